"""Objects for processes that we did not start: a socket with a name, and who may connect to it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import stat
import struct
import sys
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

from .. import memory
from ..child.wire import datagrams, messages, pickling, sent_objects
from ..child.worker import function_run
from ..model.errors import SpecError
from ..model.text import shown, told
from ..model.validation import check_bool, check_path, check_timeout, check_users
from ..system import forked_copies
from ..system.descriptors import shut
from ..system.waiting import insist

_LONGEST = 107  # bytes of a path, unix(7)
_NO_MORE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # of what a connection needs, for now
_REST = 0.1  # seconds until it is tried again


class Endpoint:
    """Offers objects (shared arrays, queues, anything that can be pickled) to other processes, by a path.

    Only processes of the same user, or of `uids`, get them: the kernel says who connects (SO_PEERCRED, unix(7)), and
    the socket's own mode is 0600, or 0666 with `uids`. The socket appears when it can be connected to, and is removed
    at the end unless another has been put in its place; one that a process which died has left is replaced.

    At most half of the descriptors that this program may have (RLIMIT_NOFILE) are for those who have come, one or two
    for each; who comes then is told so.

    Other users get what is offered and nothing else: shared arrays are `isolated` ones (`sharing.empty`), and others
    are refused; the rest is copied into memory that nothing else was in. A queue is empty when it is offered to them
    first, or was made with `uids`; from then on the same holds for its items.

    Args:
        path: of the socket.
        objects: what is offered, by name; a dict that may change later.
        uids: other users who may connect.
        read_only: shared arrays in `objects`, which are `isolated` ones, can only be read by who connects, and from
            then on by all processes that do not have them yet (F_SEAL_FUTURE_WRITE, fcntl(2); before Linux 5.1 only by
            other users). This process may write, and they see it.

    Raises:
        SpecError: the path is too long, or in use; `objects` has no names; `uids` are no numbers.
        NotShareable: something in `objects` cannot be offered, or not so; the message names it.
        OSError: the socket cannot be made.

    Example::

        async with sharing.Endpoint("/run/user/1000/frames", {"frames": queue}):
            ...

        with sharing.attach("/run/user/1000/frames") as offered:     # in another program
            frame = offered["frames"].get_sync()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        objects: Mapping[str, Any],
        uids: Collection[int] = (),
        *,
        read_only: bool = False,
    ) -> None:
        self.path = _checked(path)
        if not isinstance(objects, Mapping) or not all(isinstance(name, str) for name in objects):
            raise SpecError("objects", objects, "does not say their names", 'give a dict, as {"frames": queue}')
        self._objects = objects
        self._allowed = check_users("uids", uids)
        check_bool("read_only", read_only)
        self._for_others = len(self._allowed) > 1
        self._read_only = read_only
        self._service: _Service | None = None

    async def __aenter__(self) -> Self:
        if self._for_others or self._read_only:
            for trial in (True, False):  # nothing is sealed where something is refused
                self._check(trial)
        self._service = _Service(self.path, self._objects, self._allowed, self._read_only)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._service is not None
        await self._service.end()

    def _check(self, trial: bool) -> None:
        for name, one in dict(self._objects).items():
            try:
                messages.check(one, self._for_others, self._read_only, trial)
            except memory.NotShareable as exc:
                raise memory.NotShareable(f"objects[{shown(name)}]: {exc}") from None
            except pickling.FAILURES:
                pass  # whoever comes is told


