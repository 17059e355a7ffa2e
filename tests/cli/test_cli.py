"""`aioelastic run`, as a user meets it: a real process, real signals, and its output as the only clock."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
from helpers import alive, child_process, seen_dead, struck

import aioelastic

HOUSE = Path(aioelastic.__file__).parent.parent
RUN = [sys.executable, "-m", "aioelastic", "run"]
BOUND = 150  # seconds after which a test says "it hangs" instead of hanging itself

_WORKER = """
import os, signal
def tell(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    if number in ENDS:
        os._exit(0)
for one in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(one, tell)
signal.signal(signal.SIGWINCH, tell)
os.write(1, b"up\\n")
while True:
    signal.pause()
"""
# A worker that says "up", tells which signals came, and ends with code 0 at those that mean it; or at none of them.
POLITE = _WORKER.replace("ENDS", "(1, 2, 3, 15)")
STUBBORN = _WORKER.replace("ENDS", "()")
# ... and one that also tells when it is continued (stopping a worker continues it too, should it stand still).
CONTINUED = POLITE.replace("(signal.SIGHUP,", "(signal.SIGCONT, signal.SIGHUP,")


def run(*args: str, env: dict[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *args], capture_output=True, text=True, timeout=BOUND, env={**os.environ, **(env or {})}, **more
    )


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """`line` in a shell, where `$RUN` is our command."""
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", line.replace("$RUN", shlex.join(RUN))],
        capture_output=True,
        text=True,
        timeout=BOUND,
    )


class Live:
    """A running command line, talked to by its output and signals."""

    def __init__(self, *args: str, wrapper: tuple[str, ...] = (), code: str = POLITE) -> None:
        worker = [sys.executable, "-S", "-u", "-c", code]
        self.process = subprocess.Popen(
            [*wrapper, *RUN, *args, "--", *worker], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )

    def line(self) -> str:
        """The next line of its stdout."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def lines(self, count: int) -> list[str]:
        """The next lines, in the order of ranks."""
        return sorted(self.line() for _ in range(count))

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def workers(self) -> list[int]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        (guardian,) = [one for one in family if one.name() == "aio-guardian"]
        return [one.pid for one in guardian.children()]

    def end(self) -> tuple[int, str, str]:
        """Exit status, and what was not read yet of stdout and stderr."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        out, err = self.process.stdout.read(), self.process.stderr.read()
        return self.process.wait(BOUND), out, err

    def __enter__(self) -> Self:
        # a test that waits for a line that never comes ends too
        self.watchdog = threading.Timer(BOUND, self.process.kill)
        self.watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.cancel()
        self.watchdog.join()
        if self.process.poll() is None:
            workers = self.workers()
            with seen_dead(workers):
                self.process.kill()
                self.process.wait()
                struck(workers, signal.SIGKILL)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing temporary may remain after the command."""
    home = tmp_path / "temporary"
    home.mkdir()
    monkeypatch.setenv("TMPDIR", str(home))
    yield
    assert os.listdir(home) == []


# --- the plain run ---


def test_output_and_summary() -> None:
    done = run("-n", "2", "--", "sh", "-c", "echo out $RANK; echo err $RANK >&2")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[worker0]: out 0", "[worker1]: out 1"]
    lines = done.stderr.splitlines()
    assert {"[worker0]: err 0", "[worker1]: err 1"} <= set(lines)
    head = lines.index("")
    assert lines[head + 1].split("  ")[0] == "rank"
    for word in ("rank", "pid", "outcome", "duration", "max RSS", "CPU time"):
        assert word in lines[head + 1]
    for rank in (0, 1):
        assert re.fullmatch(
            rf"{rank} +\d+ +exit code 0 +\d+\.\d\d s +(<= )?\d+\.\d MiB +\d+\.\d\d s", lines[head + 2 + rank]
        )


@pytest.mark.parametrize("scope", ["one", "all"])
def test_restarts_are_in_the_summary(scope: str) -> None:
    script = "echo $RANK.$AIOELASTIC_ATTEMPT; [ $RANK = 0 ] || [ $AIOELASTIC_ATTEMPT -ge 2 ] || exit 3"
    options = ["-n", "2", "--max-restarts", "2", "--restart-scope", scope, "--prefix", "a{attempt} "]
    done = run(*options, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert {f"a{i} 1.{i}" for i in range(3)} <= set(done.stdout.splitlines())
    lines = done.stderr.splitlines()
    head = lines.index("") + 1
    assert re.fullmatch(r"rank +pid +attempts +outcome +duration +max RSS +CPU time", lines[head])
    for rank, count in ((0, 1 if scope == "one" else 3), (1, 3)):
        assert re.match(rf"{rank} +\d+ +{count} +exit code 0 ", lines[head + 1 + rank])
    for attempt, line in enumerate(lines[head + 3 :]):
        assert re.fullmatch(rf"attempt {attempt}: rank 1 \(pid \d+ on \S+\) failed: exit code 3 after .*", line)
    assert len(lines) == head + 5


def test_a_limit_of_restarts_that_is_passed() -> None:
    """Every attempt's exit is told, the last one's last; it gives the exit status."""
    done = run("--max-restarts", "2", "--", "sh", "-c", "exit $((10 + AIOELASTIC_ATTEMPT))")
    assert done.returncode == 12
    told = re.findall(r"failed: exit code (\d+)", done.stderr)
    assert told == ["10", "11", "12"]
    assert done.stderr.splitlines()[-1].startswith("  command: sh -c")


def test_dry_run_tells_the_policy() -> None:
    assert "\nrestart: never\n" in run("--dry-run", "--", "true").stdout
    done = run("--dry-run", "--max-restarts", "1", "--restart-scope", "all", "--", "true")
    assert "\nrestart: all ranks when one fails, at most once\n" in done.stdout


def test_without_dashes_and_with_dashes_inside() -> None:
    assert run("-n", "1", "echo", "-n", "--tee").stdout == "[worker0]: --tee"[:0] + "[worker0]: --tee\n"
    done = run("--prefix", "", "--", "sh", "-c", 'echo "$@"', "x", "a", "--", "b", "-n", "5")
    assert done.stdout == "a -- b -n 5\n"


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("aioelastic")
    if not script.exists():
        pytest.skip("installed without its console script")
    done = subprocess.run([script, "run", "--prefix", "", "--", "echo", "hi"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "hi\n")


@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
def test_either_loop(loop: str) -> None:
    done = run(loop, "-n", "3", "--", "sh", "-c", "exit $RANK")
    assert done.returncode in (1, 2)
    assert "exit code" in done.stderr


def test_uvloop_is_used_when_it_is_there() -> None:
    code = (
        "import sys\nfrom aioelastic.cli import main\n"
        "main(['run', sys.argv[1], '--tee', 'none', '--', 'true'])\nprint('uvloop' in sys.modules)"
    )
    for flag, wanted in (("--uvloop", "True"), ("--no-uvloop", "False")):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True)
        assert done.stdout.strip() == wanted, done.stderr


# --- flags ---


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    for flag in (
        "-n",
        "--log-dir",
        "--tee",
        "--save",
        "--prefix",
        "--ranks",
        "--timestamps",
        "--json",
        "--color",
        "--stop-signal",
        "--grace",
        "--max-restarts",
        "--restart-scope",
        "--timeout",
        "--env",
        "--env-file",
        "--unset",
        "--cwd",
        "-c",
        "--on-success",
        "-m",
        "--preload",
        "--start",
        "--dry-run",
        "--uvloop",
        "--no-uvloop",
    ):
        assert re.search(rf"^ +{flag}\b|, {flag}\b", done.stdout, re.MULTILINE), flag
    assert "examples:" in done.stdout
    assert done.stdout.count("aioelastic run ") >= 4
    for word in ("SIGINT", "SIGUSR1", "SIGTSTP", "124", "127", "128"):
        assert word in done.stdout


def test_every_example_of_the_help_is_accepted(tmp_path: Path) -> None:
    """Each is planned, not run, with a program that exists."""
    examples = re.findall(r"^  aioelastic (run .*)$", run("--help").stdout, re.MULTILINE)
    assert len(examples) >= 4
    for example in examples:
        words = shlex.split(example)
        if "-c" in words:
            at, end = len(words), []
        elif "-m" in words:
            (tmp_path / "trainer.py").write_text("def main(): pass")
            at, end = words.index("-m"), words[words.index("-m") :]
        else:
            at, end = words.index("--"), ["--", "true"]
        done = run(*words[1:at], "--dry-run", *end, cwd=tmp_path, env={"PYTHONPATH": str(HOUSE)})
        assert done.returncode == 0, done.stderr


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "aioelastic", "--version"], capture_output=True, text=True)
    assert done.stdout == f"aioelastic {aioelastic.__version__}\n"


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    done = run("-n", "2", "--dry-run", "--log-dir", str(tmp_path / "runs"), "--env", "A=b c", "--", "touch", str(flag))
    assert done.returncode == 0
    assert done.stderr == ""
    assert "2 worker(s)" in done.stdout
    assert f"rank 1: touch {flag}" in done.stdout
    assert "env: A='b c'" in done.stdout
    assert not flag.exists()
    assert not (tmp_path / "runs").exists()


