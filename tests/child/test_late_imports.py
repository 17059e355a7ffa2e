"""Nothing is imported while a group runs or ends: the search path, the directory or the descriptors may be gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from aioelastic.testing._supervisor_process import Program

PROGRAM = """
import asyncio, ctypes, os, sys, textwrap
sys.path.insert(0, {tests!r})
import late_imports as late
from late_imports import Failing
from aioelastic import *
from aioelastic.events import Exited, Spawned

# the names of the package are loaded when they are asked for
Command, Failing, Function, Group, GroupFailed, GroupTimeout, Logs, Restart, Std, Stop, WorkerExecutor, supervise
run = asyncio.run
if {loop!r} == "uvloop":
    import uvloop
    run = uvloop.run
start = {start!r}
cases = {cases!r}

async def begun(group):
    async for line in group.lines():
        if line.data == b"here":
            return

def program(body):
    common = dict(on_event=late.arm, logs=Logs(dir={logs!r}, tee=Std.NONE))
    one = dict(common, start=start or "zygote", preload=["late_imports"] if start == "zygote" else [])
    waits = Command("sh", "-c", "echo here; exec sleep 1000")
    names = {{**globals(), "common": common, "one": one, "waits": waits}}
    exec("async def main():\\n" + textwrap.indent(body, "    "), names)
    return names["main"]()

late.refuse_in_guardian()
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: the guardians of those that die come to us
for name, body in cases.items():  # each in a process of its own, that has imported no more than this
    pid = os.fork()
    if pid == 0:
        os.environ["LATE_IMPORTS_OF"] = name
        break
    if os.waitpid(pid, 0)[1]:
        print("failed:", name, flush=True)
    try:
        while os.wait():
            pass
    except ChildProcessError:
        pass
else:
    print("all have ended")
    sys.exit()

async def main():
    await program(body)
    late.disarm()
run(main())
"""

COMMANDS = {
    "ends": "await supervise(Command('echo', 'x'), 2, **common)",
    "direct": "await supervise(Command('echo', 'x'), 2, launcher='direct', **common)",
    "fails": "with Failing(GroupFailed): await supervise(Command('sh', '-c', 'echo no >&2; exit 3'), 2, **common)",
    "crashes": "with Failing(GroupFailed): await supervise(Command('sh', '-c', 'kill -SEGV $$'), 2, **common)",
    "is killed": "with Failing(GroupFailed): await supervise(Command('sh', '-c', 'kill -KILL $$'), 2, **common)",
    "fails with a traceback": """
code = "from aioelastic import record\\n@record\\ndef main(): raise ValueError(3)\\nmain()"
with Failing(GroupFailed):
    await supervise(Command(sys.executable, "-c", code), 2, **common)
""",
    "left": """
async with Group(waits, 2, **common):
    pass
""",
    "stopped": """
async with Group(waits, 2, **common) as group:
    await begun(group)
    await group.stop()
""",
    "stopped with its stacks": """
code = "import time; print('here', flush=True); time.sleep(1000)"
async with Group(Command(sys.executable, "-c", code), stop=Stop(dump=True), **common) as group:
    await begun(group)
""",
    "killed when the grace is over": """
deaf = Command("sh", "-c", "trap '' TERM; echo here; while :; do sleep 1; done")
async with Group(deaf, 2, stop=Stop(grace=0.01), **common) as group:
    await begun(group)
""",
    "out of time": """
async with Group(waits, 2, **dict(common, check=False)) as group:
    await begun(group)
    group.limit(0)
    result = await group.wait()
with Failing(GroupTimeout):
    result.raise_for_failures()
""",
    "cancelled": """
async def run():
    await supervise(waits, 2, **dict(common, on_event=told))
def told(event):
    late.arm(event)
    if isinstance(event, Spawned) and event.rank == 1:
        task.get_loop().call_soon(task.cancel)
task = asyncio.create_task(run())
with Failing(asyncio.CancelledError):
    try:
        await task
    except asyncio.CancelledError as exc:
        raise asyncio.CancelledError("cancelled") from exc
""",
    "begun again": """
with Failing(GroupFailed):
    await supervise(Command("false"), 2, restart=Restart.on_failure(max=1), **common)
""",
    "leaves something running": "await supervise(Command('sh', '-c', 'setsid sleep 1000 &'), 2, **common)",
    "has ports": "await supervise(Command('true'), 2, ports=[45678], **common)",
    "dies": """
async with Group(waits, 2, **common) as group:
    await begun(group)
    os._exit(0)
""",
    "loses its guardian": """
with Failing(GroupFailed):
    async with Group(waits, 2, **common) as group:
        await begun(group)
        os.kill(late.guardian_of(group.pids[0]), 9)
        await group.wait()
""",
}
FUNCTIONS = {
    "dies": """
async with Group(Function(late.waits), 2, **one) as group:
    await begun(group)
    os._exit(0)
""",
    "ends": "await supervise(Function(late.good), 2, **one)",
    "fails": "with Failing(GroupFailed): await supervise(Function(late.bad), 2, **one)",
    "stopped": """
async with Group(Function(late.waits), 2, **one) as group:
    await begun(group)
""",
    "out of time": """
async with Group(Function(late.waits), 2, **dict(one, check=False)) as group:
    await begun(group)
    group.limit(0)
    result = await group.wait()
with Failing(GroupTimeout):
    result.raise_for_failures()
""",
    "is killed": """
