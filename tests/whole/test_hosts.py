"""Groups in programs of unusual state: signals ignored or blocked by whoever started them, streams closed, an
interpreter that is something else, no /proc, no thread, no directory; and a signal to all processes of a service at
once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, child_process, no_descriptors_left, py, sh
from test_plan import torchrun

from aioelastic import Command, Function, Group, Restart, SpecError, Stop, events, supervise
from aioelastic.child.worker.stack_dump import SIGNAL
from aioelastic.testing._environment import Unavailable

HEAD = """
import asyncio, json, os, signal, sys
from aioelastic import Command, Function, Group, Logs, SpecError, Std, Stop, supervise
QUIET = Logs(tee=Std.NONE)
"""


def run(program: str, *args: str, before: tuple[str, ...] = (), **kwargs: Any) -> str:
    """What a program prints that says nothing on stderr."""
    words = [*before, sys.executable, "-c", HEAD + program, *args]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=100, **kwargs)
    assert ran.stderr == ""
    return ran.stdout


# --- signals ---

SIGNALS = """
def told():
    lines = open("/proc/self/status").read().splitlines()
    return [int(line.split()[1], 16) for line in lines if line.startswith(("SigIgn:", "SigBlk:"))]
CODE = "import json; lines = open('/proc/self/status').read().splitlines(); " \\
       "print(json.dumps([int(l.split()[1], 16) for l in lines if l.startswith(('SigIgn:', 'SigBlk:'))]))"
WAYS = [("command", {"launcher": "guardian"}), ("command", {"launcher": "direct"}),
        ("function", {"start": "zygote"}), ("function", {"start": "spawn"}), ("function", {"start": "fork"}),
        ("function", {"start": "spawn", "launcher": "direct"})]
NAMES = ("SIGCHLD", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR2")
PYTHON = Command("/bin/sh", "-c", "exec \\"$0\\" -S -c \\"$1\\"", sys.executable, CODE)
async def main():
    for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGRTMIN + 3):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    for kind, how in WAYS:
        entry = Function(told) if kind == "function" else PYTHON
        result = await supervise(entry, logs=QUIET, stop=Stop(signal="SIGRTMIN+3"), timeout=60, **how)
        blocked, ignored = result[0].value if kind == "function" else json.loads(str(result[0].stdout))
        names = [one for one in NAMES if ignored >> getattr(signal, one) - 1 & 1]
        print(kind, *how.values(), names, ignored >> signal.SIGRTMIN + 2 & 1, blocked, result[0].exit.code)
if __name__ == "__main__":
    asyncio.run(main())
"""


def test_what_a_host_ignores_or_blocks(tmp_path: Path) -> None:
    """Its workers begin with the default of what they are ended by; what else it ignores they ignore, too."""
    (tmp_path / "program.py").write_text(HEAD + SIGNALS)
    lines = subprocess.check_output([sys.executable, tmp_path / "program.py"], text=True, timeout=100).splitlines()
    assert len(lines) == 6
    for line in lines:
        assert line.endswith(" ['SIGHUP', 'SIGUSR2'] 0 0 0"), line


def test_exits_are_exact_where_sigchld_is_ignored() -> None:
    out = run(
        """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
async def main():
    for _ in range(3):
        one = await supervise(Command("sh", "-c", "exit 7"), logs=QUIET, check=False)
        two = await supervise(Function(abs, -3), logs=QUIET)
        print(one[0].exit.code, one[0].usage is not None, two[0].value)
asyncio.run(main())
"""
    )
    assert out == "7 True 3\n" * 3


REAL_TIME = int(signal.SIGRTMIN)


@pytest.mark.parametrize("given", ["SIGRTMIN+3", "rtmin+3", REAL_TIME + 3, str(REAL_TIME + 3)])
async def test_a_real_time_signal_stops(given: int | str) -> None:
    stop = Stop(signal=given)
    assert stop.signum == REAL_TIME + 3
    async with Group(sh("sleep 60"), logs=QUIET, stop=stop) as group:
        result = await group.stop()
    exit = result[0].exit
    assert exit is not None
    assert exit.signal == REAL_TIME + 3
    assert str(exit) == "stopped (SIGRTMIN+3)"
    assert "SIGRTMIN+3 (leader then group)" in str(group.plan)


@pytest.mark.parametrize("given", ["SIGRTMIN+99", "RTMAX+1", 32, 0, 65, -1, "", "SIGRTMIN+", True, 1.5, "²"])
def test_signals_that_are_none(given: Any) -> None:
    with pytest.raises(SpecError, match=r"Stop\.signal=.*is not a signal of this system"):
        Stop(signal=given)


def test_the_last_real_time_signals() -> None:
    assert Stop(signal="SIGRTMAX").signum == signal.SIGRTMAX
    assert Stop(signal="SIGRTMAX-1").signum == signal.SIGRTMAX - 1
    assert Stop(signal="SIGRTMIN").signum == signal.SIGRTMIN


SERVICE = """
def work(up):
    def save(*_):
        print("saved", flush=True)
        os._exit(0)
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(one, save)
    os.write(up, b"up\\n")
    while True:
        signal.pause()
