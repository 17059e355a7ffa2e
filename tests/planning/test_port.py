"""MASTER_PORT: nobody else is handed it while the group lives."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import child_process

from aioelastic import SpecError
from aioelastic.planning import Port, _ports

# A second supervisor that has only this one port to choose, says whether it got it, and keeps it until told to end.
HOLDER = """
import sys
from aioelastic.planning import Port, _ports as _port
_port._any = lambda low, high: int(sys.argv[1])
try:
    port = Port()
except ValueError as exc:
    print("refused", flush=True)
else:
    print("got", port.number, flush=True)
    sys.stdin.read()
"""


def only(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Leave the choice of one port."""

    def choose(low: int, high: int) -> int:
        assert number in range(low, high)
        return number

    monkeypatch.setattr(_ports, "_any", choose)


def holder(number: int) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return child_process(
        [sys.executable, "-c", HOLDER, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def free() -> int:
    with Port() as port:
        return port.number


def test_outside_the_ephemeral_range_and_bindable() -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [Port() for _ in range(50)]
    try:
        assert len({one.number for one in ports}) == 50
        for one in ports:
            assert 10_000 <= one.number <= 65_535
            assert not low <= one.number <= high
            with socket.create_server(("127.0.0.1", one.number)):  # what rank 0 will do
                pass
    finally:
        for one in ports:
            one.close()


def test_a_second_one_here_does_not_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Port()
    only(monkeypatch, first.number)
    with pytest.raises(SpecError, match="no free port") as caught:
        Port()
    assert "MASTER_PORT" in caught.value.remedy
    first.close()
    with Port() as again:
        assert again.number == first.number


def test_a_second_one_in_another_process_does_not_get_it() -> None:
    with Port() as port, holder(port.number) as other:
        assert said(other) == "refused"
    with holder(port.number) as other:  # released by then
        assert said(other) == f"got {port.number}"


def test_released_when_its_holder_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    number = free()
    only(monkeypatch, number)
    with holder(number) as other:
        assert said(other) == f"got {number}"
        with pytest.raises(SpecError):
            Port()
        other.send_signal(signal.SIGKILL)
        other.wait()
        with Port() as port:
            assert port.number == number


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_that_somebody_listens_on_is_passed_over(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    number = free()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        taken = socket.create_server((address, number), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    only(monkeypatch, number)
    with taken, pytest.raises(SpecError):
        Port()
    with Port() as port:
        assert port.number == number


def test_the_callers_random_state_is_its_own() -> None:
    random.seed(1)
    before = random.getstate()
    with Port():
        pass
    assert random.getstate() == before


def test_no_socket_is_inherited() -> None:
    def count() -> int:
        code = "import os; print(len(os.listdir('/proc/self/fd')))"
        done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, close_fds=False)
        return int(done.stdout)

    without = count()
    with Port():
        assert count() == without


def test_an_ephemeral_range_that_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hosts open it to 1024..65535; any free port is then better than none."""
    monkeypatch.setattr(_ports, "_ephemeral", lambda: (1024, 65_535))
    with Port() as port:
        assert port.number >= 10_000