def test_dry_run_tells_what_a_run_would_refuse() -> None:
    assert run("--dry-run", "--", "no-such-program-here").returncode == 127


def test_a_umask_and_a_user() -> None:
    script = ("--", "sh", "-c", "umask; id -u")
    done = run("--umask", "027", "--user", str(os.getuid()), "--group", str(os.getgid()), "--dry-run", *script)
    assert f"\n  user: {os.getuid()}\n  group: {os.getgid()}\n  umask: 027\n" in done.stdout
    done = run("--umask", "027", "--group", str(os.getgid()), "--prefix", "", *script, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, f"0027\n{os.getuid()}\n")
    for words, field in (
        (["--umask", "9", "--", "true"], "--umask"),
        (["--umask", "7777", "--", "true"], "umask"),
        (["--user", "no-such-user", "--dry-run", "--", "true"], "user"),
        (["--user", "root", "-m", "os:getuid"], "--user"),
    ):
        done = run(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"aioelastic run: {field}=")


def test_dry_run_shows_what_is_not_utf_8() -> None:
    done = run("--dry-run", "--", "echo", os.fsdecode(b"a\xff"), env={"PYTHONIOENCODING": "utf-8:strict"})
    assert (done.returncode, done.stderr) == (0, "")
    assert r"rank 0: echo 'a\udcff'" in done.stdout