async def main():
    import threading
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        loop.add_signal_handler(one, asked.set)
    trap = "trap 'echo saved; exit 0' TERM INT HUP USR1; echo up; while :; do sleep 0.01; done"
    entries = [Function(work, 1), Function(work, 1), Command("sh", "-c", trap), Command("sh", "-c", trap)]
    async with Group(entries, logs=QUIET, stop=Stop(grace=60), check=False) as group:
        up = set()
        async for line in group.lines():
            up.add(line.rank)
            if len(up) == 4:
                break
        print("up", flush=True)
        await asked.wait()
        result = await group.stop()
    print([str(one.stdout).count("saved") >= 1 and one.exit.ok for one in result], result.clean, flush=True)
if __name__ == "__main__":
    asyncio.run(main())
"""


def family(pid: int) -> list[int]:
    """All processes below it, as they are in one control group."""
    found = [pid]
    for one in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a `sleep` of a worker, which has ended
            for thread in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def names_of(pids: list[int]) -> set[str]:
    """Of those that still run."""
    found = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return found


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_service(tmp_path: Path, signum: signal.Signals) -> None:
    """As systemd (KillMode=control-group) and `kill -- -PGID` send it: helpers of ours outlive it, workers finish."""
    (tmp_path / "service.py").write_text(HEAD + SERVICE)
    with child_process([sys.executable, tmp_path / "service.py"], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "up\n"
        unit = family(program.pid)
        assert {"aio-keeper", "aio-guardian"} <= names_of(unit)
        for pid in unit:
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                pass  # a `sleep` of a worker
        assert program.stdout.read() == "[True, True, True, True] True\n"
    assert program.returncode == 0


def test_a_service_is_signalled_while_it_begins(tmp_path: Path) -> None:
    """No helper dies of it from its first instruction on, and none prints anything."""
    (tmp_path / "slow.py").write_text("import os\nos.write(1, b'importing\\n')\nopen(os.environ['WAIT']).read()\n")
    os.mkfifo(tmp_path / "wait")
    program = """
async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
    result = await supervise(Function(abs, -1), logs=QUIET, preload=["slow"])
    print(result[0].value)
