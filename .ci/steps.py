"""What `.ci/run` does, step by step. A step that fails does not keep the later ones from running; the last lines name
each failure. A test that fails is run once more, alone: if it passes then, it is named as unstable, there and in
`.ci/unstable.txt`. More than `UNSTABLE` of these fail the run.

For Python alone, before anything is installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[1]
UNSTABLE = 5
STEP_SECONDS = 1500.0  # after that a step is ended, and has failed
SIDE_BY_SIDE = ("-n", "auto", "--dist", "worksteal")
# tests that cannot run on every machine: they need a GPU, root, or a Python with its own tests
MAY_BE_SKIPPED = re.compile(r"needs an NVIDIA GPU|needs root|this Python ships no tests")
EXTRA = re.compile(r"\(the extra [\w-]+\)")


@dataclass
class Outcome:
    """Of a run of tests."""

    failed: dict[str, str] = field(default_factory=dict)  # id -> why, of the first report
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """From the lines that `--results` has written."""
        found = cls()
        for line in path.read_text().splitlines() if path.exists() else ():
            one = json.loads(line)
            getattr(found, one["outcome"]).setdefault(one["id"], one["why"])
        return found


class Run:
    """The steps, and what came of them."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.failures: list[str] = []  # a line each
        self.unstable: dict[str, str] = {}  # step and id -> why it failed at first
        self.times: list[str] = []
        self.env = {k: v for k, v in os.environ.items() if k not in UNSET} | {
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
        }

    def step(self, name: str) -> _Step:
        """Says its name, and its time at the end. An exception within it is one line of the last ones."""
        return _Step(self, name)

    def call(self, *words: str, cwd: Path = HOUSE, **env: str) -> int:
        """The exit status of a command; what it leaves running when its time is over is killed."""
        started = subprocess.Popen(words, cwd=cwd, env=self.env | env, process_group=0)
        try:
            return started.wait(STEP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            raise Failed(f"no end after {STEP_SECONDS:.0f} s: {' '.join(words)[:200]}") from None

    def must(self, *words: str, cwd: Path = HOUSE) -> None:
        """A command that ends with 0."""
        if status := self.call(*words, cwd=cwd):
            raise Failed(f"exit status {status}: {' '.join(words)[:200]}")

    def clone(self, name: str) -> Path:
        """Of the commit that is checked out."""
        self.must("git", "clone", "-q", ".", str(self.scratch / name))
        return self.scratch / name

    def tests(self, step: str, words: list[str], pytest: list[str], cwd: Path) -> Outcome:
        """Run tests by `words`; run each that failed once more, alone, by `pytest`. Returns what the first run saw."""
        results = self.scratch / f"results-{len(self.times)}"
        status = self.call(*words, cwd=cwd, PYTEST_ADDOPTS=f"--results={results}")
        outcome = Outcome.read(results)
        if status and not outcome.failed:
            raise Failed(f"exit status {status}, and no test has failed: {' '.join(words)[:200]}")
        for number, (test, why) in enumerate(outcome.failed.items()):
            if number < UNSTABLE:
                print(f"\n-- once more, alone: {test}", flush=True)
                if not self.call(*pytest, "--long", "-n0", test, cwd=cwd):
                    self.unstable[f"{step}: {test}"] = why
                    continue
            self.failures.append(f"FAILED {step}: {test}: {_last_line(why)}")
        return outcome

    def refuse(self, step: str, skipped: dict[str, str]) -> None:
        """Tests that were skipped, but for those that cannot run on every machine."""
        for test, why in skipped.items():
            if not MAY_BE_SKIPPED.search(why):
                self.failures.append(f"FAILED {step}: nobody has run {test}: {why}")

    def close(self) -> int:
        """Says what came of it. The exit status of all."""
        if len(self.unstable) > UNSTABLE:
            self.failures.append(f"FAILED: more than {UNSTABLE} tests are unstable")
        path = HOUSE / ".ci" / "unstable.txt"
        path.unlink(missing_ok=True)
        if self.unstable:
            path.write_text("\n\n".join(f"{test}\n{why}" for test, why in self.unstable.items()) + "\n")
        print("\n== times", *self.times, sep="\n")
        for test, why in self.unstable.items():
            print(f"UNSTABLE {test}: {_last_line(why)}")
        print(*self.failures, sep="\n")
        print(f"{len(self.failures)} failures, {len(self.unstable)} unstable tests, {time.monotonic() - BEGUN:.0f} s")
        return bool(self.failures)


class Failed(Exception):
    """A step has."""


class _Step:
    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name

    def __enter__(self) -> None:
        self._since = time.monotonic()
        print(f"\n== {self._name} (after {self._since - BEGUN:.0f} s)", flush=True)

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> bool:
        self._run.times.append(f"{time.monotonic() - self._since:6.0f} s  {self._name}")
        if not isinstance(exc, Exception):
            return False
        if not isinstance(exc, Failed):
            traceback.print_exception(exc)
        self._run.failures.append(f"FAILED {self._name}: {exc}")
        print(self._run.failures[-1], flush=True)
        return True


BEGUN = time.monotonic()
UNSET = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE", "PYTEST_ADDOPTS")


def _last_line(why: str) -> str:
    """Of pytest's report of a failure the line that says what was wrong."""
    lines = [line for line in why.splitlines() if line.strip()]
    told = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (told[0] if told else lines[-1] if lines else "")[:300]


def readme_commands() -> list[str]:
    """Each block of shell in the README is one command."""
    return re.findall(r"^```sh\n(.*?)\n```$", (HOUSE / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def other_pythons(run: Run) -> dict[str, Path]:
    """Version -> an interpreter in a new virtual environment, of those that pyproject.toml names and that are here."""
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (HOUSE / "pyproject.toml").read_text())
    pyenv = Path(run.env.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = {}
    for version in named:
        if version == "{}.{}".format(*sys.version_info):
            continue
        where = run.scratch / f"venv{version}"
        for python in (f"python{version}", *map(str, pyenv.glob(f"{version}.*/bin/python"))):
            if shutil.which(python) and not run.call(python, "-m", "venv", "--without-pip", str(where)):
                found[version] = where / "bin" / "python"
                break
        else:
            print(f"left out: Python {version}, which is not here")
    return found


def main(run: Run) -> None:
    """All steps."""
    python = sys.executable
    commands = readme_commands()
    unused: list[str] = []  # ids of tests, or files, that the README's command could not run

    # first of all, while nothing is there that they do not bring
    with run.step("the README's command that runs the main job, in a new clone"):
        if len(commands) != 2:
            raise Failed(f"README.md has {len(commands)} commands instead of two")
        run.must("bash", "-c", commands[0], cwd=run.clone("clone-run"))
    with run.step(name := "the README's command that runs the tests, in a new clone"):
        clone = run.clone("clone-test")
        seen = run.tests(name, ["bash", "-c", commands[1]], [".venv/bin/python", "-m", "pytest"], clone)
        unused = sorted(test for test, why in seen.skipped.items() if EXTRA.search(why))
        run.refuse(name, {test: why for test, why in seen.skipped.items() if test not in unused})

    with run.step("the source archive, the wheel, all extras"):
        run.must(python, "-m", "venv", "--without-pip", ".venv")
        pip = (python, "-m", "pip", "--python", ".venv", "install", "-q")
        run.must(*pip, "hatchling")
        run.must(".venv/bin/python", "-m", "hatchling", "build", "-d", str(run.scratch / "dist"))
        (wheel,) = (run.scratch / "dist").glob("*.whl")
        run.must(*pip, "torch==2.13.0", f"{wheel}[test-all,docs,lint]")
    with run.step(name := "the installed wheel: tests that need extras, and the long ones"):
        ids = run.scratch / "ids"
        ids.write_text("".join(f"{test}\n" for test in unused))
        # not `python -m pytest`, which would take the package from this directory
        seen = run.tests(
            name, [".venv/bin/pytest", "-q", *SIDE_BY_SIDE, "--long", f"--only={ids}"], [".venv/bin/pytest"], HOUSE
        )
        run.refuse(name, seen.skipped)

    with run.step("which other Pythons are here"):
        others = other_pythons(run)
        for number, (version, other) in enumerate(others.items()):
            loop = ("asyncio-debug", "uvloop")[number % 2]
            with run.step(name := f"Python {version}, {loop}"):
                clone = run.clone(f"clone{version}")
                run.must(python, "-m", "pip", "--python", str(other), "install", "-q", "-e", ".[gpu,test]", cwd=clone)
                words = [str(other), "-m", "pytest"]
                run.tests(name, [*words, "-q", *SIDE_BY_SIDE, f"--loop={loop}"], [*words, f"--loop={loop}"], clone)

    for tool in (
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
        ("basedpyright",),
        ("sphinx-build", "-q", "-W", "--keep-going", "-E", "-b", "html", "docs", str(run.scratch / "site")),
    ):
        with run.step(" ".join(tool[:2])):
            run.must(f".venv/bin/{tool[0]}", *tool[1:])
    with run.step("shared memory where there is little of everything"):
        if os.getuid():
            print("left out: it needs root")
        else:
            # idle memory, which is otherwise kept from test to test, is given back after each
            run.must(".venv/bin/python", "tests/confined.py", "--loop=uvloop", "--leaks-each")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ci-") as directory:
        current = Run(Path(directory))
        main(current)
        status = current.close()
    sys.exit(status)
