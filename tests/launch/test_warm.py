"""What a function worker has of the process that it was forked from: what imports there have opened and set."""

from __future__ import annotations

import asyncio
import locale
import os
import resource
import signal
import sys
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm_jobs
from helpers import QUIET, alive, program, until
from test_executor import Gate

from aioelastic import Command, Function, GroupResult, SpecError, Stop, supervise
from aioelastic.launch import _zygote, end_helpers

pytestmark = pytest.mark.fresh

SETS = """
import atexit, os, resource, signal, sys, tempfile, weakref
before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)}
os.environ["WARM_ADDED"] = "by import"
os.environ["WARM_CHANGED"] = "by import"
os.environ["WARM_OPTION"] = "by import"
os.environ.pop("WARM_REMOVED", None)
os.environ.setdefault("WARM_DEFAULT", "by import")
sys.path.insert(0, "/warm/front")
sys.path.append("/warm/behind")
sys.argv.append("--by-import")
os.umask(0o031)
os.chdir("/usr")
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def heard(*_): pass
signal.signal(signal.SIGTERM, heard)
signal.signal(signal.SIGUSR1, heard)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGALRM, heard)
signal.setitimer(signal.ITIMER_REAL, 1000)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
ring, bell = os.pipe()
os.set_blocking(bell, False)
signal.set_wakeup_fd(bell)
"""


async def run(function: Function, n: int = 1, **options: Any) -> GroupResult:
    return await supervise(function, n, **{"logs": QUIET, "check": False, "timeout": 60, **options})


async def value(function: Function, **options: Any) -> Any:
    result = await run(function, **options)
    assert result.ok, result.failures
    return result[0].value


# --- what is open ---

OPENS = """
import multiprocessing, os, socket, tempfile, threading
import multiprocessing.shared_memory
file = tempfile.TemporaryFile("w+")
left, right = os.pipe()
one, other = socket.socketpair()
lock = multiprocessing.Lock()
queue = multiprocessing.SimpleQueue()
segment = multiprocessing.shared_memory.SharedMemory(create=True, size=16)
segment.unlink()
"""


async def test_what_a_preloaded_module_has_opened_is_its_own(modules: Path, monkeypatch: Any) -> None:
    (modules / "warm_opens.py").write_text(OPENS)
    first, second = [one.value for one in await run(Function(warm_jobs.uses_opened), 2, preload=["warm_opens"])]
    assert first["numbers"] == second["numbers"]
    for seen in (first, second):
        assert seen["works"] == ["file", "pipe", "socket", "lock", "queue"]
        assert seen["others"] == ["mine"] * 12
        assert not seen["channel"] & set(seen["numbers"])


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_a_standard_stream_that_an_import_has_replaced(start: Any, modules: Path) -> None:
    """As in any program that imports such a module."""
    (modules / "warm_redirects.py").write_text(
        f"import os\nos.dup2(os.open({str(modules / 'log')!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)\n"
        "def speak():\n"
        "    import sys\n"
        "    print('by print', flush=True)\n"
        "    os.system('echo by a child')\n"
        "    print('on stderr', file=sys.stderr)\n"
    )
    preload = ["warm_redirects"] if start == "zygote" else []
    (one,) = await run(Function(warm_jobs.call, "warm_redirects", "speak"), start=start, preload=preload)
    assert (modules / "log").read_text().split("\n") == ["by print", "by a child", ""]
    assert (one.stdout.tail, one.stderr.tail) == (b"", b"on stderr\n")


async def test_nothing_of_the_zygote_stays_open(modules: Path) -> None:
    """Beside what was imported: the standard streams, the channel, and where stacks are written."""
    (modules / "warm_one_file.py").write_text("file = open('/dev/zero')\n")
    many = await run(Function(warm_jobs.descriptors), 4, preload=["warm_one_file"])
    for one in many:
        assert sorted(one.value.values()).count("/dev/zero") == 1
        assert len(one.value) == 6, one.value


