"""`aioelastic COMMAND ...`: from words to an exit status."""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import os
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from ..child.worker import interpreter_exit
from ..launch import begin_guardian
from ..model.errors import SpecError, refusal
from ..model.group_spec import GroupSpec
from ..model.text import printable, text_of
from . import _module_entry, _run_options
from ._exit_status import of_error
from ._print import put

ROOM = 16  # descriptors that a run needs before it can say how many workers fit
COMMANDS = {
    "run": "run n copies of a command, or several commands, to their end",
    "up": "run the processes of a Procfile",
}


def program() -> NoReturn:
    """`main`, then what an interpreter does at its end, but for taking down object by object, which takes longer than
    to run a command."""
    status = main()
    if _module_entry.has_imported_others:
        sys.exit(status)  # what they have opened is flushed as it is taken down
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads
        atexit._run_exitfuncs()
    finally:
        interpreter_exit.copy(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    _open_standard_streams()
    words = sys.argv[1:] if argv is None else argv
    prog = "aioelastic"
    try:
        args = _parsed(_parser("".join(words[:1])), words)
    except SystemExit as exc:  # --help, --version, wrong usage: argparse has printed
        return _say(prog, "") or (exc.code if isinstance(exc.code, int) else 2)
    prog = f"{prog} {args.command}"
    try:
        spec = _options_of(args.command).spec_of(args)
        if args.dry_run:
            return _say(prog, _dry_run(spec) + "\n")
        _check_descriptors()
        begin_guardian()
        run = _imported()
        return run(
            spec,
            args.timeout,
            fixed_signal=args.stop_signal is not None,
            require_clean=args.require_clean,
            on_uvloop=args.uvloop,
        )
    except (SpecError, OSError) as exc:
        return _complain(prog, exc)
    except KeyboardInterrupt as exc:
        return of_error(exc)


def _options_of(command: str) -> ModuleType:
    """What it may be given, and what that means."""
    if command == "up":
        from . import _up_options  # for start-up time: most runs are of no Procfile

        return _up_options
    return _run_options


def _imported() -> Callable[..., int]:
    """What runs a group, and all that it needs."""
    collects = gc.isenabled()
    gc.disable()  # what is imported stays
    try:
        from ._run import run  # for start-up time: the guardian comes up while we import asyncio and the rest

        gc.freeze()
    finally:
        if collects:
            gc.enable()
    return run


def _open_standard_streams() -> None:
    """A closed standard stream would be the number of the next file we open: put /dev/null in its place."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _check_descriptors() -> None:
    """Whether there is room for an event loop and its helpers, which would fail in the middle, or abort; how many
    workers fit is told by them. Raises `OSError`."""
    try:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft - len(os.listdir("/proc/self/fd")) >= ROOM:
            return
    except FileNotFoundError:
        return  # no /proc: nobody can count
    except OSError:
        pass  # not even for that
    words = f"this process may have {soft} descriptors (ulimit -n), which is too few to begin with; raise the limit"
    raise OSError(errno.EMFILE, words)


def _say(prog: str, text: str) -> int:
    """Print, and see that it arrived: a full disk or a reader that went away is said here, not at the interpreter's
    end."""
    problem = put(sys.stdout, text)
    return 0 if problem is None else _complain(prog, problem)


def _complain(prog: str, problem: Exception) -> int:
    words = refusal(problem) if isinstance(problem, OSError) else text_of(problem)
    put(sys.stderr, f"{prog}: {printable(words)}\n")
    return of_error(problem)


class _Parser(argparse.ArgumentParser):
    """Prints as we do: argparse drops what cannot be written at once. `commands`: the parsers of these."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.commands: dict[str, argparse.ArgumentParser] = {}

    def _print_message(self, message: str, file: Any = None) -> None:
        problem = put(file or sys.stderr, message)
        if problem is not None:
            self.exit(_complain(self.prog, problem))


class _Formatter(argparse.HelpFormatter):
    """argparse makes one for each option, too: only one that writes asks how wide the terminal is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=78)

    def format_help(self) -> str:
        import shutil  # for start-up time: most runs print no help

        self._width = shutil.get_terminal_size().columns - 2
        return super().format_help()


class _Raw(_Formatter, argparse.RawDescriptionHelpFormatter):
    pass


def _parser(command: str) -> _Parser:
    """Of the whole line; with the options of this command, since to make those takes a while."""
    parser = _Parser(
        prog="aioelastic",
        description="Start, watch and stop groups of worker processes; leave nothing behind.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aioelastic {__version__}")
    commands = parser.add_subparsers(prog="aioelastic", dest="command", required=True, metavar="{run,up}")
    for name, words in COMMANDS.items():
        one = parser.commands[name] = commands.add_parser(name, help=words, formatter_class=_Raw, allow_abbrev=False)
        if name == command:
            _options_of(name).fill(one)
    return parser


def _nearest(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """What somebody may have meant."""
    import difflib  # for start-up time: most lines are right

    known = [one for action in parser._actions for one in action.option_strings]
    given = (one.partition("=")[0] for one in words if one.startswith("-"))
    found = next((near for one in given for near in difflib.get_close_matches(one, known, 1)), "")
    return f" (is it {found}?)" if found else ""


def _parsed(parser: _Parser, words: Sequence[str]) -> argparse.Namespace:
    """What they say. argparse takes the names of processes in one place only: those behind a later option are left."""
    args, rest = parser.parse_known_args(words)
    if rest and (words[0] != "up" or any(one.startswith("-") for one in rest)):
        one = parser.commands[args.command]
        one.error(f"unrecognized arguments: {' '.join(rest)}{_nearest(one, rest)}")
    if rest:
        args.processes += rest
    return args


def _dry_run(spec: GroupSpec) -> str:
    import socket

    from ..planning import absolute, check_limits, plan, preflight  # for start-up time: a run imports them later
    from ..supervisor.start_checks import check_free  # as those

    environ = dict(os.environ)
    check_limits(spec)
    check_free(spec.ports)
    spec = absolute(spec)
    return str(preflight(plan(spec, run_id="<run id>", host=socket.gethostname(), environ=environ), environ))
