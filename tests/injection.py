"""Lets one system call of ours fail, or take long, at each place where one is made; places are read from the source.

python tests/injection.py             how many places there are, and which the scenario does not come to
python tests/injection.py --all       each place, with each errno of its man page, once and always, and slow
python tests/injection.py SITE ERRNO once|always|slow      one of them, with all that it says

Each trial is a program of its own: a group of three workers (a command that writes much, a function, and a command that
fails) and a second group beside it run through start, output, one failure and stop. The modules of aioelastic are
compiled with each such call turned into one of `reach()`, in the program, its guardian and its zygotes.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import errno
import importlib.abc
import importlib.machinery
import importlib.util
import json
import marshal
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent.parent / "aioelastic"
# what starts, watches, reads, writes and ends processes
ROOMS = (
    "child",
    "launch",
    "watch",
    "streams",
    "shm.py",
    "report.py",
    "ground.py",
    "replies.py",
    "sinks.py",
    "worker.py",
)
GRACE, BOUND = 1.0, 1.0
SLOW = 5.0  # seconds that a slow call takes
LINES = 20_000
VARIABLE = "AIOELASTIC_TESTS_INJECTION"

# the errors of each call, by its man page in section 2; none: it cannot fail, or what we do after it is not ours
_FILES = ("EACCES", "EIO", "EMFILE", "ENFILE", "ENOENT", "ENOMEM", "ENOSPC", "EROFS", "ESTALE", "EPERM")
_MEMORY = ("ENOMEM", "EMFILE", "ENFILE")
ERRNOS: dict[str, tuple[str, ...]] = {
    "open": _FILES,
    "dup": ("EMFILE", "EBADF", "ENOMEM"),
    "dup2": ("EMFILE", "EBADF", "EBUSY"),
    "pipe2": ("EMFILE", "ENFILE"),
    "eventfd": _MEMORY,
    "memfd_create": _MEMORY,
    "pidfd_open": ("ESRCH", *_MEMORY),
    "pidfd_send_signal": ("ESRCH", "EPERM"),
    "kill": ("ESRCH", "EPERM"),
    "killpg": ("ESRCH", "EPERM"),
    "fork": ("EAGAIN", "ENOMEM"),
    "posix_spawn": ("EAGAIN", "ENOMEM", "EACCES", "ENOENT", "E2BIG", "ENOEXEC", "ETXTBSY"),
    "execve": ("EACCES", "ENOENT", "E2BIG", "ENOMEM", "ENOEXEC", "ETXTBSY"),
    "waitpid": ("ECHILD",),
    "wait4": ("ECHILD",),
    "waitid": ("ECHILD",),
    "chdir": ("ENOENT", "EACCES", "EIO", "ESTALE"),
    "read": ("EIO", "EBADF"),
    "readv": ("EIO",),
    "pread": ("EIO", "ESTALE"),
    "write": ("EIO", "ENOSPC", "EPIPE", "EDQUOT", "EFBIG"),
    "writev": ("EIO", "ENOSPC", "EDQUOT", "EFBIG", "ESTALE"),
    "pwrite": ("EIO", "ENOSPC"),
    "ftruncate": ("EIO", "EFBIG"),
    "fstat": ("EIO", "ESTALE"),
    "stat": _FILES[:2],
    "listdir": ("EIO", "EMFILE", "ENOENT", "EACCES"),
    "scandir": ("EIO", "EMFILE", "ENOENT"),
    "readlink": ("ENOENT", "EACCES"),
    "unlink": ("EIO", "EACCES", "EROFS"),
    "rmdir": ("EIO", "EBUSY", "ENOTEMPTY"),
    "mkdir": ("EACCES", "ENOSPC", "EROFS"),
    "replace": ("EIO", "ENOSPC"),
    "setsid": ("EPERM",),
    "fcntl": ("EINVAL", "EMFILE"),
    "flock": ("EWOULDBLOCK", "ENOLCK"),
    "set_blocking": ("EBADF",),
    "epoll": _MEMORY,
    "register": ("ENOMEM", "ENOSPC"),
    "modify": ("ENOMEM", "ENOENT"),
    "poll": (),
    "recvmsg": ("ECONNRESET", "ENOMEM"),
    "sendmsg": ("ECONNRESET", "EPIPE", "ENOMEM", "ENOBUFS", "ETOOMANYREFS"),
    "send": ("ECONNRESET", "EPIPE", "ENOMEM", "ENOBUFS"),
    "recv": ("ECONNRESET", "ENOMEM"),
    "socketpair": ("EMFILE", "ENFILE"),
    "socket": ("EMFILE", "ENFILE", "ENOBUFS"),
    "mmap": ("ENOMEM", "EACCES"),
    "getrlimit": (),
    "setrlimit": ("EPERM",),
    "prlimit": ("EPERM", "ESRCH"),
    "sched_getaffinity": ("ESRCH",),
    "sched_setaffinity": ("EINVAL",),
    "getpriority": ("ESRCH",),
    "setpriority": ("EACCES",),
    "close": ("EIO",),
}
_MODULES = {"os", "select", "_signal", "signal", "fcntl", "resource", "socket", "mmap"}
# calls of objects: what they are called on, as it is written there
_OBJECTS = {
    "sock",
    "self.sock",
    "self._control",
    "self._epoll",
    "control",
    "self._channel",
    "channel",
    "ours",
    "theirs",
}


def call_of(node: ast.Call) -> str | None:
    """Which system call that is, if it is one."""
    match node.func:
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in _MODULES and name in ERRNOS:
            return name
        case ast.Attribute(value=on, attr=name) if name in ERRNOS and ast.unparse(on) in _OBJECTS:
            return name
        case ast.Name(id="open"):
            return "open"
    return None


class Turn(ast.NodeTransformer):
    """Turns each system call into one of `reach`."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.sites: list[str] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = call_of(node)
        if name is None:
            return node
        site = f"{self.file}:{node.lineno}:{node.col_offset}:{name}"
        self.sites.append(site)
        args = [ast.Constant(site), node.func, *node.args]
        made = ast.Call(ast.Name("_injection_reach", ast.Load()), args, node.keywords)
        return ast.copy_location(made, node)