def test_log_dir_and_save(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    script = "printf 'a\\r\\nb'; echo err >&2"
    done = run("-n", "2", "--log-dir", str(runs), "--save", "out", "--tee", "none", "--", "sh", "-c", script)
    assert done.returncode == 0
    assert done.stdout == ""
    (one,) = runs.iterdir()
    assert f"logs: {one}" in done.stderr
    for rank in ("0", "1"):
        assert (one / "attempt_0" / rank / "stdout.log").read_bytes() == b"a\r\nb"
        assert os.listdir(one / "attempt_0" / rank) == ["stdout.log"]
    run("--log-dir", str(runs), "--", "true")
    assert len(list(runs.iterdir())) == 2


@pytest.mark.parametrize(("what", "out", "err"), [("all", 1, 1), ("out", 1, 0), ("err", 0, 1), ("none", 0, 0)])
def test_tee(what: str, out: int, err: int) -> None:
    done = run("--tee", what, "--", "sh", "-c", "echo xx; echo yy >&2")
    assert done.stdout.count("[worker0]: xx") == out
    assert done.stderr.count("[worker0]: yy") == err


def test_several_commands() -> None:
    """With a name, or without one; each by a shell."""
    commands = ["-c", "web: echo a; echo $RANK", "-c", "A=1 && echo b$A", "-c", "web:  exit 3", "-c", "cat"]
    done = run("--on-failure", "continue", "--stdin", "3", *commands, input="c\n")
    assert sorted(done.stdout.splitlines()) == ["web.1   | 0", "web.1   | a", "worker1 | b1", "worker3 | c"]
    assert done.returncode == 3
    assert re.search(r"^rank +name +pid ", done.stderr, re.MULTILINE)
    assert re.search(r"^1 +- +\d+ +exit code 0 ", done.stderr, re.MULTILINE)
    assert re.search(r"^web\.2 \(rank 2, pid \d+ on \S+\) failed: exit code 3 ", done.stderr, re.MULTILINE)
    assert sorted(run("-n", "2", "-c", "web: echo a").stdout.splitlines()) == ["web.1 | a", "web.2 | a"]


def test_prefix_name_ranks() -> None:
    done = run("-n", "4", "--ranks", "1,3", "--name", "t", "--prefix", "<{name}.{rank}.{stream}> ", "--", "echo", "x")
    assert sorted(done.stdout.splitlines()) == ["<t.1.stdout> x", "<t.3.stdout> x"]
    done = run("-n", "4", "--ranks", "0-1,3", "--prefix", "{rank}", "--", "echo")
    assert sorted(done.stdout.split()) == ["0", "1", "3"]


def test_color() -> None:
    assert run("--color", "always", "--", "echo", "x").stdout == "\x1b[36m[worker0]: \x1b[0mx\n"
    assert run("--color", "never", "--", "echo", "x", env={"FORCE_COLOR": "1"}).stdout == "[worker0]: x\n"


def test_timestamps_and_json() -> None:
    done = run("--timestamps", "--", "echo", "x")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|\+00:00) \[worker0\]: x\n", done.stdout)
    done = run("--json", "--", "sh", "-c", "printf 'a\"b\\xff'")
    record = json.loads(done.stdout)
    assert record["line"].startswith('a"b')
    assert (record["name"], record["rank"], record["stream"]) == ("worker", 0, "stdout")
    assert "time" in record


