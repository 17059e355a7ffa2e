"""Why did it end? From what is known about one end to a `Cause`. Pure: nothing is read here.

What the kernel tells for certain is little: a code or a signal, never who sent it. The rest is evidence, and words that
say how far it goes.
"""

from __future__ import annotations

import re
import signal as _signal
from collections.abc import Callable
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..model.failures import Cause, Stage
from ..model.frozen import dataclass
from ..model.signal_names import signal_name
from ._tracebacks import raised

if TYPE_CHECKING:
    from ..model.exits import Exit
    from ..model.failures import ErrorReport

SHOWN = 500  # characters of one piece of evidence


@dataclass(frozen=True, slots=True)
class Kills:
    """By how much the kernel's `oom_kill` counters rose. None: that counter cannot be read.

    Attributes:
        group: of our memory cgroup and those below it (cgroups(7)).
        machine: of the whole machine (/proc/vmstat).
        own: of the worker's own control group, if it has one (`Placement.cgroup`): nobody else's.
    """

    group: int | None = None
    machine: int | None = None
    own: int | None = None

    def since(self, before: Kills) -> Kills:
        """What came after `before`."""
        return Kills(_less(self.group, before.group), _less(self.machine, before.machine))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was found about a failed worker outside of it.

    Attributes:
        report: what it wrote about itself.
        kills: processes that the kernel has killed for lack of memory, and that are not known to be other workers.
        kernel: lines of the kernel's log that name its pid.
        core: its core dump, if that is a file and there.
        core_words: what became of its core dump.
    """

    report: ErrorReport | None = None
    kills: Kills = Kills()
    kernel: tuple[str, ...] = ()
    core: Path | None = None
    core_words: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known about one end.

    Attributes:
        exit: None: it never started, or would not die.
        stage: how far we had gone to stop it; None: it failed by itself.
        refused: why it could not be started.
        stuck: in which state SIGKILL left it.
        parent: what ended it with its parent.
        raised: its exception, as it told it.
        child: what a child of it has raised, as that told it.
        instead: what a function worker did instead of returning.
        sent: signals that the program sent it through us.
        said: the last of its stderr.
    """

    exit: Exit | None
    stage: Stage | None = None
    refused: str = ""
    stuck: str = ""
    parent: str = ""
    raised: str = ""
    child: str = ""
    instead: str = ""
    sent: frozenset[int] = frozenset()
    said: str = ""
    found: Evidence = field(default_factory=Evidence)


def cause_of(facts: Facts) -> Cause:
    """The cause.

    Example::

        >>> str(cause_of(Facts(None, refused="[Errno 8] Exec format error: 'prog'")))
        "could not be started: [Errno 8] Exec format error: 'prog'"
    """
    exit = facts.exit
    if facts.stuck:
        return Cause("stuck", "SIGKILL has not ended it", (facts.stuck,))
    if exit is None:
        return Cause("not_started", "could not be started", (facts.refused,))
    if facts.stage is not None and exit.stopped_by is not None:
        return _stopped(facts.stage, exit)
    if facts.raised or exit.stopped_by is not None:  # ... before we came to stop it
        cause = _library(facts, 1) or Cause("exception", "raised", (facts.raised.partition("\n")[0],))
        if exit.signal is not None and exit.stopped_by is None:
            cause = replace(cause, evidence=(*cause.evidence, f"then it ended with {exit}"))
    elif facts.parent:
        cause = Cause("parent_died", "killed with its parent", (facts.parent,))
    elif exit.signal is not None:
        cause = _signalled(facts, exit, exit.signal)
    elif exit.code is None:
        cause = Cause("unknown", "its exit status was taken by another waiter in this program")
    else:
        cause = next(one for judge in _JUDGES if (one := judge(facts, exit.code)) is not None)
    if exit.core_dumped or cause.kind in ("crash", "fatal_error"):
        core_words = (facts.found.core_words,) if facts.found.core_words else ()
        cause = replace(cause, evidence=cause.evidence + core_words, core=facts.found.core)
    if xid := _last(_XID, facts.found.kernel):  # what the GPU's driver said about it, whatever came of that
        cause = replace(cause, evidence=(*cause.evidence, f"kernel log: {xid}"))
    if cause.kind not in ("out_of_memory", "foreign_signal") and facts.found.kills.group:
        words = f"the kernel has killed {facts.found.kills.group} of its memory cgroup for lack of memory meanwhile"
        cause = replace(cause, evidence=(*cause.evidence, words))
    return replace(cause, evidence=tuple(one if len(one) <= SHOWN else f"{one[:SHOWN]}…" for one in cause.evidence))


