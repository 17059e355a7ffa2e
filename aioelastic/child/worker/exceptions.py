"""An exception on its way to another process: the object where it can be pickled, its traceback as text always.

It travels as a list of nodes, itself first: each exception that can be reached from it is one, and tells by number
which others are its cause, its context and its parts. So what is shared travels once, and a circle is one again.
"""

from __future__ import annotations

import binascii
import json
import pickle
import time
from collections.abc import Sequence
from typing import Any, cast

from ...system.descriptors import shut_all
from ..wire import messages, untrusted
from .error_record import assign, clock, cut, formatted, reachable

SHOWN = 1_048_576  # characters of a traceback that travel; bytes of the pickles of all but the first exception
MOST = 1_024  # exceptions that travel: the nearest


def describe(exc: BaseException, skip: int = 0, with_locals: bool = False, pack: bool = True) -> dict[str, Any]:
    """What `rebuild` needs, text, and the time.

    Args:
        skip: the innermost frames of our own that its traceback begins with.
        with_locals: the text shows local variables.
        pack: it travels; else text is enough.
    """
    at_ns = time.monotonic_ns()
    trace = exc.__traceback__
    for _ in range(skip):
        if trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
    BaseException.with_traceback(exc, trace)  # its class may let nothing be set
    text, problem = untrusted.attempt(formatted, exc, with_locals)
    if text is None:  # its own __str__ or __repr__ is broken
        text = f"{type(exc).__qualname__}: <no traceback: {type(problem).__name__}>\n"
    return {
        "type": _name(exc), "message": _text(exc), "traceback": cut(text, SHOWN), "monotonic": at_ns, "clock": clock(),
        "packed": untrusted.attempt(_pack, exc)[0] if pack else None,
    }  # fmt: skip


def raised_ns(told: dict[str, Any]) -> int | None:
    """When what `describe` has told of was raised, on the monotonic clock of this process; None: on another one."""
    at = told.get("monotonic")
    return at if type(at) is int and 0 <= at < 1 << 63 and told.get("clock") == clock() != "" else None


def rebuild(packed: Any) -> tuple[BaseException | None, str]:
    """The exception with its notes, cause and context; or None, and why. Raises nothing, whatever it is given."""
    made, problem = untrusted.attempt(_rebuilt, packed)
    return made if made is not None else (None, f"{type(problem).__name__}: {_text(problem)}")


def _rebuilt(packed: Any) -> tuple[BaseException | None, str]:
    nodes = packed.get("nodes") if isinstance(packed, dict) else None
    if not isinstance(nodes, list) or not nodes or not all(isinstance(one, dict) for one in nodes):
        return None, "it did not travel"
    made: list[BaseException | None] = [None] * len(nodes)
    # groups first: their parts are in their own pickles, wherever else these stand
    for number in sorted(range(len(nodes)), key=lambda one: "parts" not in nodes[one]):
        exc, node = made[number], nodes[number]
        if exc is None and node.get("data"):
            exc, problem = untrusted.step(_loaded, node["data"])
            if problem is not None:
                node["why"] = node.get("why") or f"{type(problem).__name__}: {_text(problem)}"
            made[number] = exc
        if exc is None and number == 0:
            return None, str(node.get("why"))
        if isinstance(exc, BaseExceptionGroup):
            untrusted.step(_adopt, exc, node.get("parts"), made)
    for exc, node in zip(made, nodes, strict=True):
        if exc is not None:
            untrusted.step(_dress, exc, node, made)
    return made[0], ""


def _pack(exc: BaseException) -> dict[str, Any]:
    found = reachable(exc, MOST)
    numbers = {id(one): number for number, one in enumerate(found)}
    nodes: list[dict[str, Any]] = []
    alone = {0}  # those that are not just parts of a group, which its pickle holds
    for one in found:
        node: dict[str, Any] = {"suppress": one.__suppress_context__}
        for key, other in (("cause", one.__cause__), ("context", one.__context__)):
            if id(other) in numbers:
                node[key] = numbers[id(other)]
                alone.add(node[key])
        if isinstance(one, BaseExceptionGroup):
            node["parts"] = [numbers.get(id(part)) for part in one.exceptions]
        notes = getattr(one, "__notes__", None)
        if isinstance(notes, list):
            node["notes"] = [note if isinstance(note, str) else _text(note) for note in notes]
        nodes.append(node)
    left = SHOWN
    for at in sorted(alone):
        if at and left <= 0:
            break  # each may hold all those behind it, as an argument
        data, nodes[at]["why"] = _pickled(found[at])
        nodes[at]["data"] = binascii.b2a_base64(data, newline=False).decode()  # the whole is JSON
        left -= len(data) if at else 0
    return {"nodes": nodes}


