"""Each kind of array is right at the other end, by value, element type, type and whether it may be written to; or it is
refused in words that say what to do."""

from __future__ import annotations

import copy
import gc
import queue
from typing import Any

import kinds_of_arrays as kinds
import numpy as np
import pytest
from helpers import QUIET, needs, travelled
from kinds_of_arrays import ALL, NUMBERS, REFUSED, SCALARS
from test_sharing_foreign import run_alone

from aioelastic import Function, Group, SpecError, WorkerExecutor, sharing, supervise
from aioelastic.child.wire import messages


def assert_same(one: Any, other: Any) -> None:
    if one is np.ma.masked:
        assert other is one
        return
    assert type(other) is type(one)
    assert other.dtype == one.dtype
    assert other.dtype.str == one.dtype.str  # with its byte order
    assert other.dtype.metadata == one.dtype.metadata
    assert other.shape == one.shape
    assert other.flags.writeable == one.flags.writeable
    assert getattr(other, "unit", None) == getattr(one, "unit", None)
    if isinstance(one, np.ma.MaskedArray):
        assert other.hardmask == one.hardmask
        assert (other.mask is np.ma.nomask) == (one.mask is np.ma.nomask)
        assert np.array_equal(np.ma.getmaskarray(one), np.ma.getmaskarray(other))
        assert other.fill_value == one.fill_value
        one, other = one.data, other.data
    assert repr(np.asarray(one).tolist()) == repr(np.asarray(other).tolist())  # in records there may be arrays


@pytest.mark.parametrize("name", sorted(set(ALL) - {"pickles itself"}))
def test_in_a_message(name: str) -> None:
    one = ALL[name]()
    (other,) = travelled(one)
    assert_same(one, other)
    if other.flags.writeable and other.size and name != "masked once" and not one.dtype.names:
        other[...] = other.flat[0]  # it is the receiver's own
        assert_same(ALL[name](), one)


def test_in_a_queue() -> None:
    q = sharing.Queue(4)
    for make in ALL.values():
        one = make()
        q.put_nowait(one)
        other = q.get_nowait()
        if type(one) is not kinds.Own:
            assert_same(one, other)


@pytest.mark.parametrize("by_value", [False, True])
def test_a_subclass_that_pickles_itself_is_left_to_it(by_value: bool) -> None:
    packet, fds = messages.encode(messages.TASK, (ALL["pickles itself"](), kinds.with_unit([1.0])), by_value)
    assert not fds
    one, other = messages.decode(packet, fds)
    assert (type(one), one.unit, one.tolist()) == (kinds.Own, "own m", [1.0, 2.0])
    assert (type(other), other.unit) == (kinds.Units, "m")


def assert_all_same(arrived: dict[str, Any]) -> None:
    for name, one in kinds.make_all().items():
        if name != "pickles itself":
            assert_same(one, arrived[name])


async def test_as_arguments_and_results() -> None:
    result = await supervise(Function(kinds.back, kinds.make_all()), n=1, logs=QUIET)
    assert_all_same(result[0].value)


async def test_by_an_executor() -> None:
    async with WorkerExecutor(1) as executor:
        assert_all_same(await executor.run(kinds.back, kinds.make_all()))


async def test_by_send_and_receive() -> None:
    import share_jobs

    async with Group(Function(share_jobs.echo), logs=QUIET) as group:
        await group[0].send(kinds.make_all())
        assert_all_same(await group[0].receive())
        await group[0].send(None)
        await group.wait()


def test_what_is_shared_stays_so_whatever_its_type() -> None:
    x = sharing.copy(np.arange(12.0).reshape(3, 4))
    plain = np.asarray(x)
    own = np.ma.array(plain, mask=plain > 5, copy=False)
    for one in (plain.view(np.matrix), kinds.with_unit(plain[1:]), own, plain.view([("a", "f8")]).view(np.recarray)):
        (other,) = travelled(one)
        assert_same(one, other)
        assert sharing.is_shared(other)
        assert np.shares_memory(np.asarray(other), plain)


def test_views_of_one_stay_so_whatever_their_type() -> None:
    whole = kinds.with_unit(np.zeros(100))
    one, part, plain = travelled(whole, whole[10:20], np.asarray(whole))
    part[:] = 5
    assert one[10] == plain[19] == 5
    assert not np.asarray(whole).any()


def test_attributes_may_be_anything() -> None:
    shared = sharing.copy(np.ones(3))
    one = kinds.with_unit(np.zeros(3))
    one.unit, one.me = shared, one
    (other,) = travelled(one)
    assert other.me is other
    assert other.unit.address == shared.address
    one.unit = (each for each in ())
    with pytest.raises(TypeError, match="generator"):
        travelled(one)


