"""The structure of the package: rooms and layers, no circles, doors, public names, imports, tables of states."""

from __future__ import annotations

import ast
import importlib
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import child_process

import aioelastic
import aioelastic.launch
import aioelastic.planning
from aioelastic.executor import slots
from aioelastic.model import states

HOUSE = Path(aioelastic.__file__).parent

# each may import those of the lines before it: none of its own line, and none behind it
LAYERS = [
    {"model"},
    {"config", "errors", "events", "system"},
    {"memory"},
    {"gpu"},
    {"child"},
    {"sharing", "processes", "watch"},
    {"planning"},
    {"launch", "streams"},
    {"diagnosis"},
    {"supervisor"},
    {"executor"},
    {"cli", "testing"},
    {"__main__"},
]


class Import(NamedTuple):
    """One that stands anywhere in a file: at its head, in a function, or for type checkers only."""

    file: str
    line: int
    module: str
    is_late: bool


def module_of(path: Path) -> str:
    words = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


@cache
def sources() -> dict[str, Path]:
    return {module_of(path): path for path in sorted(HOUSE.rglob("*.py"))}


@cache
def imports(module: str) -> list[Import]:
    """What of ours it imports, by the names of modules below the package."""
    path = sources()[module]
    tree = ast.parse(path.read_text())
    package = path.relative_to(HOUSE).parts[:-1]
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            here = ".".join(one for one in base if one)
            for alias in node.names:
                below = f"{here}.{alias.name}" if here else alias.name
                name = below if below in sources() else here
                found.append(Import(str(path.relative_to(HOUSE)), node.lineno, name, id(node) in late))
    return [one for one in found if one.module and one.module != module]


def room(module: str) -> str:
    return module.partition(".")[0]


def test_nothing_is_loose_at_the_root() -> None:
    assert {path.name for path in HOUSE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_every_room_has_its_layer_and_its_door() -> None:
    rooms = {path.name for path in HOUSE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms | {"__main__"} == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(rooms) + 1
    for one in rooms:
        words = ast.get_docstring(ast.parse((HOUSE / one / "__init__.py").read_text())) or ""
        assert words, one


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_imports_point_downward(layer: int) -> None:
    """Those in functions and for type checkers, too."""
    below = set[str]().union(*LAYERS[:layer])
    for module in sources():
        if room(module) in LAYERS[layer]:
            for one in imports(module):
                assert room(one.module) in below | {room(module)}, one


@pytest.mark.parametrize("what", ["files", "folders"])
def test_there_is_no_circle(what: str) -> None:
    """Whatever kind of import it is; a folder and one inside of it are no two."""
    known: dict[str, set[str]] = {}
    for module in sources():
        for one in imports(module):
            ends = [module, one.module]
            if what == "folders":
                ends = [str(sources()[end].parent) for end in ends]
                if ends[0].startswith(ends[1]) or ends[1].startswith(ends[0]):
                    continue
            known.setdefault(ends[0], set()).add(ends[1])
    done: set[str] = set()

    def walk(end: str, way: tuple[str, ...]) -> None:
        assert end not in way, (*way[way.index(end) :], end)
        if end not in done:
            for one in known.get(end, ()):
                walk(one, (*way, end))
            done.add(end)

    for end in known:
        walk(end, ())


def test_nobody_reaches_past_a_door() -> None:
    """A file whose name begins with an underscore is its room's own."""
    for module in sources():
        for one in imports(module):
            parent, _, name = one.module.rpartition(".")
            assert not name.startswith("_") or f"{module}.".startswith(f"{parent}."), one


def test_a_late_import_says_why() -> None:
    """For start-up time, or for what may not be here: in a comment beside it, or above it."""
    for module, path in sources().items():
        lines = path.read_text().splitlines()
        for one in imports(module):
            if one.is_late:
                near = lines[one.line - 2 : one.line]
                assert any("#" in line for line in near), one


def test_who_catches_all_says_why() -> None:
    """In a comment beside it, or at the first thing that is done then; who raises it again needs none."""
    for path in sources().values():
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and _catches_all(node):
                near = text.splitlines()[node.lineno - 1 : node.body[0].end_lineno]
                assert any("#" in line for line in near), f"{path}:{node.lineno}"


def _catches_all(handler: ast.ExceptHandler) -> bool:
    kinds = {node.id for node in ast.walk(handler.type or handler) if isinstance(node, ast.Name)}
    goes_on = any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))
    return not goes_on and (handler.type is None or bool(kinds & {"Exception", "BaseException"}))


