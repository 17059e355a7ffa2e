"""What the handler of a signal raises in a call of a queue, or does with that queue, wherever in it: nothing is lost.

The handler is called before each instruction of our functions in turn, by a trace function; so no luck is needed.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import os
import select
import signal
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, Self

import numpy as np
import pytest

import aioelastic
from aioelastic import sharing
from aioelastic.child.wire import datagrams, messages, sent_objects
from aioelastic.child.worker import context, function_run, send_receive
from aioelastic.sharing._items import Putting

HOUSE = Path(aioelastic.__file__).parent
OURS = {
    str(HOUSE / name)
    for name in (
        "sharing/_queue.py",
        "sharing/_items.py",
        "child/wire/sent_objects.py",
        "child/wire/datagrams.py",
        "child/wire/untrusted.py",
        "child/wire/messages.py",
        "child/worker/function_run.py",
        "child/worker/send_receive.py",
        "child/wire/pickling.py",
        "system/descriptors.py",
        "model/validation.py",
    )
}
NEVER = {dis.opmap[name] for name in ("PUSH_EXC_INFO", "POP_EXCEPT", "NOP")}
PUBLIC = ("get_sync", "get_nowait", "__iter__", "receive")
RETURNS = {dis.opmap[name] for name in ("RETURN_VALUE", "YIELD_VALUE")}


TOOL = 4  # of those that are nobody's (sys.monitoring)


class TooLong(Exception):
    """What a time-out by alarm(2) raises."""


class At:
    """Calls `do` in the handler of a signal before the instruction of that number.

    Left out are the last one of a public function, as what it returns is the caller's then; those at which no handler
    runs and an exception would not be handled in order (how Python begins and ends to handle one); and finalizers.
    """

    def __init__(self, number: int, do: Callable[[], object]) -> None:
        self._left = number
        self._do = do
        self.where = ""

    @property
    def struck(self) -> bool:
        return self._left < 0

    def __enter__(self) -> Self:
        self._handler = signal.signal(signal.SIGUSR1, lambda *_: self._do())
        # of a generator that is closed
        self._hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        watch(self._before)
        return self

    def __exit__(self, *_: object) -> None:
        watch(None)
        sys.unraisablehook = self._hook
        signal.signal(signal.SIGUSR1, self._handler)

    def _before(self, frame: FrameType, offset: int) -> None:
        if self._left < 0:
            return
        instruction = frame.f_code.co_code[offset]
        if frame.f_lineno is None or instruction in NEVER:
            return
        if instruction in RETURNS and frame.f_code.co_name in PUBLIC:
            return
        if self._left or not is_finalizer(frame):
            self._left -= 1
        if self._left < 0:
            self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno} {dis.opname[instruction]}"
            signal.raise_signal(signal.SIGUSR1)


@pytest.fixture(autouse=True, scope="module")
def instructions() -> Iterator[None]:
    """Python 3.12 and later tell of each in our functions, if there is somebody to be told."""
    if sys.version_info < (3, 12):  # `sys.settrace` does
        yield
        return
    monitoring = sys.monitoring
    monitoring.use_tool_id(TOOL, "instructions")
    for code in CODES:
        monitoring.set_local_events(TOOL, code, monitoring.events.INSTRUCTION)
    yield
    for code in CODES:
        monitoring.set_local_events(TOOL, code, 0)
    monitoring.free_tool_id(TOOL)


def watch(call: Callable[[FrameType, int], None] | None) -> None:
    """Call that before each instruction of our functions: with the frame, and where in its code."""
    if sys.version_info >= (3, 12):
        told = None if call is None else lambda _, offset: call(sys._getframe(1), offset)
        sys.monitoring.register_callback(TOOL, sys.monitoring.events.INSTRUCTION, told)
        return

    def traced(frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode" and call is not None:
            call(frame, frame.f_lasti)
        return traced

    def called(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code not in CODES:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return traced

    sys.settrace(threading.gettrace() if call is None else called)  # None, or coverage's


def codes_of(thing: Any) -> Iterator[CodeType]:
    """That of our functions, and of what is within them."""
    if isinstance(thing, CodeType):
        if thing.co_filename in OURS:
            yield thing
            for one in thing.co_consts:
                yield from codes_of(one)
    elif isinstance(thing, type) and thing.__module__.startswith("aioelastic"):
        for one in vars(thing).values():
            yield from codes_of(one)
    elif isinstance(thing, FunctionType | classmethod | staticmethod | property):
        inner = getattr(thing, "fget", None) or getattr(thing, "__func__", None)
        yield from codes_of(thing.__code__ if isinstance(thing, FunctionType) else inner)


CODES = {
    code
    for module in list(sys.modules.values())
    if getattr(module, "__file__", None) in OURS
    for thing in vars(module).values()
    for code in codes_of(thing)
}


def is_finalizer(frame: FrameType | None) -> bool:
    """Whether it is called by one: what is raised there is only written to stderr, wherever it comes from."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def raises(_: object) -> None:
    raise TooLong


