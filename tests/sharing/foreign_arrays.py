"""Objects that say by a protocol where an array lies, rightly or not, and a program that shares a great many of them.

What is not checked here ends the process, so whatever says wrong things is run in one of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from aioelastic import SpecError, sharing
from aioelastic.memory import dlpack

VALUES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
_memory = (ctypes.c_double * 16384)()  # with room around them
WHERE = ctypes.addressof(_memory) + 8 * 8192
_memory[8192 : 8192 + len(VALUES)] = [*VALUES]
RIGHT = {"version": 3, "shape": (2, 3), "typestr": "<f8", "data": (WHERE, False)}

_libc = ctypes.CDLL(None)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Says:
    """An array by `__array_interface__`, or another protocol of that kind."""

    def __init__(self, said: Any, name: str = "__array_interface__", **others: Any) -> None:
        self.__dict__.update({name: said}, **others)


def says(**changed: Any) -> Says:
    """What is right but for this."""
    return Says({**RIGHT, **changed})


class Capsule:
    """An array by DLPack, whose tensor has these fields.

    Attributes:
        said: what it gives instead of a capsule.
    """

    def __init__(
        self,
        shape: Any = (2, 3),
        strides: Any = None,
        device: Any = (1, 0),
        name: bytes | None = None,
        version: tuple[int, int] | None = None,
        at: int | None = None,
        said: Any = None,
        **fields: Any,
    ) -> None:
        self.lists = [(ctypes.c_int64 * 8)(*one) for one in (shape, strides or ())]
        places = [ctypes.addressof(one) for one in self.lists]
        given: dict[str, Any] = {
            "shape": places[0],
            "strides": places[1] if strides is not None else 0,
            "ndim": len(shape),
        }
        given |= {"data": WHERE, "device_type": 1, "code": 2, "bits": 64, "lanes": 1}
        given |= {key.removesuffix("_at"): value for key, value in fields.items()}
        for key in ("shape", "strides"):
            given[key] = ctypes.cast(given[key], ctypes.POINTER(ctypes.c_int64))
        tensor = dlpack._Tensor(**given)
        self.managed: Any = (
            dlpack._Managed(tensor) if version is None else dlpack._ManagedVersioned(*version, tensor=tensor)
        )
        self.at = ctypes.addressof(self.managed) if at is None else at
        self.name = name or (b"dltensor" if version is None else b"dltensor_versioned")
        self.device, self.said = device, said

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self) -> Any:
        return dlpack._new(self.at, self.name, None) if self.said is None else self.said


class Raises:
    """Any attribute of it, whatever is asked."""

    def __init__(self, exc: Exception) -> None:
        self.__dict__["exc"] = exc

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in PROTOCOLS:
            return object.__getattribute__(self, name)
        raise object.__getattribute__(self, "__dict__")["exc"]


PROTOCOLS = ("__array_interface__", "__cuda_array_interface__", "__dlpack__", "__dlpack_device__")


def unreadable() -> int:
    """The address of a page that can be read, before one that cannot."""
    page = mmap.PAGESIZE
    mapped = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert _libc.mprotect(address + page, page, 0) == 0
    _kept.append(mapped)
    return address


_kept: list[Any] = []
_NUMBERS: tuple[Any, ...] = (0, 1, 2, 3, 7, -1, -3, 8, 64, 4096, 2**31, 2**40, 2**61, 2**63 - 1, 2**63, 2**64, -(2**63))
_ODD: tuple[Any, ...] = (None, "", "x", b"", b"12345678", 1.5, True, (), [], {}, object(), [1, [2]], float("nan"), ...)
_TYPES = ("<f8", ">f8", "|u1", "<u1", "<i4", "<c16", "<f2", "<f3", "|V8", "|O8", "<M8[s]", "<U2", "f8", "<f999999999")


def _fields(random: random.Random) -> dict[str, Any]:
    """What is right, with some of it changed."""

    def number() -> Any:
        return random.choice((*_NUMBERS, random.randrange(10), WHERE, WHERE + 8, WHERE + 40, _edge))

    def numbers() -> Any:
        return random.choice((tuple, list))(number() for _ in range(random.choice((0, 1, 2, 2, 2, 3, 65))))

    def odd() -> Any:
        return random.choice(_ODD)

    kinds: dict[str, tuple[Callable[[], Any], ...]] = {
        "shape": (numbers, lambda: (random.randrange(4), random.randrange(4)), odd, number),
        "strides": (numbers, lambda: (random.randrange(-24, 48, 8), random.randrange(-24, 48, 8)), lambda: None, odd),
        "typestr": (lambda: random.choice(_TYPES), odd),
        "data": (
            lambda: (number(), random.choice((True, False, 0, 1, None, "no"))),
            lambda: bytes(random.randrange(64)),
            lambda: bytearray(48),
            lambda: memoryview(bytes(96))[:: random.choice((1, 2))],
            odd,
        ),
        "offset": (number, odd),
        "version": (number, odd),
        "descr": (lambda: [("", "<f8")], lambda: [("", random.choice(_TYPES))], lambda: [("a", "<f8")], odd),
        "mask": (lambda: None, odd),
    }
    changed = {field: random.choice(kinds[field])() for field in random.sample(list(kinds), random.randrange(4))}
    said = {**RIGHT, **changed}
    if not random.randrange(8):
        del said[random.choice(list(said))]
    return said


def _capsule(random: random.Random) -> Any:
    def number(bits: int, least: int = 0) -> int:
        return random.choice((0, 1, -1, 2, 3, 8, 64, 65, 2**31 - 1, 2**62, random.randrange(200))) % (1 << bits) - least

    shape = [random.choice((0, 1, 2, 3, 3, -1, 2**62, 2**33)) for _ in range(random.randrange(4))]
    places = (0, 1, 8, WHERE, _edge, _edge + mmap.PAGESIZE, 2**63, 2**64 - 8)
    fields: dict[str, Callable[[], Any]] = {
        "data": lambda: random.choice(places),
        "device_type": lambda: number(31),
        "ndim": lambda: random.choice((0, 1, 2, 3, -1, 64, 65, 2**31 - 1)),
        "code": lambda: number(8),
        "bits": lambda: number(8),
        "lanes": lambda: number(16),
        "byte_offset": lambda: random.choice((0, 8, 16, 2**40, 2**63, 2**64 - 8)),
        "shape_at": lambda: random.choice(places),
        "strides_at": lambda: random.choice(places),
        "at": lambda: random.choice(places[1:]),
        "name": lambda: random.choice((b"dltensor", b"used_dltensor", b"dltensor_versioned", b"")),
        "version": lambda: random.choice(((1, 0), (1, 99), (2, 0), (0, 8), None)),
        "device": lambda: random.choice(((1, 0), (2, 0), (3, 0), (1,), (1, 2, 3), None, "cpu", (None, 0), (1.0, 0))),
        "said": lambda: random.choice((1, "capsule", object(), None)),
        "strides": lambda: [random.choice((0, 1, 2, 3, -1, 2**62, -(2**63))) for _ in shape],
    }
    changed = {field: fields[field]() for field in random.sample(list(fields), random.randrange(4))}
    return Capsule(**{"shape": random.choice(((2, 3), (6,), shape)) if "strides" not in changed else shape, **changed})


def _buffer(random: random.Random) -> Any:
    kind = random.choice((ctypes.c_double, ctypes.c_int16, ctypes.c_char, ctypes.c_wchar, ctypes.c_void_p))
    if random.randrange(2):
        return (kind * random.choice((0, 1, 3, 5000))).from_address(random.choice((WHERE, _edge, 1, 8, 2**47, 2**62)))
    view = memoryview(bytearray(48)).cast(random.choice(("B", "d", "i", "c", "?", "P")))
    return view[:: random.choice((1, -1, 2, -3))]


_edge = 0


def tell(array: Any) -> str:
    """What comes of sharing it."""
    try:
        x = sharing.copy(array)
    except (sharing.SharingError, SpecError) as exc:
        return type(exc).__name__
    finally:
        sharing.is_shared(array)
    numpy = sys.modules.get("numpy")
    if numpy is not None and type(array) is Says and x.size <= 100:  # others reach to what changes meanwhile
        try:
            same = numpy.array_equal(numpy.asarray(array), numpy.asarray(x), equal_nan=True)
        except (TypeError, ValueError, AttributeError):  # it refuses more
            return "copied"
        assert same, (numpy.asarray(array), numpy.asarray(x))
    return "copied"


def nonsense(seed: int, count: int) -> None:
    """Share so many; prints how many were copied, and how many refused."""
    global _edge
    _edge = unreadable()
    # what would be large is no use of this machine's memory
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 26, 1 << 26))
    chance, came = random.Random(seed), Counter[str]()
    kinds: tuple[Callable[[random.Random], Any], ...] = (
        lambda chance: Says(_fields(chance)),
        lambda chance: Says(_fields(chance), random_name(chance)),
        _capsule,
        _buffer,
    )
    for number in range(count):
        state = chance.getstate()
        array = chance.choice(kinds)(chance)
        try:
            came[tell(array)] += 1
        except BaseException:
            print(f"at {number} of {seed}: {getattr(array, '__dict__', array)} {state[1][:2]}", file=sys.stderr)
            raise
    print(dict(came))


def random_name(chance: random.Random) -> str:
    return chance.choice(("__array_interface__", "__cuda_array_interface__"))
