"""The house keeps its order: layers, public names, what a worker imports, one table for a life."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import aioelastic
from aioelastic import lifecycle, slots

HOUSE = Path(aioelastic.__file__).parent

# each may import those before it, never one behind it
ORDER = [
    "shown",
    "errors",
    "checks",
    "restart",
    "entry",
    "borrowed",
    "placement",
    "spec",
    "tracebacks",
    "why",
    "remains",
    "outcome",
    "blame",
    "events",
    "lifecycle",
    "forked",
    "thread",
    "turns",
    "shm",
    "memory",
    "gpu",
    "child",
    "report",
    "sharing",
    "watch",
    "launch",
    "streams",
    "replies",
    "stop",
    "cgroups",
    "stacks",
    "proof",
    "sinks",
    "witness",
    "ground",
    "hub",
    "keeper",
    "worker",
    "account",
    "tasks",
    "slots",
    "owner",
    "pool",
    "executor",
    "passes",
    "group",
    "run",
    "cli",
    "testing",
    "__main__",
]


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in HOUSE.rglob("*.py"):
        relative = path.relative_to(HOUSE)
        if relative.name == "__init__.py" and len(relative.parts) == 1:
            continue
        found.setdefault(relative.parts[0].removesuffix(".py"), []).append(path)
    return found


def test_every_room_is_in_the_order() -> None:
    assert sorted(rooms()) == sorted(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_downward(room: str) -> None:
    below = set(ORDER[: ORDER.index(room)])
    for path in rooms()[room]:
        tree = ast.parse(path.read_text())
        # imports for type checkers only do not run
        typing_only = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        package = ["aioelastic", *path.relative_to(HOUSE).parts[:-1]]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing_only:
                base = package[: len(package) - node.level + 1]
                target = [*base, *(node.module.split(".") if node.module else [])]
                names = [target[1]] if len(target) > 1 else [alias.name for alias in node.names]
                for name in names:
                    assert name in below | {room, "__version__"}, f"{path.name} of {room} imports {name}"


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
    mine = ["aioelastic", *(f"aioelastic.child{one}" for one in ("", "._context", "._record", "._stacks"))]
    assert out.stdout.strip() == str(mine)


def test_only_the_plugin_imports_pytest() -> None:
    code = "import sys, aioelastic.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_typed() -> None:
    assert (HOUSE / "py.typed").exists()


@pytest.mark.parametrize(
    ("module", "first", "final"),
    [
        (lifecycle, lifecycle.State.PLANNED, lifecycle.FINAL),
        (slots, slots.State.HIRING, {slots.State.DEAD}),
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
    State = lifecycle.State
    assert {State.DONE, State.UNSTARTED, State.UNKILLABLE} == lifecycle.FINAL


@pytest.mark.parametrize(
    ("module", "state", "trigger"),
    [(one, state, trigger) for one in (lifecycle, slots) for state in one.State for trigger in one.Trigger],
)
def test_missing_pairs_are_errors(module: Any, state: Any, trigger: Any) -> None:
    if (state, trigger) in module.TABLE:
        assert module.step(state, trigger) is module.TABLE[state, trigger]
    else:
        with pytest.raises(RuntimeError, match=trigger.value):
            module.step(state, trigger)


def test_files_stay_readable() -> None:
    for path in HOUSE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path
