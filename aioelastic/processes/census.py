"""Which processes belong to a worker, by /proc. Reads only; runs in a helper thread."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Container, Mapping
from dataclasses import field

from ..child.kernel import process_marks
from ..child.kernel.bounded_reads import variable
from ..model.frozen import dataclass
from ..system import forked_copies
from ..system.descriptors import shut
from ..system.helper_thread import HelperThread
from ..system.waiting import NO_ANSWER
from .proc_files import describe, newest_pid, pids, pipe_holders, stat, wchan
from .strays import Seen, Stray, _protected, sessions_of_guardians

LOOKS = 3


EXEC_LOOKS = 30  # with the pauses between them, about 40 ms: an execve(2) takes less


PF_KTHREAD = 0x00200000  # linux/sched.h


ENVIRON = 6 << 20  # bytes of an environment that are looked through: execve(2) takes no more


LINEAGE = 16_384  # bytes of the value that says whose a process is, and so many names in it: strangers choose theirs


NAMES = 256


MARKS = 1_024  # of workers that have ended: when there are so many, those that nobody carries any more are forgotten


@dataclass(frozen=True)
class Left:
    """What there is of a group's processes when its workers have ended.

    Attributes:
        ours: those that are its own; without other groups in this program, all that nobody else can have left.
        whose: those that one of the groups of this program has left, and nobody can tell which.
        doubt: why there may be more; empty: there are none.
    """

    ours: list[Seen]
    whose: list[Seen]
    doubt: str = ""


@dataclass(frozen=True)
class Snapshot:
    """The processes of this machine that started after a given time, findable by whom they belong to."""

    by_owner: dict[str, list[Seen]] = field(default_factory=dict)
    by_session: dict[int, list[Seen]] = field(default_factory=dict)

    def of(self, owner: str, leader: int | None = None, ended: int | None = None) -> list[Seen]:
        """Those that carry `owner` in their lineage, or are in the session of `leader`, without `leader` itself.

        Once the leader is reaped and its session empty, its pid may become the session of strangers: those started
        after `ended` (in ticks, see `ticks_now`).
        """
        found = {one.pid: one for one in self.by_owner.get(owner, ())}
        if leader is not None:
            here = self.by_session.get(leader, ())
            found.update((one.pid, one) for one in here if ended is None or one.started <= ended)
            found.pop(leader, None)
        return list(found.values())


def ticks_now() -> int:
    """The present in the unit and on the clock of the start times of proc(5): clock ticks since boot."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


