"""Element types by name, as numpy and torch name them; nothing is imported for it."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from ..model.errors import SpecError
from ..model.text import shown
from ._errors import FAILURES


def loaded(name: str, kind: str, part: str = "") -> Any:
    """A library that is loaded, with this class and this part; else None: tests, and applications that avoid an import,
    have something else by its name."""
    module = sys.modules.get(name) if not part or part in sys.modules else None
    return module if isinstance(getattr(module, kind, None), type) else None


class DType(NamedTuple):
    """One element type.

    Attributes:
        typestr: as in `__array_interface__`; raw bytes where numpy has no such type.
        code: its kind in DLPack (dlpack.h, DLDataTypeCode).
        format: as memoryview.cast takes it, where it has one.
    """

    name: str
    itemsize: int
    typestr: str
    code: int
    format: str


ORDER = "<" if sys.byteorder == "little" else ">"


def _plain(name: str, kind: str, size: int, code: int, format: str) -> DType:
    return DType(name, size, f"{'|' if size == 1 else ORDER}{kind}{size}", code, format)


_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6
DTYPES = {
    one.name: one
    for one in (
        _plain("bool", "b", 1, _BOOL, "?"),
        *(_plain(f"int{8 * n}", "i", n, _INT, f) for n, f in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))),
        *(_plain(f"uint{8 * n}", "u", n, _UINT, f) for n, f in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))),
        *(_plain(f"float{8 * n}", "f", n, _FLOAT, f) for n, f in ((2, ""), (4, "f"), (8, "d"))),
        *(_plain(f"complex{8 * n}", "c", n, _COMPLEX, "") for n in (8, 16)),
        DType("bfloat16", 2, "|V2", _BFLOAT, ""),
        DType("float8_e4m3fn", 1, "|V1", 10, ""),
        DType("float8_e4m3fnuz", 1, "|V1", 11, ""),
        DType("float8_e5m2", 1, "|V1", 12, ""),
        DType("float8_e5m2fnuz", 1, "|V1", 13, ""),
        DType("float8_e8m0fnu", 1, "|V1", 14, ""),
    )
}
_SHORT = {one.typestr[1:]: one for one in DTYPES.values() if one.typestr[1] != "V"}
_PYTHON = {bool: "bool", int: "int64", float: "float64", complex: "complex128"}
_OTHERWISE = {"bool_": "bool", "longlong": "int64", "ulonglong": "uint64"}  # names of numpy's types


def parse(dtype: Any) -> DType:
    """A name (`"float32"`, `"f4"`, `"bfloat16"`), or a type of Python's, numpy's or torch's. Raises `SpecError`."""
    try:
        text = _PYTHON.get(dtype) if isinstance(dtype, type) else None
        if text is None:
            text = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
        short = text.removeprefix("torch.")
    except FAILURES:  # it is none, and may do anything
        short = ""
    if short[:1] in ("=", "|", ORDER):
        short = short[1:]
    found = DTYPES.get(_OTHERWISE.get(short, short)) or _SHORT.get(short)
    if found is None:
        names = ", ".join(DTYPES)
        raise SpecError("dtype", shown(dtype), "is no element type that can be shared", f"give one of {names}")
    return found
