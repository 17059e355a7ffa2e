"""Coverage with all processes: of the tests, of those that they start, and of the copies that these fork.

`python tests/measured.py` runs all tests, or takes arguments of pytest, and shows how much of each room ran, by lines
and by branches; the lines that did not are listed by `--missing` in front of them. What a SIGKILL ends is not counted,
nor are C's own threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import coverage
import coverage.exceptions
import pytest

HOUSE = Path(__file__).parents[1]
MISSING = "--missing"
COUNTED = ("num_statements", "covered_lines", "num_branches", "covered_branches")
# The guardian's interpreter has no site-packages, and so none of the file there that starts coverage.
START = f"""\
import sys
sys.path.append({str(Path(coverage.__file__).parents[1])!r})
import coverage
coverage.process_startup()
del sys.path[-1]
import threading, _thread, sys
_start = _thread.start_new_thread
def _measured(function, args):
    def body():
        sys.settrace(threading.gettrace())
        function(*args)
    return _start(body, ())
_thread.start_new_thread = _measured
"""


def pytest_configure() -> None:
    """This module is a plug-in of the tests that it runs."""
    from aioelastic.launch import _guardian

    plain = _guardian._argv

    def measured() -> list[str]:
        *words, code = plain()
        return [*words, START + code]

    pytest.MonkeyPatch().setattr(_guardian, "_argv", measured)


def show(missing: bool) -> None:
    whole = coverage.Coverage(config_file=str(HOUSE / "pyproject.toml"))
    with warnings.catch_warnings(), tempfile.NamedTemporaryFile() as report:
        warnings.simplefilter("ignore", coverage.exceptions.CoverageWarning)  # of who was killed while it wrote
        whole.combine()
        whole.json_report(outfile=report.name)
        files = json.load(report)["files"]
    counts: dict[str, Counter[str]] = {}
    for name, of in sorted(files.items()):
        for room in (str(Path(name).parent.relative_to("aioelastic")), "all"):
            counts.setdefault(room, Counter()).update({key: of["summary"][key] for key in COUNTED})
        if missing and of["missing_lines"]:
            print(f"{name}: {', '.join(map(str, of['missing_lines']))}")
    print("\n  ran  lines   ran  branches  room")
    counts["all"] = counts.pop("all")
    for room, of in counts.items():
        lines, ran, branches, taken = (of[key] for key in COUNTED)
        print(f"{ran / max(1, lines):5.1%} {lines:6} {taken / max(1, branches):5.1%} {branches:9}  {room}")


def main() -> int:
    missing = MISSING in sys.argv
    given = [one for one in sys.argv[1:] if one != MISSING]
    with tempfile.TemporaryDirectory(prefix="measured-") as directory:
        os.environ["COVERAGE_FILE"] = f"{directory}/data"
        words = ["coverage", "run", "-m", "pytest", "-p", "measured", *given]
        code = subprocess.run([sys.executable, "-m", *words], cwd=HOUSE, check=False).returncode
        show(missing)
    return code


if __name__ == "__main__":
    sys.exit(main())