asyncio.run(main())
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "WAIT": str(tmp_path / "wait")}
    words = [sys.executable, "-c", HEAD + program]
    with child_process(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as ran:
        with open(tmp_path / "wait", "w") as wait:  # opens when the zygote has come to its import
            for pid in family(ran.pid):
                os.kill(pid, signal.SIGTERM)
            wait.write("go on")
        out, err = ran.communicate()
    assert (out, err) == ("1\n", "")


# --- standard streams ---


@pytest.mark.parametrize("launcher", ["guardian", "direct"])
@pytest.mark.parametrize("stdin", ["null", "inherit"])
def test_a_closed_standard_input(launcher: str, stdin: str) -> None:
    """No worker gets what has its number then: it reads nothing."""
    program = """
os.close(0)
async def main():
    show = Command("sh", "-c", "readlink /proc/$$/fd/0; cat", stdin=sys.argv[2])
    for _ in range(2):
        print(str((await supervise(show, logs=QUIET, launcher=sys.argv[1]))[0].stdout), end="")
asyncio.run(main())
"""
    assert run(program, launcher, stdin) == "/dev/null\n" * 2
    assert run(program.replace("os.close(0)\n", "", 1), launcher, stdin, before=("sh", "-c", '"$0" "$@" <&-')) == (
        "/dev/null\n" * 2
    )


def test_an_inherited_standard_input(tmp_path: Path) -> None:
    program = """
show = Command("cat", stdin="inherit")
for launcher in ("guardian", "direct"):
    print(str(asyncio.run(supervise(show, logs=QUIET, launcher=launcher))[0].stdout))
    os.lseek(0, 0, os.SEEK_SET)
"""
    (tmp_path / "input").write_text("hello")
    with open(tmp_path / "input") as file:
        assert run(program, stdin=file) == "hello\n" * 2


BACKGROUND = """
import os, signal, sys
pid = os.fork()
if pid:
    os.waitpid(pid, 0)
    os._exit(0)
os.setpgid(0, 0)  # as a shell does with a command that ends with &
import asyncio
from aioelastic import Command, Logs, SpecError, Std, supervise
try:
    asyncio.run(supervise(Command("cat", stdin="inherit"), logs=Logs(tee=Std.NONE)))
except SpecError as exc:
    os.write(int(sys.argv[1]), str(exc).encode())
result = asyncio.run(supervise(Command("cat"), logs=Logs(tee=Std.NONE)))
os.write(int(sys.argv[1]), f" {result.ok}".encode())
"""


def test_a_program_in_the_background_of_its_terminal() -> None:
    ours, theirs = pty.openpty()
    reader, writer = os.pipe()

    def lead() -> None:
        os.setsid()
        ioctl(theirs, termios.TIOCSCTTY, 0)

    try:
        with child_process(
            [sys.executable, "-c", BACKGROUND, str(writer)],
            stdin=theirs,
            preexec_fn=lead,  # nothing else runs here
            pass_fds=[writer],
        ):
            os.close(writer)
            told = b"".join(iter(lambda: os.read(reader, 4096), b"")).decode()
    finally:
        for fd in (ours, theirs, reader):
            os.close(fd)
    assert told == (
        "stdin='inherit' is the terminal in whose background this program runs; "
        "run it in the foreground, or redirect its standard input True"
    )


# --- an interpreter that is none ---

INTERPRETER = """
given = {"app": sys.argv[1], "empty": "", "none": None, "gone": "/no/such/python3", "file": "/etc/passwd"}[sys.argv[2]]
sys.executable = given
if sys.argv[3:]:
    sys.frozen = True
async def main():
    for _ in range(2):
        print(str((await supervise(Command("echo", "hello"), logs=QUIET))[0].stdout), end="")
        for start in ("zygote", "spawn"):
            print((await supervise(Function(abs, -1), logs=QUIET, start=start))[0].value)
asyncio.run(main())
"""


@pytest.fixture
def application(tmp_path: Path) -> Iterator[Path]:
    """A program that must not be started."""
    app = tmp_path / "app"
    app.write_text(f"#!/bin/sh\necho again >>{tmp_path}/again\n")
    app.chmod(0o755)
    yield app
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", ["app", "empty", "none", "gone", "file"])
def test_an_interpreter_is_found_where_it_was_installed(application: Path, kind: str) -> None:
    assert run(INTERPRETER, str(application), kind) == "hello\n1\n1\n" * 2


def test_a_frozen_program_is_not_started_again(tmp_path: Path, application: Path) -> None:
    shutil.copy(application, tmp_path / "python3")
    assert run(INTERPRETER, str(tmp_path / "python3"), "app", "frozen") == "hello\n1\n1\n" * 2


@pytest.mark.parametrize("frozen", [False, True])
def test_no_interpreter_at_all(application: Path, frozen: bool) -> None:
    """Commands start without a guardian; functions are refused in words, but those in copies, before any starts."""
    out = run(
        """
sys.executable = sys._base_executable = sys.argv[1]
sys.prefix = sys.base_prefix = sys.exec_prefix = sys.base_exec_prefix = "/nowhere"
if sys.argv[2] == "True":
    sys.frozen = True
import aioelastic.system.interpreter as found
real = os.readlink
os.readlink = lambda path, **kwargs: sys.argv[1] if path == "/proc/self/exe" else real(path, **kwargs)
print(str(asyncio.run(supervise(Command("echo", "hello"), logs=QUIET))[0].stdout), end="")
for start in ("zygote", "spawn", "fork"):
    try:
        print(asyncio.run(supervise(Function(abs, -1), logs=QUIET, start=start))[0].value)
    except SpecError as exc:
        print(exc.field, exc.problem, exc.remedy, sep="; ")
""",
        str(application),
        str(frozen),
    )
    problem = "is not a Python interpreter that this user may run, and none of this version was found where it belongs"
    remedy = 'start functions with start="fork"'
    if not frozen:
        remedy = f"set sys.executable to the path of a Python {sys.version_info[0]}.{sys.version_info[1]}, or {remedy}"
    assert out.splitlines() == ["hello", *[f"sys.executable; {problem}; {remedy}"] * 2, "1"]


def test_no_argv() -> None:
    program = """
del sys.argv
for start in ("zygote", "spawn", "fork"):
    print(asyncio.run(supervise(Function(abs, -1), logs=QUIET, start=start))[0].value)
"""
    assert run(program) == "1\n" * 3


# --- how the interpreter was started ---

EVERY_WAY = """
from aioelastic import WorkerExecutor
def body(x): return x + 1
async def main(how):
    if how == "executor":
        async with WorkerExecutor(1) as executor:
            print(await executor.run(body, 1))
    elif how == "command":
        print(str((await supervise(Command("echo", "2"), logs=QUIET))[0].stdout), end="")
    else:
        print((await supervise(Function(body, 1), logs=QUIET, start=how))[0].value)
if __name__ == "__main__":
    for how in sys.argv[1:]:
        asyncio.run(main(how))
"""


@pytest.fixture
def every_way(tmp_path: Path) -> Path:
    """A program that starts workers in the ways that it is given by name, each of which prints 2."""
    path = tmp_path / "every_way.py"
    path.write_text(HEAD + EVERY_WAY)
    return path


def ran(*words: str | Path, **kwargs: Any) -> tuple[str, str]:
    """What a program prints to both of its streams."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, **kwargs)
    return done.stdout, done.stderr


@pytest.mark.parametrize("how", ["command", "zygote", "spawn", "fork", "executor"])
def test_each_file_has_an_encoding(every_way: Path, how: str) -> None:
    strict = ("-X", "warn_default_encoding", "-W", "error::EncodingWarning")
    assert ran(sys.executable, *strict, every_way, how) == ("2\n", "")


@pytest.mark.parametrize("ways", [("command",), ("zygote", "spawn", "fork", "executor", "zygote")])
def test_development_mode_finds_nothing(every_way: Path, ways: tuple[str, ...]) -> None:
    """No file or socket of ours is left to the collector, in forked copies too."""
    assert ran(sys.executable, "-X", "dev", "-W", "error", every_way, *ways) == ("2\n" * len(ways), "")


AGENT = "import threading; threading.Thread(target=threading.Event().wait, daemon=True, name='agent').start()\n"


@pytest.mark.parametrize("how", ["command", "zygote", "spawn", "fork", "executor"])
def test_an_agent_with_a_thread_in_every_interpreter(every_way: Path, how: str, tmp_path: Path) -> None:
    """Its thread is not in a forked copy, as everywhere; and what Python says of that from 3.12 on is no news."""
    (tmp_path / "sitecustomize.py").write_text(AGENT)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert ran(sys.executable, "-W", "error", every_way, how, env=env) == ("2\n", "")


@pytest.mark.parametrize("where", ["program", "preload"])
def test_threads_that_imports_start_are_refused_in_words(tmp_path: Path, where: str) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    program = f"""
{"import agent" * (where == "program")}
def body(): pass
if __name__ == "__main__":
    try:
        asyncio.run(supervise(Function(body), logs=QUIET, preload={["agent"] * (where == "preload")}))
    except SpecError as exc:
        print(exc)
"""
    (tmp_path / "program.py").write_text(HEAD + program)
    field = "start='zygote'" if where == "program" else "preload=['agent']"
    words = "cannot be used, as it cannot be forked after its imports: threads run in it (agent), and a forked copy"
    remedy = 'would have their locks but not them; mend that first, or use start="spawn"'
    assert ran(sys.executable, tmp_path / "program.py") == (f"{field} {words} {remedy}\n", "")


# --- other systems ---


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
@pytest.mark.parametrize("what", ["aioelastic", "aioelastic.cli", "aioelastic.sharing"])
def test_another_system_is_told_in_one_line(platform: str, what: str) -> None:
    code = f"import sys; sys.platform = {platform!r}\ntry: import {what}\nexcept ImportError as exc: print(exc)"
    words = f"aioelastic needs Linux, and this is {platform}: run it in a container, or in WSL 2 on Windows\n"
    assert ran(sys.executable, "-c", code) == (words, "")


# --- the command line ---


@pytest.mark.parametrize("module", ["aioelastic.cli._main", "asyncio", "aioelastic.supervisor.group"])
def test_an_early_ctrl_c_ends_the_command_line_without_a_word(tmp_path: Path, module: str) -> None:
    """Whatever is just being imported."""
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
            print("went on", flush=True)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder)
sys.argv = ["aioelastic", "run", "--", "true"]
from aioelastic.cli import program
program()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# --- a limit on the size of files, which one in memory obeys, too ---


@pytest.mark.parametrize("most", [0, 4096, 3_000_000])
@pytest.mark.parametrize("how", ["command", "zygote", "spawn", "fork", "executor"])
def test_what_goes_through_memory_has_no_limit_on_files(tmp_path: Path, how: str, most: int) -> None:
    """Arguments, values, tasks and environments of workers go by pipes then."""
    program = """
import resource
from aioelastic import WorkerExecutor
LARGE = b"x" * 5_000_000
def body(x): return bytearray(x) * 2
async def main(how):
    if how == "executor":
        async with WorkerExecutor(1) as executor:
            value = await executor.run(body, LARGE)
    elif how == "command":
        env = {f"V{one}": "y" * 100_000 for one in range(10)}
        await supervise(Command("sh", "-c", "test ${#V9} = 100000", env=env), logs=QUIET)
        value = LARGE * 2
    else:
        value = (await supervise(Function(body, LARGE), logs=QUIET, start=how))[0].value
    print(value == LARGE * 2)
if __name__ == "__main__":
    most = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    asyncio.run(main(sys.argv[1]))
"""
    (tmp_path / "program.py").write_text(HEAD + program)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # Python would leave halves of files there
    assert ran(sys.executable, tmp_path / "program.py", how, str(most), env=env) == ("True\n", "")


# --- launchers that run the script, and names that the locale cannot write ---


@pytest.mark.parametrize("how", ["command", "zygote", "spawn", "fork", "executor"])
@pytest.mark.parametrize("launcher", ["cProfile -o {}/profile", "trace --count -C {}/counts", "pdb -c c -c q"])
def test_a_launcher_runs_the_script(every_way: Path, tmp_path: Path, how: str, launcher: str) -> None:
    out, err = ran(sys.executable, "-m", *launcher.format(tmp_path).split(), every_way, how)
    assert (out.partition("\n")[0], err) == ("2", "")


@pytest.mark.parametrize("how", ["command", "zygote", "spawn", "fork", "executor"])
@pytest.mark.parametrize("name", [b"n\xc3\xa4me", b"n\xe4me"])
def test_a_name_that_the_locale_cannot_write(every_way: Path, tmp_path: Path, how: str, name: bytes) -> None:
    home = tmp_path / os.fsdecode(name)
    home.mkdir()
    shutil.copy(every_way, home)
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    path = home / every_way.name
    done = subprocess.run([sys.executable, path, how], cwd=home, env=env, capture_output=True, timeout=100)
    assert (done.stdout, done.stderr) == (b"2\n", b"")


# --- environments ---


@pytest.mark.parametrize("how", ["command", "zygote", "spawn", "fork", "executor"])
def test_an_environment_with_odd_entries(every_way: Path, how: str) -> None:
    """Without a name, without a value, and in no encoding."""
    code = """
import ctypes, os, sys
found = [b"=C:=odd", b"novalue", b"=", b"BASH_FUNC_x%%=() { :; }", b"A\\xff=\\xfe", b"PATH=" + os.environb[b"PATH"]]
argv = [os.fsencode(one) for one in (sys.executable, *sys.argv[1:])]
texts = [(ctypes.c_char_p * (len(one) + 1))(*one, None) for one in (argv, found)]
ctypes.CDLL(None).execve(argv[0], *texts)
"""
    assert ran(sys.executable, "-c", code, every_way, how) == ("2\n", "")


@pytest.mark.parametrize("how", ["command", "zygote", "spawn", "fork", "executor"])
def test_an_environment_beyond_what_execve_takes(tmp_path: Path, every_way: Path, how: str) -> None:
    """The program has set it for itself; only a fork can have it."""
    program = f"""
import os
for one in range(80):
    os.environ[f"V{{one}}"] = "x" * 100_000
exec(compile(open({str(every_way)!r}).read(), __file__, "exec"))
"""
    (tmp_path / "program.py").write_text(program)
    out, err = ran(sys.executable, tmp_path / "program.py", how)
    if how == "fork":
        assert (out, err) == ("2\n", "")
    else:
        assert re.search(r"SpecError: (argv and )?env=\d+( of rank 0)? are more bytes than execve\(2\) takes", err), err


# --- a job around it ---


@pytest.mark.parametrize("start", ["command", "zygote", "spawn", "fork"])
def test_a_group_within_a_job_of_torchrun(tmp_path: Path, start: str) -> None:
    """What a worker of torchrun has, each as of another job: nothing of that is left."""
    keys = [key for key in torchrun(25) if key != "LOCAL_RANK"]  # that is 1 here, too
    program = """
SHOW = Command(sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))")
def body(): return dict(os.environ)
if __name__ == "__main__":
    if sys.argv[1] == "command":
        print(str(asyncio.run(supervise(SHOW, n=2, logs=QUIET))[1].stdout))
    else:
        print(json.dumps(asyncio.run(supervise(Function(body), n=2, logs=QUIET, start=sys.argv[1]))[1].value))
