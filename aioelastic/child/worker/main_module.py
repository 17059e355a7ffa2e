"""The caller's main module: how a worker finds it, and how it is imported there, once, under both its names.

It is run as `__mp_main__`, as multiprocessing does it, so that what stands below its guard is not. From then on it is
`__main__`, as it is for the caller: what is defined in it, and pickled here, is found there, and so are the names in
tracebacks.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import io
import os
import sys
import threading
import types
from typing import Any, NewType, ParamSpec, TypeAlias, TypeVar, TypeVarTuple

from ..wire.main_names import ALIAS, NAME, rename
from . import context

# "module" and its name, "script" and its path, or "folder" and that of a folder or zip file with a __main__.py
Main: TypeAlias = tuple[str, str]

_lock = threading.RLock()
_known: tuple[Any, Main | None] = None, None
_imported: Main | None = None  # guarded by it; multiprocessing has one of that name, too


def importable() -> Main | None:
    """How a worker can import our main module, or None: a notebook, `python -c`, an interactive session."""
    global _known
    module = sys.modules.get(NAME)
    if _known[1] is None or _known[0] is not module:
        _known = module, _way_to(module)  # asked for each task: a look at the disk takes as long as to pickle it
    return _known[1]


def _way_to(module: Any) -> Main | None:
    name = getattr(getattr(module, "__spec__", None), "name", None)
    if isinstance(name, str) and name != NAME:
        return ("module", name)
    path = getattr(module, "__file__", None)
    if not isinstance(path, str):
        return None
    kind, path = ("folder", os.path.dirname(path) or os.curdir) if name == NAME else ("script", path)
    path = os.path.abspath(path)
    if path.startswith(("/dev/", "/proc/")):  # /dev/stdin, `<(...)`: one of our descriptors
        path = os.path.realpath(path)
    return (kind, path) if os.path.isfile(path) or os.path.isdir(path) else None


def import_main(main: Main | None) -> None:
    """Import it, unless that was done here, or in the process that this one is a copy of.

    Raises:
        BaseException: whatever its code raises.
    """
    global _imported
    if main is None or main == _imported:
        return
    with _lock:
        if main == _imported:
            return
        code, spec, attributes = _found(main)
        module = types.ModuleType(ALIAS)
        module.__dict__.update(__spec__=spec, **attributes)
        before = {name: sys.modules.get(name) for name in (NAME, ALIAS)}
        sys.modules[NAME] = sys.modules[ALIAS] = module
        context.importing_main = True
        try:
            exec(code, module.__dict__)
        except BaseException:
            for name, one in before.items():
                if one is None:
                    sys.modules.pop(name, None)
                else:
                    sys.modules[name] = one
            raise
        finally:
            context.importing_main = False
        module.__name__ = NAME
        _rename_all(module.__dict__)
        _imported = main


def _rename_all(names: Any) -> None:
    """All that can be found in it by name: functions, what caches them, and classes, and those in these classes."""
    for one in list(names.values()):
        one = one.__func__ if type(one) in (staticmethod, classmethod) else one
        is_class = issubclass(type(one), type)
        if (is_class or type(one) in _NAMED) and getattr(one, "__module__", None) == ALIAS:
            rename(one)
            if is_class:
                _rename_all(vars(one))


_NAMED = (types.FunctionType, functools._lru_cache_wrapper, TypeVar, ParamSpec, TypeVarTuple, NewType)


def _found(main: Main) -> tuple[Any, Any, dict[str, Any]]:
    """Its code, its spec, and what else a module has."""
    kind, where = main
    if kind == "script":
        with io.open_code(where) as file:
            data = file.read()
        if data[:4] == importlib.util.MAGIC_NUMBER:
            code: Any = importlib.machinery.SourcelessFileLoader(ALIAS, where).get_code(ALIAS)
        else:
            code = compile(data, where, "exec", dont_inherit=True)
        return code, None, {"__file__": where, "__package__": None, "__cached__": None}
    if kind == "module":
        spec = importlib.util.find_spec(where)
    else:
        spec = importlib.machinery.PathFinder.find_spec(NAME, [where])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"there is no main module {where!r} here", name=where)
    attributes = {
        "__file__": spec.origin,
        "__package__": spec.parent,
        "__cached__": spec.cached,
        "__loader__": spec.loader,
    }
    return spec.loader.get_code(spec.name), spec, attributes  # type: ignore[attr-defined]
