"""What `chaos.py` strikes with beside SIGKILL: a debugger, a file system that hangs, and a lack of descriptors."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aioelastic import Command, testing
from aioelastic.events import Event

HELPERS = Path(__file__).with_name("_blow_helpers.py")


class Helper:
    """One of `_blow_helpers.py`; it ends when we do."""

    def __init__(self, *words: str) -> None:
        argv = [sys.executable, "-I", "-S", str(HELPERS), *words]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._process.pid

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def ask(self, words: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{words}\n".encode())
        self._process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        self._process.communicate()


class Trouble:
    """One that may strike in a round. `over` ends it; then nothing of it is left.

    Attributes:
        struck: how often it did.
    """

    def __init__(self, dice: random.Random) -> None:
        self.struck = 0
        self._dice = dice

    def entry(self) -> Command | None:
        """A worker that it needs."""
        return None

    def strike(self, event: Event) -> None:
        pass

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """In this block we are not hindered."""
        yield

    def over(self) -> None:
        pass


class Debugger(Trouble):
    """It holds a worker: dead, and nobody else can reap it; stopped, and it obeys nothing but SIGKILL; or alive."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__(dice)
        self._helper = Helper("trace")

    def strike(self, event: Event) -> None:
        if event.pid is None:
            return
        how = self._dice.choice(["dead", "dead", "stopped", "alive"])
        if self._helper.ask(f"{event.pid} {int(how == 'stopped')}") != "held":
            return
        if how == "dead":
            os.kill(event.pid, signal.SIGKILL)  # held, so its pid is its own
        self.struck += 1

    def over(self) -> None:
        self._helper.close()


class Hanging(Trouble):
    """A worker's call, or the execve(2) of a later attempt, hangs in a file system, where SIGKILL does not end it."""

    def __init__(self, dice: random.Random, where: Path) -> None:
        super().__init__(dice)
        self._hangs = where / "hangs"
        self._program = where.with_name("program")  # not where we ourselves look at all files
        self._program.unlink(missing_ok=True)
        self._program.symlink_to(shutil.which("sleep") or "/bin/sleep")
        self._starts = dice.random() < 0.5

    def entry(self) -> Command | None:
        if self._starts:
            return Command(str(self._program), "1000")
        pause = self._dice.choice([0, 0.01, 0.05])
        self.struck += 1
        return Command("/bin/sh", "-c", f"sleep {pause}; : < {self._hangs}")

    def strike(self, event: Event) -> None:
        if not self._starts:
            return
        self._program.unlink()
        self._program.symlink_to(self._hangs)
        self.struck += 1


class Fewer(Trouble):
    """A process may have no more descriptors than it has, or a few more."""

    def __init__(self, dice: random.Random, who: testing.Party) -> None:
        super().__init__(dice)
        self._who = who
        self._pid = 0
        self._before = (0, 0)

    def strike(self, event: Event) -> None:
        pid = self._who(event)
        if pid is None:
            return
        try:
            most = max(map(int, os.listdir(f"/proc/{pid}/fd")))
            self._before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            self._limit(pid, most + self._dice.randint(1, 8))
        except (OSError, ValueError):
            return  # it is gone
        self._pid = pid
        self.struck += 1

    def _limit(self, pid: int, soft: int) -> None:
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(soft, hard), hard))

    @contextmanager
    def lifted(self) -> Iterator[None]:
        if self._pid != os.getpid():
            yield
            return
        now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit(self._pid, self._before[0])
        try:
            yield
        finally:
            self._limit(self._pid, now)

    def over(self) -> None:
        pid, self._pid = self._pid, 0
        if pid:
            try:
                self._limit(pid, self._before[0])
            except OSError:
                pass  # it is gone


KINDS = ("none", "debugger", "file system", "descriptors of the host", "descriptors of the guardian")


def make(kind: str, dice: random.Random, where: Path | None) -> Trouble:
    if kind == "debugger":
        return Debugger(dice)
    if kind == "file system" and where is not None:
        return Hanging(dice, where)
    if kind.startswith("descriptors"):
        return Fewer(dice, testing.supervisor if kind.endswith("host") else testing.guardian)
    return Trouble(dice)


class FileSystem:
    """One in which whatever is looked for is not answered before `release`.

    Raises:
        OSError: it cannot be had here.
    """

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="aioelastic-bench-"))
        self.where = self._home / "files"
        self.where.mkdir()
        self._helper = Helper("hang", str(self.where))
        if words := self._helper.hear().removeprefix("up"):
            self.close()
            raise OSError(words)

    def release(self) -> None:
        """Whoever waits there is told that it does not work, and whoever comes later waits anew."""
        self._helper.ask("release")

    def close(self) -> None:
        self._helper.close()
        shutil.rmtree(self._home)
