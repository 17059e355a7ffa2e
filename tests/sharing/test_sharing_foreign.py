"""What another library says of an array is checked whole before a byte of it is read: it is shared as it is, or refused
by the field that is wrong, and no process is ended by it."""

from __future__ import annotations

import array
import ast
import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign_arrays
import numpy as np
import pytest
from foreign_arrays import RIGHT, VALUES, WHERE, Capsule, Raises, Says, says
from helpers import no_descriptors_left

from aioelastic import sharing

HERE = Path(__file__).parents[1]


def run_alone(code: str) -> str:
    """What it prints, in a process of its own: it may be ended by a signal."""
    paths = f"import sys; sys.path[:0] = {[str(HERE), str(HERE / 'sharing'), str(HERE.parent)]};"
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", paths + code], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


BYTES = bytes((ctypes.c_double * 6)(*VALUES))


# --- what is right ---


@pytest.mark.parametrize(
    "one",
    [
        says(),
        says(strides=(24, 8)),
        says(strides=None, descr=[("", "<f8")], mask=None, offset=0),
        says(shape=[2, 3], data=[WHERE, True], version=2),
        says(data=BYTES),
        says(data=bytearray(BYTES)),
        says(data=memoryview(b"12345678" + BYTES), offset=8),
        says(data=array.array("d", VALUES)),
        says(data=np.array(VALUES), offset=np.int64(0)),
        says(shape=(np.int64(2), np.uint8(3)), data=(np.uint64(WHERE), np.False_), version=np.int8(3)),
        says(data=memoryview(np.array(VALUES, ">f8").byteswap())),
        Capsule(),
        Capsule(strides=(3, 1)),
        Capsule(version=(1, 0)),
        Capsule(version=(1, 7), byte_offset=16, data=WHERE - 16),
        Capsule(device=[np.int64(1), 0]),
    ],
    ids=lambda one: type(one).__name__,
)
def test_it_is_copied(one: Any) -> None:
    x = sharing.copy(one)
    assert (x.dtype, x.shape) == ("float64", (2, 3))
    assert np.asarray(x).ravel().tolist() == list(VALUES)


@pytest.mark.parametrize(
    ("changed", "values"),
    [
        ({"strides": (8, 16)}, [[1, 3, 5], [2, 4, 6]]),
        ({"strides": (0, 8)}, [[1, 2, 3], [1, 2, 3]]),
        ({"strides": (-24, 8), "data": (WHERE + 24, False)}, [[4, 5, 6], [1, 2, 3]]),
        ({"strides": (-8, -16), "data": BYTES, "offset": 40}, [[6, 4, 2], [5, 3, 1]]),
        ({"shape": ()}, 1),
        ({"shape": (2, 0), "data": (0, False)}, [[], []]),
        ({"shape": (0,), "data": (None, False)}, []),
        ({"shape": (1, 6), "strides": (2**60, 8)}, [list(VALUES)]),
    ],
)
@pytest.mark.parametrize("numpy", [True, False])
def test_any_layout(changed: Any, values: Any, numpy: bool) -> None:
    if numpy:
        assert np.asarray(sharing.copy(says(**changed))).tolist() == values
        return
    if "data" in changed and isinstance(changed["data"], tuple) and changed["data"][0]:
        changed = {**changed, "data": (changed["data"][0] - WHERE, False)}
        code = "said['data'] = (WHERE + said['data'][0], False);"
    else:
        code = ""
    told = run_alone(
        f"from foreign_arrays import *; said = {changed}; {code} x = sharing.copy(says(**said));"
        "assert 'numpy' not in sys.modules;"
        "from numpy import asarray; print(asarray(x).tolist())"
    )
    assert told.strip() == repr(np.array(values, "f8").tolist())


def test_an_object_without_memory_of_its_own_gives_its_buffer() -> None:
    class Buffer(ctypes.Array):  # type: ignore[type-arg]
        _type_, _length_ = ctypes.c_double, 6

    one = Buffer(*VALUES)
    one.__array_interface__ = {"version": 3, "shape": (5,), "typestr": "<f8", "offset": 8}
    assert sharing.copy(one).buffer.tolist() == list(VALUES[1:])
    x = sharing.copy(one)
    view = Says({**RIGHT, "shape": (2,), "data": x.buffer, "offset": 8})
    assert sharing.is_shared(view)
    assert sharing.copy(view).buffer.tolist() == [3, 4]


