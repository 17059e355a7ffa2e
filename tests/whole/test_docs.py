"""The documentation is true: its programs run, its links lead somewhere, its diagram is the table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import diagrams  # noqa: E402  # these lie beside what they draw
import terminal  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


PROGRAMS = [
    pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, text in enumerate(blocks(page, "python"), 1)
]


@pytest.mark.long
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_run(program: str, tmp_path: Path) -> None:
    """Each as a reader would run it: saved to a file, in a directory that holds docs/examples, the venv active."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "program.py").write_text(program)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    run = subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout, "a program in the documentation should show something"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_shown_as_code_is_not_wider_than_a_page(page: Path) -> None:
    """Directives that show something else than their own text are left out."""
    shown, wide = "", []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            shown = "" if shown else line
        elif shown and shown != "```{eval-rst}" and len(line) > 88:
            wide.append(line)
    assert wide == []


def test_examples_are_not_wider_than_a_page() -> None:
    files = [*(ROOT / "docs").rglob("*.py")]
    assert len(files) > 5
    assert [(one.name, line) for one in files for line in one.read_text().splitlines() if len(line) > 88] == []


def test_there_are_programs_on_the_pages_for_newcomers() -> None:
    names = {one.id.rpartition("-")[0] for one in PROGRAMS if one.id}
    assert {"README.md", "docs/tutorial.md", "docs/how-to/save-logs.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text())
    assert [one for one in links if not (page.parent / one).exists()] == []


def test_the_diagrams_are_what_the_tables_say() -> None:
    for name, picture in diagrams.DRAWN.items():
        assert (ROOT / "docs" / "images" / name).read_text() == picture, "run `python docs/diagrams.py`"


def test_the_picture_of_a_terminal_is_drawn_from_real_runs(tmp_path: Path) -> None:
    terminal.main(tmp_path / "terminal.svg")
    for path in (tmp_path / "terminal.svg", ROOT / "docs" / "images" / "terminal.svg"):
        text = "\n".join("".join(one.itertext()) for one in ElementTree.parse(path).getroot())
        assert re.search(r"^1 +\d+ +SIGSEGV ", text, re.MULTILINE)
        assert "failed: SIGSEGV after" in text
        assert text.rstrip().endswith("nothing is left\nnothing is left")
        assert str(ROOT) not in text


def test_what_the_plugin_for_pytest_has_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference" / "testing.md").read_text()
    source = (ROOT / "aioelastic" / "testing" / "plugin.py").read_text()
    for asked in (r"^@pytest\.fixture\ndef (\w+)", r'addini\("(\w+)"', r'"markers", "(\w+):'):
        found = re.findall(asked, source, re.MULTILINE)
        assert found
        assert [one for one in found if f"`{one}`" not in text] == []


def test_the_walks_of_the_tour_are_ways_through_files() -> None:
    """Each file is there, and is entered once."""
    text = (ROOT / "docs" / "tour.md").read_text()
    walks = re.split(r"^### ", text[text.index("## Four walks") :], flags=re.MULTILINE)[1:]
    assert len(walks) == 4
    for walk in walks:
        files = re.findall(r"^\d+\. `([\w/.]+)`", walk, re.MULTILINE)
        assert len(files) == len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) == len(set(files)) > 5
        assert [one for one in files if not (ROOT / "aioelastic" / one).exists()] == []