def files() -> Iterator[Path]:
    for room in ROOMS:
        found = HOME / room
        yield from sorted(found.rglob("*.py")) if found.is_dir() else [found]


def turned(path: Path) -> tuple[ast.Module, list[str]]:
    turn = Turn(str(path.relative_to(HOME)))
    tree = turn.visit(ast.parse(path.read_text()))
    return ast.fix_missing_locations(tree), turn.sites


def sites() -> list[str]:
    """All places, in their order."""
    return [site for path in files() for site in turned(path)[1]]


# --- in each process of a trial ---


class Loader(importlib.abc.InspectLoader):
    def __init__(self, path: Path, cache: str) -> None:
        self._path = path
        self._cached = os.path.join(cache, str(path.relative_to(HOME)).replace("/", "-"))

    def get_source(self, fullname: str) -> str:
        return self._path.read_text()

    def get_code(self, fullname: str) -> Any:
        try:
            with open(self._cached, "rb") as file:
                return marshal.load(file)
        except (OSError, EOFError, ValueError):
            code = compile(turned(self._path)[0], str(self._path), "exec", dont_inherit=True)
            fd, name = tempfile.mkstemp(dir=os.path.dirname(self._cached))
            with open(fd, "wb") as file:
                file.write(marshal.dumps(code))
            os.replace(name, self._cached)
            return code


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, cache: str) -> None:
        self._cache = cache
        self._known = {self._name(path): path for path in files()}

    @staticmethod
    def _name(path: Path) -> str:
        words = path.relative_to(HOME.parent).with_suffix("").parts
        return ".".join(words[:-1] if words[-1] == "__init__" else words)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        found = self._known.get(name)
        if found is None:
            return None
        below = [str(found.parent)] if found.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, found, loader=Loader(found, self._cache), submodule_search_locations=below
        )