"""
    (tmp_path / "program.py").write_text(HEAD + program)
    outer = torchrun(25)
    out, err = ran(sys.executable, tmp_path / "program.py", start, env=os.environ | outer)
    assert err == ""
    told = json.loads(out)
    assert [key for key in keys if told.get(key) == outer[key]] == []
    assert (told["RANK"], told["ROLE_RANK"], told["TORCHELASTIC_USE_AGENT_STORE"]) == ("1", "1", "False")


# --- system calls that are missing, or forbidden in a sandbox ---

DENIED = """
import ctypes, os, struct, sys
number, code = map(int, sys.argv[1:3])
words = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | code), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in words))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(words), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program)) == 0  # seccomp(2)
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""
CALLS = {"pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "faccessat2": (439, 439), "ioprio_get": (252, 31)}
CALLS |= {"memfd_create": (319, 279), "timerfd_create": (283, 85), "signalfd4": (289, 74)}
without_calls = pytest.mark.skipif(
    os.uname().machine not in ("x86_64", "aarch64"), reason="the numbers of its system calls are not known"
)


def denied(call: str, code: int, *words: str | Path) -> tuple[str, str]:
    """What a program prints for which that call fails."""
    number = CALLS[call][os.uname().machine == "aarch64"]
    return ran(sys.executable, "-c", DENIED, str(number), str(code), *words)


@without_calls
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_a_call_that_fails(every_way: Path, call: str, code: int) -> None:
    """Workers start in another way."""
    ways = ["command", "zygote", "spawn", "fork", "executor"]
    if call == "pidfd_open":
        ways = ["command", "spawn", "fork"]
    assert denied(call, code, every_way, *ways) == ("2\n" * len(ways), "")


@without_calls
@pytest.mark.parametrize("how", ["zygote", "executor"])
def test_no_zygote_without_pidfds(every_way: Path, how: str) -> None:
    """One error with the remedy, before anything has begun."""
    _, err = denied("pidfd_open", errno.ENOSYS, every_way, how)
    words = "start='zygote' needs pidfd_open(2), which this kernel has not or this sandbox forbids; use start=\"spawn\""
    assert err.splitlines()[-1] == f"aioelastic.errors.SpecError: {words}"


@without_calls
@pytest.mark.parametrize("launcher", ["guardian", "direct"])
def test_signals_by_number_reach_workers_and_what_they_leave(tmp_path: Path, launcher: str) -> None:
    program = """
def runs(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
async def main():
    script = "trap 'exit 7' TERM; setsid sh -c 'echo $$; exec sleep 1000' & wait"
    async with Group(Command("sh", "-c", script), logs=QUIET, check=False, launcher=sys.argv[1]) as group:
        async for line in group.lines():
            left = int(line.text)
            break
        assert runs(left)
        async with Group(Function(signal.pause), logs=QUIET, check=False) as functions:
            other = await functions.stop()
        result = await group.stop()
    print(result[0].exit.code, runs(left), other[0].exit.signal)
asyncio.run(main())
"""
    (tmp_path / "program.py").write_text(HEAD + program)
    out, err = denied("pidfd_send_signal", errno.EPERM, tmp_path / "program.py", launcher)
    assert (out, err) == ("7 False 15\n", "")


# --- what is missing ---


def test_a_working_directory_that_is_gone() -> None:
    program = """
os.rmdir(os.getcwd())
print(str(asyncio.run(supervise(Command("echo", "hello"), logs=QUIET))[0].stdout), end="")
for start in ("zygote", "spawn", "fork"):
    print(asyncio.run(supervise(Function(abs, -1), logs=QUIET, start=start))[0].value)
"""
    assert run(program, cwd=tempfile.mkdtemp()) == "hello\n" + "1\n" * 3


@pytest.mark.parametrize("how", ["command", "zygote", "spawn", "executor", "fork", "direct", "elsewhere"])
def test_a_working_directory_that_may_not_be_entered(tmp_path: Path, how: str) -> None:
    """As after `sudo -u app` in the home of root: a child stays there, but no child of a guardian gets there."""
    program = """
import ctypes
from aioelastic import WorkerExecutor
def give_up_rights():
    libc, header, data = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)
    libc.capget(header, data)
    for at in range(3):
        data[at] &= ~0b110
    libc.capset(header, data)
def body(): return 7
async def main(how):
    if how == "executor":
        async with WorkerExecutor(1) as executor:
            print(await executor.run(body))
    elif how in ("command", "direct"):
        launcher = "direct" if how == "direct" else "guardian"
        print(str((await supervise(Command("echo", "7"), logs=QUIET, launcher=launcher))[0].stdout), end="")
    elif how == "elsewhere":
        print(str((await supervise(Command("echo", "7", cwd="/"), logs=QUIET))[0].stdout), end="")
    else:
        print((await supervise(Function(body), logs=QUIET, start=how))[0].value)
if __name__ == "__main__":
    os.chdir(sys.argv[2])
    give_up_rights()
    os.chmod(".", 0)
    try:
        asyncio.run(main(sys.argv[1]))
    except SpecError as exc:
        print(exc)
"""
    (tmp_path / "program.py").write_text(HEAD + program)
    (tmp_path / "private").mkdir()
    out, err = ran(sys.executable, tmp_path / "program.py", how, tmp_path / "private")
    assert err == ""
    if how in ("fork", "direct", "elsewhere"):
        assert out == "7\n"
    else:
        words = 'is where this program stands, and may not be entered by this user; give another one, as cwd="/"'
        assert out in [f"cwd={str(tmp_path / 'private')!r} of rank {rank} {words}\n" for rank in (0, 1)]


def test_no_proc() -> None:
    """Commands are started without a guardian, and so nothing is proven; functions by a zygote all the same."""
    mounted = "mount --make-rprivate / && mount -t tmpfs none /proc && exec"
    before = ("unshare", "--mount", "sh", "-c", f'{mounted} "$0" "$@"')
    try:
        possible = subprocess.run([*before, "true"], capture_output=True).returncode == 0
    except OSError:
        possible = False
    if not possible:
        pytest.skip("needs root")
    program = """
async def main():
    one = await supervise(Command("sh", "-c", "echo hello; exit 3"), logs=QUIET, check=False)
    two = await supervise(Function(abs, -1), logs=QUIET)
    print(one[0].exit.code, str(one[0].stdout).strip(), [it.kind for it in one.remains], two[0].value)
asyncio.run(main())
"""
    assert run(program, before=before) == "3 hello ['unproven'] 1\n"


def test_no_thread() -> None:
    program = """
import threading
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
for entry in (Command("true"), Function(abs, -1)):
    try:
        asyncio.run(supervise(entry, logs=QUIET, timeout=30))
    except SpecError as exc:
        print(exc)
"""
    words = "thread='aioelastic-proc' cannot be had: can't start new thread; "
    remedy = "raise `ulimit -u`, or pids.max of the control group\n"
    assert run(program) == (words + remedy) * 2


@pytest.mark.parametrize("left", range(12))
async def test_hardly_a_descriptor(left: int) -> None:
    """A group begins, or says that it cannot, with however few; and nothing is left of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    await supervise(sh("exit 0"), logs=QUIET)  # what is imported and kept by the first group is there
    with no_descriptors_left():
        held = [resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + left, hard))
        for entry in (sh("exit 3"), Function(abs, -1)):
            try:
                result = await supervise(entry, logs=QUIET, check=False)
            except SpecError as exc:
                assert exc.field in ("RLIMIT_NOFILE", "n"), exc  # noqa: PT017
            else:
                assert result[0].exit is None or result[0].exit.code == (3 if isinstance(entry, Command) else 0)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


# --- what has changed since ---


@pytest.mark.parametrize("launcher", ["guardian", "direct"])
async def test_a_later_attempt_begins_with_what_there_is_then(launcher: Any) -> None:
    """Nice is a thread's own: the thread that starts has it, not one of ours that is older."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    later = before + 1 if before < 19 else before - 1  # 19 is the most there is
    script = "import os, sys; print(os.getpriority(0, 0)); sys.exit(os.environ['AIOELASTIC_ATTEMPT'] == '0')"
    told: list[str] = []

    def renice(event: events.Event) -> None:
        if isinstance(event, events.Restarting):
            os.setpriority(os.PRIO_PROCESS, 0, later)

    try:
        async with Group(
            py(script), logs=QUIET, restart=Restart.on_failure(1), launcher=launcher, on_event=renice
        ) as group:
            async for line in group.lines():
                told.append(line.text)
    finally:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, before)
        except PermissionError:
            pytest.skip("needs root")
    assert told == [str(before), str(later)]


