"""What a process of a group imports once the group runs: each import is refused, and written down.

Executed by guardians, too, which have nothing but the standard library.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Refusal:
    """The first of the finders."""

    def __init__(self, who: str) -> None:
        self.who, self.pid = who, os.getpid()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if os.getpid() != self.pid and self.who != "guardian":
            return  # a worker that was forked imports what its function wants
        with open(os.environ["LATE_IMPORTS"], "a") as file:
            file.write(f"{os.environ['LATE_IMPORTS_OF']}: {self.who}: {name}\n")
        raise ImportError(f"it is late for {name}")


def refuse(who: str) -> None:
    """From now on, in this process."""
    sys.meta_path.insert(0, Refusal(who))


# --- the program's side ---


def refuse_in_guardian() -> None:
    """From the moment it has imported what it is."""
    from aioelastic.launch import _guardian

    argv = _guardian._argv

    def refusing() -> list[str]:
        *words, code = argv()
        before, call = code.split("import main\n")
        return [*words, f"{before}import main\nexec(open({__file__!r}).read())\nrefuse('guardian')\n{call}"]

    _guardian._argv = refusing


def guardian_of(pid: int) -> int:
    """The guardian above a worker."""
    while True:
        with open(f"/proc/{pid}/stat") as file:
            stat = file.read()
        if "(aio-guardian)" in stat:
            return pid
        pid = int(stat.rpartition(")")[2].split()[1])


def arm(event: object) -> None:
    """Of a group, or of several: called with each of its events."""
    if type(event).__name__ == "Spawned" and not isinstance(sys.meta_path[0], Refusal):
        refuse("program")


def disarm() -> None:
    """The result is here."""
    assert isinstance(sys.meta_path[0], Refusal), "no worker was started"
    del sys.meta_path[0]


class Failing:
    """A block that raises that; it can be shown."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: object, trace: object) -> bool:
        assert kind is self.kind, f"{kind} instead of {self.kind}"
        assert str(exc)
        assert all(str(one) for one in getattr(exc, "exceptions", ()))
        return True


# --- a zygote's side: it is preloaded there ---

if "aioelastic.child.zygote.main_loop" in sys.modules:
    _zygote: Any = sys.modules["aioelastic.child.zygote.main_loop"]

    def _serve(self: Any, idle: float, serve: Callable[[Any, float], None] = _zygote.Zygote.serve) -> None:
        refuse("zygote")
        serve(self, idle)

    _zygote.Zygote.serve = _serve


# --- jobs ---


def good() -> int:
    return os.getpid()


def bad() -> None:
    raise ValueError("as told")


def takes() -> None:
    from aioelastic import sharing

    sharing.receive()


def is_refused() -> None:
    from aioelastic import SpecError

    raise SpecError("x", 1, "is wrong", "leave it out")


def waits() -> None:
    print("here", flush=True)
    while True:
        os.read(os.open("/dev/zero", os.O_RDONLY), 1)
        import time

        time.sleep(1000)
