"""What the program has that its function workers shall have, too, beside variables and what a process inherits: where
modules are found, by which hooks, its arguments, and its filters of warnings. As it is when a worker starts."""

from __future__ import annotations

import functools
import importlib
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

Name: TypeAlias = "tuple[str, str]"  # module, and name in it
# action, pattern of the message, category, pattern of the module, line, as `warnings.filterwarnings` takes them
Filter: TypeAlias = "tuple[str, str | None, Name, str | None, int]"
Said: TypeAlias = "tuple[bool, str | None]"  # whether in development mode (`-X dev`), PYTHONWARNINGS
# sys.path, sys.argv, sys.path_hooks, sys.meta_path, warnings.filters, what it was told of these when it began
Program: TypeAlias = "tuple[list[str], list[str], list[Name | None], list[Name | None], list[Filter], Said]"

_OTHER = re.compile(r"[A-Za-z][\w+.-]+:")  # no path of a file, but something for a hook (RFC 3986, 3.1)
_WARNINGS = "PYTHONWARNINGS"
_told: Program | None = None  # by the program, the last time
_began: list[Any] = []  # the filters that this process began with
_said: Said = (False, None)  # and what it was told of them
_known: dict[Filter | None, Any] = {}  # those that were told, as they are made here
_own: list[Any] | None = None  # the filters of this process without the program's, once these are set
_held: list[Any] = []  # and with them, as they were set
_loaded = 0  # how many modules there were then
_importing = False
_last: tuple[tuple[Any, ...], list[Filter]] = ((), [])  # our filters, and what was said of them


def own() -> Program:
    """That of this process, in words that mean the same in another."""
    # what was put there later, for processes to come, is not in our own filters
    variable = os.environ.get(_WARNINGS)
    heeded = variable is not None and set(_options(variable)) <= set(sys.warnoptions)
    return search_path(), own_argv(), *hooks(), _filters(), (sys.flags.dev_mode, variable if heeded else None)


def hooks() -> tuple[list[Name | None], list[Name | None]]:
    """Our `sys.path_hooks` and `sys.meta_path`."""
    return [_hook(one) for one in sys.path_hooks], [_hook(one) for one in sys.meta_path]


def search_path() -> list[str]:
    """Our `sys.path`, meaning the same wherever a worker stands."""
    named = [one for one in sys.path if isinstance(one, str)]
    try:
        return [one if _OTHER.match(one) else os.path.abspath(one) for one in named]
    except FileNotFoundError:  # we stand in a directory that is gone: nothing can be found there
        return [one for one in named if os.path.isabs(one) or _OTHER.match(one)]


def own_argv() -> list[str]:
    """Our `sys.argv`, which a program that embeds Python may not have set."""
    return [one if type(one) is str else _text(one) for one in getattr(sys, "argv", None) or [""]]


def _text(one: Any) -> str:
    """What some program has put among its arguments."""
    try:
        return str(os.fsdecode(one))
    except TypeError:
        return str(one)


def adopt(program: Program) -> None:
    """Have what the program has, but for its filters of warnings, which are only remembered: nothing that is imported
    heeds them. What was imported since the last time may have changed ours, which stays.

    Raises:
        Exception: what the module of a hook raises when it is imported.
    """
    global _told, _said
    told, _told = _told, program
    path, argv, path_hooks, finders, *_ = program
    if told is None:
        _began.extend(warnings.filters)
        _known.update((_filter(one), one) for one in _began)
        environ = {} if sys.flags.ignore_environment else os.environ
        _said = sys.flags.dev_mode, environ.get(_WARNINGS)
        # what the program gave us as PYTHONPATH, and has not itself, is in front, as in any Python
        given = map(os.path.abspath, filter(None, environ.get("PYTHONPATH", "").split(os.pathsep)))
        sys.path[:] = [*(one for one in given if one not in path), *path]
        importlib.invalidate_caches()
    elif told[0] != path:
        # what was added at the front stays there, and all else that was added is behind
        known = set(told[0])
        first = next((at for at, one in enumerate(sys.path) if one in known), 0)
        behind = [one for one in sys.path[first:] if one not in known]
        sys.path[:] = [*sys.path[:first], *path, *behind]
        importlib.invalidate_caches()
    if told is None or told[1] != argv:
        sys.argv[:] = argv
    if told is None or told[2] != path_hooks:
        _add_hooks(path_hooks, sys.path_hooks)
        sys.path_importer_cache.clear()
    if told is None or told[3] != finders:
        _add_hooks(finders, sys.meta_path)


def missing_hooks(program: Program) -> list[str]:
    """Those of the program whose module is not here."""
    _, _, path_hooks, finders, *_ = program
    return [".".join(one) for one in (*path_hooks, *finders) if one is not None and one[0] not in sys.modules]


def prepare() -> None:
    """In a process whose copies will call `filter_warnings`, after its imports: this is what takes long in it."""
    if _told is not None:
        *_, filters, said = _told
        _asked(said)
        for one in filters:
            _made(one)