def test_rights_that_were_given_up() -> None:
    """A group that runs goes on with its guardian, later workers have another, and the old one ends with its group."""
    program = """
import ctypes, psutil, select
def drop():  # CAP_SYS_BOOT from the bounding set: PR_CAPBSET_DROP
    return ctypes.CDLL(None).prctl(24, 22, 0, 0, 0)
def bound():
    return next(line for line in open("/proc/self/status") if line.startswith("CapBnd"))
def name(one):
    try:
        return one.name() if one.status() != "zombie" else ""
    except psutil.NoSuchProcess:  # it has ended between two looks
        return ""
def keepers():
    return [one for one in psutil.Process().children() if name(one) == "aio-keeper"]
async def main():
    show = Command("grep", "CapBnd", "/proc/self/status")
    async with Group(Command("sleep", "60"), logs=QUIET, check=False) as group:
        await supervise(Function(abs, -1), logs=QUIET)
        (first,) = keepers()
        first = os.pidfd_open(first.pid)
        if drop():
            print("not here")
            return
        one, two = await supervise(show, logs=QUIET), await supervise(Function(abs, -1), logs=QUIET)
        print(str(one[0].stdout) == bound(), len(keepers()), list(group.pids))
        await group.stop()
        await supervise(show, logs=QUIET)
        select.select([first], [], [])  # it is told to go, and waited for only for a moment
        print(len(keepers()))
asyncio.run(main())
"""
    out = run(program)
    if out == "not here\n":
        pytest.skip("needs root")
    assert out == "True 2 [0]\n1\n"


