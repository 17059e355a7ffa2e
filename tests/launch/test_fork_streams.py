"""`start="fork"` and what the program itself has printed: the copy is made without a wait for whoever reads that, and
each of both writes its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import program

HEAD = """
import asyncio, ctypes, os, sys, threading
from aioelastic import *

def works(kept):
    print("by print")
    print("by the program's own", file=kept)
    return 7

def run(*args):
    return asyncio.run(supervise(Function(works, *args), start="fork", logs=Logs(tee=Std.NONE)))[0]

def full():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    return open(writer, "w")
"""

KINDS = {
    "none": "sys.stdout = None; kept = open(os.devnull, 'w')",
    "closed": "kept = sys.stdout = open(os.devnull, 'w'); sys.stdout.close(); kept = open(os.devnull, 'w')",
    "broken": "r, w = os.pipe(); os.close(r); kept = sys.stdout = open(w, 'w'); print('waits')",
    "full": "sys.stdout = full(); kept = open(os.devnull, 'w'); print('waits')",
    "without flush": "sys.stdout = type('Odd', (), {'write': lambda self, text: None})(); kept = open(os.devnull, 'w')",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_waits_for_nobody_who_reads_what_the_program_prints(kind: str) -> None:
    script = f"{HEAD}\n{KINDS[kind]}\nos.write(2, str(run(kept).value).encode())\nos._exit(0)\n"
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=150)
    assert done.stderr == "7"


BUSY = """
kept, sys.stdout = open(os.devnull, "w"), full()
def blocks():
    os.write(hears[1], b"!")
    sys.stdout.buffer.write(b"x" * 100_000)
hears = os.pipe()
thread = threading.Thread(target=blocks, daemon=True)
thread.start()
os.read(hears[0], 1)
def state():
    with open(f"/proc/self/task/{thread.native_id}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
while state() != "S":
    pass
os.write(2, str(run(kept).value).encode())
os._exit(0)
"""


def test_a_thread_of_the_program_is_in_the_middle_of_printing() -> None:
    done = subprocess.run([sys.executable, "-c", HEAD + BUSY], stderr=subprocess.PIPE, text=True, timeout=150)
    assert done.stderr == "7"


ONCE = """
if __name__ == "__main__":
    libc = ctypes.CDLL(None)
    sys.stdout.reconfigure(line_buffering=False)
    sys.stdout.write("of the program\\n")
    libc.printf(b"of its C code\\n")
    result = run(sys.stdout)
    print(sorted(result.stdout.tail.decode().splitlines()))
    libc.fflush(None)
"""


def test_each_writes_its_own_once(tmp_path: Path) -> None:
    said = program(HEAD + ONCE, tmp_path).splitlines()
    assert sorted(said) == sorted(["of its C code", "of the program", str(["by print", "by the program's own"])])


def test_streams_without_a_buffer(tmp_path: Path) -> None:
    said = program(HEAD + ONCE, tmp_path, options=("-u",)).splitlines()
    assert str(["by print", "by the program's own"]) in said
