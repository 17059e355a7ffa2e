"""The state machine of an executor's pool, driven through all its triggers in a random order."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Future
from typing import Any

import pytest
from fake_pool import AGES, FakePool, FakeWorker

from aioelastic import TaskTimeout, WorkerFailed
from aioelastic.executor.slots import TABLE, Slot, Slots, State, Trigger
from aioelastic.executor.tasks import Called

STEPS = 150


class Driver:
    """One run. `seen`: state and trigger that there were, to show that a run reaches what it is about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.rng = random.Random(seed)
        self.limited = self.rng.random() < 0.5
        self.world = FakePool(
            monkeypatch,
            self.rng.randint(1, 4),
            task_timeout=AGES if self.rng.random() < 0.7 else None,
            tasks_per_worker=self.rng.choice([None, None, 3]),
            max_pending=10_000 if self.limited else None,
        )
        self.futures: dict[int, Future[Any]] = {}
        self.begun: list[int] = []  # in the order in which workers received them
        self.held: dict[tuple[int, int], int] = {}  # rank and attempt → the task that it had when it died
        self.late: set[int] = set()  # whose time was over while they ran
        self.left: set[int] = set()  # for which nobody waits any more
        self.done: set[str] = set()  # actions that there was somebody for

    def run(self) -> None:
        for _ in range(STEPS):
            action = self.rng.choice(self.actions)
            if action in (Driver.submits, Driver.cancels, Driver.resizes):
                for _ in range(self.rng.randint(1, 3)):
                    action(self)
            elif self.futures:
                self.world.do(lambda action=action: action(self))  # type: ignore[misc]
                self.world.do(self.world.check)
                self.check()

    def check(self) -> None:
        room = self.world.pool._room
        if room is not None:
            assert room.taken == sum(not one.done() for one in self.futures.values())

    # --- in this thread ---

    def submits(self) -> None:
        number = len(self.futures)
        self.futures[number] = self.world.executor.submit(abs, number)
        self.done.add("submits")

    def cancels(self) -> None:
        if self.futures and self.rng.choice(list(self.futures.values())).cancel():
            self.done.add("cancels")

    def resizes(self) -> None:
        self.world.executor.resize(self.rng.randint(1, 5))
        self.done.add("resizes")

    # --- on the loop ---

    def one(self, *states: State) -> FakeWorker | None:
        found = [
            one
            for one in self.world.launcher.workers
            if not one.is_dead and (slot := self.world.slot(one)) is not None and slot.state in states
        ]
        return self.rng.choice(found) if found else None

    def gets_ready(self) -> None:
        if (one := self.one(State.STARTING)) is not None:
            one.ready()
            self.done.add("gets_ready")

    def replies(self) -> None:
        if (one := self.one(State.BUSY, State.ABORTED)) is not None:
            self.takes(one)
            if one.task is not None:
                one.reply()
                self.done.add("replies")

    def takes(self, one: FakeWorker) -> None:
        number = one.receive()
        if number is not None:
            assert not self.futures[number].cancelled(), "it was cancelled, and is run"
            assert number not in self.begun, "it is run twice"
            self.begun.append(number)

    def dies(self) -> None:
        if (one := self.one(*State)) is not None:
            if self.rng.random() < 0.7:  # else what it was given is given to another
                self.takes(one)
            slot = self.world.slot(one)
            if one.task is not None:
                self.held[one.start] = one.task
                assert slot is not None
            one.die(self.rng.choice([9, 1 << 8, 0]))
            self.done.add("dies")

    def is_dying(self) -> None:
        """Nobody knows yet: what it is given from now on cannot be sent."""
        if (one := self.one(State.IDLE, State.STARTING)) is not None:
            if not one.is_ready:
                one.ready()
            one.close()
            self.done.add("is_dying")

    def expires(self) -> None:
        if (one := self.one(State.BUSY)) is None:
            return
        slot = self.world.slot(one)
        assert slot is not None
        assert slot.task is not None
        if slot.task.timeout is None:
            return
        self.takes(one)
        if one.task is not None:
            self.late.add(one.task)
        assert slot.timer is not None
        slot.timer.cancel()
        self.world.owner._expire(slot)
        assert slot.state is State.ABORTED
        assert 9 in one.signals
        self.done.add("expires")
        if self.rng.random() < 0.5:  # its reply was on its way
            self.takes(one)
            if one.task is not None:
                one.reply()

    def is_abandoned(self) -> None:
        running = [number for number, one in self.futures.items() if one.running() and number not in self.left]
        if not running:
            return
        number = self.rng.choice(running)
        future = self.futures[number]
        assert isinstance(future, Called)
        self.left.add(number)
        self.world.pool.abandon(future)
        self.done.add("is_abandoned")

    def is_refused(self) -> None:
        self.world.launcher.fate = OSError(errno.EAGAIN, "no more processes")
        self.done.add("is_refused")
        self.world.owner._workers._false_starts = 0  # that many in a row are another test's

    actions: tuple[Callable[[Driver], None], ...] = ()


Driver.actions = (
    *[Driver.submits] * 4,
    Driver.cancels,
    Driver.resizes,
    *[Driver.gets_ready] * 3,
    *[Driver.replies] * 5,
    Driver.dies,
    Driver.is_dying,
    Driver.expires,
    Driver.is_abandoned,
    Driver.is_refused,
)


def trial(monkeypatch: pytest.MonkeyPatch, seed: int) -> set[str]:
    for where in ("owner", "workers"):
        monkeypatch.setattr(f"aioelastic.executor.{where}.FALSE_STARTS", 1_000)
    driver = Driver(monkeypatch, seed)
    driver.submits()
    driver.run()
    cancel = driver.rng.random() < 0.5
    driver.world.executor.shutdown(wait=False, cancel_futures=cancel)
    if driver.rng.random() < 0.3:
        driver.world.pool.stop()
    driver.world.end()
    room = driver.world.pool._room
    assert room is None or room.taken == 0, "permits given are permits back"
    assert driver.world.slots == {}
    assert {one.start for one in driver.world.launcher.workers} <= set(driver.world.forgotten)
    stopped = driver.world.pool.stopping
    for number, future in driver.futures.items():
        assert future.done(), "no task is lost"
        try:
            assert future.result() == number
        except CancelledError:
            assert number not in driver.begun or number in driver.left
        except TaskTimeout:
            assert number in driver.late, "none is blamed for another's time limit"
        except WorkerFailed:
            assert number in driver.held.values() or stopped, "none is blamed for another's end"
        except BrokenExecutor:
            assert stopped
    return driver.done


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_in_whatever_order(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    trial(monkeypatch, seed)


def test_that_reaches_all_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[State, Trigger]] = set()
    move = Slots.move

    def noted(self: Slots, slot: Slot, trigger: Trigger) -> None:
        seen.add((slot.state, trigger))
        move(self, slot, trigger)

    monkeypatch.setattr(Slots, "move", noted)
    done = set().union(*(trial(monkeypatch, seed) for seed in range(100, 110)))
    assert seen == set(TABLE)
    assert done == {one.__name__ for one in Driver.actions}
