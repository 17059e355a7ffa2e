"""Strike a chosen party at a chosen moment: `Recorder(when(Spawned, kill(zygote), rank=2))`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ..events import Event
from ..model.errors import SpecError
from ..model.validation import check_whole
from ._process_tree import descendants, read_stat

# Who is struck: the pid, asked at that moment; None when there is nobody.
Party: TypeAlias = Callable[[Event], int | None]

ZYGOTE = "aioelastic.child.zygote.main_loop"


class Strike:
    """One blow, made by `kill`, `stop`, `cont` or `send`.

    Attributes:
        struck: the pids that got it, in order. A test looks here whether it did happen at all.
    """

    def __init__(self, signum: int, party: Party) -> None:
        self.struck: list[int] = []
        self._signum = signum
        self._party = party

    def __call__(self, event: Event) -> None:
        pid = self._party(event)
        if pid is None:
            return
        try:
            os.kill(pid, self._signum)
        except ProcessLookupError:
            return  # it was quicker
        self.struck.append(pid)


def send(signum: int, party: Party) -> Strike:
    """A signal to a party. The pid is asked and used at once; a worker's is its own until our loop reaps it.

    Args:
        signum: its number, or a member of `signal.Signals`.
        party: who gets it.
    """
    return Strike(signum, party)


def kill(party: Party) -> Strike:
    """SIGKILL: it ends without a word.

    Args:
        party: who gets it.
    """
    return Strike(signal.SIGKILL, party)


def stop(party: Party) -> Strike:
    """SIGSTOP: it hangs, until `cont` or SIGKILL.

    Args:
        party: who gets it.
    """
    return Strike(signal.SIGSTOP, party)


def cont(party: Party) -> Strike:
    """SIGCONT: it goes on.

    Args:
        party: who gets it.
    """
    return Strike(signal.SIGCONT, party)


def when(
    kind: type[Event],
    do: Callable[[Event], object],
    *,
    rank: int | None = None,
    attempt: int | None = None,
    nth: int = 1,
) -> Callable[[Event], None]:
    """An `on_event` that does something once: at the `nth` event of this kind (of that rank, in that attempt).

    Raises what `do` raises; a group tells that to its loop's exception handler, a `Recorder` to the test.

    Args:
        kind: a class of `aioelastic.events`.
        do: called with the event: a strike, or a function of yours.
        rank: of this one; None: of any.
        attempt: in this one; None: in any.
        nth: at the first of them, the second, and so on.

    Raises:
        SpecError: there is no such event, nothing to do, or no such time.

    Example::

        blow = kill(worker)
        group = Group(Command("serve"), n=4, on_event=when(Spawned, blow, rank=2), check=False)
    """
    if not (isinstance(kind, type) and issubclass(kind, Event)):
        raise SpecError("kind", kind, "is no event", "give a class of aioelastic.events")
    if not callable(do):
        raise SpecError("do", do, "cannot be called", "give a strike like kill(worker)")
    check_whole("nth", nth, 1)
    count = 0

    def listen(event: Event) -> None:
        nonlocal count
        if isinstance(event, kind) and rank in (None, event.rank) and attempt in (None, event.attempt):
            count += 1
            if count == nth:
                do(event)

    return listen


def worker(event: Event) -> int | None:
    """The worker that the event is about.

    Args:
        event: that at which it is asked for.
    """
    return event.pid


def supervisor(event: Event) -> int | None:
    """This very process: for the source of a `Program`.

    Args:
        event: that at which it is asked for.
    """
    return os.getpid()


def zygote(event: Event) -> int | None:
    """The zygote that has forked this worker; if it is gone, or has none, a zygote of ours.

    Args:
        event: that at which it is asked for.
    """
    mine = {pid for pid, stat in descendants().items() if stat[1] not in "ZX" and _is_zygote(pid)}
    stat = None if event.pid is None else read_stat(event.pid)
    parent = None if stat is None else int(stat[2])
    return parent if parent in mine else next(iter(sorted(mine)), None)


def guardian(event: Event) -> int | None:
    """The guardian of this process, which starts its workers and adopts what they leave behind.

    Args:
        event: that at which it is asked for.
    """
    return _named("aio-guardian")


def keeper(event: Event) -> int | None:
    """Who guards the guardian.

    Args:
        event: that at which it is asked for.
    """
    return _named("aio-keeper")


def _named(name: str) -> int | None:
    for pid, stat in descendants().items():
        if stat[0] == name and stat[1] not in "ZX":
            return pid
    return None


def _is_zygote(pid: int) -> bool:
    # a worker that it forked has its command line too, and it for a parent
    stat = read_stat(pid)
    return _has_its_words(pid) and stat is not None and not _has_its_words(int(stat[2]))


def _has_its_words(pid: int) -> bool:
    try:
        return ZYGOTE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
