"""Functions and values on their way to a worker: those that cannot go, unusual callables, interruptions meanwhile."""

from __future__ import annotations

import asyncio
import functools
import io
import multiprocessing
import operator
import pickle
import queue
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import odd_jobs
import pytest
from helpers import QUIET

from aioelastic import Function, Group, RemoteError, WorkerExecutor, WorkerFailed, sharing, supervise
from aioelastic.child.wire import messages, pickling
from aioelastic.child.worker import function_run, lent_run
from aioelastic.errors import SpecError
from aioelastic.planning import Call

CONTEXT = multiprocessing.get_context("fork")  # whose locks need no tracker
# what they are made of stays open until the program ends
NUMBER, NUMBERS = CONTEXT.Value("i"), CONTEXT.Array("i", 3)


@pytest.fixture
def executor() -> Iterator[WorkerExecutor]:
    with WorkerExecutor(1) as one:
        yield one


# --- what cannot travel ---


async def _awaited() -> None:
    pass


def a_coroutine() -> Any:
    return _awaited()


def a_generator() -> Any:
    yield 1


def a_connection() -> Any:
    one, other = CONTEXT.Pipe()
    other.close()
    return one


QUEUE, FORK, ARRAY = "use an aioelastic.sharing.Queue", 'argument with start="fork"', "an array of aioelastic.sharing"
CANNOT: dict[str, tuple[Callable[[], Any], str]] = {
    "lock": (CONTEXT.Lock, FORK),
    "reentrant lock": (CONTEXT.RLock, FORK),
    "semaphore": (CONTEXT.Semaphore, FORK),
    "event": (CONTEXT.Event, FORK),
    "condition": (CONTEXT.Condition, FORK),
    "barrier": (lambda: CONTEXT.Barrier(2), FORK),
    "value": (lambda: NUMBER, ARRAY),
    "array": (lambda: NUMBERS, ARRAY),
    "queue of processes": (CONTEXT.SimpleQueue, QUEUE),
    "queue of threads": (queue.SimpleQueue, QUEUE),
    "queue of threads with a size": (lambda: queue.Queue(5), QUEUE),
    "stack of threads": (queue.LifoQueue, QUEUE),
    "ordered queue of threads": (queue.PriorityQueue, QUEUE),
    "executor of threads": (lambda: ThreadPoolExecutor(1), "make it in the worker"),
    "event loop": (lambda: asyncio.SelectorEventLoop(), "give the async function"),
    "connection": (a_connection, "its number alone would travel"),
    "socket": (socket.socket, "give its address"),
    "file": (lambda: open("/dev/null"), "give its path"),  # noqa: SIM115
    "bytes of a file": (lambda: open("/dev/null", "rb"), "give its path"),  # noqa: SIM115
    "generator": (a_generator, "give a list of what it yields"),
    "coroutine": (a_coroutine, "give the async function"),
    "database": (lambda: sqlite3.connect(":memory:"), "give what it is opened by"),
    "lock of threads": (threading.Lock, "make it in the worker"),
    "thread": (threading.Thread, "make it in the worker"),
}


@contextmanager
def made(name: str) -> Iterator[tuple[Any, str]]:
    make, words = CANNOT[name]
    one = make()
    try:
        yield one, words
    finally:
        if hasattr(one, "close"):
            one.close()


@pytest.mark.parametrize("name", CANNOT)
def test_a_task_is_told_what_to_do_instead(name: str, executor: WorkerExecutor) -> None:
    with made(name) as (one, words):
        for given in (one, {"deep": [one]}, SimpleNamespace(one=one)):
            with pytest.raises(TypeError, match=words):
                executor.submit(odd_jobs.name_of, given).result()


@pytest.mark.parametrize("name", CANNOT)
async def test_a_function_is_told_which_argument_and_what_to_do_instead(name: str) -> None:
    with made(name) as (one, words):
        with pytest.raises(SpecError, match=words) as caught:
            await supervise(Function(odd_jobs.name_of, one), n=2, logs=QUIET)
        assert caught.value.field == "args[0] of odd_jobs:name_of of rank 0"
        with pytest.raises(SpecError, match=words) as caught:
            await supervise(Function(odd_jobs.name_of, one=one), n=1, start="spawn", logs=QUIET)
        assert caught.value.field == "one of odd_jobs:name_of of rank 0"


def test_map_and_initializers_are_told_too(executor: WorkerExecutor) -> None:
    with closing(a_connection()) as one:
        for size in (1, 2):
            with pytest.raises(TypeError, match="its number alone would travel"):
                list(executor.map(odd_jobs.name_of, [one, one], chunksize=size))
        with (
            WorkerExecutor(1, initializer=odd_jobs.name_of, initargs=(one,)) as other,
            pytest.raises(SpecError, match="its number alone would travel") as caught,
        ):
            other.submit(abs, 1).result()
    assert caught.value.field == "initargs[0]"


