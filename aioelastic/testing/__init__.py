"""For those whose code supervises processes, and for our own tests: see what is left behind, and break things.

In: a block, an event, a party. Out: a failure that names what went wrong. Never here: anything that runs unless a test
asks for it. pytest is imported by `aioelastic.testing.plugin` only.
"""

from __future__ import annotations

from ._chaos import Party, Strike, cont, guardian, keeper, kill, send, stop, supervisor, when, worker, zygote
from ._clock import VirtualLoop
from ._environment import Unavailable, clock_jump, file_limit, full_disk, pid_namespace
from ._failing_calls import Fault, failing
from ._fake_launcher import FakeLauncher, FakeProcess, Life
from ._leak_check import Holdings, LeftBehind, cool_down, no_leaks
from ._misbehaving_workers import daemon, fork_storm, made, pipe_holder, setsid_escape, stubborn
from ._recorder import Recorder
from ._supervisor_process import Program
from ._unrelated_processes import bystanders

__all__ = [
    "FakeLauncher",
    "FakeProcess",
    "Fault",
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
    "failing",
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