def test_types_that_numpy_does_not_have() -> None:
    one = Says({**RIGHT, "typestr": "<V2", "shape": (3,), "descr": [("", "<V2")]}, dtype="bfloat16")
    assert sharing.copy(one).dtype == "bfloat16"
    with pytest.raises(sharing.NotShareable, match=r"typestr='<V2' has another size than elements of type float32"):
        sharing.copy(Says({**RIGHT, "typestr": "<V2", "shape": (3,)}, dtype="float32"))


def test_two_element_types() -> None:
    assert sharing.copy(Says(RIGHT, dtype=np.dtype("f8"))).dtype == "float64"
    assert sharing.copy(Says({**RIGHT, "typestr": "<u1"}, dtype=np.dtype("u1"))).dtype == "uint8"
    for dtype in ("i8", "M8[s]", "f4"):
        with pytest.raises(sharing.NotShareable, match=r"typestr='<f8' is not that of its dtype"):
            sharing.copy(Says(RIGHT, dtype=np.dtype(dtype)))


# --- what is wrong ---

POINTERS = (1, 4096, 0x12345678, 2**46, 2**47, 2**63 - 1)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    **{f"pointer {hex(one)}": ({"data": (one, False)}, "data='0x|shape=") for one in POINTERS},
    "pointer 0": ({"data": (0, False)}, "outside of its memory"),
    "pointer None": ({"data": (None, False)}, "outside of its memory"),
    "pointer below 0": ({"data": (-8, False)}, r"data=-8 is no whole number from 0"),
    "pointer too large": ({"data": (2**64, False)}, "data=18446744073709551616"),
    "pointer a text": ({"data": ("here", False)}, "data='here' is no whole number"),
    "pointer a float": ({"data": (1e9, False)}, "data=1000000000.0 is no whole number"),
    "pointer True": ({"data": (True, False)}, "data=True is no whole number"),
    "pointer alone": ({"data": (WHERE,)}, r"data=\(.* is not a pointer and whether"),
    "pointer not in a tuple": ({"data": WHERE}, r"data=\d+ is neither a pointer"),
    "read-only in words": ({"data": (WHERE, "yes")}, "data="),
    "pixels": ({"data": b"123"}, r"shape=\(2, 3\) .* byte 0 .* outside of its memory of 3 bytes"),
    "pixels, too far": ({"data": BYTES, "offset": 8}, "byte 8 .* outside of its memory of 48 bytes"),
    "pixels, behind": ({"data": BYTES, "offset": 49}, "offset=49 is no whole number|outside"),
    "pixels, before": ({"data": BYTES, "strides": (-24, 8)}, "outside of its memory of 48 bytes"),
    "pixels, strides": ({"data": BYTES, "strides": (25, 8)}, "outside of its memory of 48 bytes"),
    "no pixels": ({"data": None}, "data=None is neither a pointer"),
    "pixels with holes": ({"data": memoryview(bytes(96))[::2]}, "data=.* not contiguous"),
    "offset beside a pointer": ({"offset": 8}, "offset=8 is given beside a pointer"),
    "offset below 0": ({"data": BYTES, "offset": -8}, "offset=-8"),
    "offset a text": ({"data": BYTES, "offset": "8"}, "offset='8'"),
    "shape a number": ({"shape": 6}, "shape=6 is no tuple"),
    "shape a text": ({"shape": "23"}, "shape='23' is no tuple"),
    "shape missing": ({"shape": None}, "shape=None is no tuple"),
    "shape below 0": ({"shape": (2, -3)}, "shape=-3 is no whole number from 0"),
    "shape of floats": ({"shape": (2.0, 3.0)}, "shape=2.0 is no whole number"),
    "shape of bools": ({"shape": (True, 3)}, "shape=True"),
    "shape too large": ({"shape": (2**62, 2**62)}, "shape=.* is more than memory can be"),
    "shape too large, but for a 0": ({"shape": (2**62, 0, 2**62)}, "shape=.* is more than memory can be"),
    "shape larger than it is": ({"shape": (2**30,)}, "is not where 8589934592 bytes of memory can be read"),
    "shape of 65": ({"shape": (1,) * 65}, "has 65 dimensions, more than 64"),
    "strides a number": ({"strides": 8}, "strides=8 is no tuple"),
    "strides too few": ({"strides": (8,)}, r"strides=\(8,\) is not for 2 dimensions"),
    "strides too many": ({"strides": (8, 8, 8)}, "is not for 2 dimensions"),
    "strides of texts": ({"strides": ("24", "8")}, "strides='24'"),
    "strides too large": ({"strides": (2**63, 8)}, "strides=9223372036854775808"),
    "strides to the end of memory": ({"strides": (2**62, 8)}, "is not where|outside of its memory"),
    "strides before all memory": ({"strides": (-(2**62), 8)}, "outside of its memory"),
    "typestr missing": ({"typestr": None}, "typestr=None is no element type"),
    "typestr a name": ({"typestr": "float64"}, "typestr='float64' is no element type"),
    "typestr bytes": ({"typestr": b"<f8"}, "typestr=b'<f8'"),
    "typestr unknown": ({"typestr": "<f3"}, "its elements \\('<f3'\\) cannot be shared"),
    "typestr objects": ({"typestr": "|O8"}, "objects"),
    "typestr times": ({"typestr": "<M8[s]"}, "int64"),
    "typestr of the other order": ({"typestr": ">f8"}, "other byte order"),
    "typestr raw": ({"typestr": "|V8"}, "records"),
    "version 4": ({"version": 4}, "version=4 is no whole number from 0 to 3"),
    "version a text": ({"version": "3"}, "version='3'"),
    "descr of records": ({"descr": [("a", "<f4"), ("b", "<f4")]}, "descr=.*records"),
    "descr of others": ({"descr": [("", "<i8")]}, "descr="),
    "descr a text": ({"descr": "<f8"}, "descr='<f8'"),
    "descr of arrays": ({"descr": [("", np.arange(3))]}, "descr="),
    "a mask": ({"mask": np.ones((2, 3), "bool")}, "has a mask, which would be left behind"),
    "a mask of anything": ({"mask": 0}, "has a mask"),
}
WRONG_CAPSULES: dict[str, tuple[dict[str, Any], str]] = {
    **{f"pointer {hex(one)}": ({"data": one}, "data='0x|shape=") for one in POINTERS},
    "pointer 0": ({"data": 0}, "outside of its memory"),
    "offset": ({"byte_offset": 2**63}, "outside of its memory"),
    "no capsule": ({"said": 1}, r"__dlpack__\(\)=1 is no capsule"),
    "another capsule": ({"name": b"tensor"}, r"__dlpack__\(\)=.* is no capsule with a tensor"),
    "a used capsule": ({"name": b"used_dltensor"}, "somebody has taken that"),
    "capsule of nothing": ({"at": 8}, r"__dlpack__\(\)='0x8' is not where a tensor can be read"),
    "version 2": ({"version": (2, 0)}, r"version 2\.0' is not of DLPack 1"),
    "version 0": ({"version": (0, 8)}, r"version 0\.8"),
    "on a device": ({"device": (7, 0)}, "on a device .DLPack type 7.; copy it to the CPU"),
    "device of another": ({"device_type": 2}, r"__dlpack_device__\(\)=\(1, 0\) is not that of its tensor, 2"),
    "device a number": ({"device": 1}, r"__dlpack_device__\(\)=1 is not the type of a device and its number"),
    "device of nothing": ({"device": (None, 0)}, r"__dlpack_device__\(\)=None is no whole number"),
    "ndim below 0": ({"ndim": -1}, "ndim=-1 is not from 0 to 64"),
    "ndim 65": ({"ndim": 65}, "ndim=65"),
    "ndim huge": ({"ndim": 2**31 - 1}, "ndim=2147483647"),
    "shape nowhere": ({"shape_at": 0}, "shape='0x0' is not where 2 numbers can be read"),
    "shape elsewhere": ({"shape_at": 0x12345678}, "shape='0x12345678' is not where"),
    "strides elsewhere": ({"strides_at": 4096}, "strides='0x1000' is not where"),
    "shape below 0": ({"shape": (2, -1)}, "shape=-1"),
    "shape too large": ({"shape": (2**62, 2**62)}, "shape=.* is more than memory can be"),
    "strides too large": ({"strides": (2**62, 1)}, "strides=36893488147419103232"),
    "lanes": ({"lanes": 4}, r"its element type has no name here \(DLPack code 2, 256 bits\)"),
    "bits": ({"bits": 4}, r"DLPack code 2, 4 bits"),
    "code": ({"code": 77}, r"DLPack code 77"),
}