def test_env_and_cwd(tmp_path: Path) -> None:
    """An option counts for more than a file, of which the last counts most, and that for more than what is here."""
    for name, text in {"one": "D=1\nE=1\nF=1\nC=1", "two": "E=2\nF=2"}.items():
        (tmp_path / name).write_text(text)
    args = ["--env", "A=x=y", "--env", "B=", "--unset", "C", "--cwd", str(tmp_path), "--prefix", "", "--env", "G"]
    args += ["--env-file", str(tmp_path / "one"), "--env-file", str(tmp_path / "two"), "--env", "F=3", "--env", "D"]
    script = 'echo "$A|$B|${C-unset}|$D$E$F$G|$PWD"'
    done = run(*args, "--", "sh", "-c", script, env={"C": "0", "D": "0", "E": "0", "F": "0", "G": "0"})
    assert done.stdout == f"x=y||unset|0230|{tmp_path}\n"


def test_stop_signal_and_grace() -> None:
    with Live("--stop-signal", "USR1", "--grace", "0.05", "--prefix", "", code=STUBBORN) as live:
        assert live.line() == "up"
        live.signal(signal.SIGTERM)
        status, out, err = live.end()
    assert out == "SIGUSR1\n"
    assert "SIGKILL" in err
    assert status == 128 + signal.SIGTERM


# --- exit status ---


def test_status_of_the_first_failure() -> None:
    done = run("-n", "3", "--", "sh", "-c", "[ $RANK = 1 ] && exit 7; exec sleep 1000")
    assert done.returncode == 7
    assert "exit code 7" in done.stderr
    assert done.stderr.count(" failed: ") == 1  # rank 0 was stopped, rank 2 stopped or not started any more
    assert "stopped (SIGTERM)" in done.stderr


def test_status_of_a_signal() -> None:
    done = run("--", "sh", "-c", "kill -SEGV $$")
    assert done.returncode == 128 + signal.SIGSEGV
    assert "SIGSEGV" in done.stderr


@pytest.mark.parametrize("timeout", ["inf", "2678400"])
def test_a_timeout_that_is_long(timeout: str) -> None:
    assert run("--timeout", timeout, "--", "true").returncode == 0


@pytest.mark.parametrize("timeout", ["0", "0.05"])
def test_status_of_a_timeout(timeout: str) -> None:
    done = run("--timeout", timeout, "--", "sleep", "1000")
    assert done.returncode == 124
    assert f"timed out after {timeout} s" in done.stderr.splitlines()[-1]


def test_status_when_it_cannot_start(tmp_path: Path) -> None:
    """Only the kernel can refuse this one: an ELF header with nothing behind it."""
    broken = tmp_path / "prog"
    broken.write_bytes(Path(sys.executable).read_bytes()[:64])
    broken.chmod(0o755)
    done = run("-n", "2", "--", str(broken))
    assert done.returncode == 126
    assert "could not start" in done.stderr
    assert "Traceback" not in done.stderr


USAGE: list[tuple[list[str], str]] = [
    ([], "COMMAND"),
    (["--"], "COMMAND"),
    (["--", ""], "argv"),
    (["-n", "0", "--", "true"], "n=0"),
    (["-n", "-1", "--", "true"], "n=-1"),
    (["-n", "1.5", "--", "true"], "-n"),
    (["-n", "x", "--", "true"], "-n"),
    (["-n", "100000000000000000000", "--", "true"], "n="),
    (["-n", "1000000000", "--", "true"], "n="),
    (["--tee", "x", "--", "true"], "--tee"),
    (["--save", "out", "--", "true"], "save"),
    (["--prefix", "{rnak}", "--", "true"], "rnak"),
    (["--prefix", "{rank:{x}}", "--", "true"], "prefix"),
    (["--color", "some", "--", "true"], "--color"),
    (["--ranks", "5", "-n", "2", "--", "true"], "ranks"),
    (["--ranks", "", "--", "true"], "--ranks"),
    (["--ranks", "3-1", "--", "true"], "--ranks"),
    (["--ranks", "0-99999999999", "--", "true"], "ranks"),
    (["--stop-signal", "KILL", "--", "true"], "cannot be caught"),
    (["--stop-signal", "NOPE", "--", "true"], "NOPE"),
    (["--stop-signal", "9" * 5000, "--", "true"], "is not a signal of this system"),
    (["--stdin", "9" * 5000, "--", "true"], "is no rank"),
    (["--stop-signal", "", "--", "true"], "signal"),
    (["--grace", "-1", "--", "true"], "grace"),
    (["--max-restarts", "-1", "--", "true"], "Restart.max"),
    (["--max-restarts", "9999999", "--", "true"], "Restart.max"),
    (["--max-restarts", "many", "--", "true"], "--max-restarts"),
    (["--max-restarts", "1", "--restart-scope", "some", "--", "true"], "Restart.scope"),
    (["--restart-scope", "all", "--", "true"], "--max-restarts"),
    (["--grace", "nan", "--", "true"], "grace"),
    (["--timeout", "-1", "--", "true"], "timeout"),
    (["--timeout", "nan", "--", "true"], "timeout"),
    (["--timeout", "soon", "--", "true"], "timeout"),
    (["--env", "=x", "--", "true"], "env"),
    (["--env", "NOBODY_HAS_THIS", "--", "true"], "--env='NOBODY_HAS_THIS' is not in"),
    (["--unset", "A=B", "--", "true"], "env"),
    (["--env-file", "no-such-file", "--", "true"], "no-such-file"),
    (["-c", "exit 0", "--", "true"], "-c='exit 0' is one thing"),
    (["-c", "exit 0", "-m", "os:getpid"], "-c='exit 0' is one thing"),
    (["-c", "web:"], "-c='web:' has no command"),
    (["-c", "exit 0", "-c", "exit 0", "-n", "3"], "n=3"),
    (["-c", "exit 0", "--stdin", "1"], "--stdin='1' is no rank"),
    (["--cwd", "/no/such/dir", "--", "true"], "cwd"),
    (["--log-dir", "/dev/null", "--", "true"], "/dev/null"),
    (["--log-dir", "", "--", "true"], "dir"),
    (["--name", "a/b", "--", "true"], "name"),
    (["--no-such-flag", "--", "true"], "usage"),
    # no abbreviations: an option that comes later would change what they mean
    (["--gra", "5", "--", "true"], "--gra"),
    (["--gra=5", "--", "true"], "--gra"),
    (["--log", "x", "--", "true"], "--log"),
    (["--require", "--", "true"], "--require"),
    (["--no-uv", "--", "true"], "--no-uv"),
]


