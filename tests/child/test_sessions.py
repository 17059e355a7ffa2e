"""Functions that were typed at a prompt: the session in the documentation, typed into real prompts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "functions.md"
BLOCK = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = re.compile(r"^(>>> |\.\.\. |In \[\d+\]: |Out\[\d+\]: |   \.\.\.: )+")
PROMPTS = {
    "asyncio": ["asyncio"],
    "IPython": ["IPython", "--simple-prompt", "--no-banner", "--no-confirm-exit", "--colors=NoColor"],
}


def session() -> tuple[str, list[str]]:
    """What is typed, and what is to be answered."""
    (block,) = BLOCK.findall(PAGE.read_text())
    # in one line, for the prompt of asyncio in 3.13.0 takes no second one from a pipe; all want an empty one after it
    block = re.sub(r"(?m):\n\.\.\. +(.*)\n(?=>>>)", r": \1\n...\n", block)
    lines = block.splitlines()
    typed = [one[4:] for one in lines if one.startswith((">>>", "..."))]
    return "\n".join(typed) + "\n", [one for one in lines if not one.startswith((">>>", "..."))]


@pytest.mark.parametrize("module", PROMPTS)
def test_a_function_typed_at_a_prompt(module: str, tmp_path: Path) -> None:
    typed, answers = session()
    run = subprocess.run(
        [sys.executable, "-m", *PROMPTS[module]],
        input=typed,
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "IPYTHONDIR": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    shown = [PROMPT.sub("", one) for one in run.stdout.splitlines()]
    assert "Traceback" not in run.stdout + run.stderr
    assert answers
    assert [one for one in answers if one not in shown] == [], run.stdout
