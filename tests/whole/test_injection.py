"""Every system call of ours may fail: a sample of the trials of `injection.py`, other ones for other code."""

from __future__ import annotations

import ast
import hashlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import injection
import pytest

pytestmark = pytest.mark.long

SAMPLE = 40  # of the places that the scenario comes to


@pytest.fixture(scope="module")
def cache() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="injection-cache-") as name:
        yield name


@pytest.fixture(scope="module")
def reached(cache: str) -> dict[str, str]:
    return injection.reached(cache)


@pytest.fixture(scope="module")
def asked(reached: dict[str, str]) -> list[injection.Trial]:
    """Of some places one errno each: which ones follows from where they stand."""

    def order(trial: injection.Trial) -> bytes:
        return hashlib.sha256(str(trial).encode()).digest()

    first: dict[str, injection.Trial] = {}
    for one in sorted((one for one in injection.trials(reached) if one.how == "once"), key=order):
        first.setdefault(one.site, one)
    return list(first.values())[:SAMPLE]


def test_the_places_are_found() -> None:
    found = injection.sites()
    assert len(found) == len(set(found)) > 300
    for name in (
        "child/guardian/main_loop.py",
        "child/zygote/main_loop.py",
        "launch/_helper_process.py",
        "streams/_files.py",
        "processes/strays.py",
    ):
        assert any(one.startswith(name) for one in found), name


def test_most_places_are_come_to(reached: dict[str, str]) -> None:
    """Each scenario comes to some that those before it do not."""
    assert len(reached) > 0.65 * len(injection.sites())
    assert set(reached.values()) == set(injection.SCENARIOS)
    assert all((injection.HOME / one).exists() for one in injection.WHY_NOT)


def test_a_group_beside_one_whose_calls_fail(cache: str, asked: list[injection.Trial]) -> None:
    assert len(asked) == SAMPLE
    with ThreadPoolExecutor(4) as pool:  # they wait, most of the time
        ended = zip(asked, pool.map(lambda one: injection.run(one, cache)[1], asked), strict=True)
        assert {str(one): wrong for one, wrong in ended if wrong} == {}


@pytest.mark.parametrize("call", ["read", "close"])
def test_a_pipe_that_cannot_be_read_or_closed(cache: str, call: str) -> None:
    """What has come until then is kept, and the end is told."""
    file = "system/descriptors.py" if call == "close" else "streams/_pump.py"
    site = next(one for one in injection.sites() if one.startswith(file) and one.endswith(f":{call}"))
    told, wrong = injection.run(injection.Trial(site, "EIO", "once"), cache)
    assert wrong == []
    assert told["fired"]
    if call == "read":
        assert told["troubles"] == ["output of a worker: OSError: [Errno 5] Input/output error"]


def site(file: str, function: str, call: str) -> str:
    """The first such call in that function."""
    tree = ast.parse((injection.HOME / file).read_text())
    (found,) = (one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) and one.name == function)
    lines = range(found.lineno, (found.end_lineno or 0) + 1)
    mine = (one.split(":") for one in injection.sites() if one.startswith(f"{file}:") and one.endswith(f":{call}"))
    return next(":".join(one) for one in mine if int(one[1]) in lines)


@pytest.mark.parametrize(
    ("where", "trouble"),
    [
        # a guardian that could not begin showed a traceback
        (("child/guardian/main_loop.py", "_main", "open"), ("ENOMEM", "once", "cold")),
        # who was to end what a killed program leaves did not begin
        (("child/wire/links.py", "silence", "dup2"), ("EBUSY", "once", "killed")),
        # what it could not watch was refused, and ran on
        (("child/guardian/main_loop.py", "_await", "register"), ("ENOSPC", "always", "placed")),
        # whose start could not be learnt ran on
        (("child/guardian/process_start.py", "outcome", "read"), ("EBADF", "always", "placed")),
        # it went away from those who lived on
        (("child/kernel/child_processes.py", "_reaped", "waitpid"), ("ECHILD", "once", "killed")),
    ],
    ids=lambda one: one[1] if one[0].endswith(".py") else "",
)
def test_what_went_wrong(cache: str, where: tuple[str, str, str], trouble: tuple[str, str, str]) -> None:
    told, wrong = injection.run(injection.Trial(site(*where), *trouble), cache)
    assert told["fired"]
    assert wrong == []


def test_a_fault_is_seen(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: bytes that are not told, a group beside that suffers, an end that takes too long."""
    fine = {"loops": [], "error": None, "beside": ["", "before\nafter\n", []], "stopped": 0.1}
    fine |= {"result": {"total": 5, "logged": 3, "lost": 2}}
    trial = injection.Trial("x.py:1:1:open", "EIO", "once")
    assert injection.judge(trial, fine) == []
    for changed in (
        {"loops": ["something"]},
        {"beside": ["killed", "before\n", []]},
        {"stopped": 3.4},
        {"result": {"total": 5, "logged": 3, "lost": 1}},
        {"result": None},
    ):
        assert len(injection.judge(trial, fine | changed)) == 1
