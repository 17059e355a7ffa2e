"""The same as ../test_server.py with the standard library."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

import pytest

SERVER = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]


@pytest.fixture
def url() -> Iterator[str]:
    server = subprocess.Popen(
        SERVER,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:  # until the end: a full pipe would hold the server
        with server.stdout:
            for line in server.stdout:
                lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while (line := lines.get(timeout=30)) is not None:
            print(line, end="")
            if found := re.search(r"http://\S+/", line):
                break
        else:
            pytest.fail(f"the server ended with {server.wait()}")
        yield found[0]
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        # whether others, in sessions of their own, are left, is not seen
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
            pytest.fail("the server has left processes")
        server.wait()
        reader.join()


def test_it_answers(url):
    with urllib.request.urlopen(url) as answer:
        assert answer.status == 200