async def test_messages_and_queues_are_told_too() -> None:
    items = sharing.Queue()
    with closing(a_connection()) as one:
        async with Group(Function(sharing.receive), logs=QUIET) as group:
            with pytest.raises(TypeError, match="its number alone would travel"):
                await group[0].send(one)
            await group[0].send("end")
        for put in (items.put_sync, items.put_nowait):
            with pytest.raises(TypeError, match="its number alone would travel"):
                put([one])
        with pytest.raises(TypeError, match="its number alone would travel"):
            await items.put([one])
    items.close()
    with pytest.raises(sharing.QueueClosed):
        items.get_nowait()  # nothing was put


async def test_results_and_messages_of_workers_are_told_too(executor: WorkerExecutor) -> None:
    with pytest.raises(TypeError, match="its number alone would travel"):
        executor.submit(odd_jobs.gives_a_connection).result()
    with pytest.raises(ExceptionGroup) as caught:
        await supervise(Function(odd_jobs.gives_a_connection), n=1, logs=QUIET)
    (failed,) = caught.value.exceptions
    assert isinstance(failed, WorkerFailed)
    assert "its number alone would travel" in str(failed)
    result = await supervise(Function(odd_jobs.sends_a_connection), n=1, logs=QUIET)
    assert "its number alone would travel" in result[0].value


def test_an_executor_that_is_lent_is_told_too() -> None:
    with closing(a_connection()) as one:
        load = lent_run.Load("name_of", odd_jobs.name_of, (one,), {})
        with pytest.raises(pickle.PicklingError, match="its number alone would travel"):
            load.pickled()
        with pytest.raises(TypeError, match="its number alone would travel"):
            lent_run._pickle(one)


def test_without_cloudpickle_lambdas_are_told_of_it(monkeypatch: pytest.MonkeyPatch, executor: WorkerExecutor) -> None:
    assert executor.submit(lambda: 5).result() == 5
    monkeypatch.setitem(sys.modules, "cloudpickle", None)

    class Local:
        pass

    for one in (lambda: 5, Local, Local()):
        with pytest.raises((pickle.PicklingError, AttributeError), match="install cloudpickle"):
            executor.submit(odd_jobs.name_of, one).result()


def test_what_somebody_has_a_way_for_travels(executor: WorkerExecutor) -> None:
    """As files of a type that says how, and modules by cloudpickle."""

    class Mine(io.StringIO):
        def __reduce__(self) -> Any:
            return (int, ("7",))

    assert executor.submit(odd_jobs.name_of, Mine()).result() == "int"
    assert executor.submit(odd_jobs.name_of, threading).result() == "module"  # by value


# --- odd callables ---

ODD: dict[str, tuple[Any, Any, str]] = {
    "slot": ((1).__add__, 3, "builtins:int.__add__"),
    "method of a text": ("ab".__mul__, "abab", "builtins:str.__mul__"),
    "method of a list": ([2, 2].count, 2, "builtins:list.count"),
    "type": (complex, 2 + 0j, "builtins:complex"),
    "C function": (abs, 2, "builtins:abs"),
    "class method of a type": (int.from_bytes, None, "builtins:int.from_bytes"),
    "partials": (functools.partial(functools.partial(pow, 5), mod=7), 4, "builtins:pow"),
    "methodcaller": (operator.methodcaller("bit_length"), 2, "operator:methodcaller"),
    "lru_cache of C": (functools.lru_cache(abs), 2, "builtins:abs"),
    "lru_cache": (odd_jobs.cached, 4, "odd_jobs:cached"),
    "singledispatch": (odd_jobs.kind, "number", "odd_jobs:kind"),
    "instance": (odd_jobs.Adds(1), 3, "odd_jobs:Adds"),
    "class method": (odd_jobs.Adds.by_class, 4, "odd_jobs:Adds.by_class"),
    "static method": (odd_jobs.Adds.by_nobody, 5, "odd_jobs:Adds.by_nobody"),
    "method": (odd_jobs.Adds(4).by_method, 42, "odd_jobs:Adds.by_method"),
    "partial of a method": (functools.partial(odd_jobs.Adds(4).by_method), 42, "odd_jobs:Adds.by_method"),
    "async": (odd_jobs.awaited, 102, "odd_jobs:awaited"),
    "endless": (odd_jobs.Endless(), 1, "odd_jobs:Endless"),
    "Mock": (Mock(return_value=1), 1, "unittest.mock:Mock"),
    "MagicMock": (MagicMock(return_value=1), 1, "unittest.mock:MagicMock"),
}


def test_a_partial_of_itself_is_refused(executor: WorkerExecutor) -> None:
    itself = functools.partial(abs)
    itself.__setstate__((itself, (), {}, {}))
    with pytest.raises(SpecError, match="is a partial of itself") as caught:
        Function(itself, 1)
    assert caught.value.field == "fn"
    with pytest.raises(RecursionError):
        executor.submit(itself, 1)
    assert executor.submit(abs, -1).result() == 1
    itself.__setstate__((abs, (), {}, {}))  # it would be kept for ever


