"""A plug-in that looks for what our own tests leave behind, in two steps.

After each test: what is had in a millisecond, which is descriptors, threads, children of this process, and asyncio
tasks. Guardians and zygotes that nobody uses stay warm for the next test. After the last test of a file that runs here
before one of another file does, when fixtures of the file have gone: everything, as `no_leaks` does. If something is
left then, the tests of the file that ran here are run once more, each with the whole check, to name those that leave
it.

A test with the mark `fresh`, or with the fixture `no_leaks`, begins without warm helpers, and has the whole check after
it. So do all by `--leaks-each`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import pytest

from aioelastic.child.kernel.child_processes import children
from aioelastic.launch import _guardian, _host_state, _zygote
from aioelastic.testing import _allowed_leftovers as allowed
from aioelastic.testing import _leak_check as check
from aioelastic.testing import plugin
from aioelastic.testing._leak_check import Holdings, LeftBehind
from aioelastic.testing._process_tree import process, read_stat

LONGEST = 200.0  # seconds to run tests again; time_limit.py has more for each


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "look for everything that is left behind after each test, not only after each file"
    parser.addoption("--leaks-each", action="store_true", help=words)


def pytest_configure(config: pytest.Config) -> None:
    words = "fresh: this test begins without warm helpers, and everything that it leaves is looked for after it"
    config.addinivalue_line("markers", words)
    config.stash[_files] = Files(config)
    config.pluginmanager.register(config.stash[_files])


@pytest.fixture
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """The check of one test. It comes before all other fixtures of the test, so that they have gone when it looks."""
    _forget_its_name()
    files = request.config.stash[_files]
    if "no_leaks" in request.fixturenames:
        check.cool_down()
        yield
        return
    whole = files.each or request.node.get_closest_marker("fresh") is not None
    if whole:
        check.cool_down()
    looks = (Holdings.now, check.leaks_since) if whole else (files.at_hand, left_at_hand)
    try:
        yield from plugin.looked_after(request, *looks)
    except pytest.fail.Exception:
        files.told()
        raise
    finally:
        if files.is_last:
            gc.collect()  # what it warns of is told of this test


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    _forget_its_name()
    return (yield)


def _forget_its_name() -> None:
    """A zygote serves those that have the same variables: this one would be another in each test."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)


def left_at_hand(before: Holdings, ignore: Iterable[str] = ()) -> dict[str, list[str]]:
    """What is held beyond `before`. Garbage is collected, and helpers end, only if there seems to be something."""
    leaks = at_hand().leaks(before)
    for see_to_it in (gc.collect, check.give_back, check.cool_down):
        if leaks:
            see_to_it()
            leaks = at_hand().leaks(before)
    return leaks


def at_hand() -> Holdings:
    """What this process itself holds, but for helpers that nobody uses."""
    kept = allowed.kept_by_multiprocessing()
    pids, fds = _of_idle_helpers()
    alive: dict[str, str] = {}
    zombies: dict[str, str] = {}
    for pid in children(os.getpid()):
        if pid not in kept.pids | pids and (stat := read_stat(pid)) is not None:
            (zombies if stat[1] == "Z" else alive)[f"{pid} {stat[20]}"] = process(pid, stat)
    return Holdings(
        processes=alive,
        zombies=zombies,
        threads={check._key(one): check._words(one) for one in threading.enumerate() if one not in kept.threads},
        fds=dict(check._fds(kept.fds | fds, kept.files)),
        groups=allowed.groups(),
    )


def _of_idle_helpers() -> tuple[set[int], set[int]]:
    """Pids, and descriptors that we have for them, of guardians and zygotes that are warm for the next group."""
    zygotes = [one for one in _zygote._zygotes if not one.users]
    guardians = list(_guardian._leaving)
    for one in _guardian._guardians:
        if one.users == sum(zygote.guardian is one for zygote in zygotes):
            guardians.append(one)
    fds = {fd for one in guardians for fd in (one._pidfd, one._outbox.sock.fileno())}
    fds |= {one._control.fileno() for one in zygotes}
    fds |= {fd for one in _host_state._readers.values() if not one.users for fd in one._fds}
    return {one.session for one in guardians} | {one._pid for one in zygotes}, fds


