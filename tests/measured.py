"""Coverage with all processes: of the tests, of those that they start, and of the copies that these fork.

`python tests/measured.py` runs all tests, or takes arguments of pytest, and shows how much of each room ran; what did
not is listed by `--missing` in front of them. What a SIGKILL ends is not counted, nor are C's own threads.
"""

from __future__ import annotations

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", coverage.exceptions.CoverageWarning)  # of who was killed while it wrote
        whole.combine()
    lines, ran = Counter[str](), Counter[str]()
    print("\n  ran  lines  room")
    for path in sorted((HOUSE / "aioelastic").rglob("*.py")):
        _, statements, _, left, shown = whole.analysis2(str(path))
        room = str(path.relative_to(HOUSE / "aioelastic").parent)
        lines[room] += len(statements)
        ran[room] += len(statements) - len(left)
        if missing and left:
            print(f"{path.relative_to(HOUSE)}: {shown}")
    lines["all"], ran["all"] = lines.total(), ran.total()
    for room, count in lines.items():
        print(f"{ran[room] / max(1, count):5.1%} {count:6}  {room}")


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
