"""All kinds of numpy's arrays, by name, and functions that workers run with them: they must be found by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, cast

import numpy as np


class Units(np.ndarray):
    """A subclass as numpy's documentation has it: it says nothing of how it is pickled."""

    unit: Any

    def __array_finalize__(self, other: Any) -> None:
        self.unit = getattr(other, "unit", None)


class Slots(np.ndarray):
    __slots__ = ("unit",)


class Plain(np.ndarray):
    """Without attributes."""


class Own(np.ndarray):
    """Pickles itself, as the quantities of astropy do."""

    unit: Any

    def __reduce__(self) -> Any:
        return (own, (np.asarray(self), f"own {self.unit}"))


def own(plain: Any, unit: str) -> Own:
    made: Own = with_unit(plain, Own, unit)
    return made


def with_unit(values: Any, kind: Any = Units, unit: str = "m") -> Any:
    made = np.asarray(values).view(kind)
    made.unit = unit
    return made


def protected(array: Any) -> Any:
    array.flags.writeable = False
    return array


def masked(hard: bool = False) -> Any:
    made: Any = np.ma.array([1.0, 2.0, 3.0], mask=[False, True, False], fill_value=-1, hard_mask=hard)
    made.unit = "m"
    return made


def mapped(mode: Any) -> Any:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115  # the mapping holds it
    np.arange(100.0).tofile(file.name)
    return np.memmap(file.name, "f8", mode)


_RECORD = [("a", "i4"), ("b", "f8")]
_RECORDS = np.array([(1, 2.0), (3, 4.0)], _RECORD)
_STRINGS: Any = getattr(np.dtypes, "StringDType", None) if hasattr(np, "dtypes") else None  # numpy 2 has it

# those that `sharing.copy` can have: its elements are numbers, and that is all it has
NUMBERS: dict[str, Callable[[], Any]] = {
    **{
        name: lambda name=name: np.array([[0, 1], [2, 3]], name)
        for name in ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "q", "Q")
    },
    "read-only": lambda: protected(np.arange(5.0)),
    "in Fortran order": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": lambda: np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    "broadcast": lambda: np.broadcast_to(np.arange(3.0), (4, 3)),
    "broadcast from one": lambda: np.broadcast_to(np.float32(3), (2, 2)),
    "a column": lambda: np.arange(5000.0).reshape(50, 100)[:, 7],
    "backwards": lambda: np.arange(10)[::-3],
    "windows": lambda: np.lib.stride_tricks.sliding_window_view(np.arange(6.0), 3),
    "no elements": lambda: np.empty((0, 3)),
    "no elements, read-only": lambda: protected(np.empty((3, 0), "i2")),
    "no dimensions": lambda: np.array(3.5),
    "a field": lambda: _RECORDS["b"],
    "a field of arrays": lambda: np.ones(3, [("a", "f4", (2, 2)), ("b", "S3")])["a"],
    "not aligned": lambda: np.frombuffer(bytearray(range(17)), "u1")[1:].view("f8"),
    "with metadata": lambda: np.ones(2, np.dtype("f4", metadata={"of": "it"})),
    "a file": lambda: mapped("r+"),
    "a file, read-only": lambda: mapped("r"),
    "a part of a file": lambda: mapped("c")[3:7],
    "a matrix": lambda: np.array([[1, 2], [3, 4]]).view(np.matrix),
    "a subclass": lambda: np.arange(3.0).view(Plain),
}