def each(prepare: Callable[[], Any], call: Callable[[Any], Any], check: Callable[..., None], do: Any = None) -> None:
    """Strike `call` at each of its instructions. `check` is told what was prepared, and returned, and is right again.

    Args:
        do: is given what was prepared; raises `TooLong` when not given.
    """
    number = 0
    while True:
        if not number % 10:
            gc.collect()  # queues that tracebacks hold
        ready = prepare()
        result: list[Any] = []
        at = At(number, partial(do or raises, ready))
        try:
            with at, contextlib.suppress(TooLong):
                result.append(call(ready))
            assert sys.exc_info()[0] is None
            check(ready, result)
        except BaseException as exc:
            exc.add_note(f"struck at instruction {number}: {at.where}")
            raise
        if not at.struck:
            break
        number += 1
    assert number > 50  # it was struck at all


def fds() -> Counter[str]:
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[os.readlink(f"/proc/self/fd/{fd}")] += 1
    return found


def is_notified(q: sharing.Queue) -> bool:
    """Whether those who wait for room look."""
    return bool(select.select([q._room], [], [], 0)[0])


def silence(q: sharing.Queue) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(q._room)


def drained(q: sharing.Queue) -> list[Any]:
    found = []
    with contextlib.suppress(sharing.Empty, sharing.QueueClosed):
        while True:
            found.append(q.get_nowait())
    return found


def is_right(q: sharing.Queue) -> None:
    """Of an empty queue: it has all its places, and who waited for one was told."""
    for number in range(q.maxsize):
        q.put_nowait(number)
    with pytest.raises(sharing.Full):
        q.put_nowait("one more")
    assert drained(q) == list(range(q.maxsize))


def has_room(q: sharing.Queue) -> bool:
    one = Putting(q)
    found = one.finds_room()
    one.close()
    return found


def awaited(q: sharing.Queue) -> sharing.Queue:
    """Somebody waits for room, and has silenced the wakeup."""
    silence(q)
    q._was_full = False
    return q


def many(value: int) -> Callable[[sharing.Queue], None]:
    """Puts an item with more descriptors than one datagram carries."""

    def put(q: sharing.Queue) -> None:
        one = Putting(q)
        assert one.finds_room()
        packet, _ = function_run.pack(messages.ITEM, (value,))
        with open(os.devnull) as null:
            one.packet, one.fds = packet, [os.dup(null.fileno()) for _ in range(8)]
            assert one.goes()
        one.close()

    return put


def holds(item: Any) -> Callable[[sharing.Queue], None]:
    return lambda q: q.put_nowait(item() if callable(item) else item)


GETS: dict[str, Callable[[sharing.Queue], Any]] = {
    "get_sync": lambda q: q.get_sync(),
    "get_nowait": lambda q: q.get_nowait(),
    "iterate": lambda q: next(iter(q)),
}


def fresh(maxsize: int = 2) -> sharing.Queue:
    one = sharing.Queue(maxsize)
    can_wait(one._reader, one.get_sync)
    return one


def can_wait(reader: sent_objects.Reader, get: Callable[[float], object]) -> None:
    """What it needs to wait is there from now on."""
    while not reader._wakeup:
        with contextlib.suppress(sharing.Empty):
            get(1e-3)