def is_kill(exit: Exit) -> bool:
    """Whether it, or by its word a child of it, was killed with SIGKILL, and not by us."""
    return exit.stopped_by is None and (exit.signal == _signal.SIGKILL or exit.code == 128 + _signal.SIGKILL)


def is_out_of_memory(line: str) -> bool:
    """Whether a line of the kernel's log says that it has killed a process for lack of memory."""
    return re.match(_OOM, line) is not None


_STAGES: dict[Stage, str] = {
    "asked": "asked to stop",
    "group": "asked to stop, and after its grace its process group too",
    "grace_over": "killed when its grace was over",
    "hurried": "killed, with its grace cut short",
    "at_once": "killed at once, without a grace",
}


# signals that the kernel sends for what a program itself does
_CRASHES: dict[int, str] = {
    _signal.SIGSEGV: "touched memory that is not its own",
    _signal.SIGBUS: "touched memory that nothing is behind, as when /dev/shm is full or a mapped file was cut",
    _signal.SIGILL: "came to an instruction that this CPU does not have",
    _signal.SIGFPE: "divided by zero",
    _signal.SIGABRT: "gave up by itself (abort)",
    _signal.SIGTRAP: "came to a trap",
    _signal.SIGSYS: "made a system call that is forbidden to it (seccomp)",
}


# ... as faulthandler names them
_FAULTS: dict[str, int] = {
    "Segmentation fault": _signal.SIGSEGV,
    "Bus error": _signal.SIGBUS,
    "Illegal instruction": _signal.SIGILL,
    "Floating point exception": _signal.SIGFPE,
    "Floating-point exception": _signal.SIGFPE,
}


_LIMITS: dict[int, str] = {
    _signal.SIGXCPU: "used more CPU time than its RLIMIT_CPU",
    _signal.SIGXFSZ: "wrote more to a file than its RLIMIT_FSIZE",
}


def _stopped(stage: Stage, exit: Exit) -> Cause:
    assert exit.stopped_by is not None
    ours, how = signal_name(exit.stopped_by), replace(exit, stopped_by=None)
    strange = ", which was not ours" if exit.signal == _signal.SIGKILL != exit.stopped_by else ""
    evidence = f"we sent {ours}, it ended with {how}{strange}"
    return Cause("our_signal", f"stopped by us, {_STAGES[stage]}", (evidence,), stage=stage)


def _signalled(facts: Facts, exit: Exit, number: int) -> Cause:
    name = signal_name(number)
    told = _last(_OOM, facts.found.kernel)
    if number == _signal.SIGKILL and told:
        return Cause("out_of_memory", "killed by the kernel for lack of memory", (f"kernel log: {told}",))
    if number == _signal.SIGKILL and facts.found.kills.own:
        words = f"the oom_kill counter of its own control group is {facts.found.kills.own}"
        return Cause("out_of_memory", "killed by the kernel for lack of memory", (words,))
    if number in facts.sent:
        words = f"ended by {name}, which this program sent with send_signal()"
        return Cause("our_signal", words, stage="send_signal")
    if number == _signal.SIGKILL:
        return _killed(facts, "SIGKILL was not sent by us") or _foreign(facts, number)
    if number in _CRASHES:
        if fatal := _fatal(facts, 0):
            # said by faulthandler of the very signal; all else that is fatal to Python ends by abort(3)
            said = next((sig for words, sig in _FAULTS.items() if words in fatal.evidence[0]), _signal.SIGABRT)
            return replace(fatal, certain=said == number)
        told = next((one for one in reversed(facts.found.kernel) if not re.search(_XID, one)), "")
        evidence = (f"kernel log: {told}",) if told else _last_words(facts) if number == _signal.SIGABRT else ()
        return Cause("crash", f"crashed with {name}, it {_CRASHES[number]}", evidence, certain=bool(told))
    if number in _LIMITS:
        return Cause("limit", f"ended by {name}, it {_LIMITS[number]}", certain=False)
    if number == _signal.SIGPIPE:
        words = "ended by SIGPIPE, it wrote to a pipe or socket that nobody reads any more"
        return Cause("broken_pipe", words, certain=False)
    return _foreign(facts, number)


def _killed(facts: Facts, what: str) -> Cause | None:
    """Out of memory, as far as counters can tell."""
    kills = facts.found.kills
    where, count = ("its memory cgroup", kills.group) if kills.group else ("this machine", kills.machine)
    if not count:
        return None
    evidence = (what, f"the oom_kill counter of {where} rose by {count} meanwhile")
    return Cause("out_of_memory", "killed by the kernel for lack of memory", evidence, certain=False)