class Census:
    """Looks through /proc for a whole group: questions asked while one look is under way share the next.

    Each answer is waited for within so many seconds, through cancellations. A process that hangs a look (its memory is
    locked by a page fault on a file system that does not answer) is left out of the later ones, and told as a doubt.
    """

    def __init__(self, thread: HelperThread, tag: str) -> None:
        self._thread = thread
        self._tag = tag.encode()
        # one tick less: a process may start within the tick in which we look at the clock
        self._since = ticks_now() - 1
        self._marks: dict[int, str] = {}
        self._ended: set[int] = set()  # those of them whose worker has
        self._many: float = MARKS  # when these are looked through next
        self._spared: set[int] = set()
        self._next: asyncio.Future[Snapshot] | None = None
        self._looking: asyncio.Future[Snapshot] | None = None
        self._reading = 0  # the process that is being looked at
        self._avoided: set[int] = set()
        with _lock:
            _all.add(self)

    def close(self) -> None:
        """Its group is over."""
        with _lock:
            _all.discard(self)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """That of its questions."""
        return self._thread.loop

    def know(self, mark: int, owner: str) -> None:
        """What carries this mark (`child/kernel/process_marks.py`) is that owner's, whatever became of its variables.

        Raises:
            RuntimeError: another start has it already: what one leaves behind could not be told from the other.
        """
        if mark in self._marks:
            raise RuntimeError(f"{owner} was started already: each start has an identity of its own")
        self._marks[mark] = owner

    def over(self, mark: int) -> None:
        """That start's worker has ended: its mark is forgotten when nothing carries it any more, soon or late."""
        self._ended.add(mark)
        if len(self._ended) >= self._many:
            self._many = math.inf  # until it is done
            self._thread.put(self._forget)

    def spare(self, session: int) -> None:
        """A mark counts for nothing there: a guardian carries that of a worker while it starts it."""
        self._spared.add(session)

    async def take(self, within: float) -> Snapshot:
        """A snapshot that begins after this call; an empty one if none is had in time."""
        asked = self._next
        if asked is None:
            asked = self._next = asyncio.get_running_loop().create_future()
            if self._looking is None:
                self._look()
        found = await self._thread.known(asked, within, Snapshot())
        if not asked.done():
            self._avoid()
            if self._looking is not None:
                self._done(self._looking, Snapshot())
        return found

    async def left(self, owner: str, adopted: Callable[[], list[int]], within: float) -> Left:
        """What is left of all workers together, after they have ended.

        Args:
            adopted: the roots of whatever workers left behind, from whoever adopts it; without any there is nothing
                else to look for. Raises `OSError` when that is not known.
        """

        def job() -> Left:
            roots, doubt = [], ""
            try:
                roots = adopted()
                if not roots:
                    return Left([], [])
            except OSError as exc:
                doubt = exc.strerror or str(exc)
            try:
                now = self._snapshot()
            except OSError as exc:
                return Left([], [], f"/proc cannot be read: {exc.strerror}")
            if hang := self._avoided.intersection(pids()):
                doubt = f"a look at process {min(hang)} in /proc hangs"
            ours = now.of(owner)
            known = {one.pid for one in ours} | self._avoided
            seen = [self._see(pid) for pid in roots if pid not in known]
            with _lock:
                others = {mark for one in _all if one is not self for mark in list(one._marks)}
                alone = len(_all) == 1
            whose = [one for one in seen if one is not None and not one.lineage and one.mark not in others]
            return Left(ours + whose, [], doubt) if alone else Left(ours, whose, doubt)

        unknown = Left([], [], NO_ANSWER)
        left = await self._thread.known(self._thread.submit(job), within, unknown)
        if left is unknown:
            self._avoid()
        return left

    async def catch(self, found: list[Seen], within: float) -> list[Stray]:
        """Hold those of them that still live, and are left over; the receiver closes them."""
        none: list[Stray] = []
        asked = self._thread.submit(lambda: [stray for one in found if (stray := Stray.catch(one)) is not None])
        held = await self._thread.known(asked, within, none)
        if held is none:
            asked.add_done_callback(_close_late)
        return held

    async def look(self, pid: int, within: float) -> tuple[str, str]:
        """The state letter of a process and the kernel function in which it sleeps."""
        return await self._thread.known(
            self._thread.submit(lambda: (describe(pid).state, wchan(pid))), within, ("?", "")
        )

    async def holders(self, read_ends: list[int], within: float) -> dict[int, tuple[int, ...]]:
        """Who else has these pipes open; see `pipe_holders`."""
        return await self._thread.known(self._thread.submit(lambda: pipe_holders(read_ends)), within, {})

    def _look(self) -> None:
        asked, self._next = self._next, None
        self._looking = asked
        if asked is None:
            return

        def job() -> None:
            found = Snapshot()  # no /proc, no census: nothing is found, and nothing is signalled
            try:
                found = self._snapshot()
            except OSError:
                pass
            finally:  # whatever it was: who asked does not wait for ever
                self._thread.tell(self._done, asked, found)

        self._thread.put(job)

    def _done(self, asked: asyncio.Future[Snapshot], found: Snapshot) -> None:
        if not asked.done():
            asked.set_result(found)
        if asked is self._looking:  # else it was given up before
            self._look()

    def _avoid(self) -> None:
        """The look that is under way hangs: not there again."""
        if self._reading:
            self._avoided.add(self._reading)

    # --- in the thread ---

    def _see(self, pid: int) -> Seen | None:
        self._reading = pid
        try:
            return _see(pid, self._tag, self._since, self._marks, self._spared)
        finally:
            self._reading = 0

    def _forget(self) -> None:
        """Of workers that have ended only what they have left behind has their marks, and hands them down."""
        ended, carried = set(self._ended), set[int]()
        try:
            for _ in range(LOOKS):  # as in `_snapshot`
                newest = newest_pid()
                carried.update(mark for pid in pids() if (mark := process_marks.read(pid)) is not None)
                if newest == newest_pid():
                    break
            for mark in ended - carried:
                self._marks.pop(mark, None)
            self._ended -= ended - carried
        except OSError:
            pass  # there is no /proc now
        finally:
            self._many = max(MARKS, 2 * len(self._ended))

    def _snapshot(self) -> Snapshot:
        """Read /proc. Zombies are left out: they hold nothing.

        A process that forks while we read may hide its child behind us and end before we reach it: as long as new pids
        were given meanwhile, look again (a few times: on a busy machine they always are).
        """
        seen: dict[tuple[int, int], Seen] = {}
        for _ in range(LOOKS):
            newest = newest_pid()
            for pid in pids():
                if pid not in self._avoided and (one := self._see(pid)) is not None:
                    seen[one.pid, one.started] = one
            if newest == newest_pid():
                break
        out = Snapshot()
        for one in seen.values():
            out.by_session.setdefault(one.session, []).append(one)
            for item in one.lineage:
                out.by_owner.setdefault(item, []).append(one)
                out.by_owner.setdefault(item.split("/", 1)[0], []).append(one)
        return out