@pytest.mark.parametrize("name", GETS)
def test_a_get_loses_no_item_no_place_and_no_wake_up(name: str) -> None:
    q = fresh()
    before = fds()

    def prepare() -> sharing.Queue:
        q.put_nowait("first")
        q.put_nowait("second")
        return awaited(q)

    def check(q: sharing.Queue, got: list[Any]) -> None:
        assert is_notified(q) or not has_room(q)
        assert [*got, *drained(q)] == ["first", "second"]
        is_right(q)
        assert fds() == before
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler or not got
        signal.signal(signal.SIGINT, signal.default_int_handler)

    each(prepare, GETS[name], check)


@pytest.mark.long
@pytest.mark.parametrize(
    ("put", "value"),
    [
        (many(7), lambda found: found == 7),
        (holds(lambda: sharing.copy(np.ones(20_000))), lambda found: np.asarray(found).sum() == 20_000),
        (holds(lambda: sharing.Queue(1)), lambda found: found.maxsize == 1),
    ],
    ids=["many descriptors", "array", "queue"],
)
def test_a_get_of_much_loses_no_descriptor(put: Any, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "FDS", 3)  # in one datagram
    q = fresh(1)
    put(q)
    drained(q)
    gc.collect()
    sharing.trim()
    before = fds()

    def prepare() -> sharing.Queue:
        put(q)
        return awaited(q)

    def check(q: sharing.Queue, got: list[Any]) -> None:
        assert is_notified(q) or not has_room(q)
        got += drained(q)
        assert len(got) == 1
        assert value(got.pop())
        is_right(q)
        gc.collect()
        sharing.trim()
        assert fds() == before

    each(prepare, GETS["get_sync"], check)


def test_a_get_that_waits_leaves_nothing() -> None:
    q = fresh()
    before = fds()

    def call(q: sharing.Queue) -> None:
        with contextlib.suppress(sharing.Empty):
            q.get_sync(1e-4)

    def check(q: sharing.Queue, got: list[Any]) -> None:
        q.put_nowait("item")
        assert drained(q) == ["item"]
        is_right(q)
        assert fds() == before

    each(lambda: q, call, check)


def test_a_get_of_what_is_no_item_frees_its_place() -> None:
    q = fresh()
    before = fds()

    def prepare() -> sharing.Queue:
        for _ in range(2):
            one = Putting(q)
            assert one.finds_room()
            one.packet = b"no item"
            assert one.goes()
            one.close()
        return awaited(q)

    def call(q: sharing.Queue) -> bool:
        try:
            q.get_nowait()
        except ValueError:
            return True
        return False

    def check(q: sharing.Queue, got: list[Any]) -> None:
        assert is_notified(q) or not has_room(q)
        told = sum(got)
        while True:
            try:
                told += call(q)
            except sharing.Empty:
                break
        assert told in (1, 2) if not got else told == 2  # what is interrupted as it is refused may be told to nobody
        is_right(q)
        assert fds() == before

    each(prepare, call, check)


