"""Where the tee's text goes in the end: a terminal, pipe, socket, file or stand-in, with one writer in the process.

All consoles that write to the same thing share its `Target`, over groups, loops and threads: so it is known whose
unfinished line stands at its end, and nobody writes between two halves of what somebody else writes. What can be
written without waiting is written by the caller; the rest is queued, and written by whatever loop with something in the
queue sees room first, or by a thread where nobody tells. Never here: a change of the blocking mode of a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence

from ..system import forked_copies
from ..system.descriptors import shut
from ..system.helper_thread import starts_no_more, tell_kernel
from ._console_piece import NEWLINE, Account, Piece
from ._writers import Key, Writer, blocked, words

BROKEN = -1  # the source of a line that nobody can continue
AGAIN = 20  # milliseconds until the next try, where the kernel does not tell when
# after these nothing can be written any more; after all others the next piece may be luckier
FINAL = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.EBADF, errno.ENXIO, errno.ENODEV)


class Target:
    """One of them. Made by `Target.of`; each who got it says `leave()` once.

    Its `lock` guards all that is here and the accounts of its consoles, and is never held while somebody waits.

    Attributes:
        problem: set when nothing can be written any more.
    """

    def __init__(self, key: Key, writer: Writer, name: str) -> None:
        self.lock = threading.Lock()
        self.problem: str | None = None
        self.writer = writer
        self._key = key
        self._name = name
        self._users: Counter[asyncio.AbstractEventLoop] = Counter()
        self._armed: set[asyncio.AbstractEventLoop] = set()  # they watch for room
        self._open = 0  # the source of the unfinished line at the end
        self._queue: deque[Piece] = deque()
        self._busy = False  # the thread is writing what it has taken from the queue
        self._work = threading.Condition(self.lock)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._on_end: Callable[[threading.Thread], object] | None = None
        self._wakeup = -1  # an eventfd, while the thread may wait for the target
        forked_copies.register(self)

    @classmethod
    def of(cls, key: Key, make: Callable[[], Writer], name: str, loop: asyncio.AbstractEventLoop) -> Target:
        """The one that is in use already, or a new one. Raises what `make` raises."""
        with _registry:
            target = _targets.get(key)
            if target is None or target.problem is not None:
                target = _targets[key] = cls(key, make(), name)
            target._users[loop] += 1
            return target

    def write(
        self, console: Account, source: int, prefix: bytes, parts: Sequence[bytes | memoryview], size: int
    ) -> None:
        """Write it, as far as that can be done at once; queue the rest."""
        with self.lock:
            if self.problem is not None:
                console.lose(size, self.problem, final=True)
                return
            if self._queue or self._busy or not self.writer.direct:
                self._put(Piece(console, source, prefix, b"".join(parts), size))
                return
            if console.gaps:
                self._append(Piece(console, source, prefix, b"".join(parts), size))
                if self._drain({}):
                    self._arm(console.loop)
                return
            if parts:
                head = self._head(self._open, source, prefix)
                whole = [head, *parts] if head else parts
            else:
                whole = [b"\n"] if source == self._open != 0 else ()
            total = sum(map(len, whole))
            sent = 0
            if total:
                try:
                    sent = self.writer.send(whole)
                except Exception as exc:  # what is written to may be the user's object
                    if not blocked(exc):
                        self._lost(Piece(console, source, prefix, b"".join(parts), size), exc)
                        return
            if sent == total:
                console.given += size
                if total:
                    self._open = 0 if whole[-1][-1] == NEWLINE else source
                return
            piece = Piece(console, source, prefix, b"".join(whole if sent else parts), size)
            if sent:
                self._begun(piece, b"", sent)
            self._put(piece)

    def do(self, console: Account, job: Callable[[], object]) -> None:
        """Call it in the thread, after all that was written before and before all that comes."""
        with self.lock:
            self._append(piece := Piece(console, 0, b"", b"", 0))
            piece.job = job
            self._wake_thread()

    def drop_oldest(self, console: Account, most: int, problem: str) -> None:
        """Forget the oldest of a console's pieces until they are no more than `most` bytes: never the newest, never one
        that is written in part, and no beginning of a line whose end is still to be seen. The lock is held."""
        kept: list[Piece] = []
        lost: dict[int, bool] = {}
        left = sum(one.console is console and len(one.data) > 0 for one in self._queue)
        while left > 1 and console.queued > most:
            piece = self._queue.popleft()
            if piece.console is not console or not piece.data:
                kept.append(piece)
                continue
            left -= 1
            if piece.begun:
                kept.append(piece)
                continue
            console.queued -= piece.size
            console.lose(piece.size, problem)
            lost[piece.source] = piece.torn
        self._mend(console, lost)  # in what came after them
        self._queue.extendleft(reversed(kept))

    def give_up(self, console: Account) -> int:
        """Forget all that it has not written yet. Returns how many bytes."""
        with self.lock:
            rest = [one for one in self._queue if one.console is not console]
            if len(rest) < len(self._queue):
                self._queue.clear()
                self._queue.extend(rest)
                self._notify()
            missing, console.queued, console.gone = console.taken - console.given, 0, True
            console.lost += missing
            console.given = console.taken
            return missing

    def leave(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[threading.Thread], object]) -> bool:
        """One user less; the last one closes. True: `on_end` will be called, in the thread, when that is done."""
        with _registry, self.lock:
            self._users[loop] -= 1
            if not self._users[loop]:
                del self._users[loop]
                self._disarm(loop)
            if self._users:
                return False
            if _targets.get(self._key) is self:
                del _targets[self._key]
            self._closing = True
            if self._thread is None:
                self.writer.close()
                return False
            self._on_end = on_end
            self._work.notify()
            self._notify()
            return True

    def disown(self) -> list[int]:
        """See `forked_copies`: the copy has no such thread."""
        self.lock = threading.Lock()
        self._work, self._thread = threading.Condition(self.lock), None
        self.problem = "belongs to the program of which this is a copy"
        self._queue.clear()
        self._armed.clear()
        wakeup, self._wakeup = self._wakeup, -1
        return [*self.writer.disown(), *([wakeup] if wakeup >= 0 else [])]

    @staticmethod
    def _head(before: int, source: int, prefix: bytes) -> bytes:
        """What comes before the next byte of `source`, when the unfinished line at the end is that of `before`."""
        if before == 0:
            return prefix
        return b"" if before == source else b"\n" + prefix

    def _put(self, piece: Piece) -> None:
        self._append(piece)
        if self._thread is None and self.writer.direct:
            self._arm(piece.console.loop)
        else:
            self._wake_thread()

    def _append(self, piece: Piece) -> None:
        console = piece.console
        if console.gaps and piece.source in console.gaps and not self._cut(piece, console.gaps.pop(piece.source)):
            console.gaps[piece.source] = True
            return
        console.queued += piece.size
        self._queue.append(piece)

    def _wake_thread(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=f"aioelastic-{self._name}", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:
                if not starts_no_more(exc):
                    self._fail(f"cannot be written to: {exc}")
                while self._drain({}) is not None:  # what there is, is written here, as `print` does
                    select.poll().poll(AGAIN)
                return
            self._thread = thread
        self._work.notify()

    def _cut(self, piece: Piece, torn: bool) -> bool:
        """Something before it was lost; `torn`: the beginning of its first line too. False: all of it is lost then."""
        piece.broken = True
        if torn and piece.data:
            data = bytes(piece.data)
            end = data.find(b"\n") + 1
            rest = data[end:] if end else b""
            piece.console.lose(piece.size - len(rest))
            piece.size, piece.prefix, piece.data = len(rest), b"", rest  # the next line has its own prefix there
            return end > 0
        return True

    def _mend(self, console: Account, lost: dict[int, bool]) -> None:
        """See to it that what these sources write next continues no line of which a part is lost."""
        if not lost:
            return
        whole: set[int] = set()
        for piece in self._queue:
            if piece.console is console and piece.source in lost and not piece.begun and piece.job is None:
                before = piece.size
                if self._cut(piece, lost[piece.source]):
                    del lost[piece.source]
                else:
                    whole.add(id(piece))
                console.queued -= before - piece.size
                if not lost:
                    break
        if whole:
            rest = [one for one in self._queue if id(one) not in whole]
            self._queue.clear()
            self._queue.extend(rest)
        console.gaps.update(lost)

    def _begun(self, piece: Piece, head: bytes, sent: int) -> None:
        """So many bytes of both were written."""
        whole = memoryview(head + piece.data if head else piece.data)
        self._open = 0 if whole[sent - 1] == NEWLINE else BROKEN
        rest = whole[sent:]
        piece.console.given += piece.size - len(rest)
        piece.data, piece.prefix, piece.size, piece.begun = rest, b"", len(rest), True

    def _lost(self, piece: Piece, exc: Exception) -> None:
        """It, which is not in the queue, was refused for good."""
        problem = words(exc)
        if not (isinstance(exc, OSError) and exc.errno in FINAL):
            piece.console.lose(piece.size, problem)
            if piece.data:
                self._mend(piece.console, {piece.source: piece.torn})
            return
        piece.console.lose(piece.size, problem, final=True)
        self._fail(problem)

    def _fail(self, problem: str) -> None:
        """Nothing can be written any more."""
        self.problem = problem
        for one in self._queue:
            one.console.queued -= one.size
            one.console.lose(one.size, problem, final=True)
        self._queue.clear()

    # --- a loop, when there is room ---

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop not in self._armed:
            try:
                self.writer.watch(loop, self._writable)
                self._armed.add(loop)
            except OSError:  # a device for which epoll(7) is not
                self._wake_thread()

    def _disarm(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop in self._armed:
            self._armed.discard(loop)
            self.writer.unwatch(loop)

    def _writable(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write what is queued, whosever it is: its own loop may be busy."""
        consoles: dict[int, Account] = {}
        with self.lock:
            problem = self._drain(consoles) if self._thread is None else None
            if problem is None:
                self._disarm(loop)
            elif not isinstance(problem, BlockingIOError):
                self._disarm(loop)  # nobody tells when the kernel has memory again
                loop.call_later(AGAIN / 1000, self._again, loop)
            for console in consoles.values():
                console.wake(loop)

    def _drain(self, consoles: dict[int, Account]) -> Exception | None:
        """Write the queue, and note whose it was; returns why that could not be finished."""
        while self._queue:
            taken, parts = self._take()
            consoles.update((id(one.console), one.console) for one, _ in taken)
            sent, problem = self._send(taken, parts)
            self._settle(taken, sent, problem)
            if problem is not None and blocked(problem):
                return problem
        return None

    def _again(self, loop: asyncio.AbstractEventLoop) -> None:
        with self.lock:
            if self._queue and self._thread is None and loop in self._users:
                self._arm(loop)

    # --- the thread ---

    def _run(self) -> None:
        try:
            tell_kernel(f"aioelastic-{self._name}")
            self._write_all()
        except BaseException as exc:  # a bug of ours: nobody shall wait for this thread
            with self.lock:
                self._thread, self._busy = None, False
                self._fail(f"{type(exc).__name__}: {exc}")
                if not self._closing:
                    return  # whoever leaves closes
        self.writer.close()
        shut(self._wakeup)
        if self._on_end is not None:
            self._on_end(threading.current_thread())

    def _write_all(self) -> None:
        """Until it is closed."""
        while True:
            with self.lock:
                while not self._queue and not self._closing:
                    self._work.wait()
                if self._closing:
                    return
                taken, parts = self._take()
                self._busy = True
            try:
                sent, problem = self._send(taken, parts)
            except BaseException as exc:  # somebody else's object says that the program is to end: not here
                sent, problem = 0, RuntimeError(f"{type(exc).__name__}: {exc}")
            consoles = {id(one.console): one.console for one, _ in taken}.values()
            full = blocked(problem) if problem is not None else sent < sum(map(len, parts))
            with self.lock:
                self._busy = False
                self._settle(taken, sent, problem)
                for console in consoles:
                    console.wake()
            if full:
                self._wait(self.writer.fd if problem is None or isinstance(problem, BlockingIOError) else -1)

    def _take(self) -> tuple[list[tuple[Piece, bytes]], list[bytes | memoryview]]:
        """What is to be written next, each with its head."""
        taken: list[tuple[Piece, bytes]] = []
        parts: list[bytes | memoryview] = []
        size, before = 0, self._open
        while self._queue and len(taken) < self.writer.pieces and size < self.writer.batch:
            if self._queue[0].job is not None and taken:
                break
            piece = self._queue.popleft()
            piece.console.queued -= piece.size
            if piece.broken and before == piece.source != 0:
                before = BROKEN
            if piece.begun or piece.job is not None:
                head = b""
            elif piece.data:
                head = self._head(before, piece.source, piece.prefix)
            else:
                head = b"\n" if before == piece.source != 0 else b""
            taken.append((piece, head))
            if piece.job is not None:
                break
            if head:
                parts.append(head)
            if piece.data:
                parts.append(piece.data)
                before = piece.source if piece.torn else 0
            elif head:
                before = 0
            size += len(head) + len(piece.data)
        return taken, parts

    def _send(self, taken: list[tuple[Piece, bytes]], parts: list[bytes | memoryview]) -> tuple[int, Exception | None]:
        first = taken[0][0]
        try:
            if first.job is not None:
                first.job()
                return 0, None
            return (first.console.context.run(self.writer.send, parts) if parts else 0), None
        except Exception as exc:  # what is written to may be the user's object
            return 0, exc

    def _settle(self, taken: list[tuple[Piece, bytes]], sent: int, problem: Exception | None) -> None:
        """So many bytes of it were written; what was not goes back to the head of the queue."""
        refused = taken.pop(0)[0] if problem is not None and not blocked(problem) else None
        done = 0
        while problem is None and done < len(taken):
            piece, head = taken[done]
            size = len(head) + len(piece.data)
            if sent < size:
                if sent:
                    self._begun(piece, head, sent)
                break
            sent -= size
            done += 1
            piece.console.given += piece.size
            if size:
                self._open = piece.source if piece.torn else 0
        for piece, _ in reversed(taken[done:]):
            if not piece.console.gone:
                piece.console.queued += piece.size
                self._queue.appendleft(piece)
        if refused is not None and problem is not None and refused.job is None and not refused.console.gone:
            self._lost(refused, problem)

    def _wait(self, fd: int) -> None:
        """Until `fd` takes more (-1: for a while), or somebody notifies."""
        with self.lock:
            if self._wakeup < 0:
                with contextlib.suppress(OSError):
                    self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if not self._queue or self._closing:
                return
        poll = select.poll()
        if self._wakeup >= 0:
            poll.register(self._wakeup, select.POLLIN)
        if fd >= 0:
            poll.register(fd, select.POLLOUT)
        poll.poll(None if fd >= 0 and self._wakeup >= 0 else AGAIN)
        if self._wakeup >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)

    def _notify(self) -> None:
        if self._wakeup >= 0:
            os.eventfd_write(self._wakeup, 1)


@forked_copies.in_copies
def _renew() -> None:
    global _registry
    _registry = threading.Lock()
    _targets.clear()


_registry = threading.Lock()
_targets: dict[Key, Target] = {}