def test_public_names_are_real() -> None:
    for name in aioelastic.__all__:
        value = getattr(aioelastic, name)
        assert value is not None
    assert set(aioelastic.__all__) == set(aioelastic._HOMES) | aioelastic._MODULES
    for name, home in aioelastic._HOMES.items():
        module = importlib.import_module(f"aioelastic.{home}")
        assert getattr(aioelastic, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="nonsense"):
        aioelastic.nonsense  # noqa: B018
    assert set(aioelastic.__all__) <= set(dir(aioelastic))


def test_public_names_are_documented() -> None:
    for name in aioelastic._HOMES:
        assert getattr(aioelastic, name).__doc__, name


def test_a_group_without_gpus_does_not_load_what_they_need() -> None:
    code = (
        "import asyncio, sys; from aioelastic import Command, supervise; asyncio.run(supervise(Command('true')));"
        "print([one for one in sys.modules if one.startswith('aioelastic.gpu') or one == 'cuda'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_a_worker_imports_little() -> None:
    code = (
        "import sys; before = set(sys.modules); import aioelastic; aioelastic.record;"
        "new = set(sys.modules) - before;"
        "foreign = {m.partition('.')[0] for m in new} - set(sys.stdlib_module_names) - {'aioelastic'};"
        "assert not foreign, foreign; assert 'asyncio' not in sys.modules; print(sorted(m for m in new if 'aioe' in m))"
    )
    out = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    worker = ("", ".context", ".error_record", ".stack_dump")
    mine = ["aioelastic", "aioelastic.child", *(f"aioelastic.child.worker{one}" for one in worker)]
    mine += ["aioelastic.system", "aioelastic.system.descriptors", "aioelastic.system.first_streams"]
    assert out.stdout.strip() == str(mine)


# of the package, what only functions, lent executors, GPUs and shared memory need; and what is slow to import
_NOT_FOR_COMMANDS = [
    "aioelastic.child.wire.messages",
    "aioelastic.child.wire.pickling",
    "aioelastic.child.wire.sent_objects",
    "aioelastic.child.worker.exceptions",
    "aioelastic.child.worker.function_run",
    "aioelastic.child.worker.host_program",
    "aioelastic.child.worker.lent_run",
    "aioelastic.child.worker.main_module",
    "aioelastic.child.worker.named_function",
    "aioelastic.child.worker.task_loop",
    "aioelastic.child.zygote",
    "aioelastic.executor",
    "aioelastic.gpu",
    "aioelastic.launch._fork",
    "aioelastic.launch._function_channel",
    "aioelastic.launch._lent_executor",
    "aioelastic.launch._zygote",
    "aioelastic.memory",
    "aioelastic.planning._calls",
    "aioelastic.sharing",
    "aioelastic.supervisor.function_parts",
    "aioelastic.testing",
    "anyio",
    "ctypes",
    "datetime",
    "difflib",
    "hashlib",
    "importlib.util",
    "multiprocessing",
    "pickle",
    "platform",
    "psutil",
    "random",
    "shutil",
    "symtable",
    "tempfile",
]


def test_a_run_of_a_command_imports_little() -> None:
    """What it does not need would delay every run, by up to some milliseconds for each module."""
    code = (
        "import sys; before = set(sys.modules); from aioelastic.cli import main;"
        "assert 'asyncio' not in sys.modules;"  # a guardian is begun first
        "main(['run', '--', 'true']); print(*{*sys.modules} - before)"
    )
    ran = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    imported = set(ran.stdout.split())
    assert not imported.intersection(_NOT_FOR_COMMANDS)
    assert len([one for one in imported if one.startswith("aioelastic")]) <= 130


def test_a_door_that_loads_names_when_they_are_used_has_all() -> None:
    for door in (aioelastic.launch, aioelastic.planning):
        assert all(getattr(door, name) is not None for name in door.__all__)
        with pytest.raises(AttributeError, match="nonsense"):
            door.nonsense  # noqa: B018
    assert sorted(name for names in aioelastic.launch._NAMES.values() for name in names) == aioelastic.launch.__all__


def test_only_the_plugin_imports_pytest() -> None:
    code = "import sys, aioelastic.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_text_has_an_encoding() -> None:
    """Where `EncodingWarning` is an error, one that has none raises; in whatever thread that is."""
    for path in sources().values():
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name, given = ast.unparse(call.func), {one.arg: ast.unparse(one.value) for one in call.keywords}
            if name in ("open", "io.open", "os.fdopen"):
                mode = ast.unparse(call.args[1]) if len(call.args) > 1 else given.get("mode", "'r'")
                fine = "b" in mode
            elif name.endswith((".read_text", ".write_text")):
                fine = len(call.args) > name.endswith(".write_text")
            else:
                fine = not name.startswith("subprocess.") or not {"text", "universal_newlines"} & {*given}
            assert fine or "encoding" in given, f"{path}:{call.lineno}: {ast.unparse(call)}"


def test_typed() -> None:
    assert (HOUSE / "py.typed").exists()


@pytest.mark.parametrize(
    ("module", "first", "final"),
    [
        (states, states.State.PLANNED, states.FINAL),
        (slots, slots.State.STARTING, {slots.State.DEAD}),
    ],
)
def test_a_table_is_complete(module: Any, first: Any, final: Any) -> None:
    """Every state can be reached, every state that is not final can be left, and nothing leaves a final one."""
    reached = {first}
    while new := {b for (a, _), b in module.TABLE.items() if a in reached} - reached:
        reached |= new
    assert reached == set(module.State)
    assert {one for one in module.State if not any(one is source for source, _ in module.TABLE)} == final


def test_what_is_final() -> None:
    ended = {states.State.SUCCEEDED, states.State.FAILED, states.State.STOPPED}
    assert ended | {states.State.UNSTARTED, states.State.UNKILLABLE} == states.FINAL


@pytest.mark.parametrize(
    ("module", "state", "trigger"),
    [(one, state, trigger) for one in (states, slots) for state in one.State for trigger in one.Trigger],
)
def test_missing_pairs_are_errors(module: Any, state: Any, trigger: Any) -> None:
    if (state, trigger) in module.TABLE:
        assert module.step(state, trigger) is module.TABLE[state, trigger]
    else:
        with pytest.raises(RuntimeError, match=trigger.value):
            module.step(state, trigger)


def test_only_who_tells_what_came_of_it_closes_a_descriptor_by_itself() -> None:
    closers = {
        str(path.relative_to(HOUSE))
        for path in HOUSE.rglob("*.py")
        if re.search(r"(?<!`)\bos\.close\b", path.read_text())
    }
    makes_it_fail = "testing/_failing_calls.py"
    assert closers == {"system/descriptors.py", "streams/_files.py", makes_it_fail}


PUBLIC = {
    "Group": {
        *("as_completed", "begin_stop", "dump_stacks", "events", "finish", "hurry", "limit", "line", "lines", "pids"),
        *("plan", "run_id", "send_signal", "stop", "wait"),
    },
    "Worker": {
        *(
            "attempt",
            "dialogue",
            "exit",
            "pid",
            "rank",
            "receive",
            "send",
            "send_signal",
            "signal_group",
            "stacks",
            "state",
        ),
        *("stdin", "stop", "wait"),
    },
    "WorkerExecutor": {
        *("kill_workers", "map", "map_unordered", "max_workers", "pids", "resize", "run", "shutdown", "submit"),
        *("terminate_workers", "with_options"),
    },
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_handle_shows_what_users_may_call(name: str) -> None:
    kind = getattr(aioelastic, name)
    assert {one for one in dir(kind) if not one.startswith("_")} == PUBLIC[name]
    text = (Path(__file__).parents[2] / "docs" / "reference" / "running.md").read_text()
    (members,) = re.findall(rf"autoclass:: aioelastic\.{name}(?:\(\))?\n   :members: (.*)", text)
    assert set(members.split(", ")) == PUBLIC[name]


@pytest.mark.parametrize("start", ["zygote", "fork"])
async def test_an_instance_shows_no_more(start: Any) -> None:
    async with aioelastic.Group(aioelastic.Function(abs, 1), start=start) as group:
        for one in (group, group[0]):
            assert {name for name in dir(one) if not name.startswith("_")} == PUBLIC[type(one).__name__]
        assert group[0] is group[0]
        assert [*group] == [group[0]]
        await group.wait()


def test_no_test_waits_for_ever_for_a_process_of_its_own() -> None:
    """`Popen.__exit__` waits for its end, whatever the block has raised: `helpers.child_process` kills it then. A
    program of its own (`injection.py`) does the same in its own way."""
    found = [
        f"{path.name}:{number}"
        for path in sorted(Path(__file__).parents[1].rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"(with|enter_context\() ?subprocess\.Popen\(", line) and path.name != "injection.py"
    ]
    assert found == []


def test_a_process_of_a_test_ends_with_its_block() -> None:
    stays = ["/bin/sh", "-c", "exec sleep 600"]
    with suppress(EOFError), child_process(stays, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        program.stdin.write(b"what nobody reads")
        raise EOFError
    assert program.returncode == -signal.SIGKILL
    with child_process(["cat"], stdin=subprocess.PIPE) as program:
        pass
    assert program.returncode == 0


# what makes a descriptor, or a name that has to be removed
_MAKERS = {"open", "dup", "pipe2", "openpty", "eventfd", "memfd_create", "pidfd_open", "epoll", "accept", "mkdtemp"}
_MAKERS |= {"socket", "socketpair", "pair", "mkstemp", "signalfd"}


def test_a_forked_copy_can_disown_each_descriptor() -> None:
    """Who keeps one says in `disown` what a copy is to close. What is in `child/` makes its copies itself."""
    keepers: set[str] = set()
    silent: set[str] = set()
    for module, path in sources().items():
        if room(module) in ("child", "testing", "memory", "gpu"):  # the latter two have a registry of their own
            continue
        classes = [one for one in ast.walk(ast.parse(path.read_text())) if isinstance(one, ast.ClassDef)]
        disowns = {
            one.name
            for one in classes
            if any(isinstance(part, ast.FunctionDef) and part.name == "disown" for part in one.body)
        }
        for one in classes:
            if any(map(_keeps_one, ast.walk(one))):
                keepers.add(one.name)
                if not disowns & {one.name, *map(ast.unparse, one.bases)}:
                    silent.add(f"{path.relative_to(HOUSE)}: {one.name}")
    assert silent == {"launch/_host_state.py: Reader"}  # which its module closes in copies
    assert {"Exchange", "Guardian", "Ends", "_Service", "_Name", "Target", "Opened", "Poller"} <= keepers


def _keeps_one(node: ast.AST) -> bool:
    """Whether it puts a new descriptor into an attribute."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any("self." in ast.unparse(one) for one in targets) and any(
        isinstance(one, ast.Call)
        and isinstance(one.func, ast.Attribute)
        and one.func.attr in _MAKERS
        and ast.unparse(one.func.value) in ("os", "socket", "select", "tempfile", "datagrams")
        for one in ast.walk(node.value)
    )
