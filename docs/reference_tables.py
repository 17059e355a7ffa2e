"""The tables on the pages of `docs/reference`: all there is, with types and defaults.

With them the pages can be read in a checkout, too. `python docs/reference_tables.py`
writes them anew, from the directives of each page and the docstrings that these name;
a test says when that was forgotten.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGES = Path(__file__).parent / "reference"
BEGIN = "<!-- written by docs/reference_tables.py -->\n"
END = "<!-- end of what it writes -->\n"

# those that take the arguments of another, and say so
SAME = {"aioelastic.Group": "aioelastic.supervise"}

_DIRECTIVE = re.compile(
    r"^\.\. (currentmodule|auto\w+):: ([\w.]+)(\(\))?((?:\n   :.*)*)", re.MULTILINE
)
_ITEM = re.compile(r" {4}(\*{,2}\w+(?:, \*{,2}\w+)*)(?: \((.*)\))?: (.*)")


class Entry(NamedTuple):
    """One name of a page.

    Attributes:
        name: with its module.
        made: whether users call it.
        members: what of it is shown there; None: all.
        left_out: what is public, and not for users.
    """

    name: str
    made: bool
    members: tuple[str, ...] | None
    left_out: tuple[str, ...]

    @property
    def value(self) -> Any:
        """What has this name."""
        parts = self.name.split(".")
        for end in range(len(parts), 0, -1):
            try:
                module = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                continue
            return functools.reduce(getattr, parts[end:], module)
        raise LookupError(self.name)


class Row(NamedTuple):
    """One line of a table."""

    name: str
    type: str
    default: str
    words: str


def entries(page: str) -> Iterator[Entry]:
    """What a page names, in its order."""
    module = ""
    for kind, name, bare, options in _DIRECTIVE.findall(page):
        if kind == "currentmodule":
            module = f"{name}."
            continue
        whole = name if name.startswith("aioelastic") else module + name
        if kind == "automodule":
            if ":members:" in options:
                for one in vars(importlib.import_module(name)).values():
                    if inspect.isclass(one) and one.__module__ == name:
                        yield Entry(f"{name}.{one.__name__}", False, None, ())
            continue
        listed = {
            key: tuple(re.findall(r"\w+", rest))
            for key, rest in re.findall(r":([\w-]+):(.*)", options)
        }
        shown = listed.get("members", ())
        all_of_them = "members" in listed and not shown
        yield Entry(
            whole,
            not bare and kind != "autoexception",
            None if all_of_them else shown,
            listed.get("exclude-members", ()),
        )


def said(value: Any, section: str) -> dict[str, str]:
    """Name → text, of one section of a docstring. Of "" it is the first sentence."""
    text = inspect.cleandoc(value.__doc__ or "")
    if not section:
        return {"": _sentence(" ".join(text.partition("\n\n")[0].split()))}
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, rest = f"\n{text}".partition(f"\n{section}:\n")
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        if entry := _ITEM.match(line):
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[3]))
        elif line.strip():
            for name in names:
                found[name] += f" {line.strip()}"
    return {name: _sentence(words) for name, words in found.items()}


def members(kind: type) -> dict[str, Any]:
    """Its public methods and properties that are ours."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("aioelastic"):
            for name, value in vars(base).items():
                plain = getattr(value, "__func__", getattr(value, "fget", value))
                foreign = not plain.__doc__ and hasattr(kind.__base__, name)
                if inspect.isfunction(plain) and name[0] != "_" and not foreign:
                    found[name] = value
    return found