def install() -> None:
    """Have the modules of aioelastic that are imported from now on call `reach`."""
    with open(os.environ[VARIABLE]) as file:
        config = json.load(file)
    fd = os.open(config["state"], os.O_RDWR)
    state = mmap.mmap(fd, 16)
    os.close(fd)
    trace: str = config["trace"]
    target, number, how = config["site"], config["errno"], config["how"]
    seen: set[str] = set()

    def reach(site: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if trace and site not in seen:
            seen.add(site)
            with contextlib.suppress(OSError):  # no descriptor of this is kept: those that fork close all
                fd = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
                os.write(fd, f"{site}\n".encode())
                os.close(fd)
        if site != target or not state[0] or (how != "always" and state[1]):
            return call(*args, **kwargs)
        state[1] = 1
        if how == "slow":
            time.sleep(SLOW)
            return call(*args, **kwargs)
        if site.endswith(":close"):
            call(*args, **kwargs)  # whatever it says, the descriptor is closed (close(2))
        raise OSError(number, os.strerror(number))

    builtins._injection_reach = reach  # type: ignore[attr-defined]
    sys.meta_path.insert(0, Finder(config["cache"]))


PRELUDE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import injection; injection.install(); "
PRELUDE += "del sys.path[0]\n"


def passed_on() -> None:
    """Have the interpreters that aioelastic starts do the same."""
    from aioelastic.launch import _call, _direct, _guardian, _zygote

    def with_prelude(argv: Sequence[str]) -> list[str]:
        return [*argv[:-1], PRELUDE + argv[-1]]

    guardian, interpreter = _guardian._argv, _call.interpreter
    _guardian._argv = lambda: with_prelude(guardian())
    for module in (_direct, _guardian, _zygote):
        module.interpreter = lambda call: with_prelude(interpreter(call))  # type: ignore[attr-defined]


def count(n: int) -> int:
    """What the function worker does."""
    print("counting", flush=True)
    return sum(range(n))


def scenario() -> None:
    """The program of a trial; prints what came of it."""
    install()
    sys.path.insert(0, str(HOME.parent))
    import asyncio

    import aioelastic
    from aioelastic import Command, Function, Group, Logs, Std, Stop
    from aioelastic.events import SinkTrouble

    passed_on()
    here = Path(os.environ[VARIABLE]).parent
    gates = {name: here / name for name in ("beside", "fails")}
    for gate in gates.values():
        os.mkfifo(gate)
    opened = {name: os.open(gate, os.O_RDWR) for name, gate in gates.items()}
    with open(here / "state", "r+b") as file:
        state = mmap.mmap(file.fileno(), 16)
    stop = Stop(grace=GRACE, bound=BOUND)
    told: dict[str, Any] = {"error": None, "loops": []}

    def command(script: str) -> Command:
        return Command("/bin/sh", "-c", script)

    async def ours() -> None:
        loop = asyncio.get_running_loop()
        entries = [
            command(f"seq {LINES}; echo end; exec sleep 600"),
            Function(count, 1000),
            command(f"read x < {gates['fails']}; exit 3"),
        ]
        began = None
        try:
            logs = Logs(dir=here / "logs", tee=Std.NONE)
            async with Group(entries, logs=logs, stop=stop, check=False, name="ours") as group:
                try:
                    async with asyncio.timeout(10):
                        async for line in group.lines(ranks=[0]):
                            if line.text == "end":
                                break
                        os.write(opened["fails"], b"go\n")
                        result = await group.wait()
                except TimeoutError:
                    began = loop.time()
                    result = await group.stop()
                    told["stopped"] = loop.time() - began
                troubles = [one async for one in group.events() if isinstance(one, SinkTrouble)]
        except BaseException as exc:
            told["error"] = f"{type(exc).__name__}: {exc}"[:2000]
            if not isinstance(exc, Exception):
                raise
            return
        told["troubles"] = [f"{one.sink}: {one.problem}" for one in troubles]
        stops = [one.exit for one in result if one.exit is not None and one.exit.stopped_by]
        told["result"] = {
            "ok": result.ok,
            "codes": [None if one.exit is None else [one.exit.code, one.exit.signal] for one in result],
            "why": [str(one.why) for one in result],
            "remains": [str(one) for one in result.remains],
            "total": result[0].stdout.total,
            "logged": result[0].stdout.path.stat().st_size if result[0].stdout.path else 0,
            "lost": result[0].stdout.lost,
            "value": result[1].value,
            "stopped": len(stops),
        }

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told["loops"].append(str(context)[:500]))
        script = f"echo before; read x < {gates['beside']}; echo after"
        logs = Logs(dir=here / "logs", tee=Std.NONE)
        async with Group(command(script), logs=logs, stop=stop, check=False, name="beside") as beside:
            await anext(aiter(beside.lines()))
            state[0] = 1
            began = loop.time()
            await ours()
            told["took"] = loop.time() - began
            state[0] = 0
            os.write(opened["beside"], b"go\n")
            result = await beside.wait()
            path = result[0].stdout.path
            told["beside"] = [str(result[0].why or ""), path.read_text() if path else "", [*map(str, result.remains)]]

    asyncio.run(main())
    told["fired"] = bool(state[1])
    told["version"] = aioelastic.__version__
    print(json.dumps(told))


# --- the trials ---


@dataclass(frozen=True)
class Trial:
    """One call that fails.

    Attributes:
        how: `"once"`, `"always"` from the beginning of the group on, or `"slow"`, once.
    """

    site: str
    errno: str
    how: str

    def __str__(self) -> str:
        return f"{self.site} {self.errno} {self.how}"


def trials() -> Iterator[Trial]:
    for site in sites():
        for name in ERRNOS[site.rpartition(":")[2]]:
            for how in ("once", "always"):
                yield Trial(site, name, how)
        yield Trial(site, "", "slow")