_all: weakref.WeakSet[Census] = weakref.WeakSet()  # of this program: what is theirs is not ours


_lock = threading.Lock()


def _guardians() -> set[int]:
    """Their sessions."""
    with _lock:
        return {one for census in _all for one in census._spared}


sessions_of_guardians.append(_guardians)


@forked_copies.in_copies
def _renew() -> None:
    global _lock
    _lock = threading.Lock()
    _all.clear()
    _protected.clear()


def _close_late(asked: asyncio.Future[list[Stray]]) -> None:
    if not asked.cancelled() and asked.exception() is None:
        for one in asked.result():
            one.close(asked.get_loop())


def _see(pid: int, tag: bytes, since: int, marks: Mapping[int, str], spared: Container[int]) -> Seen | None:
    """One process, if it lives and started since."""
    attempt = 0
    while True:
        fields = stat(pid)
        if fields is None or int(fields[19]) < since or fields[0] in "ZX":
            return None
        mark = process_marks.read(pid) or 0 if int(fields[3]) not in spared else 0
        owner = marks.get(mark)
        lineage = lineage_of(pid, tag)
        if owner is not None and owner not in lineage:
            lineage += (owner,)
        # in the middle of execve(2) a process has no environment yet: it is read as if it had none; it is stable when
        # env_start and env_end (proc(5)) are there, and are the same before and after
        known = lineage or int(fields[6]) & PF_KTHREAD or not _readable(pid) or attempt == EXEC_LOOKS
        again = fields if known else stat(pid)
        if again is not None and (known or (again[47:49] == fields[47:49] and again[48] != "0")):
            return Seen(pid, fields[0], int(fields[2]), int(fields[3]), int(fields[19]), lineage, mark)
        attempt += 1
        time.sleep(0.0001 * attempt)


def _readable(pid: int) -> bool:
    """Not asked by access(2): that looks at the owner of the file only. To open it one must be allowed to trace the
    process, too (ptrace(2)): it may belong to our user, and have more rights, or be outside our user namespace."""
    try:
        shut(os.open(f"/proc/{pid}/environ", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def lineage_of(pid: int, tag: bytes) -> tuple[str, ...]:
    """The names in that variable of its environment; none when it is gone, or another user's."""
    value = variable(f"/proc/{pid}/environ", tag, ENVIRON, LINEAGE)
    return () if value is None else tuple(value.decode(errors="replace").split(":")[:NAMES])
