"""What /proc says about a worker's stacks: who can write them, and whether it is done. Runs in a helper thread."""

from __future__ import annotations

import errno
import os
import re
from itertools import islice
from typing import NamedTuple

from ...child.kernel import bounded_reads
from ...child.worker.stack_dump import NAME, SIGNAL
from ...model.frozen import dataclass
from ...processes.proc_files import wchan
from ...system.descriptors import shut

LIMIT = 4_194_304  # bytes of a dump; faulthandler itself writes no more than 100 threads of 100 frames
STATUS = 65_536  # bytes
ENTRIES = 65_536  # of a directory of /proc
_BIT = 1 << (SIGNAL - 1)
_LINK = f"/memfd:{NAME} (deleted)"
_PYTHON = re.compile(r"(python|pypy)[\d.]*[a-z]?$")


@dataclass(frozen=True)
class Offer:
    """A process that writes its stacks into its memfd at our signal.

    Attributes:
        blockers: its threads that blocked the signal before it was sent.
    """

    pid: int
    fd: int
    blockers: frozenset[int]

    @property
    def path(self) -> str:
        """The memfd. Gone when the process has ended, closed it, or replaced itself."""
        return f"/proc/{self.pid}/fd/{self.fd}"

    def read(self) -> tuple[str, bool]:
        """What it has written, and whether there is more to come: the kernel blocks a signal in the thread that is in
        its handler, for as long as it is there.

        Raises:
            OSError: it has ended, or replaced itself.
        """
        file = _opened(self.path, os.O_RDONLY)
        try:
            if not os.fstat(file).st_size:
                return "", True
            # in this order: it has begun, and is in its handler or not; what it has written then is here now
            busy = bool(_blocking(self.pid) - self.blockers)
            return bounded_reads.upto(file, LIMIT).decode(errors="replace"), busy
        finally:
            shut(file)


class Python(NamedTuple):
    """A Python process that cannot write its stacks by itself; `why` in words."""

    why: str


class NoStacks(NamedTuple):
    """There are no stacks to be had; `why` in words."""

    why: str


def look(pid: int) -> Offer | Python | NoStacks:
    """What can be done about a process. An earlier dump of it is thrown away."""
    try:
        status = _status(f"/proc/{pid}/status")
        state = status.get("State", "?")
        if state[:1] in "ZX":
            return NoStacks("it ended")
        fd = _memfd(pid) if int(status.get("SigCgt", "0"), 16) & _BIT else None
        if fd is None:
            return _other(pid, state)
        if state[:1] in "Tt":
            return Python("it is stopped")
        offer = Offer(pid, fd, frozenset(_blocking(pid)))
        if len(offer.blockers) == sum(1 for _ in _entries(f"/proc/{pid}/task")):
            return Python(f"each of its threads blocks signal {SIGNAL}")
        file = _opened(offer.path, os.O_RDWR)
        try:
            os.ftruncate(file, 0)
        finally:
            shut(file)
    except (FileNotFoundError, ProcessLookupError):
        return NoStacks("it ended, or became another program, just now")
    except OSError as exc:
        return NoStacks(f"it may not be looked at: {exc.strerror}")
    return offer


def _other(pid: int, state: str) -> Python | NoStacks:
    program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    if _PYTHON.fullmatch(os.path.basename(program)):
        return Python("it does not offer them (aioelastic.record, around its main function, would)")
    where = wchan(pid)
    return NoStacks(f"{program} is no Python program; state {state}{f', in {where}' if where else ''}")


def _memfd(pid: int) -> int | None:
    home = f"/proc/{pid}/fd"
    for name in _entries(home):  # it was opened early
        try:
            if os.readlink(f"{home}/{name}") == _LINK:
                return int(name)
        except FileNotFoundError:
            pass  # closed meanwhile
    return None


def _blocking(pid: int) -> set[int]:
    """The threads that block the signal."""
    found = set()
    for name in _entries(f"/proc/{pid}/task"):
        try:
            if int(_status(f"/proc/{pid}/task/{name}/status")["SigBlk"], 16) & _BIT:
                found.add(int(name))
        except (FileNotFoundError, ProcessLookupError):
            pass  # a thread that has ended
    return found


def _status(path: str) -> dict[str, str]:
    """Its fields. Whatever its name holds, it is one line."""
    found = (line.decode(errors="replace").split(":\t", 1) for line in bounded_reads.lines(path, STATUS))
    return {one[0]: one[1] for one in found if len(one) == 2}


def _entries(directory: str) -> list[str]:
    """The first of them, in the order of their numbers, which is the kernel's: a process may have a million."""
    with os.scandir(directory) as found:
        return [one.name for one in islice(found, ENTRIES)]


def _opened(path: str, how: int) -> int:
    """The memfd that is there, by a descriptor of our own. It has been looked at before it is opened: whose process it
    is may put a pipe in its place, which makes us wait, or a file that we, not it, may change.

    Raises:
        OSError: it has ended, or this is something else.
    """
    held = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mine = f"/proc/self/fd/{held}"
        if os.readlink(mine) != _LINK:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return os.open(mine, how | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        shut(held)