def test_a_registered_subclass_is_asked_for() -> None:
    from aioelastic.memory import array_messages

    sharing.register(kinds.Units, lambda one: (np.asarray(one), "registered"), make_units)
    try:
        (other,) = travelled(kinds.with_unit([1.0]))
        assert other.unit == "registered"
    finally:
        del array_messages._registered[kinds.Units]


def make_units(parts: Any) -> Any:
    return kinds.with_unit(parts[0], kinds.Units, parts[1])


def test_scalars_travel() -> None:
    for one, other in zip(SCALARS, travelled(*SCALARS), strict=True):
        assert type(other) is type(one) or one.dtype.char in "qQ"  # numpy itself makes another of the same size of it
        assert other.dtype == one.dtype
        assert other == one


def test_scalars_are_arguments() -> None:
    q = sharing.Queue(int(np.int64(1)))
    q.put_sync(1, timeout=np.float64(0.5))
    assert q.get_sync(timeout=np.float64(0.5)) == 1
    with pytest.raises(queue.Empty):
        q.get_sync(timeout=np.float64(0))


# --- copies ---


@pytest.mark.parametrize("name", NUMBERS)
def test_a_copy(name: str) -> None:
    one = NUMBERS[name]()
    x = sharing.copy(one)
    other = np.asarray(x)
    assert (other.dtype, other.shape) == (one.dtype, one.shape)
    assert other.tolist() == one.tolist()
    assert other.flags.writeable
    assert not np.shares_memory(other, one)


@pytest.mark.parametrize("name", REFUSED)
def test_no_copy(name: str) -> None:
    make, words, instead = REFUSED[name]
    one = make()
    with pytest.raises(sharing.NotShareable, match=words):
        sharing.copy(one)
    assert not sharing.is_shared(one)
    if instead is not None:
        assert np.asarray(sharing.copy(instead(one))).tolist() == np.asarray(instead(one)).tolist()


def test_copies_of_scalars() -> None:
    for one in SCALARS:
        assert not sharing.is_shared(one)
        try:
            x = sharing.copy(one)
        except sharing.NotShareable:
            assert one.dtype.kind in "SUMmV" or one.dtype.char in "gG"
        else:
            assert (x.shape, np.asarray(x)[()], x.dtype) == ((), one, one.dtype.name)
    gc.collect()
    assert np.asarray(sharing.copy(np.float64(2.5))) == 2.5  # numpy says where a copy of it is, which is gone then


def test_bools_are_0_or_1() -> None:
    """As in images of one bit, by some libraries."""
    one = np.zeros((1500, 1000), "u1")
    one[0, 1], one[-1, -2:] = 1, 0xFF
    x = sharing.copy(one.view("bool"))
    assert np.array_equal(np.asarray(x).view("u1"), one != 0)
    assert np.asarray(sharing.copy(one.view("bool")[-1, -1])).tobytes() == b"\1"


# --- deep copies ---


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_has_memory_of_its_own(how: Any) -> None:
    x = sharing.copy(np.arange(12).reshape(3, 4))
    for one in (x, x[1], x[:, ::-2], x[1, 1], x[:0]):
        other = how(one)
        assert type(other) is sharing.SharedArray
        assert np.asarray(other).tolist() == np.asarray(one).tolist()
        np.asarray(other)[...] = 77
        assert 77 not in np.asarray(x)
    held = copy.deepcopy({"a": x, "b": [x]})
    assert held["a"] is held["b"][0]
    assert held["a"].address != x.address


# --- shapes, element types ---


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (np.int64(3), (3,)),
        (np.array(3), (3,)),
        (np.array([2, 3], "u1"), (2, 3)),
        ([np.uint8(2), np.int32(3)], (2, 3)),
        ((), ()),
        ([], ()),
        (range(1, 3), (1, 2)),
    ],
)
def test_shapes(shape: Any, sizes: Any) -> None:
    x = sharing.empty(shape)
    assert x.shape == sizes
    assert all(type(one) is int for one in x.shape)
    assert np.asarray(x).shape == sizes


@pytest.mark.parametrize(
    "shape",
    [
        np.float64(3),
        np.array([1.5]),
        np.array([[1, 2]]),
        (np.array([1, 2]),),
        np.True_,
        (2, np.True_),
        (2, np.float32(2)),
        {"a": 1},
        {1, 2},
        [(1, 2)],
        (1,) * 65,
        (0, 2**40, 2**40),
        2**64,
        pytest.param(object(), id="object"),
    ],
    ids=str,
)
def test_no_shapes(shape: Any) -> None:
    with pytest.raises(SpecError, match=r"^shape"):
        sharing.empty(shape)