def refusals(table: str) -> None:
    """Runs in a process of its own: prints what each of that table is refused with."""
    page = foreign_arrays.unreadable()
    cases: dict[str, Any]
    if table == "WRONG":
        cases = {name: says(**changed) for name, (changed, _) in WRONG.items()}
        cases["a page that cannot be read behind it"] = says(shape=(512,), strides=(9,), data=(page, False))
    else:
        cases = {name: Capsule(**changed) for name, (changed, _) in WRONG_CAPSULES.items()}
        cases["a page that cannot be read behind it"] = Capsule(shape=(513,), data=page)
    for name, one in cases.items():
        sharing.is_shared(one)
        print(f"{name} -> ", end="", flush=True)
        try:
            print(sharing.copy(one))
        except sharing.NotShareable as exc:
            print(exc)


@pytest.mark.parametrize("table", ["WRONG", "WRONG_CAPSULES"])
def test_each_field_is_looked_at(table: str) -> None:
    out = run_alone(f"import test_sharing_foreign as here; here.refusals({table!r})")
    told = dict(line.split(" -> ", 1) for line in out.splitlines())
    assert "can be read; mend" in told.pop("a page that cannot be read behind it")
    expected: dict[str, tuple[Any, str]] = globals()[table]
    for name, (_, words) in expected.items():
        assert re.search(words, told.pop(name, "nothing")), name
    assert not told