def test_a_warm_zygote_with_rights_that_were_given_up_goes() -> None:
    """And with it its guardian, though only commands are started afterwards."""
    program = """
import ctypes, psutil, select
def name(one):
    try:
        return one.name() if one.status() != "zombie" else ""
    except psutil.NoSuchProcess:  # it has ended between two looks
        return ""
def helpers():
    mine = psutil.Process().children(recursive=True)
    return sorted(found for one in mine if (found := name(one)))
async def main():
    await supervise(Function(abs, -1), logs=QUIET)
    before = [os.pidfd_open(one.pid) for one in psutil.Process().children(recursive=True) if name(one)]
    if ctypes.CDLL(None).prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        print("not here")
    result = await supervise(Command("grep", "NoNewPrivs", "/proc/self/status"), logs=QUIET)
    for one in before:  # they are told to go, and waited for only for a moment
        select.select([one], [], [])
    print(str(result[0].stdout).split()[1], len(before), helpers())
asyncio.run(main())
"""
    assert run(program) == "1 3 ['aio-guardian', 'aio-keeper']\n"


def test_a_root_directory_of_its_own() -> None:
    """With CAP_SYS_CHROOT alone, as in containers; there is no /proc in there."""
    program = """
import ctypes
libc = ctypes.CDLL(None)
async def main():
    show = Command("/bin/ls", "/", stdin="inherit")
    await supervise(show, logs=QUIET)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    for at in range(3):
        data[at] &= ~(1 << 21)  # CAP_SYS_ADMIN
    libc.capset(header, data)
    await supervise(show, logs=QUIET)
    try:
        os.chroot("/usr")
    except PermissionError:
        print("not here")
        return
    print(str((await supervise(show, logs=QUIET))[0].stdout) == "".join(f"{one}\\n" for one in sorted(os.listdir("/"))))
asyncio.run(main())
"""
    if not os.path.exists("/usr/bin/ls") or not os.path.exists("/usr/lib64"):
        pytest.skip("needs root, and a system with all programs below /usr")
    out = run(program, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})
    if out == "not here\n":
        pytest.skip("needs root")
    assert out == "True\n"