@pytest.mark.parametrize("dtype", ["?", "b", "h", "i", "l", "q", "B", "H", "I", "L", "Q", "e", "f", "d", "F", "D"])
def test_element_types_of_numpy(dtype: str) -> None:
    kind = np.dtype(dtype)
    for one in (kind, kind.type, kind.name, kind.str):
        assert np.asarray(sharing.empty(2, one)).dtype == kind


class Raises:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __name__ = property(__str__)  # type: ignore[assignment]


@pytest.mark.parametrize(
    "dtype",
    [np.dtype("M8[s]"), np.dtype("S3"), np.dtype([("a", "f4")]), np.dtype(("f4", (2,))), np.longdouble, Raises(), ""],
    ids=lambda one: type(one).__name__,
)
def test_no_element_types(dtype: Any) -> None:
    with pytest.raises(SpecError, match=r"^dtype.*give one of bool"):
        sharing.empty(2, dtype)


@pytest.mark.parametrize("index", [True, np.True_, None, 1.5, "a", [0], np.array([0, 1])], ids=str)
def test_no_index(index: Any) -> None:
    x = sharing.empty((2, 3))
    with pytest.raises(IndexError, match=r"numpy\.asarray\(x\)"):
        x[index]
    assert x[np.int64(1), : np.uint8(2)].shape == (2,)


# --- buffers of it ---


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("dtype", ["bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"])
def test_the_buffer_of_an_empty_one(shape: Any, dtype: str) -> None:
    other = sharing.empty((1,), dtype).buffer
    buffer = sharing.empty(shape, dtype).buffer
    assert (buffer.shape, buffer.nbytes, buffer.readonly) == (shape, 0, False)
    assert (buffer.format, buffer.itemsize) == (other.format, other.itemsize)
    assert buffer.tolist() == np.empty(shape).tolist()
    again = memoryview(buffer)
    del buffer
    gc.collect()
    assert np.asarray(again).dtype == np.dtype(dtype)
    assert (again.tobytes(), again.contiguous, bytes(again)) == (b"", True, b"")


def test_the_buffer_of_types_that_buffers_do_not_have() -> None:
    for dtype in ("bfloat16", "float16", "complex64"):
        assert (sharing.empty((0, 3), dtype).buffer.shape, sharing.empty((0, 3), dtype).buffer.format) == ((0,), "B")


def test_dlpack_on_another_device_is_refused() -> None:
    x = sharing.empty(3)
    assert x.__dlpack__(dl_device=(1, 0), max_version=(1, 0), stream=None)
    with pytest.raises(BufferError, match="CPU"):
        x.__dlpack__(dl_device=(2, 0))


ALONE = """
import sys
from aioelastic import sharing
from aioelastic.memory import dlpack as _dlpack

def fails(capsule): raise ValueError("kept")
def exports(*kinds):
    for kind in kinds:
        x = sharing.empty(300_000, kind)
        where, told = x.address, []
        for attempt in (lambda: int(x.__dlpack__()), lambda: fails(x.__dlpack__()), lambda: [x.__dlpack__(), 1 / 0]):
            try: attempt()
            except BaseException as exc: told.append(type(exc).__name__)
        del x, attempt
        assert sharing.empty(300_000, kind).address == where
        assert not _dlpack._lent
        print(told)

"""


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_exception_on_its_way_when_a_capsule_is_dropped(library: str) -> None:
    """It is the caller's, and the memory is free."""
    if library == "torch":
        needs("torch")
    others = "import warnings; warnings.simplefilter('ignore'); sys.modules['numpy'] = None;" * (library == "torch")
    told = run_alone(f"{ALONE}{others}import {library}; exports('float32', 'bool', 'bfloat16', 'float8_e5m2')")
    assert told.splitlines() == ["['TypeError', 'ValueError', 'ZeroDivisionError']"] * 4


def test_without_a_library_it_is_lost_and_the_memory_is_free() -> None:
    assert "'ValueError'" in run_alone(f"{ALONE}exports('float32'); assert 'numpy' not in sys.modules")


def test_numpy_says_which_types_it_has_not() -> None:
    with pytest.raises((BufferError, RuntimeError), match="dtype"):
        np.from_dlpack(sharing.empty(3, "bfloat16"))