class _Service(forked_copies.Owned):
    """One that is open: its socket, and who has come."""

    def __init__(self, path: str, objects: Mapping[str, Any], allowed: Collection[int], read_only: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self._path, self._objects = path, objects
        self._allowed, self._read_only = allowed, read_only
        self._for_others = len(allowed) > 1
        self._peers: set[socket.socket] = set()
        self._processes: dict[int, int] = {}  # the pidfds of those that have come
        self._offering: set[asyncio.Task[None]] = set()
        self._rest: asyncio.TimerHandle | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            os.fchmod(self._listener.fileno(), 0o600)  # before there is a name: nobody can come too early
            self._listener.setblocking(False)
            try:
                self._name = _Name(path, self._listener, 0o666 if self._for_others else 0o600)
            except FileExistsError:
                raise SpecError("path", path, "is in use", "give another, or end who offers there") from None
            except OSError as exc:
                raise OSError(exc.errno, os.strerror(exc.errno or 0), path) from None
        except BaseException:
            self._listener.close()
            raise
        self._listen()
        forked_copies.register(self)

    def disown(self) -> list[int]:
        """See `forked_copies`: the name, and who has come, are the original's."""
        self.lost = forked_copies.error(f"the endpoint {self._path}")
        if self._rest is not None:
            self._rest.cancel()
        fds = [one.detach() for one in (self._listener, *self._peers)]
        fds += [*self._processes.values(), *self._name.disown()]
        self._peers.clear()
        self._processes.clear()
        return [fd for fd in fds if fd >= 0]

    async def end(self) -> None:
        """In a forked copy: nothing; the original will."""
        if self.lost is not None:
            return
        self.loop.remove_reader(self._listener.fileno())
        if self._rest is not None:
            self._rest.cancel()
        self._name.remove()  # while it listens: so nobody takes it for a left-over in between
        self._listener.close()
        for one in self._offering:
            one.cancel()
        while self._offering:
            await insist(asyncio.gather(*self._offering, return_exceptions=True))
        for peer in list(self._peers):
            self._left(peer)
        for pid in list(self._processes):
            self._ended(pid)

    def _listen(self) -> None:
        self.loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError as exc:
            if exc.errno in _NO_MORE:  # it stays in the line, and the loop would be told of it all the time
                self.loop.remove_reader(self._listener.fileno())
                self._rest = self.loop.call_later(_REST, self._listen)
            return
        peer.setblocking(False)
        pid, uid, _ = _who(peer)
        if uid not in self._allowed:
            peer.close()
            return
        if len(self._peers) + len(self._processes) >= _most():
            self._refuse(peer, "as many processes as it has descriptors for are connected")
            peer.close()
            return
        if pid not in self._processes:
            try:
                # its connection may end before its other descriptors do
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                peer.close()
                return
            except OSError:
                pass  # no descriptor left, or no process of ours to see: then the end of its connection has to do
            else:
                self._processes[pid] = pidfd
                self.loop.add_reader(pidfd, self._ended, pid)
        self._peers.add(peer)
        self.loop.add_reader(peer.fileno(), self._left, peer)  # it has nothing to say
        offering = self.loop.create_task(self._offer(peer))
        self._offering.add(offering)
        offering.add_done_callback(self._offering.discard)

    async def _offer(self, peer: socket.socket) -> None:
        """Send it all, when GPUs have done what they were asked for arrays in it."""
        try:
            pack = partial(function_run.pack, for_others=self._for_others, read_only=self._read_only)
            packet, fds = await sent_objects.ready(partial(pack, messages.OBJECT, (dict(self._objects),)))
            try:
                while peer in self._peers:
                    try:
                        datagrams.send(peer, packet, fds)
                        break
                    except datagrams.Crowded:
                        await asyncio.sleep(datagrams.AGAIN)
            finally:
                datagrams.close(fds)
        except Exception as exc:
            if peer in self._peers:
                words = told(exc)
                if self._for_others and not isinstance(exc, memory.SharingError):
                    words = "it cannot be pickled"  # what the code of others says is not theirs
                self._refuse(peer, words)
                self._left(peer)
            self.loop.call_exception_handler({"message": f"what {self._path} offers cannot be sent", "exception": exc})

    def _refuse(self, peer: socket.socket, words: str) -> None:
        with contextlib.suppress(OSError):
            datagrams.send(peer, *function_run.pack(messages.OBJECT, (words[:_LONGEST],)))

    def _left(self, peer: socket.socket) -> None:
        """It has ended its connection."""
        self.loop.remove_reader(peer.fileno())
        self._peers.discard(peer)
        peer.close()
        memory.peer_gone()

    def _ended(self, pid: int) -> None:
        pidfd = self._processes.pop(pid)
        self.loop.remove_reader(pidfd)
        shut(pidfd)
        memory.peer_gone()


def _most() -> int:
    """Descriptors that those who come may cost this program, which has other uses for them: half of all."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if most == resource.RLIM_INFINITY else max(most // 2, 2)


class _Name:
    """The name of a listening socket in a directory: it appears there at once, and never in the place of another's.

    Raises:
        FileExistsError: something else has the name, and is no socket that nobody listens to.
        OSError: it cannot be made.
    """

    def __init__(self, path: str, listener: socket.socket, mode: int) -> None:
        home, self._last = os.path.split(path)
        self._home = os.open(home or os.curdir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            made = self._other()
            where = f"/proc/self/fd/{self._home}"  # a path of any length has room in the name of a socket then
            listener.bind(f"{where}/{made}")
            try:
                os.chmod(f"{where}/{made}", mode)
                listener.listen()  # before anybody can find it: a socket that does not listen is taken for a left-over
                self._which = self._inode(made)
                while True:
                    try:
                        self._appear(made)
                        break
                    except FileExistsError:
                        stale = self._stale(path)
                        if stale is None:
                            raise
                        self._remove(stale)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(made, dir_fd=self._home)
        except BaseException:
            shut(self._home)
            raise

    def remove(self) -> None:
        """Take it away, unless the name is another's by now, or gone."""
        with contextlib.suppress(OSError):
            self._remove(self._which)
        shut(*self.disown())

    def disown(self) -> list[int]:
        """It is the original's. Returns its descriptor, to be closed."""
        home, self._home = self._home, -1
        return [home]

    def _appear(self, made: str) -> None:
        try:
            os.link(made, self._last, src_dir_fd=self._home, dst_dir_fd=self._home)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if self._inode(self._last) is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            os.rename(made, self._last, src_dir_fd=self._home, dst_dir_fd=self._home)

    def _remove(self, which: tuple[int, int] | None) -> None:
        if self._inode(self._last) != which:
            return
        aside = self._other()  # who looked and then removed would remove what has come in between
        os.rename(self._last, aside, src_dir_fd=self._home, dst_dir_fd=self._home)
        try:
            if self._inode(aside) != which:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._last, src_dir_fd=self._home, dst_dir_fd=self._home)
        finally:
            os.unlink(aside, dir_fd=self._home)

    def _stale(self, path: str) -> tuple[int, int] | None:
        """The inode of a socket there that nobody listens to; None: there is something else."""
        which = self._inode(self._last)
        if which is None or not stat.S_ISSOCK(os.lstat(path).st_mode):
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
            one.setblocking(False)
            try:
                one.connect(path)
            except ConnectionRefusedError:
                return which
            except OSError:
                pass
        return None

    def _inode(self, name: str) -> tuple[int, int] | None:
        try:
            there = os.stat(name, dir_fd=self._home, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return there.st_dev, there.st_ino

    def _other(self) -> str:
        """A name that nobody else has."""
        return f".aioelastic-{os.getpid()}-{os.urandom(4).hex()}"


class _Connection:
    """By which an endpoint knows that the one who has come is there."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        forked_copies.register(self)

    def close(self) -> None:
        self._connection.close()

    def disown(self) -> list[int]:
        """See `forked_copies`: it tells of the original."""
        return [fd for fd in (self._connection.detach(),) if fd >= 0]


class Attachment(Mapping[str, Any]):
    """What an `Endpoint` offers, by name. What was taken out stays valid after `close()`, and after the other's end."""

    def __init__(self, objects: dict[str, Any], connection: socket.socket) -> None:
        self._objects = objects
        self._over = weakref.finalize(self, _Connection(connection).close)

    def close(self) -> None:
        """Let go of it."""
        self._objects = {}
        self._over()

    def __getitem__(self, name: str) -> Any:
        return self._objects[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def __len__(self) -> int:
        return len(self._objects)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def attach(path: str | os.PathLike[str], uids: Collection[int] = (), *, timeout: float | None = None) -> Attachment:
    """Get what an `Endpoint` offers, in any process of this machine. The thread waits for its loop to send it.

    In an event loop: `await asyncio.to_thread(sharing.attach, path)`.

    Args:
        path: of its socket.
        uids: other users than this one, whose objects are trusted: unpickling runs their code.
        timeout: seconds to wait for the answer; None, or infinity, for no limit.

    Raises:
        ShareLost: nobody offers anything there, or what is offered cannot be sent.
        PermissionError: it belongs to another user, or that one does not let us in.
        TimeoutError: it does not answer.
        SpecError: an argument is wrong.
    """
    where, trusted = _checked(path), check_users("uids", uids)
    seconds = check_timeout("timeout", timeout)
    until = time.monotonic() + seconds
    late = f"who offers at {where} does not answer within {seconds:g} s"
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        try:
            datagrams.connect(connection, where, until)
        except (FileNotFoundError, ConnectionRefusedError):
            raise memory.ShareLost(f"nobody offers anything at {where}") from None
        except BlockingIOError:
            raise TimeoutError(late) from None
        _, owner, _ = _who(connection)
        if owner not in trusted:
            raise PermissionError(f"{where} belongs to user {owner}; name that one in uids= to trust it")
        if not datagrams.readable(max(until - time.monotonic(), 0), connection.fileno()):
            raise TimeoutError(late)
        try:
            packet, fds = datagrams.receive(connection)
        except ConnectionResetError:
            packet, fds = b"", []
        if not packet:
            raise PermissionError(f"{where} does not let user {os.geteuid()} in, or has just ended")
        try:
            (objects,) = messages.decode(packet, fds)
        finally:
            datagrams.close(fds)
        if isinstance(objects, str):
            raise memory.ShareLost(f"what {where} offers cannot be sent: {objects}")
    except BaseException:
        connection.close()
        raise
    return Attachment(objects, connection)


def _checked(path: str | os.PathLike[str]) -> str:
    text = check_path("path", path)
    if len(os.fsencode(text)) > _LONGEST:
        raise SpecError("path", text, f"is longer than the {_LONGEST} bytes of a socket's name", "give a shorter one")
    return text


def _who(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", told)
    return pid, uid, gid