def test_a_limit_on_descriptors_that_was_raised() -> None:
    """The guardian opens descriptors for each start, within the limit that it was born with."""
    program = """
import resource
async def main():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    await supervise(Command("true"), logs=QUIET)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    async with Group(Command("sleep", "60"), n=100, logs=QUIET) as group:
        print(len(group.pids))
asyncio.run(main())
"""
    assert run(program) == "100\n"


@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
def test_the_trace_of_a_crash(start: str) -> None:
    """Where the program itself has faulthandler on, too."""
    program = """
import ctypes, faulthandler
faulthandler.enable()
result = asyncio.run(supervise(Function(ctypes.string_at, 0), logs=QUIET, start=sys.argv[1], check=False))
print("Fatal Python error: Segmentation fault" in str(result[0].stderr), result[0].exit.signal)
"""
    assert run(program, start) == "True 11\n"


@pytest.mark.parametrize("start", ["zygote", "fork"])
def test_an_early_ctrl_c_is_nothing_but_a_stop(tmp_path: Path, start: str) -> None:
    """Whenever it comes to a function that is just being set up."""
    program = """
def work():
    signal.pause()
async def main():
    for _ in range(25):
        stop = Stop(signal="SIGINT")
        async with Group(Function(work), n=2, logs=QUIET, start=sys.argv[1], stop=stop, check=False) as group:
            result = await group.stop()
        assert not result.failures, result.failures
        told = [str(one.stderr) for one in result]
        assert not any("could not be set up" in one for one in told), told
    print("fine")
if __name__ == "__main__":
    asyncio.run(main())
"""
    (tmp_path / "program.py").write_text(HEAD + program)
    ran = subprocess.run([sys.executable, tmp_path / "program.py", start], capture_output=True, text=True, timeout=100)
    assert (ran.stdout, ran.stderr) == ("fine\n", "")