HOST = """
import asyncio, atexit, logging, os, sys, tempfile, weakref
from aioelastic import Function, Logs, Std, WorkerExecutor, supervise

HOME = os.environ["WARM_HOME"]
with open(HOME + "/runs", "a") as file:
    file.write("x")
logging.basicConfig(filename=HOME + "/log", format="%(message)s")
SETTING = "at import"

class Thing:
    pass

thing = Thing()
weakref.finalize(thing, open(HOME + "/ends", "a", buffering=1).write, "finalized by program\\n")
atexit.register(lambda: open(HOME + "/ends", "a").write("at exit of program\\n"))

def work(rank):
    files = [open(f"{HOME}/data-{rank}-{at}", "w+", buffering=1) for at in range(12)]
    for one in files:
        one.write("mine")
    logging.warning("from %s", rank)
    atexit.register(lambda: open(HOME + "/ends", "a").write(f"at exit of {rank}\\n"))
    weakref.finalize(work, open(HOME + "/ends", "a", buffering=1).write, f"finalized by {rank}\\n")
    for one in files:
        one.seek(0)
    return SETTING, {one.read() for one in files}

async def main():
    result = await supervise([Function(work, rank) for rank in range(2)], start="fork", logs=Logs(tee=Std.NONE))
    print([one.value for one in result])

def initializer():
    global READY
    READY = SETTING

def task(_):
    return SETTING, READY

if __name__ == "__main__":
    SETTING = "at run time"
    if sys.argv[1] == "executor":
        with WorkerExecutor(2, start="fork", initializer=initializer) as executor:
            print(set(executor.map(task, range(8))))
    else:
        asyncio.run(main())
"""


def test_a_copy_of_the_program_is_as_the_program(tmp_path: Path) -> None:
    out = program(HOST, tmp_path, "group", env={"WARM_HOME": str(tmp_path)})
    assert out == "[('at run time', {'mine'}), ('at run time', {'mine'})]\n"
    assert (tmp_path / "runs").read_text() == "x"
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["from 0", "from 1"]
    # what the program has to do at its end it does itself, and once
    ends = (tmp_path / "ends").read_text().splitlines()
    assert sorted(ends[:4]) == sorted(f"{what} {rank}" for what in ("at exit of", "finalized by") for rank in (0, 1))
    assert sorted(ends[4:]) == ["at exit of program", "finalized by program"]


def test_an_executor_of_copies_runs_nothing_again(tmp_path: Path) -> None:
    out = program(HOST, tmp_path, "executor", env={"WARM_HOME": str(tmp_path)})
    assert out == "{('at run time', 'at run time')}\n"
    assert (tmp_path / "runs").read_text() == "x"


# --- what is set ---


