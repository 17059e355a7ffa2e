"""A Python like this one, for the processes of our own: `sys.executable`, unless that is something else.

In a program that is frozen or embeds Python it is the application itself, or empty, or None: to start that would start
the application once more.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

from ..model.errors import SpecError
from .permissions import may

_PATIENCE = 10.0  # seconds for one to say what it is
_NAME = re.compile(r"(python|pypy)[0-9.]*(t|d|dbg)?", re.IGNORECASE)


def python() -> str:
    """Its path.

    Raises:
        SpecError: there is none.
    """
    given = sys.executable
    frozen = bool(getattr(sys, "frozen", False))
    if not frozen and isinstance(given, str) and _NAME.fullmatch(os.path.basename(given)) and _may_run(given):
        return given
    found = next((one for one in _others() if one != given and _may_run(one) and _is_like_this_one(one)), None)
    if found is not None:
        return found
    problem = "is not a Python interpreter that this user may run, and none of this version was found where it belongs"
    remedy = 'start functions with start="fork"'
    if not frozen:
        remedy = f"set sys.executable to the path of a Python {sys.version_info[0]}.{sys.version_info[1]}, or {remedy}"
    raise SpecError("sys.executable", given, problem, remedy)


def home() -> str:
    """Where this package is to be found: a directory, or an archive."""
    return os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))


def interpreter(call: str) -> list[str]:
    """The command line of a Python like this one that calls `call` (`"module:function"`) of ours.

    Raises:
        SpecError: there is none here.
    """
    module, _, name = call.partition(":")
    # where we are, and no more of the search path, which may be longer than a command line: that is sent
    code = (
        "from _frozen_importlib import _load; from _frozen_importlib_external import PathFinder; "
        f"_load(PathFinder.find_spec('aioelastic', {[home()]!r})); from {module} import {name}; {name}()"
    )
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    for key, value in sys._xoptions.items():  # of which it knows some
        word = key if value is True else f"{key}={value}"
        if word not in flags:
            flags += ["-X", word]
    # -P: Python 3.13.0 can import nothing more where the directory on its path is deleted
    return [python(), *flags, "-P", "-c", code]


def _may_run(path: str) -> bool:
    return may(path, os.X_OK) and not os.path.isdir(path)


def _others() -> Iterator[str]:
    major, minor = sys.version_info[:2]
    if base := getattr(sys, "_base_executable", None):
        yield base
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)):
        for name in (f"python{major}.{minor}", f"python{major}", "python"):
            yield os.path.join(prefix, "bin", name)
    try:
        yield os.readlink("/proc/self/exe")
    except OSError:
        pass  # no /proc


def _is_like_this_one(path: str) -> bool:
    """Whether it is a Python whose messages this one understands. It is only asked if it is called so, and once."""
    if path in _known or not _NAME.fullmatch(os.path.basename(path)):
        return _known.get(path, False)
    words = [path, "-I", "-S", "-c", "import sys; print(sys.implementation.cache_tag, sys.hexversion)"]
    try:
        told = subprocess.run(words, capture_output=True, timeout=_PATIENCE, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return False  # at the moment
    _known[path] = told.stdout.split() == [str(sys.implementation.cache_tag).encode(), str(sys.hexversion).encode()]
    return _known[path]


_known: dict[str, bool] = {}