def filter_warnings(own: list[Any] | None = None) -> None:
    """Filter warnings as the program does, now that all is imported that the function needs: what was imported before
    the program set its filters has not heeded them there. A filter is left out as long as the module of its category is
    not loaded.

    Args:
        own: our filters without the program's; None: those that we have.
    """
    global _own, _held, _loaded
    if _told is None:
        return
    _own = list(warnings.filters) if own is None else own
    *_, filters, said = _told
    asked = _asked(said)
    wanted = [made for one in filters if (made := _made(one)) is not None and made not in asked]
    began = set(map(id, _began))
    # what imports have set is in front, as ever, unless the program has it, too, and so a place for it
    ours = [one for one in _own if id(one) not in began and _filter(one) not in filters]
    _held = [*ours, *asked, *wanted]
    if _held != warnings.filters:
        warnings.resetwarnings()  # tells the C half
    warnings.filters[:] = _held  # type: ignore[index]
    _loaded = len(sys.modules)


def importing(call: Callable[..., T], *args: Any) -> T:
    """What `call` returns, which may import something. That does not heed the program's filters, but all others."""
    global _importing
    if _own is None or _importing:
        return call(*args)
    held = warnings.filters
    own = _own
    if held != _held:  # what was set since is not the program's
        known = set(map(id, _held))
        own = [*(one for one in held if id(one) not in known), *own]
    warnings.filters, _importing = own, True
    try:
        return call(*args)
    finally:
        warnings.filters, _importing = held, False
        if len(sys.modules) != _loaded:
            filter_warnings(own)


@functools.lru_cache(1)
def _asked(theirs: Said) -> list[Any]:
    """The filters that our environment asks for, where that of the program does not: no others that we began with were
    meant for us."""
    (dev, variable), options = _said, []
    if dev and not theirs[0]:
        options.append("default")
    if variable is not None and variable != theirs[1]:
        options += _options(variable)
    held, made = warnings.filters, list[Any]()
    warnings.filters = made
    try:
        for one in options:
            module = f"{one}::".split(":")[2].strip().rpartition(".")[0]
            if not module or module in sys.modules:  # else the interpreter could not import it, and has told so
                try:
                    warnings._setoption(one)  # type: ignore[attr-defined]
                except warnings._OptionError:
                    pass  # it has told of that, too
    finally:
        warnings.filters = held
    return [one for one in made if one in _began]


def _options(variable: str) -> list[str]:
    return [one for one in variable.split(",") if one]


def _filters() -> list[Filter]:
    global _last
    now = tuple(warnings.filters)
    if now != _last[0]:
        _last = now, [one for one in map(_filter, now) if one is not None]
    return _last[1]


def _filter(one: tuple[Any, ...]) -> Filter | None:
    """None: it is nothing that `warnings` makes."""
    action, message, category, module, line = one
    name = _name(category)
    if name is None:
        return None
    return (action, _pattern(message), name, _pattern(module), line)


def _pattern(one: Any) -> str | None:
    """Those that the interpreter begins with are no patterns, but what a module's name is equal to."""
    if one is None or isinstance(one, re.Pattern):
        return None if one is None else str(one.pattern)
    return rf"{re.escape(str(one))}\Z"


def _made(one: Filter) -> tuple[Any, ...] | None:
    """As it is here; None: there is no such category."""
    made: tuple[Any, ...] | None = _known.get(one)
    if made is None:
        made = _as_filter(one)
        if made is not None:
            _known[one] = made
    return made


def _as_filter(one: Filter) -> tuple[Any, ...] | None:
    action, message, (module, name), where, line = one
    category = _found(sys.modules.get(module), name)
    if not isinstance(category, type) or not issubclass(category, Warning):
        return None  # not loaded, or something else of that name: each process has a main module
    return (
        action,
        None if message is None else re.compile(message, re.IGNORECASE),
        category,
        None if where is None else re.compile(where),
        line,
    )


def _name(one: Any) -> Name | None:
    """By which it can be found elsewhere, too; None: it cannot."""
    module, name = getattr(one, "__module__", None), getattr(one, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module not in sys.modules:
        return None
    found = _found(sys.modules[module], name)
    # a method of a class is made anew each time that it is asked for
    return (module, name) if found is one or (type(one) is MethodType and found == one) else None


def _hook(one: Any) -> Name | None:
    """Its name; None: it cannot be found elsewhere, or not before the main module is imported there."""
    name = _name(one)
    return None if name is None or name[0] == "__main__" else name


def _found(module: Any, name: str) -> Any:
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        return None


def _add_hooks(told: list[Name | None], ours: list[Any]) -> None:
    """Those that are missing here: before that which they are before there, else behind all."""
    present = {None, *map(_hook, ours)}
    for one in told:
        if one is not None and one not in present:
            try:
                importlib.import_module(one[0])  # which may add it itself
            except ImportError:
                pass  # what cannot be had here is left out
    names, at = [_hook(one) for one in ours], len(ours)
    for one in reversed(told):
        if one is None:
            continue
        if one in names:
            at = names.index(one)
        elif (hook := _found(sys.modules.get(one[0]), one[1])) is not None:
            ours.insert(at, hook)
            names.insert(at, one)
