"""A function known by its name alone: `package.module:function`, imported where it is called and nowhere else."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from ...model.errors import SpecError


class Named:
    """Stands for that function. Its pickle is the function itself, once it is unpickled.

    Args:
        field: where the name was given, for the error.
        name: `package.module:function`.
    """

    def __init__(self, field: str, name: str) -> None:
        self.field = field
        self.__module__, _, self.__qualname__ = name.partition(":")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function()(*args, **kwargs)

    def function(self) -> Any:
        """The function itself. Raises as `find`."""
        return find(self.field, self.__module__, self.__qualname__)

    def __reduce__(self) -> Any:
        return (find, (self.field, self.__module__, self.__qualname__))


def find(field: str, module: str, function: str) -> Any:
    """Import it.

    Raises:
        SpecError: the module has nothing of that name, or it cannot be called.
        Exception: whatever importing the module raises.
    """
    found: Any = importlib.import_module(module)
    given = f"{module}:{function}"
    for part in function.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            functions = [name for name in dir(found) if callable(getattr(found, name, None))]
            raise absent(field, given, module, part, functions) from None
    if not callable(found):
        problem = f"is {type(found).__name__}, and cannot be called"
        raise SpecError(field, given, problem, "name a function")
    return found


def absent(field: str, given: str, module: str, part: str, functions: Iterable[str]) -> SpecError:
    """The error for a name that the module does not have; `functions` are those it has."""
    names = [name for name in functions if not name.startswith("_")]
    near = difflib.get_close_matches(part, names, 3, 0.5) or names[:5]
    remedy = f"it has {', '.join(near)}" if near else "it has no functions"
    return SpecError(field, given, f"names nothing in {module} ({part!r})", remedy)