PUTS: dict[str, Callable[[sharing.Queue], Any]] = {
    "put_sync": lambda q: q.put_sync("item"),
    "put_nowait": lambda q: q.put_nowait("item"),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", PUTS)
def test_a_put_puts_once_or_not_at_all(name: str, full: bool) -> None:
    """`full`: there was no room just before."""
    q = fresh()
    before = fds()

    def prepare() -> sharing.Queue:
        q.put_nowait("first")
        awaited(q)
        q._was_full = full
        q._notify()
        return q

    def check(q: sharing.Queue, done: list[Any]) -> None:
        assert is_notified(q) or not has_room(q)
        found = drained(q)
        assert found in ([["first", "item"]] if done else [["first"], ["first", "item"]])
        is_right(q)
        assert fds() == before

    each(prepare, PUTS[name], check)


@pytest.mark.long
@pytest.mark.parametrize("what", ["text", "bytes", "array", "private array"])
def test_a_put_of_much_loses_no_descriptor(what: str) -> None:
    q = fresh()
    x = {"text": "x" * 20_000, "bytes": bytes(100_000), "array": None, "private array": np.ones(20_000)}[what]
    if x is None:
        x = sharing.copy(np.ones(20_000))
    q.put_nowait(x)
    drained(q)
    before = fds()

    def check(q: sharing.Queue, done: list[Any]) -> None:
        assert len(drained(q)) in ((1,) if done else (0, 1))
        is_right(q)
        assert fds() == before

    each(lambda: q, lambda q: q.put_sync(x), check)


@pytest.mark.parametrize("closed", [False, True])
def test_a_put_that_finds_no_room_leaves_nothing(closed: bool) -> None:
    q = fresh()
    before = fds()

    def prepare() -> sharing.Queue:
        if not closed:
            q.put_nowait("first")
            q.put_nowait("second")
            return q
        one = sharing.Queue(1)
        one.close()
        return one

    def call(q: sharing.Queue) -> None:
        with contextlib.suppress(sharing.Full, sharing.QueueClosed):
            q.put_sync("third", 1e-4)

    def check(one: sharing.Queue, done: list[Any]) -> None:
        assert drained(one) == ([] if closed else ["first", "second"])
        if not closed:
            is_right(one)
            assert fds() == before

    each(prepare, call, check)
    gc.collect()
    assert fds() == before


def test_objects_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = datagrams.pair()
    monkeypatch.setattr(context, "channel", here)
    monkeypatch.setattr(context, "_pid", os.getpid())
    with here, there:
        can_wait(send_receive._reader, sharing.receive)
        before = fds()

        def prepare() -> None:
            for word in ("first", "second"):
                datagrams.send(there, messages.encode(messages.OBJECT, (word,))[0])

        def check(_: None, got: list[Any]) -> None:
            found = [*got, sharing.receive(0)]
            if not got:
                found.append(sharing.receive(0))
            assert found == ["first", "second"]
            assert fds() == before

        each(prepare, lambda _: sharing.receive(), check)
    send_receive.forget()


# --- the same queue is used in the midst of a call ---


class Dropped:
    """Does it when it is collected."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._do = do

    def __del__(self) -> None:
        self._do()


def takes(q: sharing.Queue, kept: list[Any]) -> None:
    with contextlib.suppress(sharing.Empty):
        kept.append(q.get_nowait())


def gives(q: sharing.Queue, kept: list[Any]) -> None:
    with contextlib.suppress(sharing.Full):
        q.put_nowait("by the handler")
        kept.append(None)


def takes_and_gives(q: sharing.Queue, kept: list[Any]) -> None:
    takes(q, kept)
    gives(q, kept)


def closes(q: sharing.Queue, kept: list[Any]) -> None:
    q.close()


@pytest.mark.long
@pytest.mark.parametrize("by", ["a handler", "a finalizer"])
@pytest.mark.parametrize("does", [takes, gives, takes_and_gives, closes])
@pytest.mark.parametrize("call", ["get_sync", "put_sync"])
def test_a_call_in_the_midst_of_another(call: str, does: Any, by: str) -> None:
    """It does not wait for what is under way, and both are done."""
    before = fds()
    kept: list[Any] = []

    def prepare() -> sharing.Queue:
        kept.clear()
        q = sharing.Queue(3)
        q.put_nowait("first")
        return q

    def do(q: sharing.Queue) -> None:
        if by == "a handler":
            does(q, kept)
        else:
            Dropped(lambda: does(q, kept))

    def called(q: sharing.Queue) -> Any:
        try:
            return q.get_sync(1e-4) if call == "get_sync" else q.put_sync("item", 1e-4)
        except (sharing.Empty, sharing.QueueClosed) as exc:
            return type(exc)

    def check(q: sharing.Queue, results: list[Any]) -> None:
        (result,) = results
        there = Counter(["first"])
        there["by the handler"] += kept.count(None)
        there["item"] += call == "put_sync" and result is None
        found = Counter(drained(q))
        found.update(one for one in kept if one is not None)
        if call == "get_sync" and isinstance(result, str):
            found[result] += 1
        assert found == +there
        if does is not closes:
            is_right(q)
        del q

    each(prepare, called, check, do)
    gc.collect()
    assert fds() == before