# those that it cannot have: what the error says, and what it says to share instead
REFUSED: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Any] | None]] = {
    "masked": (masked, r"mask.*x\.data and numpy\.ma\.getmaskarray\(x\)", lambda x: x.data),
    "masked, hard": (lambda: masked(True), r"mask.*getmaskarray\(x\)", np.ma.getmaskarray),
    "masked, read-only": (lambda: protected(np.ma.array([1, 2])), "mask", lambda x: x.data),
    "masked, without a mask": (lambda: np.ma.array([1, 2]), "mask", lambda x: x.data),
    "masked records": (lambda: np.ma.array(_RECORDS, mask=cast("Any", [(1, 0), (0, 0)])), "mask", None),
    "masked once": (lambda: np.ma.masked, "mask", None),
    "a unit": (lambda: with_unit([1.0, 2.0]), r"attributes \(unit\).*share numpy\.asarray\(x\)", np.asarray),
    "a unit, read-only": (lambda: protected(with_unit([1.0])), r"attributes \(unit\)", np.asarray),
    "a unit of objects": (lambda: with_unit(np.array([{}, None])), r"attributes \(unit\)", None),
    "a unit of nothing": (lambda: with_unit(np.empty((0, 2))), r"attributes \(unit\)", np.asarray),
    "a unit of one": (lambda: with_unit(3.0), r"attributes \(unit\)", np.asarray),
    "slots": (lambda: with_unit([1.0], Slots), r"attributes \(unit\)", np.asarray),
    "records": (lambda: _RECORDS, r'records.*x\["name"\].*x\.view\("uint8"\)', lambda x: x["a"]),
    "records as bytes": (lambda: _RECORDS, "records", lambda x: x.view("uint8")),
    "records, aligned": (lambda: np.ones(2, np.dtype(_RECORD, align=True)), "records", lambda x: x["b"]),
    "records, read-only": (lambda: protected(_RECORDS.copy()), "records", lambda x: x["b"]),
    "some fields": (lambda: _RECORDS[["b"]], "records", lambda x: x["b"]),
    "records of arrays": (lambda: np.ones(3, [("a", "f4", (2, 2)), ("b", "S3")]), "records", lambda x: x["a"]),
    "recarray": (lambda: _RECORDS.view(np.recarray), "records", lambda x: x["a"]),
    "records of objects": (lambda: np.array([(1, None)], [("a", "i4"), ("o", "O")]), "records", lambda x: x["a"]),
    "no fields": (lambda: np.zeros(2, np.dtype([])), "records", None),
    "raw bytes": (lambda: np.array([b"abc"], "V3"), "records", lambda x: x.view("uint8")),
    "raw bytes, none": (lambda: np.zeros(2, "V0"), "records", None),
    "objects": (lambda: np.array([{"any": 1}, None]), "objects.*send the array itself", None),
    "objects, read-only": (lambda: protected(np.array([{"any": 1}, None])), "objects", None),
    "bytes": (lambda: np.array([b"a", b"bc"]), r'text.*x\.view\("uint8"\)', lambda x: x.view("uint8")),
    "texts": (lambda: np.array(["a", "bcd"]), "text", lambda x: x.view("uint8")),
    "texts of the other order": (lambda: np.array(["a"], ">U3"), "text", lambda x: x.view("uint8")),
    "times": (lambda: np.array([1, 2], "M8[ns]"), r'x\.view\("int64"\)', lambda x: x.view("int64")),
    "lengths of time": (lambda: np.array([1, 2], "m8[3us]"), r'x\.view\("int64"\)', lambda x: x.view("int64")),
    "long double": (lambda: np.ones(2, "g"), r'x\.astype\("float64"\)', lambda x: x.astype("float64")),
    "long complex": (lambda: np.ones(2, "G"), r'x\.astype\("complex128"\)', lambda x: x.astype("complex128")),
    "the other byte order": (
        lambda: np.ones(2, np.dtype("f4").newbyteorder("S")),
        r'x\.astype\(x\.dtype\.newbyteorder\("="\)\)',
        lambda x: x.astype(x.dtype.newbyteorder("=")),
    ),
    "times of the other order": (lambda: np.array([1], np.dtype("M8[s]").newbyteorder("S")), "view", None),
    **(
        {
            "strings": (lambda: np.array(["a", "b" * 100], _STRINGS()), "objects.*send the array itself", None),
            "strings and none": (lambda: np.array(["a", None], _STRINGS(na_object=None)), "objects", None),
        }
        if _STRINGS is not None
        else {}
    ),
}

ALL: dict[str, Callable[[], Any]] = {
    **NUMBERS,
    **{name: make for name, (make, _, _) in REFUSED.items()},
    "pickles itself": lambda: _own(),
}


def _own() -> Any:
    return with_unit([1.0, 2.0], Own)


SCALARS: list[Any] = [
    np.bool_(True),
    *(np.dtype(name).type(3) for name in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "q", "Q", "f2", "f4", "f8")),
    *(np.dtype(name).type(3.5) for name in ("g", "c8", "c16", "G")),
    np.str_("text"),
    np.bytes_(b"bytes"),
    np.datetime64("2020-01-01T00:00:00", "ns"),
    np.timedelta64(7, "D"),
    np.void(b"abc"),
    _RECORDS[0],
    cast("Any", _RECORDS).view(np.recarray)[1],
]


def make_all() -> dict[str, Any]:
    return {name: make() for name, make in ALL.items()}


def back(value: Any) -> Any:
    return value
