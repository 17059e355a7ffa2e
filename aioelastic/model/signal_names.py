"""Signals by name and by number: the one place that knows both (signal(7))."""

from __future__ import annotations

import signal as _signal

from .errors import SpecError


def parse_signal(field: str, value: int | str) -> int:
    """`15`, `"TERM"`, `"SIGTERM"`, `"SIGRTMIN+3"` or a member → the member; a number where there is none (real-time
    signals, signal(7)). Raises `SpecError`.
    """
    number: object = value
    if isinstance(value, str):
        name = value.strip().upper()
        name = name if name.isdigit() or name.startswith("SIG") else f"SIG{name}"
        number = int(name) if name.isdecimal() and len(name) < 20 else _NUMBERS.get(name)
    if isinstance(number, int) and not isinstance(number, bool) and number in _VALID:
        return _signal.Signals(number) if number in _MEMBERS else int(number)
    remedy = 'give a name like "SIGTERM" or "SIGRTMIN+3", a number, or signal.SIGINT'
    raise SpecError(field, value, "is not a signal of this system", remedy)


def signal_name(number: int) -> str:
    """`11` → `"SIGSEGV"`, `37` → `"SIGRTMIN+3"`; unknown ones by number."""
    if number in _MEMBERS:
        return _signal.Signals(number).name
    if _signal.SIGRTMIN < number < _signal.SIGRTMAX:
        return f"SIGRTMIN+{number - _signal.SIGRTMIN}"
    return f"signal {number}"


_VALID = frozenset(map(int, _signal.valid_signals()))  # to ask takes 0.1 ms


_MEMBERS = {int(one) for one in _signal.Signals}


_REAL_TIME = range(_signal.SIGRTMIN, _signal.SIGRTMAX + 1)


_NUMBERS: dict[str, int] = {
    **{f"SIGRTMIN+{at}": number for at, number in enumerate(_REAL_TIME)},
    **{f"SIGRTMAX-{at}": number for at, number in enumerate(reversed(_REAL_TIME))},
    **{name: int(one) for name, one in _signal.Signals.__members__.items()},
}
