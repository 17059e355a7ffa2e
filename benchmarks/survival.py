"""Who is left when the supervisor dies? One worker, which has a grandchild, one in a session of its own, and a daemon.

The supervisor gets SIGKILL or SIGTERM, or the task in it that waits is cancelled. Then: who of the four is still there
a second later, and when did the last one go? Each says who it is before it matters, so that the benchmark holds a pidfd
of each; it asks nobody and signals nothing else. SIGTERM ends a program that does not handle it: where a library leaves
that to its host, the host here does nothing.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from _common import TAG, Report, available, leftovers, main, marked, scratch
from _peers import circusd, supervisord
from _survival_peers import CANCELLABLE, OTHERS, command
from _survivor import ROLES

PATIENCE = 60.0  # seconds for a supervisor and its worker to be there
LOOK = 1.0  # seconds after which whoever is there stays
CANCEL = signal.SIGUSR1
WAYS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "cancelled": CANCEL}
QUICK = ("ours: supervise(Command)", "ours: supervise(Function)", "ours: aioelastic run", "asyncio", "subprocess.Popen")

# directory for files, socket to which the four tell who they are → the supervisor's pid
SetUp = Callable[[Path, str], AbstractContextManager[int]]


class Absent(Exception):
    """It cannot be had here."""


@dataclass
class Outcome:
    """What came of the four. `last` is in milliseconds."""

    stays: tuple[str, ...]
    last: float
    supervisor_stays: bool


# --- the supervisors ---


@contextmanager
def running(argv: list[str], home: Path) -> Iterator[int]:
    with open(home / "stderr", "wb") as said:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, cwd=home)
        try:
            yield process.pid
        finally:
            process.kill()
            process.wait()


def program(name: str) -> SetUp:
    return lambda home, door: running(
        [sys.executable, str(Path(__file__).parent / "_survival_peers.py"), name, door], home
    )


def line(*before: str, after: tuple[str, ...] = ()) -> SetUp:
    """A program that runs a command given on its own command line."""

    def start(home: Path, door: str) -> AbstractContextManager[int]:
        found = shutil.which(before[0]) or shutil.which(before[0], path=os.path.dirname(sys.executable))
        if found is None:
            raise Absent("is not installed")
        return running([found, *before[1:], *command(door), *after], home)

    return start


def _honcho(home: Path, door: str) -> AbstractContextManager[int]:
    (home / "Procfile").write_text(f"worker: exec {shlex.join(command(door))}\n")
    return running([sys.executable, "-m", "honcho", "start"], home)


def _make(home: Path, door: str) -> AbstractContextManager[int]:
    if shutil.which("make") is None:
        raise Absent("is not installed")
    (home / "Makefile").write_text(f"all:\n\t@{shlex.join(command(door))}\n")
    return running(["make", "-j", "2"], home)


@contextmanager
def _supervisord(home: Path, door: str, options: tuple[str, ...] = ()) -> Iterator[int]:
    with supervisord(home, command(door), options=options) as one:
        yield one.pid


@contextmanager
def _circusd(home: Path, door: str) -> Iterator[int]:
    with circusd(home, command(door), options=("stop_children = True",)) as one:
        yield one.pid


# name → (module that it needs, how it is started, whether its task can be cancelled)
SET_UPS: dict[str, tuple[str, SetUp, bool]] = {
    **{name: (module, program(name), True) for name, (module, _) in CANCELLABLE.items()},
    **{name: (module, program(name), False) for name, (module, _) in OTHERS.items()},
    "torchrun": (
        "torch",
        line(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--no-python"),
        False,
    ),
    "supervisord": ("supervisor", _supervisord, False),
    "supervisord stopasgroup killasgroup": (
        "supervisor",
        lambda home, door: _supervisord(home, door, ("stopasgroup = true", "killasgroup = true")),
        False,
    ),
    "circusd stop_children": ("circus", _circusd, False),
    "honcho": ("honcho", _honcho, False),
    "xargs": ("", line("xargs", "-P", "2"), False),
    "make -j": ("", _make, False),
    "GNU parallel": ("", line("parallel", "-N0", "-q", after=(":::", "one")), False),
    "tini -s -g": ("", line("tini", "-s", "-g", "--"), False),
    "dumb-init": ("", line("dumb-init", "--"), False),
    "catatonit -g": ("", line("catatonit", "-g", "--"), False),
    "unshare --pid --kill-child": ("", line("unshare", "--pid", "--fork", "--kill-child", "--"), False),
    "ours: aioelastic run": ("aioelastic", line(sys.executable, "-m", "aioelastic", "run", "-n", "1", "--"), False),
}


# --- the measurement ---


def gather(door: socket.socket, supervisor: int, home: Path) -> dict[str, int]:
    """role → pidfd of the four, each held before it goes on. They belong to the caller, also those of an error."""
    found: dict[str, int] = {}
    poll = select.poll()
    poll.register(door, select.POLLIN)
    poll.register(supervisor, select.POLLIN)
    late = time.monotonic() + PATIENCE
    try:
        while len(found) < len(ROLES):
            ready = dict(poll.poll(max(late - time.monotonic(), 0) * 1000))
            if door.fileno() not in ready:
                said = (home / "stderr").read_text(errors="replace").strip() if (home / "stderr").exists() else ""
                why = "ended at once" if ready else f"did not start its worker within {PATIENCE:g} s"
                raise Absent(f"{why}: {said.splitlines()[-1]}" if said else why)
            with door.accept()[0] as end:
                end.settimeout(PATIENCE)
                role = end.recv(64).decode()
                pid = int.from_bytes(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
                found[role] = os.pidfd_open(pid)
                end.send(b".")
    except BaseException:
        for pidfd in found.values():
            finish(pidfd)
        raise
    return found


def finish(pidfd: int) -> None:
    """End it, see it ended, let go."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    ended(pidfd, None)
    os.close(pidfd)