@pytest.mark.parametrize(("args", "told"), USAGE, ids=[" ".join(args)[:60] or "nothing" for args, _ in USAGE])
def test_wrong_usage(args: list[str], told: str, tmp_path: Path) -> None:
    """Status 2, one message, no traceback, nothing started, nothing left behind."""
    here = tmp_path / "here"
    here.mkdir()
    limit = f"ulimit -v {4 * 2**20}; cd {shlex.quote(str(here))}; "  # a list of 10^9 ranks must not cost the machine
    flag = tmp_path / "ran"
    args = [f"touch {flag}" if one == "true" else one for one in args]
    words = [word for one in args for word in (one.split() if one.startswith("touch ") else [one])]
    done = shell(f"{limit} $RUN {shlex.join(words)}")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert done.stdout == ""
    assert not flag.exists()
    assert os.listdir(here) == []


def test_several_failures_root_cause_last() -> None:
    """Both fail by themselves: rank 1 first, then rank 0, held from its end by a stop of its own until it is killed."""
    with Live(
        "-n",
        "2",
        "--prefix",
        "",
        code="import os, time; print('up', os.getpid(), os.environ['RANK'])\nwhile True: time.sleep(1000)",
    ) as live:
        pids = {int(line.split()[2]): int(line.split()[1]) for line in live.lines(2)}
        live.signal(signal.SIGSTOP)  # so that it sees both at once, as on a busy machine
        os.waitid(os.P_PID, live.process.pid, os.WSTOPPED | os.WNOWAIT)
        for rank in (1, 0):
            pidfd = os.pidfd_open(pids[rank])
            os.kill(pids[rank], signal.SIGSEGV if rank == 1 else signal.SIGABRT)
            _ended(pidfd)
        live.signal(signal.SIGCONT)
        status, _, err = live.end()
    assert "root cause: rank 1" in err
    assert err.index("rank 0 (pid") < err.index("root cause: rank 1")
    assert status == 128 + signal.SIGSEGV


def _ended(pidfd: int) -> None:
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(BOUND * 1000)
    os.close(pidfd)


# --- signals ---

STOPPERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]


@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
@pytest.mark.parametrize("signum", STOPPERS, ids=lambda one: one.name)
def test_a_stopper_is_forwarded_and_stops(signum: signal.Signals, loop: str) -> None:
    with Live(loop, "-n", "2", "--prefix", "{rank} ") as live:
        assert live.lines(2) == ["0 up", "1 up"]
        workers = live.workers()
        live.signal(signum)
        status, out, err = live.end()
    assert sorted(out.splitlines()) == [f"0 {signum.name}", f"1 {signum.name}"]
    assert status == 128 + signum
    assert err.count(f"stopped ({signum.name}): exit code 0") == 2
    assert "Traceback" not in err
    assert not any(map(alive, workers))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGQUIT], ids=lambda one: one.name)
def test_ctrl_c_reaches_what_a_shell_waits_for(signum: signal.Signals) -> None:
    """A shell that waits for a command leaves these to it, since a terminal sends them to both; so does system(3)."""
    # a shell in between would end first, and then system(3): what they leave is sent the signal once more
    command = "exec " + shlex.join([sys.executable, "-S", "-u", "-c", POLITE])
    with Live("--grace", "3600", "--prefix", "", code=f"import os; os.system({command!r})") as live:
        assert live.line() == "up"
        live.signal(signum)
        status, out, err = live.end()
    assert (status, out) == (128 + signum, f"{signum.name}\n")
    assert f"stopped ({signum.name}): exit code 0" in err


