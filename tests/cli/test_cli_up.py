"""`aioelastic up`: a Procfile, as a user meets it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aioelastic.cli import main

UP = [sys.executable, "-m", "aioelastic", "up"]
BOUND = 150  # seconds after which a test says "it hangs" instead of hanging itself


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, in which we are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PORT", raising=False)
    return tmp_path


def up(*args: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*UP, *args], input=given, capture_output=True, text=True, timeout=BOUND, check=False)


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What would run."""
    assert main(["up", "--dry-run", *args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize(("end", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)])
def test_any_end_ends_all(end: str, status: int, home: Path) -> None:
    """The others are asked to stop, and what they say then is no failure; the status is that of the first."""
    server = "trap 'echo bye; exit 9' TERM; echo up > fifo; while :; do sleep 1000 & wait; done"
    (home / "Procfile").write_text(f"# mine\nserver: {server}\njob: read x < fifo; echo $x; {end}\n")
    os.mkfifo(home / "fifo")
    done = up()
    assert done.returncode == status, done.stderr
    assert sorted(done.stdout.splitlines()) == ["job    | up", "server | bye"]
    assert re.search(r"^0 +server +\d+ +stopped \(SIGTERM\): exit code 9 ", done.stderr, re.MULTILINE)
    assert ("the others were stopped: job had ended" in done.stderr) == (status == 0)


def test_names_in_colour_and_who_reads(home: Path) -> None:
    (home / "Procfile").write_text("web: echo $PS; cat\njob: sleep 1000\n")
    options = ["--formation", "web=2", "--on-success", "continue", "--color", "always", "--stdin", "web.2"]
    done = up("web", *options, given="hello\n")
    assert sorted(done.stdout.splitlines()) == [
        "\x1b[33mweb.2 | \x1b[0mhello",
        "\x1b[33mweb.2 | \x1b[0mweb.2",
        "\x1b[36mweb.1 | \x1b[0mweb.1",
    ]
    assert done.returncode == 0


def test_what_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "Procfile").write_text("web: a $PORT\nworker: b\nclock: c\n")
    plan = planned(capsys, "--formation", "web=002,clock=0", "--formation", "worker=1")
    assert re.findall(r"^rank \d+ .*", plan, re.MULTILINE) == [
        "rank 0 (web.1): /bin/sh -c 'a $PORT'",
        "rank 1 (web.2): /bin/sh -c 'a $PORT'",
        "rank 2 (worker): /bin/sh -c b",
    ]
    assert re.findall(r"env: PORT=(\d+)", plan) == ["5000", "5001", "5100"]
    assert "when one succeeds: the others are stopped" in plan
    plan = planned(capsys, "--on-success", "continue", "clock")
    assert re.findall(r"^rank \d+ \((.*?)\)", plan, re.MULTILINE) == ["clock"]
    assert "when one succeeds" not in plan
    plan = planned(capsys, "clock", "--port", "8000", "web", "--env", "A=1", "worker")
    assert re.findall(r"^rank \d+ \((.*?)\)", plan, re.MULTILINE) == ["web", "worker", "clock"]


def test_the_first_port(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the option, of files and --env, of the caller."""
    (home / "Procfile").write_text("web: a")
    monkeypatch.setenv("PORT", "6000")
    assert "env: PORT=6000" in planned(capsys)
    (home / ".env").write_text("PORT=7000")
    assert "env: PORT=7000" in planned(capsys)
    assert "env: PORT=7500" in planned(capsys, "--env", "PORT=7500")
    assert "env: PORT=8000" in planned(capsys, "--port", "8000")


def test_variables(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the file beside the Procfile, unless others are named."""
    (home / "app").mkdir()
    for name in ("app/Procfile", "Procfile"):
        (home / name).write_text("web: a")
    (home / "app" / ".env").write_text("A=beside")
    (home / "other").write_text("B=other")
    assert "env: A=" not in planned(capsys)
    (home / ".env").mkdir()  # a virtual environment
    assert "env: A=" not in planned(capsys)
    assert "env: A=beside" in planned(capsys, "-f", "app/Procfile")
    plan = planned(capsys, "-f", "app/Procfile", "--env-file", "other")
    assert "env: B=other" in plan
    assert "env: A=" not in plan
    assert "env: A=" not in planned(capsys, "-f", "app/Procfile", "--env-file", "/dev/null")


WRONG: list[tuple[str, list[str], str]] = [
    ("web: a\nweb: b", [], "Procfile:2: web='b' makes two processes"),
    ("web: a\nwo rker: b", [], "Procfile:2: line='wo rker: b' is no `name: command`"),
    ("web: a\njob: echo 'b", [], 'Procfile:2: job="echo \'b" is not understood by the shell: '),
    ("web: a", ["-f", "no/Procfile"], "Procfile='no/Procfile' cannot be read: No such file or directory"),
    ("web: a", ["job"], "PROCESS='job' is not in Procfile; Procfile has web"),
    ("web: a", ["--formation", "job=2"], "--formation='job=2' is of a process that is not in Procfile"),
    ("web: a\njob: b", ["web", "--formation", "job=2"], "--formation='job=2' is of a process that is not to run"),
    ("web: a", ["--formation", "web"], "--formation='web' is no NAME=N"),
    ("web: a", ["--formation", "web=-1"], "--formation='web=-1' is no NAME=N"),
    ("web: a", ["--formation", "web=" + "9" * 5000], "--formation web="),
    ("web: a", ["--formation", "web=0"], "--formation='web=0' leaves nothing to run"),
    ("web: a", ["--stdin", "web.1"], "--stdin='web.1' is no process that is to run; there is web"),
    ("web: a", ["--port", "0"], "--port=0 is no port"),
    ("web: a", ["--port", "65535", "--formation", "web=2"], "--port=65535 would give web ports up to 65536"),
    ("web: a", ["--env", "PORT=x"], "PORT='x' is no port"),
    ("web: a", ["--env-file", "bad.env"], "bad.env:1: A='5 characters' has a quote"),
    ("web: a", ["--env-file", "no.env"], "env file='no.env' cannot be read: No such file or directory"),
    ("web: a", ["--timeout", "-1"], "timeout="),
]


@pytest.mark.parametrize(("procfile", "args", "words"), WRONG)
def test_wrong_usage(
    procfile: str, args: list[str], words: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and status 2."""
    (home / "Procfile").write_text(procfile)
    (home / "bad.env").write_text("A='open\n")
    assert main(["up", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("aioelastic up: ")
    assert words in err.splitlines()[-1]


def test_every_example_of_the_help_is_accepted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--help"]) == 0
    examples = re.findall(r"^  aioelastic (up\b.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) >= 4
    for name in ("Procfile", "Procfile.dev"):
        (home / name).write_text("web: a\nclock: b\n")
    for example in examples:
        assert main([*example.split(), "--dry-run"]) == 0, capsys.readouterr().err