def ended(pidfd: int, seconds: float | None) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def watch(family: dict[str, int], began: float) -> tuple[tuple[str, ...], float]:
    """Who stays, and when the last of the others went, in milliseconds."""
    poll = select.poll()
    roles = {pidfd: role for role, pidfd in family.items()}
    for pidfd in roles:
        poll.register(pidfd, select.POLLIN)
    last = 0.0
    while roles and (left := began + LOOK - time.monotonic()) > 0:
        for pidfd, _ in poll.poll(left * 1000):
            last = (time.monotonic() - began) * 1000
            poll.unregister(pidfd)
            del roles[pidfd]
    return tuple(role for role in ROLES if role in roles.values()), last


def once(set_up: SetUp, signum: int, place: Path) -> Outcome:
    home = place / "home"
    home.mkdir()
    name = f"aioelastic-survival-{os.urandom(8).hex()}"  # of no file: a path may be too long for unix(7)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            door.bind(f"\0{name}")
            door.listen()
            with set_up(home, name) as pid:
                held = [os.pidfd_open(pid)]
                try:
                    family = gather(door, held[0], home)
                    held += family.values()
                    began = time.monotonic()
                    signal.pidfd_send_signal(held[0], signum)
                    stays, last = watch(family, began)
                    return Outcome(stays, last, signum == signal.SIGTERM and not ended(held[0], 0))
                finally:
                    for pidfd in held:  # the supervisor first, which might start others
                        finish(pidfd)
    finally:
        # helpers of the peers end by themselves when they see it, and unlink their semaphores then
        late = time.monotonic() + LOOK
        for pidfd, _ in marked(os.environ[TAG]):
            ended(pidfd, max(late - time.monotonic(), 0))
        while leftovers(os.environ[TAG]):  # what dies may have forked
            pass
        shutil.rmtree(home, ignore_errors=True)


def cell(outcomes: list[Outcome]) -> str:
    """`4/4 gone in 12 ms`, or who stays."""
    stays = [role for role in ROLES if any(role in one.stays for one in outcomes)]
    over = " (and the supervisor is there)" if any(one.supervisor_stays for one in outcomes) else ""
    if stays:
        return ("all stay" if len(stays) == len(ROLES) else f"stays: {', '.join(stays)}") + over
    return f"4/4 gone in {statistics.median(one.last for one in outcomes):.0f} ms{over}"


def measure(quick: bool) -> Report:
    rounds = 1 if quick else 3
    report = Report("survival", rounds)
    report.table.append(["supervisor", *WAYS])
    with scratch() as place:
        for name in sorted(SET_UPS, key=lambda one: not one.startswith("ours")):
            module, set_up, cancellable = SET_UPS[name]
            if quick and name not in QUICK:
                continue
            if module and not available(report, module, name, apart=True):
                continue
            row = [name]
            try:
                for way, signum in WAYS.items():
                    if signum == CANCEL and not cancellable:
                        row.append("n/a")
                        continue
                    # who stays is the same each time: a peer has one turn, as each takes seconds
                    turns = rounds if name.startswith("ours") else 1
                    outcomes = [once(set_up, signum, place) for _ in range(turns)]
                    row.append(cell(outcomes))
                    # a call that has begun cannot be cancelled in any concurrent.futures.Executor, nor in ours
                    if not (name == "ours: WorkerExecutor" and signum == CANCEL):
                        gone = [float(len(ROLES) - len(one.stays)) for one in outcomes]
                        report.add(f"{name}, {way}", "of 4 gone", gone)
            except Absent as exc:
                report.skipped[name] = str(exc)
                continue
            report.table.append(row)
    for way in ("SIGKILL", "SIGTERM"):
        report.chart(
            f"survival-{way.lower()}", f"Worker, child, child in another session, daemon: how many go after {way}",
            [name for name in report.series if name.endswith(way)], strip=f", {way}",
        )  # fmt: skip
    peers = [row for row in report.table[1:] if not row[0].startswith("ours")]
    for number, way in enumerate(WAYS, 1):
        asked = [row for row in peers if row[number] != "n/a"]
        clean = [row[0] for row in asked if row[number].startswith("4/4")]
        words = f"{len(clean)} of {len(asked)} peers" + (f" ({', '.join(clean)})" if clean else "")
        for name in [one for one in SET_UPS if one.startswith("ours") and f"{one}, {way}" in report.series]:
            what = "the task is cancelled" if way == "cancelled" else f"the supervisor gets {way}"
            work = f"{name.removeprefix('ours: ')}: {what}; worker, grandchild, setsid, daemon gone within 1 s"
            report.plain(work, "4 of 4", float(len(ROLES)), f"{name}, {way}", words, best="high")
    return report


if __name__ == "__main__":
    main("survival", measure)
