"""Every system call of ours may fail: a sample of the trials of `injection.py`, other ones for other code."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator

import injection
import pytest

SAMPLE = 40  # of the places that the scenario comes to


@pytest.fixture(scope="module")
def cache() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="injection-cache-") as name:
        yield name


@pytest.fixture(scope="module")
def asked(cache: str) -> list[injection.Trial]:
    """Of some places one errno each: which ones follows from where they stand."""
    reached = injection.reached(cache)

    def order(trial: injection.Trial) -> bytes:
        return hashlib.sha256(str(trial).encode()).digest()

    first: dict[str, injection.Trial] = {}
    for one in sorted((one for one in injection.trials() if one.how == "once"), key=order):
        if one.site in reached:
            first.setdefault(one.site, one)
    return list(first.values())[:SAMPLE]


def test_the_places_are_found() -> None:
    found = injection.sites()
    assert len(found) == len(set(found)) > 300
    for name in ("child/_guardian.py", "child/_zygote.py", "launch/_served.py", "streams/_files.py", "watch/_proc.py"):
        assert any(one.startswith(name) for one in found), name


def test_a_group_beside_one_whose_calls_fail(cache: str, asked: list[injection.Trial]) -> None:
    assert len(asked) == SAMPLE
    bad = {str(one): wrong for one in asked if (wrong := injection.run(one, cache)[1])}
    assert bad == {}


@pytest.mark.parametrize("call", ["read", "close"])
def test_a_pipe_that_cannot_be_read_or_closed(cache: str, call: str) -> None:
    """What has come until then is kept, and the end is told."""
    site = next(one for one in injection.sites() if one.startswith("streams/_pump.py") and one.endswith(f":{call}"))
    told, wrong = injection.run(injection.Trial(site, "EIO", "once"), cache)
    assert wrong == []
    assert told["fired"]
    if call == "read":
        assert told["troubles"] == ["output of a worker: OSError: [Errno 5] Input/output error"]


def test_a_fault_is_seen(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: bytes that are not told, a group beside that suffers, an end that takes too long."""
    fine = {"loops": [], "error": None, "beside": ["", "before\nafter\n", []], "stopped": 0.1}
    fine |= {"result": {"total": 5, "logged": 3, "lost": 2}}
    trial = injection.Trial("x.py:1:1:open", "EIO", "once")
    assert injection.judge(trial, fine) == []
    for changed in (
        {"loops": ["something"]},
        {"beside": ["killed", "before\n", []]},
        {"stopped": 3.1},
        {"result": {"total": 5, "logged": 3, "lost": 1}},
        {"result": None},
    ):
        assert len(injection.judge(trial, fine | changed)) == 1
