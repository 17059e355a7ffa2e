"""For those whose code supervises processes, and for our own tests: see what is left behind, and break things.

In: a block, an event, a party. Out: a failure that names what went wrong. Never here: anything that runs unless a test
asks for it. pytest is imported by `aioelastic.testing.plugin` only.
"""

from __future__ import annotations

from ._bodies import daemon, fork_storm, made, pipe_holder, setsid_escape, stubborn
from ._bystanders import bystanders
from ._chaos import Party, Strike, cont, guardian, keeper, kill, send, stop, supervisor, when, worker, zygote
from ._clock import VirtualLoop
from ._environment import Unavailable, clock_jump, file_limit, full_disk, pid_namespace
from ._fake import FakeLauncher, FakeProcess, Life
from ._holdings import Holdings, LeftBehind, cool_down, no_leaks
from ._program import Program
from ._recorder import Recorder

__all__ = [
    "FakeLauncher",
    "FakeProcess",
    "Holdings",
    "LeftBehind",
    "Life",
    "Party",
    "Program",
    "Recorder",
    "Strike",
    "Unavailable",
    "VirtualLoop",
    "bystanders",
    "cool_down",
    "clock_jump",
    "cont",
    "daemon",
    "file_limit",
    "fork_storm",
    "full_disk",
    "guardian",
    "keeper",
    "kill",
    "made",
    "no_leaks",
    "pid_namespace",
    "pipe_holder",
    "send",
    "setsid_escape",
    "stop",
    "stubborn",
    "supervisor",
    "when",
    "worker",
    "zygote",
]