def _foreign(facts: Facts, number: int) -> Cause:
    words = f"ended by {signal_name(number)}, which was not sent by us but by somebody else, or by itself"
    kills = facts.found.kills
    if number != _signal.SIGKILL:
        return Cause("foreign_signal", words)
    words += ", or for a hard RLIMIT_CPU"
    if kills.group is None and kills.machine is None:
        return Cause("foreign_signal", words, ("whether memory ran out is not known here",))
    return Cause("foreign_signal", words, ("not for lack of memory, for the kernel's oom_kill counters did not rise",))


# texts: `re` compiles each when it is first needed, and only after a failure one is
_OOM = r"^(?:(?:Out of memory|Memory cgroup out of memory)[^:]*: )?Killed process \d+ "


_XID = r"^NVRM: Xid "  # https://docs.nvidia.com/deploy/xid-errors


_LOADER = (
    r"error while loading shared libraries: |^Error loading shared library |symbol lookup error: "
    r"|: cannot open shared object file: |: version `.*' not found \(required by "
)


_BY_LOADER = r"error while loading shared libraries: |^Error loading shared library "  # ld.so's, musl's


_FATAL = r"^Fatal Python error: "


_FRAME = r'^\s*File "'


_NOT_RUN = r"not found$|No such file or directory|Permission denied|cannot execute|Exec format error|Is a directory"


_TRACE = "Traceback (most recent call last):"


def _library(facts: Facts, code: int) -> Cause | None:
    # at the end: a program may live without a library and say so
    told = _last(_LOADER, facts.raised.splitlines() if facts.raised else facts.said.splitlines()[-3:])
    certain = bool(facts.raised) or (code == 127 and re.search(_BY_LOADER, told) is not None)
    return Cause("missing_library", "a shared library is missing", (told,), certain) if code and told else None


def _fatal(facts: Facts, code: int) -> Cause | None:
    said = facts.said.rpartition(_TRACE)[2] if code else facts.said  # one that raised after it was another process
    lines = said.splitlines()
    told = _last(_FATAL, lines)
    if not told:
        return None
    after = lines[len(lines) - 1 - lines[::-1].index(told) :]
    where = next((one.strip() for one in after if re.match(_FRAME, one)), "")
    return Cause("fatal_error", "Python itself gave up", (f"{told}, at {where}" if where else told,), certain=False)


def _not_returned(facts: Facts, code: int) -> Cause | None:
    return Cause("no_value", "did not return a value", (facts.instead,)) if facts.instead else None


def _not_run(facts: Facts, code: int) -> Cause | None:
    if code not in (126, 127):
        return None
    told = _last(_NOT_RUN, facts.said.splitlines()[-3:])
    words = "its shell found no such program" if code == 127 else "its shell could not run the program"
    return Cause("exec_failed", words, (told or f"exit code {code}",), certain=bool(told))


def _of_a_child(facts: Facts, code: int) -> Cause | None:
    number = code - 128
    if number not in _signal.valid_signals():
        return None
    name = signal_name(number)
    told = f"exit code {code} is what a shell says when a child ended by {name}"
    if number == _signal.SIGKILL and (cause := _killed(facts, told)):
        return cause
    # ... and it prints the words of that signal
    said = _last(re.escape(_signal.strsignal(number) or name), facts.said.splitlines()[-3:])
    return Cause("child_signal", f"a child of it was ended by {name}", (told, *([said] if said else [])), bool(said))


def _traceback(facts: Facts, code: int) -> Cause | None:
    # it may have been caught and printed, or be another program's: only what the worker tells itself is certain
    told = (facts.child.partition("\n")[0] or raised(facts.said)) if code else ""
    return Cause("exception", "raised", (told,), certain=False) if told else None


def _plain(facts: Facts, code: int) -> Cause:
    return Cause("exit_code", f"ended by itself with exit code {code}")


_JUDGES: tuple[Callable[[Facts, int], Cause | None], ...] = (
    _library,
    _fatal,
    _not_returned,
    _not_run,
    _of_a_child,
    _traceback,
    _plain,
)


def _last(pattern: str, lines: list[str] | tuple[str, ...]) -> str:
    return next((one.strip() for one in reversed(lines) if re.search(pattern, one)), "")


def _last_words(facts: Facts) -> tuple[str, ...]:
    return tuple(facts.said.rstrip().splitlines()[-1:])


def _less(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else max(now - before, 0)