@pytest.mark.parametrize("said", [3, "text", [("shape", 1)], (WHERE, False)])
def test_no_dict(said: Any) -> None:
    with pytest.raises(sharing.NotShareable, match=r"__array_interface__=.* is no dict"):
        sharing.copy(Says(said))


@pytest.mark.parametrize("exc", [RuntimeError("no"), ValueError("no"), TypeError("no"), KeyError("no")])
def test_what_raises_is_no_array(exc: Exception) -> None:
    with pytest.raises(sharing.NotShareable, match=f"{type(exc).__name__}: .*no"):
        sharing.copy(Raises(exc))
    assert not sharing.is_shared(Raises(exc))


class Speaks:
    """What carries an array and a unit, as the quantities of pint: it passes on what the array says."""

    def __init__(self, array: Any) -> None:
        self.array, self.unit = array, "m"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array, name)


def test_what_speaks_for_an_array_may_have_more() -> None:
    x = sharing.copy(np.ones(3))
    for one in (Speaks(np.ones(3)), Speaks(np.asarray(x)), Speaks(says()), Speaks(Capsule())):
        with pytest.raises(sharing.NotShareable, match=r"more than that.*numpy\.asarray\(x\)"):
            sharing.copy(one)
    assert sharing.is_shared(Speaks(np.asarray(x)))


