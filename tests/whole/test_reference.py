"""The reference is whole: each public name, what it takes, has and returns, with its type and a word of what it is."""

from __future__ import annotations

import ast
import enum
import inspect
import re
import sys
from pathlib import Path

import pytest

import aioelastic
from aioelastic import errors, events, gpu, sharing, testing

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

import reference_tables as tables  # noqa: E402  # it lies beside what it writes

# of `aioelastic.gpu`, what its door has for the rooms above
FOR_ROOMS = {"DeviceArray", "copy", "empty", "end", "inventory", "is_on_gpu", "meant", "reducers", "set_limit"}
FOR_ROOMS |= {"why_unproven"}

ENTRIES = [one for page in sorted(tables.PAGES.glob("*.md")) for one in tables.entries(page.read_text())]
NAMED = {one.name.rpartition(".")[2] for one in ENTRIES}


def types_of_ours() -> dict[str, str]:
    """The classes, and the names of types, that the package defines; these with what they mean."""
    found: dict[str, str] = {}
    for path in Path(aioelastic.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, "")
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias" and node.value:
                value = node.value.value if isinstance(node.value, ast.Constant) else ast.unparse(node.value)
                found[ast.unparse(node.target)] = str(value)
    return found


def test_each_public_name_is_in_the_reference() -> None:
    public = {*aioelastic.__all__, *errors.__all__, *testing.__all__, *gpu.__all__} - aioelastic._MODULES - FOR_ROOMS
    happens = [one for one in vars(events).values() if inspect.isclass(one) and issubclass(one, events.Event)]
    public |= {*sharing.__all__, *(one.__name__ for one in happens)}
    assert public - NAMED == set()


def test_each_attribute_and_each_parameter_is_told_of() -> None:
    gaps = []
    for entry in ENTRIES:
        is_enum = isinstance(entry.value, enum.EnumType)
        gaps += [(entry.name, row) for row in tables.rows(entry) if not row.words or not (row.type or is_enum)]
    assert gaps == []


def test_each_method_is_shown_or_left_out() -> None:
    """What the page on the site leaves out, its directive names."""
    for entry in ENTRIES:
        if inspect.isclass(entry.value) and entry.members is not None:
            there = tables.members(entry.value)
            assert there.keys() - {*entry.members} - {*entry.left_out} == set(), entry.name
            assert [one for one in entry.members if not hasattr(entry.value, one)] == [], entry.name


def test_each_type_that_is_named_can_be_looked_up() -> None:
    words = (tables.PAGES / "words.md").read_text()
    aliases = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", words, re.MULTILINE))
    ours = types_of_ours()
    for entry in ENTRIES:
        for row in tables.rows(entry):
            for name in {*re.findall(r"(?<![\w.])[A-Z]\w+", row.type)} & ours.keys():
                if ours[name]:
                    assert aliases.get(name, "").replace("\\|", "|") == ours[name], (entry.name, name)
                else:
                    assert name in NAMED, (entry.name, row)


@pytest.mark.parametrize("page", sorted(tables.PAGES.glob("*.md")), ids=lambda page: page.name)
def test_the_tables_are_what_there_is(page: Path) -> None:
    text = page.read_text()
    assert tables.written(text) == text, "run `python docs/reference_tables.py`"
    assert (tables.BEGIN in text) == bool([*tables.entries(text)])


def test_who_is_called_has_an_example() -> None:
    """Of the front door, with arguments."""
    without = []
    for entry in ENTRIES:
        value, name = entry.value, entry.name.removeprefix("aioelastic.")
        if name in aioelastic.__all__ and entry.made and inspect.signature(value).parameters:
            told = [value, *tables.members(value).values()] if inspect.isclass(value) else [value]
            without += [] if any("Example::" in (one.__doc__ or "") for one in told) else [name]
    assert without == []


def test_docstrings_are_not_taken_for_something_else() -> None:
    """By Sphinx: `type: text` for a property and after Returns, one name for each attribute, no escapes in code."""
    for entry in ENTRIES:
        parts = {"": entry.value, **(tables.members(entry.value) if inspect.isclass(entry.value) else {})}
        for name, one in parts.items():
            text, who = inspect.cleandoc(one.__doc__ or ""), f"{entry.name}.{name}"
            if isinstance(one, property):
                assert ":" not in re.sub("``.*?``", "", text.partition("\n")[0]), who
            for first in re.findall(r"^(?:Returns|Yields):\n(.*)", text, re.MULTILINE):
                assert ":" not in re.sub("``.*?``", "", first), who
            attributes = text.partition("Attributes:\n")[2].partition("\n\n")[0]
            assert not re.search(r"^    \w+, \w.*?:", attributes, re.MULTILINE), who
            assert not re.search(r"(?<!`)`[^`\n]*\\[^`\n]*`(?!`)", text.partition("Example::")[0]), who
