"""Our frozen classes behave as those that `dataclasses.dataclass` makes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import pkgutil
from importlib import import_module
from typing import Any, ClassVar, get_type_hints

import pytest

import aioelastic
from aioelastic.model.frozen import dataclass


def twin(decorate: Any, slots: bool) -> Any:
    @decorate(frozen=True, slots=slots)
    class Twin:
        """Both."""

        a: int
        b: str = "b"
        c: dict[str, int] = dataclasses.field(default_factory=dict)

        def __post_init__(self) -> None:
            object.__setattr__(self, "b", self.b.upper())

    return Twin


def derived(decorate: Any, base: Any, slots: bool) -> Any:
    @decorate(frozen=True, slots=slots)
    class Derived(base):
        """Of both."""

        d: float = 0.5

    return Derived


def outcome(call: Any) -> Any:
    try:
        return call()
    except Exception as exc:
        return type(exc), str(exc)


def pair(decorate: Any, slots: bool) -> list[Any]:
    base = twin(decorate, slots)
    return [base, derived(decorate, base, slots)]


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_it_does_what_the_standard_one_does(which: int, slots: bool) -> None:
    def plain_child(cls: Any) -> Any:
        class Child(cls):
            pass

        child = Child(1)
        child.own = 2
        del child.own
        return [outcome(lambda: setattr(child, "a", 3)), child == Child(1), child == cls(1)]

    checks = {
        "repr": lambda cls: repr(cls(1, "x", {"y": 2})),
        "recursive": lambda cls: (one := cls(1, c={}), one.c.update(own=one), repr(one))[-1],
        "equal": lambda cls: [cls(1) == cls(1), cls(1) == cls(2), cls(1) == (1, "B", {}), cls(1) != cls(1)],
        "hash": lambda cls: [hash(cls(1, c=())) == hash(cls(1, c=())), outcome(lambda: hash(cls(1)))],
        "hash is that of the tuple": lambda cls: hash(cls(1, c=())),
        "set": lambda cls: outcome(lambda: setattr(cls(1), "a", 2)),
        "delete": lambda cls: outcome(lambda: delattr(cls(1), "a")),
        "signature": lambda cls: [str(inspect.signature(cls)), str(inspect.signature(cls.__init__))],
        "annotations": lambda cls: cls.__init__.__annotations__,
        "name": lambda cls: cls.__init__.__qualname__,
        "missing": lambda cls: outcome(cls),
        "unknown": lambda cls: outcome(lambda: cls(1, q=2)),
        "fields": lambda cls: [
            (one.name, one.type, one.default, one.default_factory) for one in dataclasses.fields(cls)
        ],
        "replace": lambda cls: repr(dataclasses.replace(cls(1), a=5)),
        "asdict": lambda cls: dataclasses.asdict(cls(1)),
        "copy": lambda cls: [copy.copy(cls(1)) == cls(1), repr(copy.deepcopy(cls(1)))],
        "match": lambda cls: cls.__match_args__,
        "slots": lambda cls: [cls.__dict__.get("__slots__"), hasattr(cls(1), "__dict__")],
        "parameters": lambda cls: cls.__dataclass_params__.frozen,
    }
    if not slots:  # the standard one fails there: https://github.com/python/cpython/issues/90562
        checks |= {"set another": lambda cls: outcome(lambda: setattr(cls(1), "z", 2)), "child": plain_child}
    ours, theirs = pair(dataclass, slots)[which], pair(dataclasses.dataclass, slots)[which]
    for name, check in checks.items():
        assert check(ours) == check(theirs), name
    assert ours(1).c is not ours(1).c


@pytest.mark.parametrize("slots", [False, True])
def test_users_may_derive_from_one(slots: bool) -> None:
    child = derived(dataclasses.dataclass, twin(dataclass, slots), slots)
    assert repr(child(1)).endswith("Derived(a=1, b='B', c={}, d=0.5)")
    with pytest.raises(dataclasses.FrozenInstanceError):
        child(1).d = 1


@dataclasses.dataclass(frozen=True, repr=False)
class Marked(aioelastic.Remains):
    """A user's own, with what is no field."""

    mark: ClassVar[int] = 3


def test_what_is_the_class_s_is_no_value_of_an_object() -> None:
    one = Marked("port", "8000")
    assert vars(pickle.loads(pickle.dumps(one))) == {}
    assert repr(one) == "Marked(kind='port', words='8000', rank=None, pid=None)"


def test_what_a_class_has_of_its_own_stays() -> None:
    @dataclass(frozen=True)
    class Own:  # noqa: PLW1641 - what is made for it is looked at
        """Has its own."""

        a: int

        def __repr__(self) -> str:
            return "own"

        def __eq__(self, other: object) -> bool:
            return True

    assert repr(Own(1)) == "own"
    assert Own(1) == Own(2)
    assert hash(Own(1)) == hash((1,))


def frozen_classes() -> list[type]:
    found = {}
    for one in pkgutil.walk_packages(aioelastic.__path__, "aioelastic."):
        if not one.name.endswith(("__main__", "._torch", "._torch_tensors")):  # they need torch
            found.update({id(value): value for value in vars(import_module(one.name)).values() if _is_ours(value)})
    return list(found.values())


def _is_ours(value: object) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__.startswith("aioelastic.")


def test_all_of_ours_are_made_so() -> None:
    for one in frozen_classes():
        assert one.__dataclass_params__.frozen, one  # type: ignore[attr-defined]
        assert one.__doc__, one
        assert not one.__doc__.startswith(f"{one.__name__}("), one


def test_they_can_be_pickled() -> None:
    for one in (aioelastic.Stop(), aioelastic.Remains("port", "8000", 1), aioelastic.Command("x", cwd="/")):
        assert pickle.loads(pickle.dumps(one)) == one


def test_types_of_fields_can_be_looked_up() -> None:
    """As libraries do that read settings from files."""
    for one in [getattr(aioelastic, name) for name in aioelastic.__all__]:
        if dataclasses.is_dataclass(one):
            assert get_type_hints(one).keys() >= {field.name for field in dataclasses.fields(one)}