def test_on_a_gpu_each_field_is_looked_at_too() -> None:
    """But for the memory itself, which only the driver can look at."""
    from aioelastic.gpu import _array

    data = {name for name in WRONG if "pixels" in name}
    for name, (changed, _) in WRONG.items():
        one = Says({**RIGHT, **changed}, "__cuda_array_interface__")
        if name in data or "pointer" in name or "larger" in name or "end of memory" in name:
            continue
        with pytest.raises(sharing.NotShareable):
            _array.foreign(one)
        with pytest.raises(sharing.SharingError):
            sharing.copy(one)
    for name in sorted(data):
        with pytest.raises(sharing.NotShareable, match=r"data=.* is not a pointer"):
            _array.foreign(Says({**RIGHT, **WRONG[name][0]}, "__cuda_array_interface__"))
    place = _array.foreign(Says({**RIGHT, "stream": None}, "__cuda_array_interface__"))
    assert (place.address, place.shape, place.strides) == (WHERE, (2, 3), (24, 8))


@pytest.mark.parametrize("seed", range(4))
def test_nonsense(seed: int) -> None:
    told = run_alone(f"import numpy, foreign_arrays; foreign_arrays.nonsense({seed}, 2000)")
    came = ast.literal_eval(told)
    assert came["NotShareable"] > 500
    assert came["copied"] > 500


# --- buffers ---


@pytest.mark.parametrize("kind", "bBhHiIlLqQfd")
def test_arrays_of_the_standard_library(kind: str) -> None:
    one = array.array(kind, [1, 2, 3])
    x = sharing.copy(one)
    assert (x.itemsize, x.shape, x.buffer.tolist()) == (one.itemsize, (3,), [1, 2, 3])
    assert x.dtype == np.asarray(one).dtype.name
    assert sharing.copy(memoryview(one)[::-2]).buffer.tolist() == [3, 1]


@pytest.mark.parametrize(
    "kind",
    [
        *(getattr(ctypes, f"c_{name}") for name in ("bool", "byte", "ubyte", "short", "ushort", "int", "uint")),
        *(getattr(ctypes, f"c_{name}") for name in ("long", "ulong", "longlong", "ulonglong", "float", "double")),
        ctypes.c_size_t,
        ctypes.c_uint8.__ctype_be__,
    ],
)
def test_arrays_of_ctypes(kind: Any) -> None:
    one = (kind * 3 * 2)((1, 0, 1), (0, 1, 1))
    x = sharing.copy(one)
    assert x.buffer.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert x.dtype == np.asarray(one).dtype.name
    assert sharing.copy((kind * 3 * 0)()).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "f2", "f4", "f8", "c8", "c16", "S1"])
@pytest.mark.parametrize("key", [slice(None), slice(None, None, -2), slice(0)])
def test_buffers_of_numpy(dtype: str, key: Any) -> None:
    one = np.array([[1, 0], [1, 1], [0, 1]], dtype)[key]
    one.flags.writeable = False
    if dtype == "S1":
        with pytest.raises(sharing.NotShareable, match="text"):
            sharing.copy(memoryview(one))
        return
    x = sharing.copy(memoryview(one))
    assert x.dtype == one.dtype.name
    assert np.array_equal(np.asarray(x), one)


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_int), ("b", ctypes.c_double))


def released() -> memoryview:
    view = memoryview(b"abc")
    view.release()
    return view