def _pickled(exc: BaseException) -> tuple[bytes, str]:
    """Its pickle, if need be by value; and else why there is none."""
    data, problem = untrusted.step(pickle.dumps, exc, 5)
    if data is not None:
        return data, ""
    why = f"it cannot be pickled: {type(problem).__name__}: {_text(problem)}"
    dumps = messages.by_value()
    if dumps is not None:
        data, _ = untrusted.step(dumps, exc, 5)
    return data or b"", why


def _loaded(data: str) -> BaseException:
    exc = pickle.loads(binascii.a2b_base64(data))
    if not isinstance(exc, BaseException):
        raise TypeError(f"its pickle holds a {type(exc).__name__}")
    return exc


def _adopt(group: BaseExceptionGroup[Any], parts: Any, made: list[BaseException | None]) -> None:
    for one, at in zip(group.exceptions, parts, strict=False):
        if type(at) is int and 0 <= at < len(made) and made[at] is None:
            made[at] = one


def _dress(exc: BaseException, node: dict[str, Any], made: list[BaseException | None]) -> None:
    """What a pickle leaves out."""
    if "notes" in node and not hasattr(exc, "__notes__"):
        object.__setattr__(exc, "__notes__", [note for note in node["notes"] if isinstance(note, str)])
    for key in ("cause", "context"):
        other = _at(node.get(key), made)
        if other is not None:
            assign(exc, key, other)
    assign(exc, "suppress_context", node.get("suppress") is True)


def _at(at: Any, made: list[BaseException | None]) -> BaseException | None:
    return made[at] if type(at) is int and 0 <= at < len(made) else None


def _name(exc: BaseException) -> str:
    kind = type(exc)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _text(exc: object) -> str:
    text, problem = untrusted.attempt(str, exc)
    return f"<str() raised {type(problem).__name__}>" if text is None else text[:SHOWN]


def tell(kind: bytes, told: dict[str, Any]) -> tuple[bytes, list[int]]:
    """As `encode`, for `ERROR` and `FAILED`; cut, where it needs a memfd and there can be none."""
    fds: list[int] = []
    try:
        return messages.packed(kind, 0, [memoryview(json.dumps(told).encode())], fds), fds
    except OSError as exc:
        shut_all(fds)
        return messages.packed(kind, 0, [memoryview(_inline(told, str(exc)))], fds), fds


def _inline(told: dict[str, Any], why: str) -> bytes:
    """What there is room for beside the datagram: the exception itself goes when there is little for its texts."""
    most = messages.INLINE
    while len(data := json.dumps(told).encode()) > messages.INLINE:
        most //= 2
        told = {**told, **{key: cut(told[key], most) for key in ("type", "message", "traceback")}}
        if most < 4_096 and told["packed"] is not None:
            told.update(packed=None, not_rebuilt=f"there was no room for it: {why}")
    return data


def told(packet: bytes, fds: Sequence[int]) -> dict[str, Any]:
    """What `tell` was given; it runs nothing. Raises `ValueError`, or `OSError`."""
    (data, *_), _ = messages.unpacked(packet, fds, True)
    try:
        found = json.loads(bytes(data))
    except (ValueError, RecursionError):
        found = None
    texts = [found.get(key) for key in ("phase", "type", "message", "traceback")] if isinstance(found, dict) else [None]
    if not all(isinstance(one, str) for one in texts):
        raise ValueError(messages.FOREIGN)
    return cast("dict[str, Any]", found)


def as_text(packet: bytes, fds: Sequence[int], words: str) -> tuple[bytes, list[int]]:
    """The reply of a task, or the error of a function, without the pickles in it.

    Args:
        words: why they are left out.
    """
    if packet[:1] == messages.DONE:
        report = {"phase": "result", "type": "PermissionError", "message": words, "traceback": "", "packed": None}
        out, more = tell(messages.FAILED, report)
    else:
        size = 8 if packet[:1] == messages.FAILED else 0
        report = told(packet[:2] + packet[2 + size :], fds)
        out, more = tell(packet[:1], {**report, "packed": None, "not_rebuilt": words})
    return (out if packet[:1] == messages.ERROR else out[:2] + bytes(8) + out[2:]), more
