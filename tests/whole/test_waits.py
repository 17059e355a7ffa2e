"""Each place of the package that may wait stands in the list of docs/waits.md, with what bounds it; nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2] / "aioelastic"
LIST = HOME.parent / "docs" / "waits.md"
ROW = re.compile(r"\| `(?P<place>[^`]+)` \| (?P<whom>[^|]+) \| (?P<bound>[^|]+) \|")
QUEUE = re.compile(r"(?i)(queue|jobs|work|answer|done)$")  # what a `get` without arguments waits for
# calls that wait, whatever they are called on
WAITS = {"wait", "waitpid", "waitid", "wait4", "flock", "poll", "select", "acquire", "join", "result"}
WAITS |= {"connect", "accept", "recv", "recvmsg", "sendmsg", "sleep", "communicate"}
WAITS |= {"sigtimedwait", "sigwaitinfo", "sigwait", "pause"}
OF_OS = {"read", "write", "readv", "writev"}  # those of other objects are files, or in memory
WITHOUT = {
    "WNOHANG",
    "LOCK_NB",
    "MSG_DONTWAIT",
    "DONTWAIT",
    "FLAGS",
}  # with one of these it does not


def called(node: ast.AST) -> str:
    """The last name of what is called."""
    match node:
        case ast.Call(func=ast.Attribute(attr=name)) | ast.Call(func=ast.Name(id=name)):
            return name
    return ""


class Waits(ast.NodeVisitor):
    """The places of one file.

    Args:
        own: names of the package's functions that can be awaited: they wait by what is in them.
    """

    def __init__(self, file: str, own: set[str], tree: ast.Module) -> None:
        self._file, self._own = file, own
        self._within: list[str] = []
        self._modules = {  # of the package
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }
        self.places: dict[str, str] = {}  # place → what it does
        self.visit(tree)

    def _named(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._within.append(node.name)
        self.generic_visit(node)
        self._within.pop()

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _named  # noqa: N815  # as `ast` wants them

    def _add(self, node: ast.AST) -> None:
        self.places.setdefault(f"{self._file}: {'.'.join(self._within) or 'import'}", ast.unparse(node))

    def visit_Await(self, node: ast.Await) -> None:
        text = ast.unparse(node.value)
        if text != "asyncio.sleep(0)" and (called(node.value) not in self._own or text.startswith("asyncio.")):
            self._add(node)
        for child in ast.iter_child_nodes(node.value):  # and not what is awaited as a call that waits by itself
            self.visit(child)

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        for item in node.items:
            if called(item.context_expr) not in self._own | {"timeout", "AsyncExitStack"}:
                self._add(item.context_expr)
        self.generic_visit(node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        if called(node.iter) not in self._own | {"events", "lines"}:
            self._add(node.iter)
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            text = ast.unparse(item.context_expr)
            if re.search(r"(?i)(lock|_changed)$", text):
                self.places[f"{self._file}: with {text}"] = text  # one row for each lock, whoever takes it
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute):
            return
        name, on = node.func.attr, ast.unparse(node.func.value)
        waits = name in WAITS or (on, name) == ("subprocess", "run") or (name == "exception" and bool(node.args))
        waits |= name == "get" and not node.args and QUEUE.search(on) is not None
        if (name in OF_OS and on == "os") or (waits and on not in self._modules | {"_log"}):
            words = {one.attr if isinstance(one, ast.Attribute) else getattr(one, "id", "") for one in ast.walk(node)}
            at_once = words & WITHOUT or (name not in OF_OS and [ast.unparse(one) for one in node.args[:1]] == ["0"])
            text = isinstance(node.func.value, ast.Constant) or on in ("os.path", "shlex")
            made = name in ("poll", "select") and on == "select" and not node.args
            if not (at_once or text or made):
                self._add(node)


def places() -> dict[str, str]:
    """All of them, and what is done there."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(HOME.rglob("*.py"))}
    own = {one.name for tree in trees.values() for one in ast.walk(tree) if isinstance(one, ast.AsyncFunctionDef)}
    found: dict[str, str] = {}
    for path, tree in trees.items():
        found |= Waits(str(path.relative_to(HOME)), own, tree).places
    return found


def rows() -> Iterator[re.Match[str]]:
    for line in LIST.read_text().splitlines():
        if line.startswith("| `"):
            row = ROW.fullmatch(line)
            assert row is not None, f"no row of three cells: {line}"
            yield row


def test_each_place_that_waits_is_in_the_list() -> None:
    """Who adds one says in docs/waits.md whom it waits for, and what bounds it; who removes one removes its row."""
    there, listed = places(), [row["place"] for row in rows()]
    missing = [f"| `{place}` | WHOM | BOUND | (for {there[place]})" for place in sorted(set(there) - set(listed))]
    gone = sorted(set(listed) - set(there))
    assert not missing, "add these rows to docs/waits.md:\n" + "\n".join(missing)
    assert not gone, "nothing waits there any more; remove these rows from docs/waits.md:\n" + "\n".join(gone)
    assert listed == sorted(set(listed)), "the rows of docs/waits.md are to be sorted, each place once"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("async def f(): await g()", {"f"}),
        ("async def f(): await own()", set()),
        ("async def f(): await asyncio.sleep(0)", set()),
        ("async def f(): await asyncio.own(x)", {"f"}),
        ("def f(): self._jobs.get()", {"f"}),
        ("def f(): found.get(name)", set()),
        ("def f(): future.exception(seconds)", {"f"}),
        ("async def f():\n async with lock: pass", {"f"}),
        ("async def f():\n async with asyncio.timeout(3): await asyncio.wait(x)", {"f"}),
        ("def f(): os.waitpid(3, 0)", {"f"}),
        ("def f(): os.waitpid(3, os.WNOHANG)", set()),
        ("def f(): fcntl.flock(fd, fcntl.LOCK_EX)", {"f"}),
        ("def f(): fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", set()),
        ("def f(): ', '.join(x)", set()),
        ("class C:\n def f(self): self.thread.join()", {"C.f"}),
        ("def f():\n with self._lock: pass", {"with self._lock"}),
        ("from . import mine\ndef f(): mine.connect()", set()),
        ("def f(): poll = select.poll(); poll.poll(0); os.read(0, 1)", {"f"}),
        ("def f(): poll = select.poll(); poll.poll(0)", set()),
        ("time.sleep(1)", {"import"}),
    ],
)
def test_what_counts_as_a_wait(code: str, found: set[str]) -> None:
    assert set(Waits("x.py", {"own"}, ast.parse(code)).places) == {f"x.py: {one}" for one in found}