def test_the_stacks_signal_stops_nobody() -> None:
    with pytest.raises(
        SpecError, match=r"Stop\.signal='SIGRTMIN\+\d+' is the one by which a worker is asked for its stacks"
    ):
        Stop(signal=SIGNAL)


async def test_umask_of_each_group() -> None:
    before = os.umask(0o022)
    try:
        first = await supervise(sh("umask"), n=20, logs=QUIET)
        os.umask(0o027)
        second = await supervise(sh("umask"), n=20, logs=QUIET)
    finally:
        os.umask(before)
    assert {str(one.stdout) for one in first} == {"0022\n"}
    assert {str(one.stdout) for one in second} == {"0027\n"}


# --- placements are tried ---


def test_a_place_is_tried_where_capabilities_say_yes() -> None:
    """In a user namespace root has all capabilities, and the kernel refuses what they are for."""
    before = ("unshare", "--user", "--map-root-user")
    try:
        if subprocess.run([*before, "true"], capture_output=True).returncode:
            raise Unavailable("this user may have no user namespace")
    except (OSError, Unavailable):
        pytest.skip("needs root, or user namespaces")
    out = run(
        """
import resource
from aioelastic import Placement
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
assert "CapEff:\\t0000000000000000" not in open("/proc/self/status").read()
for entry in (Command("true"), Function(abs, -1)):
    for given in (dict(nice=-5), dict(oom_score_adj=-5), dict(limits={"CORE": 10}), dict(nice=19)):
        try:
            print(asyncio.run(supervise(entry, logs=QUIET, placement=Placement(**given))).ok)
        except SpecError as exc:
            print(exc.field)
""",
        before=before,
    )
    fields = ["Placement.nice of rank 0", "Placement.oom_score_adj of rank 0", "Placement.limits['CORE'] of rank 0"]
    assert out.splitlines() == [*fields, "True"] * 2


@pytest.mark.parametrize("launcher", ["guardian", "direct"])
def test_a_stop_that_was_not_permitted_is_not_told_as_the_cause(launcher: str, tmp_path: Path) -> None:
    """A worker that runs as root since its start is out of reach for its host, and ends as it likes."""
    setpriv, fifo = shutil.which("setpriv"), tmp_path / "fifo"
    if setpriv is None or os.geteuid() != 0:
        pytest.skip("needs root, and setpriv")
    os.mkfifo(fifo, 0o666)
    os.chmod(fifo, 0o666)
    program = str(shutil.copy(setpriv, tmp_path / "setpriv"))
    os.chmod(program, 0o4755)
    code = """
script = "echo up; trap : TERM; read x < \\"$0\\"; exit 3"
root = Command(sys.argv[1], "--reuid=0", "sh", "-c", script, sys.argv[2])
def let_go(event):
    if isinstance(event, events.Stopping):
        os.close(os.open(sys.argv[2], os.O_WRONLY))
async def main():
    given = dict(logs=QUIET, stop=Stop(grace=100), launcher=sys.argv[3], on_event=let_go, check=False)
    async with Group(root, **given) as group:
        async for line in group.lines():
            await group.stop()
        result = await group.wait()
    print(result[0].exit.code, result[0].exit.stopped_by, result[0].why.kind)
asyncio.run(main())
"""
    # not CAP_KILL; the others are for the directories that only we may enter
    caps = "+dac_override,+dac_read_search"
    before = (setpriv, "--reuid=65534", f"--inh-caps={caps}", f"--ambient-caps={caps}")
    out = run("from aioelastic import events\n" + code, program, str(fifo), launcher, before=before)
    if out == "":
        pytest.skip("needs a file system that has set-user-ID programs")
    assert out == "3 None exit_code\n"


def test_what_a_capability_permits_is_not_refused(tmp_path: Path) -> None:
    """access(2) asks for the real user, and knows no capabilities: as of a service with AmbientCapabilities."""
    setpriv = shutil.which("setpriv")
    if setpriv is None or os.geteuid() != 0:
        pytest.skip("needs root, and setpriv")
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    shutil.copy("/bin/echo", mine / "say")
    (mine / "script").write_text(f"#!{mine}/say\n")
    (mine / "script").chmod(0o755)
    code = """
for words in (["say", "by PATH"], [sys.argv[1] + "/say", "by name"], ["script"]):
    command = Command(*words, env={"PATH": sys.argv[1]}, cwd=sys.argv[1])
    print(asyncio.run(supervise(command, logs=QUIET))[0].stdout, end="")
"""
    caps = "+dac_override,+dac_read_search"
    before = (setpriv, "--reuid=65534", f"--inh-caps={caps}", f"--ambient-caps={caps}")
    assert run(code, str(mine), before=before) == f"by PATH\nby name\n{mine}/script\n"
