"""Workers that behave badly. Each prints `made PID…` for the processes that it leaves, and `made()` reads that."""

from __future__ import annotations

import re
import shlex

from ..model.entries import Command
from ..model.validation import check_whole

# far longer than any test, and not for ever
LONG = 1000


def stubborn() -> Command:
    """Prints `up`, then ignores SIGTERM, SIGINT and SIGHUP: only SIGKILL ends it."""
    # what is ignored stays so over an execve(2)
    return _sh(f"trap '' TERM INT HUP; echo up; exec sleep {LONG}")


def pipe_holder(then: str = "exit 0") -> Command:
    """Leaves a child that holds its output open, in its process group.

    Args:
        then: shell words that end the worker; `"wait"` lets it stay.
    """
    return _sh(f"sleep {LONG} & echo made $!; {then}")


def setsid_escape(then: str = "exit 0") -> Command:
    """Leaves a child in a session of its own (setsid(1)), so that no signal to the worker's group reaches it.

    Args:
        then: shell words that end the worker; `"wait"` lets it stay.
    """
    return _sh(f"setsid sleep {LONG} >/dev/null 2>&1 & echo made $!; {then}")


def daemon(then: str = "exit 0", clean: bool = True) -> Command:
    """Leaves a daemon: forked twice, a session of its own, no output, no parent; with `clean` no environment either.

    A clean one is found by its mark alone (`docs/explanation/nothing-left-behind.md`).

    Args:
        then: shell words that end the worker; `"wait"` lets it stay.
        clean: without the worker's environment.
    """
    inner = f"sleep {LONG} </dev/null >/dev/null 2>&1 & echo made $!"
    return _sh(f"{'env -i ' if clean else ''}setsid /bin/sh -c {shlex.quote(inner)}; {then}")


def fork_storm(most: int = 300, then: str = "wait") -> Command:
    """Forks as fast as it can, while it is killed too; told pids may be fewer than made ones.

    Args:
        most: when it has had enough, so that a test that goes wrong leaves a machine that still works.
        then: shell words that end the worker; `"wait"` lets it stay.
    """
    check_whole("most", most, 1)
    storm = f"i=0; while [ $i -lt {most} ]; do sleep {LONG} >/dev/null 2>&1 & echo made $!; i=$((i + 1)); done"
    return _sh(f"{storm}; {then}")


def made(output: object) -> list[int]:
    """The pids in what a worker printed.

    Args:
        output: text, a `Line`'s text, or `result[0].stdout`.
    """
    return [int(pid) for line in re.findall(r"^made((?: \d+)+)$", str(output), re.MULTILINE) for pid in line.split()]


def _sh(script: str) -> Command:
    return Command("/bin/sh", "-c", script)
