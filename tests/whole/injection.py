"""Lets one system call of ours fail, or take long, at each place where one is made; places are read from the source.

python tests/whole/injection.py                which places the scenarios do not come to, and why
python tests/whole/injection.py --all          each place, with each errno of its man page, once and always, and slow
python tests/whole/injection.py --sample 500   so many of these
python tests/whole/injection.py SITE ERRNO once|always|slow [SCENARIO]     one of them, all that it says; ERRNO may be -

Each trial is a program of its own: a group of three workers (one that writes much, a function, and one that fails) and
a second group beside it run through start, output, one failure and stop. The scenarios differ in how workers are
started, what they are given and what becomes of their output. The modules of aioelastic are compiled with each such
call turned into one of `reach()`, in the program, its guardian, its zygotes and its workers. An errno that says that
the other end has gone comes with its going.
"""

from __future__ import annotations

import _thread
import argparse
import ast
import builtins
import contextlib
import errno
import faulthandler
import importlib.abc
import importlib.machinery
import importlib.util
import json
import marshal
import math
import mmap
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from _socket import SHUT_RDWR, socket, socketpair
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[2] / "aioelastic"
# what starts, watches, reads, writes and ends processes
ROOMS = (
    "child",
    "launch",
    "watch",
    "streams",
    "system/descriptors.py",
    "system/shared_memory_names.py",
    "diagnosis/_error_files.py",
    "supervisor/resources.py",
    "processes/census.py",
    "processes/proc_files.py",
    "processes/strays.py",
    "supervisor/worker_life.py",
    "supervisor/worker_output.py",
)
GRACE, BOUND = 1.0, 1.0
SLOW = 5.0  # seconds that a slow call takes
LATE = 0.3  # seconds by which a busy machine may wake the judge late
OPENS = 12.0  # seconds after which the opening of a group is cancelled
HANGS = 30.0  # seconds after which a trial shows where it hangs; it is ended after as many again
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
# those that ask a file system: by a name, or on a descriptor, if it is a file
_BY_NAME = {"open", "posix_spawn", "execve", "chdir", "stat", "listdir", "scandir", "readlink", "unlink", "rmdir"}
_BY_NAME |= {"mkdir", "replace"}
_ON_DESCRIPTORS = {"read", "readv", "pread", "write", "writev", "pwrite", "ftruncate", "fstat", "close", "flock"}
_ON_DESCRIPTORS |= {"open", "listdir", "stat"}
_SIGNALS = ("kill", "killpg", "pidfd_send_signal")
_MODULES = {"os", "select", "_signal", "signal", "fcntl", "resource", "socket", "mmap"}
# calls of objects: what they are called on, as it is written there
_OBJECTS = {
    "sock",
    "self.sock",
    "self._outbox.sock",
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


_loop = (0, 0)  # the process and thread of the event loop


def awaited(task: Any) -> Iterator[str]:
    """Where a task is, from the outside in."""
    at = task.get_coro()
    while at is not None and getattr(at, "cr_frame", None) is not None:
        yield f"{at.cr_frame.f_code.co_filename}:{at.cr_frame.f_lineno} {at.cr_frame.f_code.co_name}"
        at = at.cr_await


def can_hang(site: str, args: tuple[Any, ...]) -> bool:
    """Whether that call may take long at all: it asks a file system. Others do not wait, unless they are told to."""
    name = site.rpartition(":")[2]
    if name in _ON_DESCRIPTORS and args and isinstance(args[0], int):
        mode = os.fstat(args[0]).st_mode
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return name in _BY_NAME


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
        if trace and state[0] and site not in seen:
            seen.add(site)
            with contextlib.suppress(OSError):  # no descriptor of this is kept: those that fork close all
                fd = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
                os.write(fd, f"{site}\n".encode())
                os.close(fd)
        if site != target or not state[0] or (how != "always" and state[1]):
            return call(*args, **kwargs)
        state[1] = 1
        if how == "slow":
            state[2] = (os.getpid(), _thread.get_ident()) == _loop and not can_hang(site, args)
            time.sleep(SLOW)
            return call(*args, **kwargs)
        if site.endswith(":close"):
            call(*args, **kwargs)  # whatever it says, the descriptor is closed (close(2))
        if number in (errno.EPIPE, errno.ECONNRESET) and isinstance(peer := getattr(call, "__self__", None), socket):
            peer.shutdown(SHUT_RDWR)  # these words are never said of one that lives on
        raise OSError(number, os.strerror(number))

    builtins._injection_reach = reach  # type: ignore[attr-defined]
    sys.meta_path.insert(0, Finder(config["cache"]))


PRELUDE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import injection; injection.install(); "
PRELUDE += "del sys.path[0]\n"


def passed_on() -> None:
    """Have the interpreters that aioelastic starts do the same."""
    from aioelastic.launch import _direct, _guardian, _guardian_launcher, _zygote
    from aioelastic.system import interpreter as interpreters

    def with_prelude(argv: Sequence[str]) -> list[str]:
        return [*argv[:-1], PRELUDE + argv[-1]]

    guardian, interpreter = _guardian._argv, interpreters.interpreter
    _guardian._argv = lambda: with_prelude(guardian())
    for module in (_direct, _guardian_launcher, _zygote):
        module.interpreter = lambda call: with_prelude(interpreter(call))  # type: ignore[attr-defined]


def count(n: int) -> int:
    """What the function worker does."""
    print("counting", flush=True)
    return sum(range(n))


def takes(given: Any) -> Any:
    """What it is given, and something large besides."""
    return given, bytes(1 << 20)


def forsakes(_: Any) -> None:
    """Ignores the stop signal, and leaves somebody running."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    print("end", flush=True)
    signal.pause()


def ends(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def uses(queue: Any) -> Any:
    """All that a worker can do."""
    from aioelastic import ready, sharing, stopping

    ready()
    queue.put_sync(sharing.copy(bytes(1 << 20)))
    sharing.send(sharing.receive())
    return stopping()


# python commands
FAILS = """
import os
from aioelastic import record
@record
def main():
    os.read(os.open({gate!r}, os.O_RDONLY), 3)
    raise ValueError("no")
main()
"""
WRITES = "seq {lines}; echo end; exec sleep 600"
ORPHANS = "trap '' TERM; (setsid sleep 600 &); sleep 600 & seq {lines}; echo end; while :; do read x < {never}; done"


# what is different in each: a trial is made in the first one that comes to its place
SCENARIOS = ("plain", "cold", "direct", "placed", "teed", "socket", "shared", "lent", "killed")


def scenario() -> None:  # noqa: C901  # one program, read from above to below
    """The program of a trial; writes what came of it to the file `told`."""
    install()
    sys.path.insert(0, str(HOME.parent))
    import asyncio
    import threading
    from concurrent.futures import ProcessPoolExecutor

    from aioelastic import Command, Function, Group, Logs, Placement, Restart, Std, Stop, sharing
    from aioelastic.events import Exited, SinkTrouble
    from aioelastic.model.logs import Rotate

    passed_on()
    global _loop
    _loop = (os.getpid(), threading.get_ident())
    here = Path(os.environ[VARIABLE]).parent
    which: str = json.loads((here / "config").read_text())["scenario"]
    gates = {name: here / name for name in ("beside", "fails", "never")}
    for gate in gates.values():
        os.mkfifo(gate)
    opened = {name: os.open(gate, os.O_RDWR | os.O_CLOEXEC) for name, gate in gates.items()}
    with open(here / "state", "r+b") as file:
        state = mmap.mmap(file.fileno(), 16)
    stop = Stop(grace=GRACE, bound=BOUND, dump=which == "direct")
    told: dict[str, Any] = {"error": None, "loops": []}

    def command(script: str, **given: Any) -> Command:
        return Command("/bin/sh", "-c", script, **given)

    def python(code: str) -> Command:
        return Command(sys.executable, "-c", PRELUDE + code)

    writes, orphans = (command(one.format(lines=LINES, never=gates["never"])) for one in (WRITES, ORPHANS))
    fails = command(f"read x < {gates['fails']}; exit 3")
    recorded = python(FAILS.format(gate=str(gates["fails"])))
    logs = Logs(dir=here / "logs", tee=Std.NONE)
    place = Placement(nice=19, oom_score_adj=500, cpus=[min(os.sched_getaffinity(0))], limits={"CORE": 0})
    rotated = Logs(dir=here / "logs", tee=Std.NONE, rotate=Rotate(50_000), match="end")
    pool = ProcessPoolExecutor(2) if which == "lent" else None
    queue = sharing.Queue(2) if which == "shared" else None
    large = sharing.copy(bytes(1 << 20)) if which in ("shared", "lent") else b""
    entries: list[Any] = [writes, Function(count, 1000), fails]
    options: dict[str, Any] = {"logs": logs}
    match which:
        case "direct":
            entries = [orphans, Function(takes, b""), recorded]
            options = {"launcher": "direct", "start": "spawn", "logs": rotated, "restart": Restart.on_failure(max=1)}
        case "placed":
            more: dict[str, Any] = {"input": b"nobody reads it", "secrets": {"A": "b"}}
            given = command(ORPHANS.format(lines=LINES, never=gates["never"]), **more)
            entries = [given, Function(forsakes, None), recorded]
            options |= {"placement": place, "env": {f"LARGE{at}": "x" * 100_000 for at in range(3)}}
        case "teed" | "socket":
            entries[0] = command(
                WRITES.format(lines=10 * LINES) if which == "teed" else f"echo no >&2; {WRITES}".format(lines=LINES)
            )
            options["logs"] = Logs(dir=here / "logs", tee=Std.ALL, when_full="drop")
        case "shared":
            entries[1] = Function(uses, queue)
        case "lent":
            entries = [Function(takes, large), Function(takes, large), Function(ends, None)]
            options = {"start": pool}

    async def meet(group: Group) -> None:
        """Until the failure."""
        if which == "shared":
            await group[1].send(large)
            assert queue is not None
            await queue.get()
            await group[1].receive()
        if which != "lent":
            async for line in group.lines(ranks=[0]):
                if line.text == "end":
                    break
        os.write(opened["fails"], b"go\n" * (1 + group._supervisor.spec.restart.max))
        async for event in group.events():
            if isinstance(event, Exited) and event.rank == 2 and event.attempt == group._supervisor.spec.restart.max:
                break

    async def ours() -> None:
        loop = asyncio.get_running_loop()
        try:
            if which == "killed":
                await asyncio.wait_for(forsaken(), OPENS)
                return
            async with contextlib.AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(OPENS) as opening:
                        group = Group(entries, stop=stop, check=False, name="ours", **options)
                        await stack.enter_async_context(group)
                except TimeoutError:
                    told["stopped"] = loop.time() - (opening.when() or 0)
                    raise
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(10):
                        await meet(group)
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
        path = result[0].stdout.path
        told["result"] = {
            "ok": result.ok,
            "codes": [None if one.exit is None else [one.exit.code, one.exit.signal] for one in result],
            "why": [str(one.why) for one in result],
            "remains": [str(one) for one in result.remains],
            "total": result[0].stdout.total,
            "logged": sum(one.stat().st_size for one in path.parent.glob("stdout.log*")) if path else 0,
            "lost": result[0].stdout.lost,
        }

    async def struck() -> None:
        state[0] = 1
        await ours()
        state[0] = 0

    async def forsaken() -> None:
        """The program is killed while they run."""
        entries: list[Command | Function] = [orphans, Function(forsakes, None), fails]
        group = Group(entries, stop=replace(stop, if_lost="stop"), logs=Logs(tee=Std.NONE), check=False, name="ours")
        await group.__aenter__()
        async for line in group.lines(ranks=[0]):
            if line.text == "end":
                break
        (here / "told").write_text(json.dumps(told))
        os.kill(os.getpid(), signal.SIGKILL)

    async def beside(then: Callable[[], Awaitable[None]] | None) -> None:
        script = f"echo before; read x < {gates['beside']}; echo after"
        async with Group(command(script), logs=logs, stop=stop, check=False, name="beside") as group:
            await anext(aiter(group.lines()))
            while not any(one.read_text() for one in Path(logs.dir or "").rglob("stdout.log")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # what is slow from here on, or fails, is not this
            if then is not None:
                await then()
            os.write(opened["beside"], b"go\n")
            result = await group.wait()
            path = result[0].stdout.path
            told["beside"] = [str(result[0].why or ""), path.read_text() if path else "", [*map(str, result.remains)]]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told["loops"].append(str(context)[:500]))
        faulthandler.dump_traceback_later(HANGS + 5)
        loop.call_later(
            HANGS, lambda: [print(*awaited(one), sep="\n  ", file=sys.stderr) for one in asyncio.all_tasks()]
        )
        if which == "cold":  # there is no guardian yet
            await struck()
            await beside(None)
        else:
            await beside(struck)

    if which == "cold":  # numbers of standard streams are given to others
        os.close(0)
    if which == "placed":
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if which in ("teed", "socket"):  # nobody reads what is tee'd until much has come
        console, end = os.pipe() if which == "teed" else [one.detach() for one in socketpair()]
        os.dup2(end, 1)
        os.close(end)
        if which == "socket":
            sys.stderr = open(here / "stderr", "w")  # noqa: SIM115
        go = threading.Timer(1, lambda: [None for _ in iter(lambda: os.read(console, 65536), b"")])
        go.daemon = True
        go.start()
    asyncio.run(main())
    if pool is not None:
        pool.shutdown()
    (here / "told").write_text(json.dumps(told))
    state[0] = 1  # the end of the program counts, too


# --- the trials ---


@dataclass(frozen=True)
class Trial:
    """One call that fails.

    Attributes:
        how: `"once"`, `"always"` from the beginning of the group on, or `"slow"`, once.
        scenario: one of `SCENARIOS`.
    """

    site: str
    errno: str
    how: str
    scenario: str = "plain"

    def __str__(self) -> str:
        return f"{self.site} {self.errno or '-'} {self.how} {self.scenario}"


def trials(come: Mapping[str, str]) -> Iterator[Trial]:
    """All of them for these places, each in its scenario."""
    for site, scenario in come.items():
        for name in ERRNOS[site.rpartition(":")[2]]:
            for how in ("once", "always"):
                yield Trial(site, name, how, scenario)
        yield Trial(site, "", "slow", scenario)


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


def run(trial: Trial, cache: str, trace: str = "", bound: float = 2 * HANGS) -> tuple[dict[str, Any], list[str]]:
    """One trial: what came of it, and what is wrong with that."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="injection-") as name:
        here = Path(name)
        (here / "state").write_bytes(bytes(16))
        (here / "tmp").mkdir()
        number = getattr(errno, trial.errno) if trial.errno else 0
        config = {"site": trial.site, "errno": number, "how": trial.how, "trace": trace}
        config |= {"state": str(here / "state"), "cache": cache, "scenario": trial.scenario}
        (here / "config").write_text(json.dumps(config))
        environ = {**os.environ, VARIABLE: str(here / "config"), "TMPDIR": str(here / "tmp")}
        words = [sys.executable, "-c", f"{PRELUDE.replace('injection.install()', 'injection.scenario()')}"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, text=True) as program:
            try:
                _, err = program.communicate(timeout=bound)
            except subprocess.TimeoutExpired:
                program.kill()
                _, err = program.communicate()
                wrong.append(f"it had not ended after {bound:g} s")
            except BaseException:  # which is not to wait for it
                program.kill()
                raise
        err = "\n".join(dict.fromkeys(err.splitlines()))  # the same may be said very often
        late = time.monotonic() + 10  # the guardian ends after its program
        while (there := left(str(here / "config"))) and time.monotonic() < late:
            time.sleep(0.01)
        strays = []
        for pid in there:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
                strays.append((pid, f"left behind: process {pid}, {file.read(200)!r}"))
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        if trial.scenario == "killed" and trial.how == "always":
            from aioelastic.system import shared_memory_names  # not before, in the program of a trial

            shared_memory_names.sweep(str(here / "tmp"))  # as the next program does
        wrong += [f"left behind: {one.relative_to(here)}" for one in (here / "tmp").iterdir()]
        died = trial.scenario == "killed" and program.returncode == -signal.SIGKILL
        told: dict[str, Any] = json.loads((here / "told").read_text()) if died or program.returncode == 0 else {}
        ended = bool(told)
        told["fired"], told["excused"] = ((here / "state").read_bytes()[at] > 0 for at in (1, 2))
        # what nobody can signal, or find, stays; it is told as left or as not known
        remains = str((told.get("result") or {}).get("remains"))
        doubted = trial.how != "once" and ("is not known" in remains or trial.site.endswith(_SIGNALS))
        doubted |= "in time" in remains or "hangs" in remains  # a busy machine
        wrong += [words for pid, words in strays if not doubted and f"process {pid} " not in remains]
        if not ended:
            wrong.append(f"the program ended with {program.returncode}: {err[-2000:]}")
        else:
            wrong += judge(trial, told)
            if said := [line for line in err.splitlines() if not line.startswith("aioelastic: ")]:
                wrong.append(f"it said: {chr(10).join(said)[-2000:]}")
        return told, wrong


def limit(trial: Trial, told: dict[str, Any]) -> float:
    """Seconds that stop() may take. What never waits, and is made to in the loop's own thread, adds what it takes."""
    dump = 2.0 if trial.scenario == "direct" else 0.0
    return GRACE + BOUND + 1 + dump + (SLOW if told.get("excused") else 0)


def judge(trial: Trial, told: dict[str, Any]) -> list[str]:
    """What must hold whatever fails: a bounded end, the group beside unharmed, what was lost counted."""
    wrong = [f"an error in a callback: {one}" for one in told["loops"]]
    if told.get("stopped", 0) > limit(trial, told) + LATE:
        wrong.append(f"stop() took {told['stopped']:.2f} s")
    gone = trial.errno in ("EPIPE", "ECONNRESET")  # the guardian, for all
    why, output, remains = told.get("beside", ("", "before\nafter\n", []))  # it dies with its program
    if (why or output != "before\nafter\n") and not (gone and "the guardian that had started it died" in why):
        wrong.append(f"the group beside: {why}, {output!r}, {remains}")
    result = told.get("result")
    if result is not None:
        if result and result["total"] != result["logged"] + result["lost"]:
            wrong.append(f"{result['total']} bytes read, {result['logged']} in the file, {result['lost']} lost")
    elif told["error"] is None and trial.scenario != "killed":
        wrong.append("neither a result nor an error")
    return wrong


# what the scenarios do not come to, and why; besides, calls that are made only after another one has failed
WHY_NOT = {
    "child/worker/lent_run.py": "pools of the caller's whose processes end or hang meanwhile",
    "child/wire/sent_objects.py": "a zygote or worker whose socket is full",
    "child/wire/links.py": "a guardian or zygote whose socket is full",
    "child/kernel/process_setup.py": "control groups; a program with other limits than its guardian",
    "child/zygote/main_loop.py": "a worker that a debugger holds",
    "launch/_direct.py": "a system without pidfds; a child that a debugger holds",
    "launch/_pipe_ends.py": "standard streams that are closed",
    "launch/_host_state.py": "a program whose rights or limits differ from its guardian's",
    "launch/_standard_streams.py": "standard streams that are closed, or inherited",
    "streams/_files.py": "log files that others cut off; those without a rotated name",
    "streams/_console_target.py": "output at the interpreter's end; descriptors that neither wait nor tell of room",
    "streams/_writers.py": "terminals, objects that are no files, sockets with a default timeout",
    "processes/proc_files.py": "a look for GPUs and for who holds a port",
    "watch/_thread.py": "a system without pidfds",
}


def reached(cache: str) -> dict[str, str]:
    """The places that are come to, each with the first scenario that does."""
    found: dict[str, str] = {}
    for scenario in SCENARIOS:
        with tempfile.NamedTemporaryFile() as file:
            told, wrong = run(Trial("", "", "once", scenario), cache, file.name)
            if wrong:
                raise RuntimeError(f"nothing was to fail in {scenario!r}: {wrong}, {told}")
            for site in Path(file.name).read_text().split():
                found.setdefault(site, scenario)
    return {site: found[site] for site in sites() if site in found}


def main() -> int:
    parser = argparse.ArgumentParser(description="Let system calls of aioelastic fail.")
    parser.add_argument("trial", nargs="*", help="SITE ERRNO|- once|always|slow [SCENARIO]")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--first", action="store_true", help="only the first errno of each place, once")
    parser.add_argument("--sample", type=int, help="so many of all, evenly drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="injection-cache-") as cache:
        if given.trial:
            site, name, *rest = given.trial
            told, wrong = run(Trial(site, name.strip("-"), *rest), cache)
            print(json.dumps(told, indent=2), *wrong, sep="\n")
            return bool(wrong)
        there, come = sites(), reached(cache)
        print(f"{len(there)} places, {len(come)} of them are come to")
        asked = [*trials(come)]
        if given.first:
            asked = [one for one in asked if one.how == "once" and one.errno == ERRNOS[one.site.rpartition(":")[2]][0]]
        elif given.sample:
            asked = random.Random(given.seed).sample(asked, min(given.sample, len(asked)))
        elif not given.all:
            tell_the_rest(there, come, set())
            return 0
        bad, fired, after = 0, 0, set[str]()
        slowest = (-math.inf, "none")
        with ThreadPoolExecutor(given.jobs) as pool:
            for trial, (told, wrong, seen) in zip(asked, pool.map(partial(traced, cache), asked), strict=True):
                fired += bool(told.get("fired"))
                after |= seen
                if not told.get("excused"):
                    slowest = max(slowest, (told.get("stopped", 0.0) - limit(trial, told), str(trial)))
                if wrong:
                    bad += 1
                    print(trial, *wrong, sep="\n    ", flush=True)
        tell_the_rest(there, come, after)
        print(f"{len(asked)} trials, {fired} of them came about, {bad} bad")
        print(f"the slowest stop() ended {-slowest[0]:.2f} s before grace + bound + 1 s: {slowest[1]}")
        return bool(bad)


def traced(cache: str, trial: Trial) -> tuple[dict[str, Any], list[str], set[str]]:
    """As `run`, and the places that it came to."""
    with tempfile.NamedTemporaryFile() as file:
        told, wrong = run(trial, cache, file.name)
        return told, wrong, set(Path(file.name).read_text().split())


def tell_the_rest(there: Sequence[str], come: Mapping[str, str], after: set[str]) -> None:
    """The places at which nothing was made to fail."""
    rest = [one for one in there if one not in come]
    only = [one for one in rest if one in after]
    if after:
        print(f"{len(only)} more were come to after another call had failed")
    print(f"{len(rest) - len(only)} were not come to:")
    for file, found in groupby((one for one in rest if one not in after), lambda one: one.partition(":")[0]):
        print(f"  {file}: {WHY_NOT.get(file, 'what follows when another call has failed')}")
        print(*(f"    {one.partition(':')[2]}" for one in found), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