@pytest.mark.parametrize(
    ("one", "words"),
    [
        ((Pair * 2)(), "records"),
        ((ctypes.c_int.__ctype_be__ * 2)(1, 2), "other byte order"),
        ((ctypes.c_wchar * 2)("a", "b"), "text"),
        ((ctypes.c_void_p * 2)(1, 2), "share them as numbers"),
        ((ctypes.py_object * 2)(1, 2), "objects"),
        ((ctypes.c_longdouble * 2)(1, 2), 'x.astype."float64"'),
        (memoryview(np.ones(2, ">f4")), "other byte order"),
        (memoryview(np.zeros(2, [("a", "i4")])), "records"),
        (array.array("w" if sys.version_info >= (3, 13) else "u", "ab"), "text"),
        (released(), "released"),
        ("text", "is no array"),
        ([1, 2], "is no array"),
        (None, "is no array"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_no_buffers(one: Any, words: str) -> None:
    with pytest.raises(sharing.NotShareable, match=words):
        sharing.copy(one)
    assert not sharing.is_shared(one)


def test_a_buffer_of_memory_that_is_not_there() -> None:
    told = run_alone(
        "import ctypes, foreign_arrays; from aioelastic import sharing\n"
        "for at in (8, 4096, 1 << 46, foreign_arrays.unreadable() + 8):\n"
        "    one = (ctypes.c_double * 512).from_address(at)\n"
        "    for what in (one, memoryview(one), memoryview(one).cast('B')[::2]):\n"
        "        try: print(sharing.copy(what))\n"
        "        except sharing.NotShareable: pass\n"
        "print('done')"
    )
    assert told == "done\n"


def test_without_a_descriptor_what_python_owns_is_copied_and_others_are_told() -> None:
    sharing.copy(bytes(10))  # there is room for small ones from now on
    with no_descriptors_left():
        assert sharing.copy(b"abc").buffer.tobytes() == b"abc"
        assert sharing.copy(np.arange(3)).buffer.tolist() == [0, 1, 2]
        with pytest.raises(sharing.ShareLimit, match="look at the memory"):
            sharing.copy(says())


# --- is_shared ---


def test_views_are_shared_by_whatever_library() -> None:
    x = sharing.copy(np.arange(24.0).reshape(4, 6))
    a = np.asarray(x)
    address = a.__array_interface__["data"][0]
    records = a.view([("a", "f8"), ("b", "f8")])
    flat = x.buffer.cast("B")
    assert sharing.is_shared(sharing.empty(0))
    for one in (
        x,
        x[1:, ::-2],
        x.buffer,
        x.buffer.toreadonly(),
        flat[::-3],
        flat[5:6],
        a,
        a[2, 3:4],
        a[::-1],
        a.T,
        a[1, 1, ...],
        np.broadcast_to(a, (2, 4, 6)),
        np.frombuffer(flat, "u1"),
        a.view("M8[s]"),
        a.view("S8"),
        a.view(">f8"),
        a.view(np.matrix),
        np.ma.array(a, mask=a > 3, copy=False),
        records,
        records["b"],
        records[0, 1],
        memoryview(a),
        memoryview(a)[1:],
        ctypes.c_double.from_buffer(flat, 16),
        (ctypes.c_int * 3).from_buffer(flat, 4),
        Pair.from_buffer(flat),
        Says({**RIGHT, "data": (address, False)}),
        Says({**RIGHT, "data": (address, False), "typestr": "<M8[s]"}),
        Says({**RIGHT, "data": x.buffer}),
        Says({**RIGHT, "data": (address, False)}, "__cuda_array_interface__"),
        Capsule(data=address),
        Capsule(data=address - 8, byte_offset=8, code=77),
    ):
        assert sharing.is_shared(one), one


def test_others_are_not_shared() -> None:
    x = sharing.copy(np.arange(3.0))
    a = np.asarray(x)
    for one in (
        a.copy(),
        a + 1,
        a[0],
        a.tolist(),
        a.tobytes(),
        bytes(3),
        bytearray(3),
        memoryview(b"abc"),
        array.array("d", [1]),
        (ctypes.c_int * 3)(),
        np.float64(3),
        np.array(3),
        np.empty(0),
        np.array([x], object),
        [x],
        {"x": x},
        says(),
        Capsule(),
        None,
        3,
        "text",
        object(),
        sharing.SharedArray,
        np.ndarray,
        np,
        sharing.Queue,
        *(says(**changed) for changed, _ in WRONG.values()),
        *(Says(odd) for odd in (1, "x", {}, {"data": "x"}, {"data": (None,)})),
    ):
        assert not sharing.is_shared(one), one


def test_is_shared_raises_nothing() -> None:
    class Odd:
        data_ptr = property(lambda self: 1 / 0)
        __class__ = property(lambda self: 1 / 0)  # type: ignore[assignment]

    class Pointer:
        def __init__(self, value: Any) -> None:
            self.data_ptr = lambda: value

    for one in (Odd(), *(Pointer(value) for value in (None, "x", 1.5, -1, 2**70, [1], Odd()))):
        assert not sharing.is_shared(one)
        with pytest.raises(sharing.NotShareable):
            sharing.copy(one)