@pytest.mark.parametrize("second", STOPPERS, ids=lambda one: one.name)
def test_a_second_one_skips_the_grace(second: signal.Signals) -> None:
    with Live("-n", "2", "--grace", "3600", "--prefix", "{rank} ", code=STUBBORN) as live:
        assert live.lines(2) == ["0 up", "1 up"]
        workers = live.workers()
        live.signal(signal.SIGTERM)
        assert live.lines(2) == ["0 SIGTERM", "1 SIGTERM"]
        live.signal(second)
        status, out, err = live.end()
    assert out == ""
    assert status == 128 + signal.SIGTERM
    assert err.count("stopped (SIGKILL)") == 2
    assert not any(map(alive, workers))


def test_a_failures_status_outlives_an_impatient_user() -> None:
    """Rank 0 failed by itself; a signal that only hurries the end does not turn it into a stop by hand."""
    code = (
        "import os, sys\nif os.environ['RANK'] == '0':\n    open(os.environ['FIFO']).read(); sys.exit(7)\n" + STUBBORN
    )
    fifo = Path(os.environ["TMPDIR"]).parent / "fifo"
    os.mkfifo(fifo)
    with Live("-n", "2", "--grace", "3600", "--prefix", "{rank} ", "--env", f"FIFO={fifo}", code=code) as live:
        assert live.line() == "1 up"
        fifo.write_text("")
        assert live.line() == "1 SIGTERM"
        live.signal(signal.SIGINT)
        live.signal(signal.SIGTERM)
        live.signal(signal.SIGQUIT)
        status, _, err = live.end()
    assert "rank 0" in err
    assert status == 7


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH], ids=lambda one: one.name)
def test_passed_on(signum: signal.Signals) -> None:
    with Live("-n", "2", "--prefix", "{rank} ") as live:
        assert live.lines(2) == ["0 up", "1 up"]
        for _ in range(2):
            live.signal(signum)
            assert live.lines(2) == [f"0 {signum.name}", f"1 {signum.name}"]
        live.signal(signal.SIGTERM)
        assert live.end()[0] == 128 + signal.SIGTERM


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _unread(pid: int) -> int:
    """Bytes that it has printed, and that we have not read."""
    pipe = os.open(f"/proc/{pid}/fd/1", os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
    finally:
        os.close(pipe)


@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
def test_ctrl_z_and_fg(loop: str) -> None:
    """We and the workers stand still, and go on; twice."""
    with Live(loop, "-n", "2", "--prefix", "{rank} ", code=CONTINUED) as live:
        assert live.lines(2) == ["0 up", "1 up"]
        workers = live.workers()
        assert len(workers) == 2
        for _ in range(2):
            live.signal(signal.SIGTSTP)
            os.waitid(os.P_PID, live.process.pid, os.WSTOPPED)
            while any(_state(pid) != "T" for pid in workers):  # on its way: it was signalled before we stopped
                os.sched_yield()
            live.signal(signal.SIGCONT)
            assert live.lines(2) == ["0 SIGCONT", "1 SIGCONT"]
        live.signal(signal.SIGTERM)
        status, out, _ = live.end()
    assert status == 128 + signal.SIGTERM
    assert {"0 SIGTERM", "1 SIGTERM"} <= set(out.splitlines())


def test_a_worker_with_its_own_handler_gets_sigtstp_itself() -> None:
    code = CONTINUED.replace("(signal.SIGCONT,", "(signal.SIGTSTP, signal.SIGCONT,")
    with Live("--prefix", "", code=code) as live:
        assert live.line() == "up"
        live.signal(signal.SIGTSTP)
        os.waitid(os.P_PID, live.process.pid, os.WSTOPPED)
        (worker,) = live.workers()
        while not _unread(worker):  # a SIGCONT would take back one that it has not had yet
            os.sched_yield()
        live.signal(signal.SIGCONT)
        assert live.lines(2) == ["SIGCONT", "SIGTSTP"]
        live.signal(signal.SIGTERM)
        assert live.end()[0] == 128 + signal.SIGTERM


def test_nohup() -> None:
    with Live("--prefix", "", wrapper=("/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh")) as live:
        assert live.line() == "up"
        live.signal(signal.SIGHUP)
        live.signal(signal.SIGUSR1)
        assert live.line() == "SIGUSR1"  # still there
        live.signal(signal.SIGTERM)
        assert live.end()[:2] == (128 + signal.SIGTERM, "SIGTERM\n")


# Sends a signal to itself when Python is about to do a given thing for the k-th time: start-up, cut open anywhere.
SURPRISED = """
import os, signal, sys
event, text, count, signum = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def hook(name, args):
    global count
    if name == event and text in repr(args):
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signum)
sys.addaudithook(hook)
from aioelastic.cli import main
from aioelastic.launch import GuardianLauncher
real = GuardianLauncher.start
def start(self, worker, *more):
    sys.audit("spawn", worker.program)
    return real(self, worker, *more)
GuardianLauncher.start = start
sys.exit(main(["run", *sys.argv[5:]]))
"""


@pytest.mark.long
@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
@pytest.mark.parametrize(
    ("event", "text", "count"),
    [
        ("socket.bind", "aioelastic-port", 1),
        ("os.mkdir", "attempt_0", 1),
        ("open", "stdout.log", 2),
        ("spawn", "sleep", 1),
        ("spawn", "sleep", 3),
    ],
)
def test_a_signal_during_start_up(event: str, text: str, count: int, signum: int, loop: str, tmp_path: Path) -> None:
    """Whenever it comes, it ends with that signal's status, no traceback, and no worker."""
    args = [loop, "-n", "4", "--log-dir", str(tmp_path / "runs"), "--", "sleep", "1000"]
    done = subprocess.run(
        [sys.executable, "-c", SURPRISED, event, text, str(count), str(int(signum)), *args],
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode in (128 + signum, -signum), done.stderr


def test_ctrl_c_before_anything_is_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SURPRISED, "import", "asyncio", "1", "2", "--", "sleep", "1000"],
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert done.returncode in (130, -2)


# --- broken surroundings ---


@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str, loop: str) -> None:
    script = "echo out; echo err >&2; exit 3"
    done = shell(f"$RUN {loop} -- sh -c {shlex.quote(script)} {closed}")
    assert done.returncode == 3, done.stderr
    if "2>&-" in closed:
        assert "rank  " not in done.stdout  # the summary never goes where output is wanted
        assert done.stderr == ""
    else:
        assert "exit code 3" in done.stderr
    assert ("[worker0]: out" in done.stdout) == (" >&-" not in f" {closed}")


