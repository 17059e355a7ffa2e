"""`-m package.module[:function]`: found without importing it, which is the workers' business and may cost seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..model.entries import Command, Function
from ..model.errors import SpecError
from ..model.text import told

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

FIELD = "-m"
has_imported_others = False  # here, and so their code has run
# a module with one of these in its source may have names that its source does not show
_DYNAMIC = ("__getattr__", "import *", "globals()", "exec(", "setattr(", "sys.modules[", "vars(")


def entry(words: Sequence[str], cwd: str | None, env: Mapping[str, str | None]) -> Command | Function:
    """What `-m WORDS` runs: a function with its arguments, or a module as `python -m` does.

    The directory in which the workers start becomes importable here, and so does their PYTHONPATH.

    Raises:
        SpecError: there is no such module, or it certainly has no such function.
    """
    given, *args = words or [""]
    if args[:1] == ["--"]:
        del args[0]
    module, colon, function = given.partition(":")
    if not module:
        raise SpecError(FIELD, given, "names no module", "write -m package.module:function")
    if colon and not all(function.split(".")):
        raise SpecError(FIELD, given, "names no function", "write -m package.module:function")
    if not sys.flags.safe_path:
        _importable([cwd or os.curdir])
    _importable((env.get("PYTHONPATH") or "").split(os.pathsep))
    spec = _find(given, module)
    if colon:
        _check_function(given, module, function, spec)
        from ..child.worker import named_function  # for start-up time: most runs have no function

        return Function(named_function.Named(FIELD, given), *args).options(cwd=cwd)
    if spec.submodule_search_locations is not None:
        try:
            _find(given, f"{module}.__main__")
        except SpecError:
            problem = f"is a package without {module}.__main__"
            raise SpecError(FIELD, given, problem, f"name a module in it, or a function: {module}:main") from None
    return Command(sys.executable, "-m", module, *args, cwd=cwd)


def _importable(places: Sequence[str]) -> None:
    for place in reversed([os.path.abspath(one) for one in places if one]):
        if place not in sys.path:
            sys.path.insert(0, place)


def _find(given: str, module: str) -> ModuleSpec:
    """Where it is. Its parent packages are imported only if it is not found where they lie."""
    global has_imported_others
    names = module.split(".")
    spec = _look(names[0], None)
    for end in range(2, len(names) + 1):
        path = None if spec is None else spec.submodule_search_locations
        try:
            spec = None if path is None else _look(".".join(names[:end]), path)
        except KeyError:  # a namespace inside a package that is not imported
            spec = None
        if spec is None:
            break
    if spec is not None:
        return spec
    problem = f"cannot be found: there is no module {module!r}"
    if len(names) > 1 and path is not None:  # its package may make its modules itself
        import importlib.util  # for start-up time: most runs have no function

        has_imported_others = True
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            pass
        except Exception as exc:  # imports run code of others
            problem = f"cannot be found: importing its package raised {told(exc)}"
        if spec is not None:
            return spec
    remedy = "write package.module:function, importable from the current directory or PYTHONPATH"
    if module.endswith(".py") or "/" in module:
        remedy += ", without .py and with dots for slashes"
    raise SpecError(FIELD, given, problem, remedy)


def _look(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            return spec
    return None


def _check_function(given: str, module: str, function: str, spec: ModuleSpec) -> None:
    """Whether its source shows that it cannot be there; what is not sure is left to the worker."""
    import symtable  # for start-up time, as this:

    from ..child.worker import named_function  # most runs have no function

    get_source = getattr(spec.loader, "get_source", None)
    try:
        source = get_source(module) if get_source is not None else None
        if not isinstance(source, str):
            return
        table = symtable.symtable(source, spec.origin or module, "exec")
    except SyntaxError as exc:
        raise SpecError(FIELD, given, f"cannot be imported: SyntaxError: {exc}", "mend the module") from None
    except Exception:  # of a loader of others: the worker will tell
        return
    if any(word in source for word in _DYNAMIC):
        return
    first = function.partition(".")[0]
    names = {one.get_name(): one for one in table.get_symbols() if one.is_assigned() or one.is_imported()}
    if first in names or f"global {first}" in source:
        return
    functions = [name for name, one in names.items() if one.is_namespace()]
    raise named_function.absent(FIELD, given, module, first, functions)
