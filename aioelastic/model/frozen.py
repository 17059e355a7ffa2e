"""`@dataclass(frozen=True)` as that of the standard library, in a fifth of the time: it compiles six methods for
each class, which was a third of what importing us took. Here classes share all but `__init__`, which is
compiled when it is first needed."""

from __future__ import annotations

import dataclasses
import sys
from reprlib import recursive_repr

__all__ = ["dataclass"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass  # it is all that users, and checkers, need to know
    from typing import Any
else:

    def dataclass(*, frozen: bool, init=True, repr=True, eq=True, slots=False):  # noqa: A002 - as dataclasses has it
        """See `dataclasses.dataclass`; `frozen` is said for who reads."""
        assert frozen

        def decorate(cls: type) -> type:
            bases = [one.__dataclass_params__ for one in cls.__mro__ if "__dataclass_params__" in vars(one)]
            for one in bases:  # it wants all of them to be frozen, or none
                one.frozen = False
            cls = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots)(cls)
            for one in (*bases, cls.__dataclass_params__):
                one.frozen = True
            shared = {**_FROZEN, **(_REPR if repr else {}), **(_EQ if eq else {}), **(_STATE if slots else {})}
            if init:
                shared["__init__"] = _Init(cls)
            for name, method in shared.items():
                # Python sets __hash__ to None beside an __eq__
                if name not in vars(cls) or (name == "__hash__" and vars(cls)[name] is None):
                    setattr(cls, name, method)
            return cls

        return decorate


class _Factory:
    """What `__init__` shows for a default that is made for each."""

    def __repr__(self) -> str:
        return "<factory>"


_FACTORY = _Factory()


class _Init:
    """`__init__`, compiled when somebody asks for it."""

    def __init__(self, cls: Any) -> None:
        self._cls = cls

    def __get__(self, instance: object, owner: type) -> Any:
        init = self._cls.__init__ = _init(self._cls)
        return init.__get__(instance, owner)


def _init(cls: type) -> Callable[..., None]:
    fields, factories, lines = dataclasses.fields(cls), {}, []
    for one in fields:
        value = one.name
        if one.default_factory is not dataclasses.MISSING:
            factories[one.name] = one.default_factory
            value = f"_factories[{one.name!r}]() if {value} is _FACTORY else {value}"
        lines.append(f"  _set(self, {one.name!r}, {value})\n")
    if hasattr(cls, "__post_init__"):
        lines.append("  self.__post_init__()\n")
    head = f"def make(_set, _factories, _FACTORY):\n def __init__(self, {', '.join(one.name for one in fields)}):\n"
    made: dict[str, Any] = {}
    exec(f"{head}{''.join(lines)} return __init__", vars(sys.modules[cls.__module__]), made)
    init: Callable[..., None] = made["make"](object.__setattr__, factories, _FACTORY)
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = {one.name: one.type for one in fields} | {"return": None}
    defaults = [_FACTORY if one.name in factories else one.default for one in fields]
    init.__defaults__ = tuple(one for one in defaults if one is not dataclasses.MISSING)
    return init


def _values(self: Any) -> list[Any]:
    return [getattr(self, one.name) for one in dataclasses.fields(self)]


@recursive_repr()
def _repr(self: Any) -> str:
    words = (f"{one.name}={getattr(self, one.name)!r}" for one in dataclasses.fields(self) if one.repr)
    return f"{type(self).__qualname__}({', '.join(words)})"


def _eq(self: Any, other: Any) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(tuple(_values(self)))


def _setattr(self: Any, name: str, value: object) -> None:
    _refuse(self, name, "assign to")
    object.__setattr__(self, name, value)


def _delattr(self: Any, name: str) -> None:
    _refuse(self, name, "delete")
    object.__delattr__(self, name)


def _refuse(self: Any, name: str, what: str) -> None:
    # a class below ours that is no dataclass may have attributes of its own
    if "__dataclass_fields__" in vars(type(self)) or name in self.__dataclass_fields__:
        raise dataclasses.FrozenInstanceError(f"cannot {what} field {name!r}")


def _setstate(self: Any, state: list[Any]) -> None:
    for one, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, one.name, value)


_REPR = {"__repr__": _repr}
_EQ = {"__eq__": _eq, "__hash__": _hash}
_FROZEN = {"__setattr__": _setattr, "__delattr__": _delattr}
_STATE = {"__getstate__": _values, "__setstate__": _setstate}  # slots that nobody may set