def fields(kind: type) -> dict[str, str]:
    """Its public attributes that are no methods and no properties, and their types."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("aioelastic"):
            if inspect.isfunction(vars(base).get("__init__")):
                found |= _assigned(base)
            found |= vars(base).get("__annotations__", {})
            for line in inspect.cleandoc(base.__doc__ or "").splitlines():
                if (entry := _ITEM.match(line)) and entry[2]:
                    found[entry[1]] = entry[2]
            for name in said(base, "Attributes"):
                found.setdefault(name, "")
    own = members(kind)
    return {
        one: _type(told)
        for one, told in found.items()
        if one[0] != "_" and one not in own
    }


def _assigned(kind: type) -> dict[str, str]:
    """What `__init__` gives each instance."""
    try:
        source = textwrap.dedent(inspect.getsource(vars(kind)["__init__"]))
    except (OSError, TypeError):  # that of a dataclass is not in a file
        return {}
    types = vars(kind)["__init__"].__annotations__
    found: dict[str, str] = {}
    targets: list[Any]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        if isinstance(node, ast.AnnAssign):
            targets, told = [node.target], ast.unparse(node.annotation)
        else:
            targets, told = node.targets, types.get(ast.unparse(node.value), "")
            if isinstance(node.value, ast.Constant):
                told = type(node.value.value).__name__
        for name in [ast.unparse(leaf) for one in targets for leaf in ast.walk(one)]:
            if re.fullmatch(r"self\.\w+", name):
                found[name.removeprefix("self.")] = told
    return found


def rows(entry: Entry) -> list[Row]:
    """What a table says of it, below its head."""
    value = entry.value
    if inspect.isroutine(value):
        return _parameters(value, "", said(value, "Args")) + _errors(value, "")
    if not inspect.isclass(value):
        return []
    texts: dict[str, str] = {}
    for base in reversed(value.__mro__):
        texts |= said(base, "Args") | said(base, "Attributes")
    if issubclass(value, enum.Enum):
        return [
            Row(name, "", "", texts.get(name) or repr(one.value))
            for name, one in value.__members__.items()
        ]
    if entry.name in SAME:
        other = Entry(SAME[entry.name], True, (), ()).value
        texts |= said(other, "Args")
    out = _parameters(value, "", texts) + _errors(value, "") if entry.made else []
    known = {one.name.lstrip("*") for one in out} | {*entry.left_out}
    defaults = _defaults(value)
    for name, told in fields(value).items():
        if name not in known:
            out.append(Row(name, told, defaults.get(name, ""), texts.get(name, "")))
    own = members(value)
    for name in own if entry.members is None else filter(own.get, entry.members):
        one = own[name]
        function = inspect.unwrap(getattr(one, "__func__", getattr(one, "fget", one)))
        words = said(function, "")[""] or texts.get(name, "")
        returned = _type(function.__annotations__.get("return", ""))
        if isinstance(one, property):
            out.append(Row(name, returned, "", words))
        else:
            out.append(Row(f"{_wait(function)}{name}()", returned, "", words))
            out += _parameters(getattr(value, name), name, said(function, "Args"))
        out += _errors(function, name)
    return out


def _parameters(function: Any, of: str, texts: dict[str, str]) -> list[Row]:
    out = []
    for one in inspect.signature(function).parameters.values():
        if one.name == "self" or one.name.startswith("_"):
            continue
        star = "*" * (one.kind is one.VAR_POSITIONAL) or "**" * (
            one.kind is one.VAR_KEYWORD
        )
        name = f"{star}{one.name}"
        told = "" if one.annotation is one.empty else _type(one.annotation)
        default = "" if one.default is one.empty else _shown(one.default)
        words = texts.get(name) or texts.get(one.name, "")
        out.append(Row(f"{of}({name})" if of else name, told, default, words))
    return out


def _errors(function: Any, of: str) -> list[Row]:
    raised = said(function, "Raises").items()
    return [Row(f"{of} raises".strip(), name, "", words) for name, words in raised]


def _defaults(kind: type) -> dict[str, str]:
    found = dict(getattr(kind, "_field_defaults", {}))
    if dataclasses.is_dataclass(kind):
        found = {one.name: one.default for one in dataclasses.fields(kind)}
    return {
        name: _shown(value)
        for name, value in found.items()
        if value is not dataclasses.MISSING
    }


def _wait(function: Any) -> str:
    return "await " if inspect.iscoroutinefunction(function) else ""


def _type(told: Any) -> str:
    if isinstance(told, typing.ForwardRef):  # of a NamedTuple
        return told.__forward_arg__
    return told if isinstance(told, str) else getattr(told, "__name__", str(told))


def _shown(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    return "{}" if repr(value) == "<factory>" else repr(value)


def _sentence(text: str) -> str:
    """The first one, as Markdown."""
    first = re.split(r"(?<=\.)\s+(?=[A-Z`\"(])", text)[0].removesuffix(".")
    parts = first.split("`")
    parts[::2] = [re.sub(r"([*<])", r"\\\1", one) for one in parts[::2]]
    return "`".join(parts)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _line(*cells: str) -> str:
    return f"| {' | '.join(one.replace('|', chr(92) + '|') for one in cells)} |\n"


def table(entry: Entry) -> str:
    """One name of a page, in Markdown."""
    value = entry.value
    name = entry.name.rpartition(".")[2]
    kind = _code(repr(value)) if isinstance(value, int) else ""
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
    elif inspect.isroutine(value):
        kind = _code(_type(value.__annotations__.get("return", "")))
        name = f"{_wait(value)}{name}()"
    words = "" if isinstance(value, int) else said(value, "")[""]
    out = _line(_code(name), kind, "default", words) + _line(*["---"] * 4)
    for one in rows(entry):
        out += _line(_code(one.name), _code(one.type), _code(one.default), one.words)
    return out


def written(page: str) -> str:
    """The page with its tables as they should be; without a place for them it stays."""
    before, begin, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not begin:
        return page
    return f"{before}{BEGIN}\n{chr(10).join(map(table, entries(page)))}\n{END}{after}"


if __name__ == "__main__":
    for path in PAGES.glob("*.md"):
        path.write_text(written(path.read_text()))