def test_errors_with_a_closed_stderr_are_not_printed_on_stdout() -> None:
    done = shell("$RUN -n 0 -- true 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
def test_head(loop: str) -> None:
    """The reader leaves: the worker is stopped, the summary has a line about it, the status is that of `yes`."""
    done = shell(f"{{ $RUN {loop} --prefix '' -- yes; echo $? >&2; }} | head -1")
    assert done.stdout == "y\n"
    assert done.stderr.endswith("\n141\n")
    assert done.stderr.count("Broken pipe") == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
def test_head_of_both_streams(loop: str) -> None:
    """There is nobody left to tell but by the status."""
    script = "yes & yes >&2"
    done = shell(f"{{ $RUN {loop} --prefix '' -- sh -c {shlex.quote(script)} 2>&1; echo $? >&2; }} | head -1")
    assert (done.stdout, done.stderr) == ("y\n", "141\n")


@pytest.mark.parametrize("what", ["--dry-run -n 500 -- true", "--help"])
def test_head_of_our_own_text(what: str) -> None:
    done = shell(f"$RUN {what} | head -1")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("what", ["--dry-run -- true", "--help"])
def test_our_own_text_on_a_full_disk(what: str) -> None:
    done = shell(f"$RUN {what} > /dev/full")
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr
    assert done.returncode != 0


def test_lost_output_is_told() -> None:
    """Standard output on a full disk: the worker goes on, and the summary says what was lost, in all."""
    done = shell("$RUN -- sh -c 'seq 1000; seq 1000' > /dev/full")
    assert done.returncode == 1
    lost = 2 * sum(len(f"[worker0]: {i}\n") for i in range(1, 1001))
    assert f"trouble with stdout: No space left on device ({lost} bytes lost)" in done.stderr


def test_output_beyond_a_limit_on_file_sizes_is_told(tmp_path: Path) -> None:
    """What fits is there; what does not is counted."""
    out = tmp_path / "out"
    done = shell(f"trap '' XFSZ; ulimit -f 16; $RUN --prefix '' -- seq 100000 > {out}")
    assert done.returncode == 1
    written = out.stat().st_size
    assert f"trouble with stdout: File too large ({588_895 - written} bytes lost)" in done.stderr
    assert out.read_bytes() == b"".join(b"%d\n" % i for i in range(1, 100_001))[:written]


def test_a_closed_stdout_shows_in_the_status() -> None:
    done = shell("$RUN -- echo hello >&-")
    assert done.returncode == 1
    assert "trouble with stdout: is closed (17 bytes lost)" in done.stderr


def test_a_failure_of_a_worker_is_told_before_lost_output() -> None:
    done = shell("$RUN -- sh -c 'echo hello; exit 3' > /dev/full")
    assert done.returncode == 3
    assert "No space left" in done.stderr


def test_a_full_disk_under_the_logs_is_told(tmp_path: Path) -> None:
    script = "head -c 100000 /dev/zero"
    done = shell(f"trap '' XFSZ; ulimit -f 16; $RUN --tee none --log-dir {tmp_path / 'runs'} -- sh -c '{script}'")
    lost = 100_000 - next((tmp_path / "runs").glob("*/attempt_0/0/stdout.log")).stat().st_size
    assert re.search(rf"stdout.log: File too large \({lost} bytes lost\)", done.stderr)
    assert done.returncode == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "counts"),
    [("-- true", range(4, 41)), ("--no-uvloop -- true", (4, 7, 11, 16)), ("-m os:getpid", (4, 8, 12, 24))],
)
def test_few_file_descriptors(what: str, counts: Sequence[int]) -> None:
    """Too few even for ourselves: said in one line, whatever the number (at 3 Python itself cannot be loaded)."""
    for count in counts:
        done = shell(f"ulimit -n {count}; exec $RUN --tee none {what}")
        assert done.returncode in (1, 2), (count, done.stderr)
        if count < 7 and "Error processing line" in done.stderr:
            continue  # Python itself, for a .pth file of another package
        assert len(done.stderr.splitlines()) == 1, (count, done.stderr)
        assert "ulimit -n" in done.stderr
        assert done.stdout == ""


