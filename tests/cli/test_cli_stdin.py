"""What workers of `aioelastic run` read from their standard input."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios
from typing import Any

import pytest
from helpers import child_process

RUN = [sys.executable, "-m", "aioelastic", "run", "--prefix", "[{rank}]"]
BOUND = 150  # seconds after which a test says "it hangs" instead of hanging itself


def run(*args: str, given: str | None = "hello\n", **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *args], input=given, capture_output=True, text=True, timeout=BOUND, check=False, **more
    )


@pytest.mark.parametrize(
    ("args", "out"),
    [
        ([], "[0]hello\n"),  # one worker: as if it stood there alone
        (["--stdin", "all"], "[0]hello\n"),
        (["--stdin", "none"], ""),
        (["--stdin", "0"], "[0]hello\n"),
        (["-n", "2"], ""),
        (["-n", "2", "--stdin", "1"], "[1]hello\n"),
        (["-n", "2", "--stdin", "none"], ""),
    ],
)
def test_who_reads_it(args: list[str], out: str) -> None:
    ran = run(*args, "--", "cat")
    assert (ran.returncode, ran.stdout) == (0, out), ran.stderr


def test_all_of_several() -> None:
    """They share it: who reads first has it."""
    assert run("-n", "2", "--stdin", "all", "--", "cat").stdout in ("[0]hello\n", "[1]hello\n")


def test_a_function_has_none() -> None:
    ran = run("-m", "sys:stdin.read")
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stdin", "2", "--", "cat"], "--stdin='2' is no rank"),
        (["--stdin", "some", "--", "cat"], "--stdin='some' is"),
        (["--stdin", "-1", "--", "cat"], "--stdin"),
        (["--stdin", "all", "-m", "sys:exit"], "--stdin='all' is for a command"),
    ],
)
def test_what_is_wrong(args: list[str], words: str) -> None:
    ran = run(*args)
    assert ran.returncode == 2
    assert words in ran.stderr


def test_what_is_shown_of_it() -> None:
    assert "  stdin: inherit\n" in run("--dry-run", "--", "cat").stdout
    ran = run("--dry-run", "-n", "2", "--stdin", "1", "--", "cat")
    assert [line.strip() for line in ran.stdout.splitlines() if "stdin" in line] == ["stdin: null", "stdin: inherit"]


def test_in_the_background_of_a_terminal_nothing_is_taken() -> None:
    """What is typed there is for the shell."""
    ours, theirs = pty.openpty()
    code = (
        "import fcntl, os, subprocess, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "print(subprocess.run(sys.argv[1:], process_group=0, stdout=subprocess.PIPE, timeout=150).stdout)"
    )
    with child_process(
        [sys.executable, "-c", code, *RUN, "--", "cat"], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as shell:
        os.write(ours, b"typed for the shell\n")
        assert shell.communicate(timeout=BOUND)[0] == b"b''\n"
    unread = bytearray(4)
    fcntl.ioctl(theirs, termios.FIONREAD, unread)
    assert int.from_bytes(unread, sys.byteorder) == len("typed for the shell\n")
    os.close(ours)
    os.close(theirs)