@pytest.mark.parametrize("name", ODD)
async def test_odd_callables_run_or_are_refused_in_words(name: str, executor: WorkerExecutor) -> None:
    fn, value, called = ODD[name]
    assert Function(fn, 2).name == called
    try:
        result = await supervise(Function(fn, 2), n=1, logs=QUIET, check=False)
    except SpecError as exc:
        refused = exc
    else:
        refused = None
    if refused is not None:
        assert name in ("endless", "Mock", "MagicMock", "class method of a type", "lru_cache of C")
        assert "cannot be pickled" in str(refused)
        return
    if name == "class method of a type":
        assert result.first_failure is not None
        return
    assert result[0].value == value
    assert await asyncio.wrap_future(executor.submit(fn, 2)) == value


# --- interruptions ---


@pytest.fixture(params=[odd_jobs.Interrupted, TimeoutError, odd_jobs.Wrong, KeyboardInterrupt])
def comes(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    """What the handler of SIGUSR1 raises."""
    before = signal.signal(signal.SIGUSR1, odd_jobs.by_signal(request.param))
    yield request.param
    signal.signal(signal.SIGUSR1, before)


def test_an_interruption_while_it_is_packed_is_the_callers(comes: type[BaseException]) -> None:
    for kind in (messages.OBJECT, messages.TASK, messages.ITEM):
        one = odd_jobs.Slow()
        with pytest.raises(comes, match="time is up"):
            function_run.pack(kind, (one,))
        assert one.packed == 1  # and is not tried by value


def test_an_interruption_of_submit(comes: type[BaseException], executor: WorkerExecutor) -> None:
    one = odd_jobs.Slow()
    with pytest.raises(comes, match="time is up"):
        executor.submit(odd_jobs.name_of, one).result()
    assert one.packed == 1
    assert executor.submit(abs, -1).result() == 1


def test_an_interruption_takes_no_room(comes: type[BaseException]) -> None:
    with WorkerExecutor(1, max_pending=1) as one:
        for _ in range(3):
            with pytest.raises(comes):
                one.submit(odd_jobs.name_of, odd_jobs.Slow()).result()
        assert one.submit(abs, -1).result() == 1


def test_an_interruption_of_put(comes: type[BaseException]) -> None:
    items, one = sharing.Queue(maxsize=1), odd_jobs.Slow()
    with pytest.raises(comes, match="time is up"):
        items.put_sync(one)
    assert one.packed == 1
    items.put_nowait(1)  # its place is free
    assert items.get_nowait() == 1
    items.close()


def test_an_interruption_of_a_start(comes: type[BaseException]) -> None:
    """Not taken for an argument that cannot be pickled, unless it is of the kind that says so."""
    one = odd_jobs.Slow()
    with pytest.raises(SpecError if comes is odd_jobs.Wrong else comes, match="time is up"):
        Call(Function(odd_jobs.name_of, one), "of rank 0")
    assert one.packed == 1 or comes is odd_jobs.Wrong
    one = odd_jobs.Slow()
    with pytest.raises(pickle.PicklingError if comes is odd_jobs.Wrong else comes, match="time is up"):
        lent_run.Load("name_of", odd_jobs.name_of, (one,), {}).pickled()
    assert one.packed == 1


@pytest.mark.parametrize(
    "problem", [ValueError("mine"), RuntimeError("mine"), TypeError("mine"), AttributeError("mine")]
)
def test_what_the_code_of_others_raises_is_not_tried_again(problem: Exception) -> None:
    one = odd_jobs.Raises(problem)
    with pytest.raises(type(problem), match="mine") as caught:
        function_run.pack(messages.OBJECT, (one,))
    assert caught.value is problem
    assert one.packed == 1
    assert not pickling.is_pickles_own(problem)


def test_an_interruption_while_an_error_is_packed(comes: type[BaseException]) -> None:
    inner = ValueError("bad")
    inner.args = (odd_jobs.Slow(),)
    error = RemoteError("call", "ValueError", "bad", "", inner)
    if comes is odd_jobs.Wrong:  # of a kind that says that it cannot be pickled
        assert "time is up" in pickle.loads(pickle.dumps(error)).not_rebuilt
        return
    with pytest.raises(comes):
        pickle.dumps(error)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ([1, 2.5, None, True, "x"], True),
        (([1, "x"], (2,), abs), True),
        ([[[1]]], False),
        ([0] * 2_000, False),
        ({"a": 1}, False),
        (["x" * 600], False),
        ([type("Number", (int,), {})], False),
    ],
)
def test_what_is_plain_is_the_same_both_ways(value: Any, plain: bool) -> None:
    assert messages._is_plain((value,)) is plain
    if not isinstance(value[0] if isinstance(value, list) else None, type):
        packet, fds = messages.encode(messages.DONE, (value,))
        assert messages.decode(packet, fds) == (value,)


def test_a_function_of_the_main_module_is_looked_at_in_a_list_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(odd_jobs.name_of, "__module__", "__main__")
    assert not messages._is_plain(([odd_jobs.name_of],))
    assert not messages._is_plain((abs, ((1, 2), odd_jobs.name_of), {}))