def test_no_file_may_have_a_byte(tmp_path: Path) -> None:
    """It does not matter where none is written, and is told in one line where one would be."""
    for what in ("-- echo hi", "-m os:getpid"):
        done = shell(f"trap '' XFSZ; ulimit -f 0; exec $RUN {what}")
        assert done.returncode == 0, done.stderr
        assert "exit code 0" in done.stderr
    done = shell(f"trap '' XFSZ; ulimit -f 0; exec $RUN --log-dir {tmp_path / 'runs'} -- echo hi")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "ulimit -f" in done.stderr


def test_nothing_of_ours_reaches_the_worker() -> None:
    """Its descriptors are the three standard ones; its signals have their defaults; it leads its own session."""
    code = (
        "import os, signal\n"
        "print(sorted(os.listdir('/proc/self/fd'))[:4], os.getsid(0) == os.getpid())\n"
        "print([one.name for one in signal.Signals if signal.getsignal(one) == signal.SIG_IGN])\n"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    )
    done = run("--prefix", "", "--", sys.executable, "-S", "-c", code)
    assert done.stdout.splitlines()[0] == "['0', '1', '2', '3'] True"  # 3 is the listing itself
    assert done.stdout.splitlines()[1:] == ["['SIGPIPE', 'SIGXFSZ']", "set()"]  # as any Python has them


def test_stray_children_are_told_and_ended() -> None:
    done = run("--prefix", "", "--", "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!")
    assert done.returncode == 0
    pid = int(done.stdout)
    assert f"left running by a worker, and ended: pid {pid}" in done.stderr
    assert not alive(pid)


def test_each_in_a_control_group() -> None:
    done = run("-n", "2", "--cgroup", "--dry-run", "--", "true")
    assert done.stdout.count("  placement: a control group of its own\n") == 2


# --- a stderr or stdout that does not wait ---


@pytest.mark.parametrize("buffered", [True, False])
def test_what_is_printed_arrives_whole_where_nobody_waits(buffered: bool) -> None:
    """A parent written in Node has non-blocking streams, and may be slow to read: a long plan, and a long summary."""
    env = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    for words, stream, end in (
        (["-n", "400", "--dry-run", "--", "true"], "stdout", b"rank 399: true"),
        (["-n", "3000", "--tee", "none", "--max-restarts", "0", "--", "no such program"], "stderr", b"PATH"),
        (
            ["-n", "40", "--tee", "none", "--", "sh", "-c", "head -c 15000 /dev/zero | tr '\\0' x >&2; exit 3"],
            "stderr",
            b"x",
        ),
    ):
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        both = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: theirs}
        with child_process([*RUN, *words], env=env, **both) as program:
            os.close(theirs)
            data = b"".join(iter(lambda ours=ours: os.read(ours, 512), b""))
        os.close(ours)
        assert program.returncode in (0, 3, 127)
        assert end in data
        assert data.endswith(b"\n")


def test_the_status_of_an_error_that_cannot_be_told() -> None:
    assert shell("$RUN -- nosuchprogram 2>/dev/full").returncode == 127
    assert shell("$RUN -n 0 -- true 2>/dev/full").returncode == 2


@pytest.mark.parametrize("collects", [True, False])
def test_who_calls_main_has_the_garbage_collector_as_it_was(collects: bool) -> None:
    words = "enable" if collects else "disable"
    code = (
        f"import gc; gc.{words}(); from aioelastic.cli import main; main(['run', '--', 'true']); print(gc.isenabled())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{collects}\n"