@pytest.mark.parametrize("preload", [[], ["warm_sets"]])
async def test_what_an_import_sets_holds(preload: list[str], modules: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Whoever imports it."""
    (modules / "warm_sets.py").write_text(SETS)
    monkeypatch.setenv("WARM_REMOVED", "by the program")
    monkeypatch.setattr(sys, "argv", ["program"])
    env = {"WARM_CHANGED": "by the group", "WARM_DEFAULT": "by the group"}
    seen = await value(Function(warm_jobs.what_is_set), preload=preload, env=env)
    assert seen == {
        "variables": {
            "WARM_ADDED": "by import",
            "WARM_CHANGED": "by import",
            "WARM_OPTION": "by import",
            "WARM_DEFAULT": "by the group",
        },
        "path": ["/warm/front", "/warm/behind"],
        "argv": ["program", "--by-import"],
        "umask": 0o031,
        "cwd": "/usr",
        "policy": os.SCHED_BATCH,
        "core": (0, resource.getrlimit(resource.RLIMIT_CORE)[1]),
        "cpus": {min(os.sched_getaffinity(0))},
        "handlers": ["SIG_IGN", "heard", "heard", "heard"],
        "before": ["SIG_DFL", "SIG_DFL", "SIG_DFL", "default_int_handler"],
        "timer": True,
        "mask": {12},
        "rings": True,
    }


async def test_what_the_worker_itself_is_given_is_last(modules: Path, tmp_path: Path) -> None:
    (modules / "warm_sets.py").write_text(SETS)
    function = Function(warm_jobs.what_is_set).options(env={"WARM_OPTION": "its own"}, cwd=tmp_path)
    seen = await value(function, preload=["warm_sets"])
    assert seen["variables"]["WARM_OPTION"] == "its own"
    assert seen["variables"]["WARM_ADDED"] == "by import"
    assert seen["cwd"] == str(tmp_path)


async def test_the_search_path_of_now_with_what_imports_added(modules: Path, monkeypatch: Any) -> None:
    """The program may change its own between the imports and a start."""
    from aioelastic.child.worker import host_program

    rest = host_program.own()[2:]
    monkeypatch.setattr(host_program, "_told", (["a", "b"], ["x"], *rest))
    monkeypatch.setattr(sys, "path", ["front", "a", "b", "behind"])
    monkeypatch.setattr(sys, "argv", ["x", "added"])
    host_program.adopt((["b", "c"], ["x"], *rest))
    assert sys.path == ["front", "b", "c", "behind"]
    assert sys.argv == ["x", "added"]
    host_program.adopt((["b", "c"], ["y"], *rest))
    assert sys.path == ["front", "b", "c", "behind"]
    assert sys.argv == ["y"]


async def test_a_limit_that_an_import_raised_is_under_that_of_now(modules: Path) -> None:
    """Which the program has lowered since."""
    (modules / "warm_limit.py").write_text(
        "import resource\nhard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\n"
    )
    before = resource.getrlimit(resource.RLIMIT_CORE)
    script = (
        "import asyncio, resource, sys\nfrom aioelastic import *\nimport warm_jobs\n"
        "async def once():\n"
        "    r = await supervise(Function(warm_jobs.core_limit), preload=['warm_limit'], logs=Logs(tee=Std.NONE))\n"
        "    print(r[0].value)\n"
        "async def main():\n"
        "    resource.setrlimit(resource.RLIMIT_CORE, (0, 8192))\n    await once()\n"
        "    resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))\n    await once()\n"
        "if __name__ == '__main__':\n    asyncio.run(main())\n"
    )
    assert before[1] == resource.RLIM_INFINITY or before[1] >= 8192
    out = program(script, modules, env={"PYTHONPATH": str(Path(__file__).parents[1])})
    assert out == "(8192, 8192)\n(4096, 4096)\n"


@pytest.mark.parametrize("preload", [[], ["warm_ends"]])
async def test_exit_work_that_an_import_registered_is_done(preload: list[str], modules: Path) -> None:
    (modules / "warm_ends.py").write_text(
        "import atexit, weakref\n"
        "class Thing: pass\nthing = Thing()\n"
        "atexit.register(print, 'at exit', flush=True)\n"
        "weakref.finalize(thing, print, 'finalized', flush=True)\n"
    )
    result = await run(Function(warm_jobs.imports, "warm_ends"), 2, preload=preload)
    for one in result:
        assert sorted(str(one.stdout).splitlines()) == ["at exit", "finalized"]


@pytest.mark.parametrize("preload", [[], ["warm_streams"]])
async def test_streams_that_an_import_took_or_replaced(preload: list[str], modules: Path) -> None:
    (modules / "warm_streams.py").write_text(
        "import io, logging, sys\n"
        "taken = sys.stdout\n"
        "print('only where it is imported')\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "class Loud(io.TextIOBase):\n"
        "    def write(self, text):\n        return taken.write(text.upper())\n"
        "    def flush(self):\n        taken.flush()\n"
        "sys.stdout = Loud()\n"
    )
    result = await run(Function(warm_jobs.says, "warm_streams"), preload=preload)
    said = [] if preload else ["only where it is imported"]
    assert str(result[0].stdout).splitlines() == [*said, "PRINTED", "logged", "written"]


@pytest.mark.parametrize("is_preloaded", [False, True])
@pytest.mark.parametrize(
    ("module", "stdout", "stderr"),
    [
        ("os.dup2(os.open(os.devnull, os.O_WRONLY), 1)", "", ""),  # the zygote's own is that file, too
        ("own = os.fdopen(os.dup(1), 'w', 1)", "own\nsystem\n", ""),
        ("os.dup2(2, 1)", "", "system\n"),
    ],
    ids=["silenced", "copied", "joined"],
)
async def test_descriptors_of_streams_that_an_import_copied_or_replaced(
    module: str, stdout: str, stderr: str, is_preloaded: bool, modules: Path
) -> None:
    (modules / "warm_copied.py").write_text(f"import os\n{module}\n")
    (one,) = await run(Function(warm_jobs.says_by, "warm_copied"), preload=["warm_copied"] if is_preloaded else [])
    assert (str(one.stdout), str(one.stderr), one.value) == (stdout, stderr, [0, 1, 2])


@pytest.mark.parametrize("preload", [[], ["warm_policy"]])
async def test_the_event_loop_policy_that_an_import_set(preload: list[str], modules: Path) -> None:
    (modules / "warm_policy.py").write_text(
        "import asyncio\n"
        "class OwnLoop(asyncio.SelectorEventLoop):\n    pass\n"
        "class Policy(asyncio.DefaultEventLoopPolicy):\n    _loop_factory = OwnLoop\n"
        "asyncio.set_event_loop_policy(Policy())\n"
    )
    entry = Function(warm_jobs.loop_of, "warm_policy")
    if preload:
        assert await value(entry, preload=preload) == "OwnLoop"
    else:  # it is imported before a loop is made only if the function's own module does that
        assert await value(Function(warm_jobs.policy_of, "warm_policy")) == "Policy"


async def test_a_loop_that_an_import_made_is_each_workers_own(modules: Path, tmp_path: Path) -> None:
    """An epoll set that was shared would tell one of them of the other's descriptors."""
    (modules / "warm_loop.py").write_text(
        "import asyncio\nloop = asyncio.SelectorEventLoop()\nasyncio.set_event_loop(loop)\n"
    )
    result = await run(Function(warm_jobs.uses_loop, "warm_loop"), 2, preload=["warm_loop"])
    assert [one.value for one in result] == [b"0", b"1"]


async def test_children_of_the_zygote_are_not_waited_for(modules: Path) -> None:
    (modules / "warm_children.py").write_text(
        "import multiprocessing, signal\n"
        "context = multiprocessing.get_context('fork')\n"
        "child = context.Process(target=signal.pause, daemon=True)\nchild.start()\n"
        "queue = context.Queue()\n"
    )
    result = await run(Function(warm_jobs.child_of, "warm_children"), 2, preload=["warm_children"])
    assert result.ok
    assert [str(one.stderr) for one in result] == ["", ""]
    assert alive(result[0].value)
    end_helpers()  # and with the zygote the child
    await until(lambda: not alive(result[0].value))


async def test_asked_to_stop_by_what_an_import_holds(modules: Path) -> None:
    """`stopping()` at the top of a preloaded module: each worker is asked by itself."""
    (modules / "warm_stop.py").write_text("import aioelastic\nstop = aioelastic.stopping()\n")
    result = await run(Function(warm_jobs.asks, "warm_stop"), 2, preload=["warm_stop"])
    assert [one.value for one in result] == [(False, True), (False, False)], result.failures


@pytest.mark.parametrize("preload", [[], ["warm_fault"]])
async def test_stacks_that_an_import_has_written(preload: list[str], modules: Path) -> None:
    """By faulthandler, which Python's `signal` knows nothing of."""
    (modules / "warm_fault.py").write_text(
        "import faulthandler, pathlib, signal\n"
        "here = pathlib.Path(__file__).parent\n"
        "faulthandler.register(signal.SIGUSR1, file=open(here / 'asked', 'a'))\n"
        "faulthandler.enable(open(here / 'crashed', 'a'))\n"
    )
    for _ in range(2):
        (one,) = await run(Function(warm_jobs.aborts, "warm_fault"), preload=preload)
        assert one.exit is not None
        assert (one.exit.signal, str(one.stderr)) == (signal.SIGABRT, "")
    for name in ("asked", "crashed"):
        assert (modules / name).read_text().count("in aborts") == 2


@pytest.mark.parametrize("preload", [[], ["warm_stop_by"]])
async def test_asked_by_the_groups_own_signal(preload: list[str], modules: Path) -> None:
    """The signal that is told to a worker is for what a preloaded module holds, and SIGTERM is as it was before."""
    (modules / "warm_stop_by.py").write_text(
        "import aioelastic, signal\n"
        "def heard(*_): pass\n"
        "signal.signal(signal.SIGTERM, heard)\n"
        "stop = aioelastic.stopping()\n"
    )
    by = Stop(signal=signal.SIGINT)
    result = await run(Function(warm_jobs.asked_by, "warm_stop_by"), preload=preload, stop=by)
    assert result[0].value == (False, "heard", True), result.failures


# --- variables of the interpreter ---

EARLY = [
    ({"PYTHONIOENCODING": "latin-1:backslashreplace"}, "zygote spawn fork"),
    ({"PYTHONIOENCODING": ":replace"}, "zygote spawn fork"),
    ({"PYTHONUTF8": "1"}, "zygote spawn fork"),
    ({"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, "zygote spawn"),
    ({"PYTHONHASHSEED": "7"}, "zygote spawn"),
    ({"PYTHONWARNINGS": "error::ImportWarning"}, "zygote spawn"),
    ({"TZ": "XYZ-5:17"}, "zygote spawn fork"),
    ({"MALLOC_ARENA_MAX": "3"}, "zygote spawn"),
    ({"PYTHONUNBUFFERED": "1"}, "zygote spawn"),
    ({"PYTHONUNBUFFERED": ""}, "zygote spawn"),
    ({"PYTHONDEVMODE": "1"}, "zygote spawn"),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("env", "start", "where"),
    [
        (env, start, where)
        for env, starts in EARLY
        for start in starts.split()
        for where in ("group", "worker")
        # for one worker that is what they all have, and a zygote's write line by line
        if (env, start, where) != ({"PYTHONUNBUFFERED": "1"}, "zygote", "worker")
    ],
    ids=str,
)
async def test_variables_that_python_reads_at_its_start(env: dict[str, str], start: Any, where: str) -> None:
    """They hold as in a command."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import warm_jobs; warm_jobs.tell()"
    command = await supervise(Command(sys.executable, "-c", code, env=env), logs=QUIET, timeout=60)
    want = str(command[0].stdout).strip()
    if where == "group":
        got = await value(Function(warm_jobs.told), start=start, env=env)
    else:
        entries = [Function(warm_jobs.told), Function(warm_jobs.told).options(env=env)]
        got = (await supervise(entries, start=start, logs=QUIET, timeout=60))[1].value
    keys = ("streams", "tz") if start == "fork" else None
    assert warm_jobs.shown(got, keys) == warm_jobs.shown(eval(want), keys)


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_a_search_path_by_variable(start: Any, tmp_path: Path) -> None:
    (tmp_path / "warm_by_variable.py").write_text("VALUE = 'found'\n")
    seen = await value(
        Function(warm_jobs.attribute, "warm_by_variable"), start=start, env={"PYTHONPATH": str(tmp_path)}
    )
    assert seen[0] == "found"


@pytest.mark.parametrize("start", ["zygote", "spawn"])
def test_options_of_the_interpreter(start: str, tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\nfrom aioelastic import *\n"
        "def look():\n    return sys.get_int_max_str_digits(), sys.warnoptions, sys.flags.optimize, sys._xoptions\n"
        "async def main():\n"
        f"    r = await supervise(Function(look), start={start!r}, logs=Logs(tee=Std.NONE))\n"
        "    print(r[0].value == look(), look()[0])\n"
        "if __name__ == '__main__':\n    asyncio.run(main())\n"
    )
    options = ("-X", "int_max_str_digits=777", "-X", "of_mine", "-O", "-W", "ignore::ImportWarning")
    assert program(script, tmp_path, options=options) == "True 777\n"


async def test_the_locale_of_the_program() -> None:
    before = locale.setlocale(locale.LC_NUMERIC)
    try:
        locale.setlocale(locale.LC_NUMERIC, "C.UTF-8")
        assert await value(Function(locale.setlocale, locale.LC_NUMERIC)) == "C.UTF-8"
    finally:
        locale.setlocale(locale.LC_NUMERIC, before)
    assert await value(Function(locale.setlocale, locale.LC_NUMERIC)) == before


# --- how many there are ---


def zygotes() -> list[int]:
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            if "aioelastic.child.zygote.main_loop" in " ".join(one.cmdline()):
                found.append(one.pid)
        except psutil.NoSuchProcess:
            pass
    return found


async def test_few_stay_warm(monkeypatch: Any) -> None:
    end_helpers()
    pids = [await value(Function(os.getppid), env={"WARM_TRIAL": str(trial)}) for trial in range(6)]
    await until(lambda: len(zygotes()) == 4)
    assert sorted(zygotes()) == sorted(pids[2:])  # the least recently used have left
    assert await value(Function(os.getppid), env={"WARM_TRIAL": "2"}) == pids[2]
    assert await value(Function(os.getppid), env={"WARM_TRIAL": "6"}) not in pids
    await until(lambda: not alive(pids[3]))
    assert alive(pids[2])
    monkeypatch.setenv("AIOELASTIC_WARM_PROCESSES", "1")
    last = await value(Function(os.getppid))
    await until(lambda: zygotes() == [last])
    monkeypatch.setenv("AIOELASTIC_WARM_PROCESSES", "0")
    await value(Function(os.getppid))
    await until(lambda: zygotes() == [])


async def test_little_memory_stays_warm(modules: Path, monkeypatch: Any) -> None:
    """Of those that nobody uses; the least recently used has left."""
    end_helpers()
    (modules / "warm_large.py").write_text("DATA = b'x' * (64 << 20)\n")

    async def large(trial: int) -> int:
        return await value(Function(os.getppid), preload=["warm_large"], env={"WARM_TRIAL": str(trial)})

    monkeypatch.setenv("AIOELASTIC_WARM_MEMORY", str(120 << 20))
    pids = [await value(Function(os.getppid)), await large(1)]
    assert sorted(zygotes()) == sorted(pids)
    last = await large(2)
    await until(lambda: zygotes() == [last])
    monkeypatch.setenv("AIOELASTIC_WARM_MEMORY", str(32 << 20))
    small = await value(Function(os.getppid))
    await until(lambda: zygotes() == [small])
    await large(4)
    await until(lambda: zygotes() == [])


@pytest.mark.parametrize("name", ["PROCESSES", "MEMORY"])
@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
async def test_bounds_that_are_none(monkeypatch: Any, name: str, value: str) -> None:
    monkeypatch.setenv(f"AIOELASTIC_WARM_{name}", value)
    with pytest.raises(SpecError, match=f"AIOELASTIC_WARM_{name}='{value}'"):
        await run(Function(os.getppid))


async def test_those_in_use_are_not_ended(monkeypatch: Any) -> None:
    end_helpers()
    monkeypatch.setenv("AIOELASTIC_WARM_PROCESSES", "0")
    both = await asyncio.gather(*(run(Function(warm_jobs.imports, "json"), env={"WARM_TRIAL": one}) for one in "ab"))
    assert all(one.ok for one in both)
    await until(lambda: zygotes() == [])


async def test_an_edited_module_is_read_anew(modules: Path) -> None:
    file = modules / "warm_edited.py"
    (modules / "warm_kept.py").write_text("import warm_edited\n")
    file.write_text("VALUE = 1\n")
    os.utime(file, (1, 1))
    first = await value(Function(warm_jobs.attribute, "warm_edited"), preload=["warm_kept"])
    assert first == (1, (await value(Function(warm_jobs.attribute, "warm_edited"), preload=["warm_kept"]))[1])
    file.write_text("VALUE = 2  # it was edited\n")
    second = await value(Function(warm_jobs.attribute, "warm_edited"), preload=["warm_kept"])
    assert second[0] == 2
    assert second[1] != first[1]
    await until(lambda: not alive(first[1]))
    file.unlink()
    (modules / "warm_kept.py").write_text(
        "import types, sys\nsys.modules['warm_edited'] = types.SimpleNamespace(VALUE=3)\n"
    )
    assert (await value(Function(warm_jobs.attribute, "warm_edited"), preload=["warm_kept"]))[0] == 3


async def test_an_edited_zip_file_is_read_anew(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = modules / "warm.zip"

    def write(text: str) -> None:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("warm_zipped/__init__.py", text)
        os.utime(archive, (len(text), len(text)))

    write("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(archive))
    first = await value(Function(warm_jobs.attribute, "warm_zipped"), preload=["warm_zipped"])
    assert first == (1, (await value(Function(warm_jobs.attribute, "warm_zipped"), preload=["warm_zipped"]))[1])
    write("VALUE = 2  # it was edited\n")
    assert (await value(Function(warm_jobs.attribute, "warm_zipped"), preload=["warm_zipped"]))[0] == 2


def test_an_edited_main_module_is_read_anew(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, sys\nfrom aioelastic import *\n"
        "def look():\n    return VALUE\n"
        "VALUE = 'first'\n"
        "async def main():\n"
        "    for text in ('second', 'third one'):\n"
        "        print((await supervise(Function(look), logs=Logs(tee=Std.NONE)))[0].value)\n"
        "        with open(__file__) as file:\n"
        '            edited = file.read().replace("VALUE = \'" + VALUE, "VALUE = \'" + text)\n'
        "        with open(__file__, 'w') as file:\n"
        "            file.write(edited)\n"
        "        globals()['VALUE'] = text\n"
        "if __name__ == '__main__':\n    asyncio.run(main())\n"
    )
    assert program(script, tmp_path) == "first\nsecond\n"


# --- what is long ---


@pytest.mark.parametrize("start", ["zygote", "spawn"])
async def test_a_long_search_path_and_environment(start: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, *(f"/nowhere/{'p' * 100}/{at}" for at in range(3000))])
    env = {f"WARM_LONG_{at}": "x" * 100_000 for at in range(4)}
    path, size = await value(Function(warm_jobs.long), start=start, env=env)
    assert path == sys.path[-1]
    assert size == 400_000


# --- one that is warming up ---


def test_a_warm_up_that_was_cut_off_is_waited_for_on_another_loop(modules: Path) -> None:
    gate = Gate(modules)
    (modules / "warm_slow.py").write_text(f"open({gate.path!r}).read()\n")

    async def cut_off() -> None:
        work = asyncio.ensure_future(run(Function(os.getpid), preload=["warm_slow"]))
        await asyncio.to_thread(gate.entered)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    async def again() -> bool:
        work = asyncio.ensure_future(run(Function(os.getpid), preload=["warm_slow"]))
        await until(lambda: any(one._waiting for one in _zygote._zygotes))
        gate.open()
        return (await work).ok

    asyncio.run(cut_off())
    assert asyncio.run(again())


async def test_each_who_waits_for_a_warm_up_is_told_that_it_failed(modules: Path) -> None:
    gate = Gate(modules)
    (modules / "warm_broken.py").write_text(f"open({gate.path!r}).read()\n1 / 0\n")
    first, second = (asyncio.ensure_future(run(Function(os.getpid), preload=["warm_broken"])) for _ in range(2))
    await asyncio.to_thread(gate.entered)
    await until(lambda: sum(len(one._waiting) for one in _zygote._zygotes) == 2)
    gate.open()
    told = await asyncio.gather(first, second, return_exceptions=True)
    assert [str(one).partition("\n")[0] for one in told] == [str(told[0]).partition("\n")[0]] * 2
    assert "ZeroDivisionError" in str(told[0])
