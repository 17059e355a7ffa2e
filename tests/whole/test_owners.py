"""Each class of the program's side that holds a descriptor is known to what a forked copy must forget."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import aioelastic

HOUSE = Path(aioelastic.__file__).parent

# calls that make a descriptor
MAKERS = {
    *("os.open", "os.dup", "os.pipe", "os.pipe2", "os.pidfd_open", "os.eventfd", "os.memfd_create", "os.openpty"),
    *("socket.socket", "socket.socketpair", "select.epoll", "datagrams.pair", "pidfd_or_none", "reopened", "owned"),
    *("mmap.mmap", "tempfile.TemporaryFile", "accept", "above_two", "into"),
}

# other processes, and what only tests and the command line have
ELSEWHERE = ("child", "testing", "cli")

# class without a `disown` → who sees to it in a copy
WITHOUT = {
    "launch/_direct.py:DirectLauncher": "what it opens goes to a DirectProcess, which is registered",
    "launch/_fork.py:ForkLauncher": "what it opens goes to a DirectProcess, which is registered",
    "launch/_host_state.py:Reader": "its module closes all of them in a copy",
    "memory/array_messages.py:Outgoing": "a message under way; memory/_forked_copies.py closes what belongs to those",
    "sharing/_items.py:Putting": "an item under way; as messages",
    "sharing/_queue.py:Queue": "a copy may use the memory that it inherits; its module tells copies",
}


def called(node: ast.Call) -> str:
    """`os.open` as it is written; a method by its last name alone."""
    text = ast.unparse(node.func)
    return text if text in MAKERS else text.rpartition(".")[2] if not text.startswith(("os.", "socket.")) else text


def holders() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in sorted(HOUSE.rglob("*.py")):
        room = path.relative_to(HOUSE)
        if room.parts[0] in ELSEWHERE:
            continue
        for one in ast.walk(ast.parse(path.read_text())):
            if isinstance(one, ast.ClassDef):
                names = {called(it) for it in ast.walk(one) if isinstance(it, ast.Call)}
                if names & MAKERS:
                    yield f"{room}:{one.name}", one


def disowning() -> set[str]:
    """Classes with a `disown` of their own, or of an elder."""
    trees = [ast.parse(path.read_text()) for path in HOUSE.rglob("*.py")]
    classes = [one for tree in trees for one in ast.walk(tree) if isinstance(one, ast.ClassDef)]
    found = {one.name for one in classes for it in one.body if isinstance(it, ast.FunctionDef) and it.name == "disown"}
    while more := {one.name for one in classes for base in one.bases if ast.unparse(base) in found} - found:
        found |= more
    return found


def test_what_holds_a_descriptor_is_known() -> None:
    known = disowning()
    found = dict(holders())
    unknown = {where for where, one in found.items() if one.name not in known}
    assert unknown == set(WITHOUT)


def test_the_test_sees_those_that_hold_one() -> None:
    found = {where.partition(":")[2] for where, _ in holders()}
    assert {"_Service", "Poller", "Guardian", "Server", "Port", "Stray", "Target", "Segment"} <= found