class Files:
    """A plug-in: what the tests of one file leave behind that run here, one after the other.

    Attributes:
        each: whether each test has the whole check.
        is_last: no other test of its file runs after the present one.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.each: bool = config.getoption("--leaks-each")
        self.is_last = False
        self._config = config
        self._before: Holdings | None = None
        self._pools = allowed.pools()  # with those of fixtures
        self._known: list[pytest.FixtureDef[Any]] = []  # of the session, or a package
        self._ran: list[str] = []

    def at_hand(self) -> Holdings:
        """What is held before a test."""
        return at_hand().and_what_came(Holdings(), Holdings(pools=self._pools))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if self._before is None:
            self._before = Holdings.now()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """What lives longer than a file's tests is no leak of theirs; and a fixture's pool may start threads later."""
        is_wider = fixturedef.scope in ("package", "session")
        if fixturedef.scope == "function" or fixturedef in self._known:
            return (yield)
        if is_wider:
            self._known.append(fixturedef)  # that of pytest-asyncio is set up anew for each test, and makes nothing
        before = Holdings.now() if is_wider else Holdings()
        value = yield
        self._pools |= allowed.pools()
        if is_wider and self._before is not None:
            self._before = self._before.and_what_came(before, Holdings.now())
        return value

    @pytest.hookimpl(wrapper=True, trylast=True)  # while output is captured, as at the set-up
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
        self._ran.append(item.nodeid)
        self.is_last = nextitem is None or nextitem.path != item.path
        if not self.is_last:
            return (yield)
        plugin.let_go(item)
        error: BaseException | None = None
        try:
            yield
        except BaseException as exc:  # it goes on, below
            error = exc
        words = self._left(item)
        if words and error is not None:
            raise AssertionError(words) from error
        if words:
            pytest.fail(words, pytrace=False)
        if error is not None:
            raise error
        return None

    def told(self) -> None:
        """A test has failed for what it has left: it is not told again of its file."""
        self._before = Holdings.now()

    def _left(self, item: pytest.Item) -> str:
        """What the file has left, and by whom; "": nothing."""
        ran, self._ran = self._ran, []
        assert self._before is not None
        leaks = check.leaks_since(self._before, self._config.getini("no_leaks_ignore"))
        if not leaks:
            return ""
        head, *lines = str(LeftBehind(leaks)).splitlines()
        who = [f"  {ran[0]}"] if len(ran) == 1 else [] if self.each else self._culprits(ran)
        self.told()
        named = [one.split()[0].rpartition("::")[2] for one in who if "::" in one]
        by = f" by {', '.join(named)}" if named else ""
        found = who or ["  none of them, each for itself"]
        return "\n".join([f"{item.path.name}{by} {head}", *lines, f"of its {len(ran)} tests that ran here:", *found])

    def _culprits(self, ran: list[str]) -> list[str]:
        options = ["-q", "--tb=no", "-rfE", "-p", "no:xdist", "--leaks-each"]
        options += ["--long"] if self._config.getoption("--long", False) else []
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        argv = [sys.executable, "-P", "-m", "pytest", *options, *ran]
        with contextlib.suppress(subprocess.TimeoutExpired):
            again = subprocess.run(
                argv,
                cwd=self._config.rootpath,
                env={**env, "COLUMNS": "500"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
                timeout=LONGEST,
            )
            found = re.findall(r"^(?:ERROR|FAILED) (.*)", again.stdout, re.MULTILINE)
            return [f"  {one}" for one in found]
        return [f"  it was not found out within {LONGEST:g} s"]


_files = pytest.StashKey[Files]()