with Failing(GroupFailed):
    async with Group(Function(late.waits), 2, **one) as group:
        await begun(group)
        os.kill(group.pids[0], 9)
        await group.wait()
""",
    "loses its guardian": """
with Failing(GroupFailed):
    async with Group(Function(late.waits), 2, **one) as group:
        await begun(group)
        os.kill(late.guardian_of(group.pids[0]), 9)
        await group.wait()
""",
}
OTHERS = {
    "threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(2) as threads:
    await supervise(Function(late.good), 2, **dict(common, start=threads))
    with Failing(GroupFailed):
        await supervise(Function(late.bad), 2, **dict(common, start=threads))
""",
    "an executor": """
async with WorkerExecutor(1, preload=["late_imports"]) as executor:
    pid = await executor.run(late.good)
    late.refuse("program")
    assert await executor.run(late.good) == pid
    with Failing(ValueError):
        await executor.run(late.bad)
""",
    "an executor that had nothing to do": """
async with WorkerExecutor(1) as executor:
    late.refuse("program")
""",
}
CASES = {
    "commands": ("", COMMANDS),
    "zygote": ("zygote", FUNCTIONS),
    "spawn": ("spawn", FUNCTIONS),
    "fork": ("fork", {name: one for name, one in FUNCTIONS.items() if "guardian" not in name}),  # it has none
    "others": ("", OTHERS),
}


@pytest.mark.long
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("which", CASES)
def test_nothing_is_imported(tmp_path: Path, which: str, loop: str) -> None:
    told, (start, cases) = tmp_path / "imports", CASES[which]
    tests, logs = str(Path(__file__).parent), str(tmp_path / "logs")
    source = PROGRAM.format(tests=tests, logs=logs, start=start, cases=cases, loop=loop)
    with Program(source, env={"LATE_IMPORTS": str(told)}) as program:
        code = program.wait()
    assert not told.exists(), told.read_text()
    assert (code, program.output, program.errors) == (0, "all have ended\n", "")


LATER = """
import os, sys
sys.path.insert(0, {tests!r})
{first}
import asyncio
from concurrent.futures import ThreadPoolExecutor
from aioelastic import Command, Function, Logs, Std
import late_imports as late

async def run(entry, **options):
    {run}

async def talk(entry):
    {talk}

async def main():
    {begin}
    with ThreadPoolExecutor(1) as threads:
        threads.submit(len, "").result()
        late.refuse("program")
        await run(Command("true"))
        await run(Command("cat", input="x"))
        await talk(Command("cat", tty=True))
        for start in ("zygote", "spawn", "fork", threads):
            await run(Function(late.good), start=start)

asyncio.run(main())
"""
RUN = "async with Group(entry, logs=Logs(tee=Std.NONE), **options) as group: await group.wait()"
TALK = """
    async with Group(entry, logs=Logs(tee=Std.NONE)) as group, group[0].dialogue() as dialogue:
        await dialogue.send_line("hello")
        assert await dialogue.read_line() == "hello"
"""
SUPERVISE = {"run": "await supervise(entry, logs=Logs(tee=Std.NONE), **options)", "talk": "pass"}
PROGRAMS = {
    "Group": {"first": "from aioelastic import Group", "run": RUN, "talk": TALK.strip(), "begin": ""},
    "supervise, with a loop": {"first": "import asyncio; from aioelastic import supervise", "begin": "", **SUPERVISE},
    "supervise, without": {
        "first": "from aioelastic import supervise",
        "begin": "await supervise(Command('true'))",
        **SUPERVISE,
    },
}


@pytest.mark.parametrize("which", PROGRAMS)
def test_who_has_imported_what_starts_groups_can_start_any(tmp_path: Path, which: str) -> None:
    told = tmp_path / "imports"
    source = LATER.format(tests=str(Path(__file__).parent), **PROGRAMS[which])
    with Program(source, env={"LATE_IMPORTS": str(told), "LATE_IMPORTS_OF": which}) as program:
        code = program.wait()
    assert not told.exists(), told.read_text()
    assert (code, program.output, program.errors) == (0, "", "")


def test_programs_that_import_little(tmp_path: Path) -> None:
    for name, source in {"an executor": EXECUTOR, "a large array": ARRAY, "an error of ours": ERROR}.items():
        told = tmp_path / "imports"
        begin = f"import asyncio, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
        with Program(begin + source, env={"LATE_IMPORTS": str(told), "LATE_IMPORTS_OF": name}) as program:
            code = program.wait()
        assert not told.exists(), told.read_text()
        assert (code, program.output, program.errors) == (0, "", "")


EXECUTOR = """
from aioelastic import WorkerExecutor
import late_imports as late

async def main():
    late.refuse("program")
    async with WorkerExecutor(1) as executor:
        await executor.run(late.good)

asyncio.run(main())
"""
ARRAY = """
import numpy
from aioelastic import Function, Group
import late_imports as late

async def main():
    async with Group(Function(late.takes), on_event=late.arm, start="spawn") as group:
        await group[0].send(numpy.ones(4_000_000))
        await group.wait()

asyncio.run(main())
"""
ERROR = """
from aioelastic import Function, Group
import late_imports as late

async def main():
    async with Group(Function(late.is_refused), on_event=late.arm, check=False) as group:
        result = await group.wait()
    assert str(result.first_failure.exception.exception) == "x=1 is wrong; leave it out", result.failures

asyncio.run(main())
"""
