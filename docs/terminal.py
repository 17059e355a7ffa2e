"""Draws `docs/images/terminal.svg`, the picture in the README, from real runs.

Run it where aioelastic is installed: `python docs/terminal.py`, with another path to
write somewhere else.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from aioelastic import Command, Logs, Std, supervise

HERE = Path(__file__).parent
COLUMNS = 98
WIDE, HIGH, EDGE = 8.1, 18, 16  # pixels of a character, of a line, and around all
PROMPT = "$ "
PLAIN, TYPED = "#c9d1d9", "#ffffff"
COLOURS = {  # of SGR, on a dark ground
    "31": "#ff7b72",
    "32": "#7ee787",
    "33": "#e3b341",
    "34": "#79c0ff",
    "35": "#d2a8ff",
    "36": "#56d4dd",
}
SLEEP = "aioelastic run -n 4 -- sleep 1000 &"
KILL = "kill -9 $!; pgrep -f 'sleep 1000' || echo nothing is left"
# what is typed, and what is run in its place by one shell, if that is something else
SHOWN = {
    "aioelastic run -n 4 -- python3 crash.py": "",
    SLEEP: f"{SLEEP} sleep 1",
    KILL: KILL.replace(";", "; sleep 0.5;").replace("'sleep", "'^sleep"),
}
TITLE = (
    "One of four workers crashes, the others are stopped, and the reason is told; "
    "then the supervisor is killed, and nothing of it is left"
)


async def said(directory: Path) -> list[str]:
    """The lines of a shell at a terminal."""
    script = "".join(
        f"printf '%s\\n' {shlex.quote(PROMPT + one)}; {run or one}\necho\n"
        for one, run in SHOWN.items()
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = Command(
        "sh",
        "-c",
        script,
        cwd=directory,
        tty=(40, COLUMNS),
        env={"TERM": "xterm", "PATH": path},
    )
    result = await supervise(command, logs=Logs(tee=Std.NONE), check=False)
    lines = str(result[0].stdout).replace("\r", "").rstrip().split("\n")
    return [
        one[at : at + COLUMNS]
        for one in lines
        for at in range(0, max(len(one), 1), COLUMNS)
    ]


def drawn(lines: list[str]) -> str:
    """As SVG: text, each piece in its colour."""
    width, height = COLUMNS * WIDE + 2 * EDGE, len(lines) * HIGH + 2 * EDGE
    font = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}"',
        f'  width="{width:.0f}" font-family="{font}" font-size="13.5" role="img">',
        f"<title>{TITLE}</title>",
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>',
    ]
    for number, line in enumerate(lines):
        pieces, colour = [], ""
        for piece in re.split(r"(\x1b\[[0-9;]*[A-Za-z])", line):
            if piece.startswith("\x1b["):
                codes = piece[2:-1].split(";")
                colour = next((COLOURS[one] for one in codes if one in COLOURS), "")
            elif piece:
                fill = colour or (TYPED if line.startswith(PROMPT) else PLAIN)
                pieces.append(f'<tspan fill="{fill}">{html.escape(piece)}</tspan>')
        where = f'x="{EDGE}" y="{EDGE + HIGH * (number + 0.75):.1f}"'
        out.append(f'<text {where} xml:space="preserve">{"".join(pieces)}</text>')
    return "\n".join([*out, "</svg>", ""])


def main(path: Path) -> None:
    """Run all of it in a directory of its own, and draw it."""
    with tempfile.TemporaryDirectory(prefix="aioelastic-terminal-") as name:
        shutil.copy(HERE / "examples" / "crash.py", name)
        path.write_text(drawn(asyncio.run(said(Path(name)))))


if __name__ == "__main__":
    shown = HERE / "images" / "terminal.svg"
    main(Path(sys.argv[1]) if sys.argv[1:] else shown)
