"""An exception on its way to another process: the object where it can be pickled, its traceback as text always."""

from __future__ import annotations

import contextlib
import pickle
import time
import traceback
from typing import Any

from . import _wire
from ._record import clock

SHOWN = 1_048_576  # characters of a traceback that travel
DEPTH = 50  # exceptions of one chain, or of nested groups, that travel


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
    try:
        exc.__traceback__ = trace
        lines = traceback.TracebackException.from_exception(exc, capture_locals=with_locals).format()
        text = "".join(lines)
    except Exception as problem:  # its own __str__ or __repr__ is broken
        text = f"{type(exc).__qualname__}: <no traceback: {type(problem).__name__}>\n"
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]}\n…\n{text[-SHOWN // 2 :]}"
    packed = _pack(exc, DEPTH) if pack else None
    return {
        "type": _name(exc), "message": _text(exc), "traceback": text, "packed": packed,
        "monotonic": at_ns, "clock": clock(),
    }  # fmt: skip


def raised_ns(told: dict[str, Any]) -> int | None:
    """When what `describe` has told of was raised, on the monotonic clock of this process; None: on another one."""
    at = told.get("monotonic")
    return at if isinstance(at, int) and told.get("clock") == clock() != "" else None


def rebuild(packed: Any) -> tuple[BaseException | None, str]:
    """The exception with its notes, cause and context; or None, and why. Raises nothing."""
    if not isinstance(packed, dict):
        return None, "it did not travel"
    try:
        exc = pickle.loads(packed["data"])
        if not isinstance(exc, BaseException):
            return None, f"its pickle holds a {type(exc).__name__}"
        _dress(exc, packed)
    except Exception as problem:
        return None, packed.get("why") or f"{type(problem).__name__}: {_text(problem)}"
    return exc, ""


def _pack(exc: BaseException, depth: int) -> dict[str, Any]:
    out: dict[str, Any] = {"data": b"", "why": "", "suppress": exc.__suppress_context__}
    try:
        out["data"] = pickle.dumps(exc, protocol=5)
    except Exception as problem:
        out["why"] = f"it cannot be pickled: {type(problem).__name__}: {_text(problem)}"
        dumps = _wire.by_value()
        if dumps is not None:
            with contextlib.suppress(Exception):
                out["data"] = dumps(exc, protocol=5)
    notes = getattr(exc, "__notes__", None)
    if isinstance(notes, list):
        out["notes"] = [one if isinstance(one, str) else _text(one) for one in notes]
    if depth > 0:
        for key, other in (("cause", exc.__cause__), ("context", exc.__context__)):
            if other is not None:
                out[key] = _pack(other, depth - 1)
        if isinstance(exc, BaseExceptionGroup):
            out["parts"] = [_pack(one, depth - 1) for one in exc.exceptions]
    return out


def _dress(exc: BaseException, packed: dict[str, Any]) -> None:
    """What a pickle leaves out."""
    if "notes" in packed and not hasattr(exc, "__notes__"):
        for note in packed["notes"]:
            exc.add_note(note)
    for key in ("cause", "context"):
        if key in packed:
            other, _ = rebuild(packed[key])
            if other is not None:
                setattr(exc, f"__{key}__", other)
    exc.__suppress_context__ = packed["suppress"]
    if isinstance(exc, BaseExceptionGroup):
        for one, part in zip(exc.exceptions, packed.get("parts", ()), strict=False):
            _dress(one, part)


def _name(exc: BaseException) -> str:
    kind = type(exc)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _text(exc: object) -> str:
    try:
        return str(exc)[:SHOWN]
    except Exception as problem:
        return f"<str() raised {type(problem).__name__}>"