def environment_of(pid: str) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read(1 << 20)
    except OSError:
        return b""


def left(config: str) -> list[str]:
    """Processes that carry the trial's name."""
    mine = f"{VARIABLE}={config}".encode()
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and mine in environment_of(pid).split(b"\0")]


def run(trial: Trial, cache: str, trace: str = "", bound: float = 60.0) -> tuple[dict[str, Any], list[str]]:
    """One trial: what came of it, and what is wrong with that."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="injection-") as name:
        here = Path(name)
        (here / "state").write_bytes(bytes(16))
        (here / "tmp").mkdir()
        number = getattr(errno, trial.errno) if trial.errno else 0
        config = {"site": trial.site, "errno": number, "how": trial.how, "trace": trace}
        config |= {"state": str(here / "state"), "cache": cache}
        (here / "config").write_text(json.dumps(config))
        environ = {**os.environ, VARIABLE: str(here / "config"), "TMPDIR": str(here / "tmp")}
        words = [sys.executable, "-c", f"{PRELUDE.replace('injection.install()', 'injection.scenario()')}"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, text=True) as program:
            try:
                out, err = program.communicate(timeout=bound)
            except subprocess.TimeoutExpired:
                program.kill()
                out, err = program.communicate()
                wrong.append(f"it had not ended after {bound:g} s")
        late = time.monotonic() + 10  # the guardian ends after its program
        while (there := left(str(here / "config"))) and time.monotonic() < late:
            time.sleep(0.01)
        for pid in there:
            with open(f"/proc/{pid}/cmdline") as file:
                wrong.append(f"left behind: process {pid}, {file.read(200)!r}")
            os.kill(int(pid), signal.SIGKILL)
        wrong += [f"left behind: {one.relative_to(here)}" for one in (here / "tmp").iterdir()]
        told: dict[str, Any] = json.loads(out) if program.returncode == 0 else {}
        if not told:
            wrong.append(f"the program ended with {program.returncode}: {err[-2000:]}")
        else:
            wrong += judge(trial, told)
            if said := [line for line in err.splitlines() if not line.startswith("aioelastic: ")]:
                wrong.append(f"it said: {chr(10).join(said)[-2000:]}")
        return told, wrong


def judge(trial: Trial, told: dict[str, Any]) -> list[str]:
    """What must hold whatever fails: a bounded end, the group beside unharmed, what was lost counted."""
    wrong = [f"an error in a callback: {one}" for one in told["loops"]]
    if told.get("stopped", 0) > GRACE + BOUND + 1:
        wrong.append(f"stop() took {told['stopped']:.2f} s")
    why, output, remains = told["beside"]
    if (why or output != "before\nafter\n") and trial.how == "once":
        wrong.append(f"the group beside: {why}, {output!r}, {remains}")
    result = told.get("result")
    if result is not None:
        if result["total"] != result["logged"] + result["lost"]:
            wrong.append(f"{result['total']} bytes read, {result['logged']} in the file, {result['lost']} lost")
    elif told["error"] is None:
        wrong.append("neither a result nor an error")
    return wrong


def reached(cache: str) -> set[str]:
    """The places that the scenario comes to."""
    with tempfile.NamedTemporaryFile() as file:
        told, wrong = run(Trial("", "", "once"), cache, file.name)
        if wrong:
            raise RuntimeError(f"nothing was to fail: {wrong}, {told}")
        return set(Path(file.name).read_text().split())


def main() -> int:
    parser = argparse.ArgumentParser(description="Let system calls of aioelastic fail.")
    parser.add_argument("trial", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--first", action="store_true", help="only the first errno of each place, once")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="injection-cache-") as cache:
        if given.trial:
            told, wrong = run(Trial(*given.trial), cache)
            print(json.dumps(told, indent=2), *wrong, sep="\n")
            return bool(wrong)
        there, come = sites(), reached(cache)
        print(f"{len(there)} places, {len(come)} of them are come to; not to:")
        print(*(f"  {one}" for one in there if one not in come), sep="\n")
        asked = [one for one in trials() if one.site in come]
        if given.first:
            asked = [one for one in asked if one.how == "once" and one.errno == ERRNOS[one.site.rpartition(":")[2]][0]]
        elif not given.all:
            return 0
        bad = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for trial, (told, wrong) in zip(asked, pool.map(lambda one: run(one, cache), asked), strict=True):
                if wrong:
                    bad += 1
                    print(trial, *wrong, sep="\n    ", flush=True)
                elif not told.get("fired"):
                    print(trial, "did not come about", sep="\n    ", flush=True)
        print(f"{len(asked)} trials, {bad} bad")
        return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
