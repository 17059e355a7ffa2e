"""The options that `run` and `up` share, and what they mean. In: an argument parser to fill. Out: parts of a spec."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..model.entries import Command, Function
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..model.logs import Logs, Std
from ..model.placement import Placement
from ..model.restart_policy import Restart
from ..model.stop_policy import Stop
from ..model.validation import check_env, check_timeout
from ._exit_status import table

SIGNALS = """\
signals:
  SIGINT SIGTERM SIGHUP SIGQUIT   stop the workers with that signal (or --stop-signal);
                                  SIGINT and SIGQUIT go to their children, too, as from a
                                  terminal; a second one skips the grace
  SIGUSR1 SIGUSR2 SIGWINCH        passed on to the workers
  SIGTSTP SIGCONT                 stop and continue the workers with this process

exit status:
"""

# `add_argument` of one group of options
Add = Callable[..., object]


def add_workers(add: Add, name: str) -> None:
    """Who they are, and their variables.

    Args:
        name: of the group, by default.
    """
    add("--name", default=name, help="name of the group, for directories and prefixes (default: %(default)s)")
    add(
        "--env",
        action="append",
        default=[],
        metavar="K[=V]",
        help="set a variable for all workers; K= empties it; K alone gives it the value that it has here",
    )
    add("--unset", action="append", default=[], metavar="K", help="unset a variable for all workers")
    add(
        "--env-file",
        action="append",
        metavar="FILE",
        help="set variables by a file of KEY=VALUE lines; may be repeated, and the last one wins; --env and --unset "
        "come after",
    )
    add("--cwd", metavar="DIR", help="directory in which the workers start")
    add("--user", metavar="USER", help="run them as this user, with its groups, by name or number")
    add("--group", metavar="GROUP", help="run them as of this group, in place of that of --user")
    add("--umask", metavar="MASK", help="umask of the workers, octal: 027")
    add("--timeout", type=_seconds, metavar="SECONDS", help="stop the group after this long")
    add(
        "--cgroup",
        action="store_true",
        help="run each worker in a control group of its own, from which nothing escapes; needs one that we may write",
    )


def add_output(add: Add) -> None:
    """Where output goes."""
    add("--log-dir", metavar="DIR", help="save output below DIR/<run id>/attempt_<n>/<rank>/")
    add("--tee", type=_std, default=Std.ALL, metavar="WHAT", help="on the terminal: all, out, err or none")
    add("--save", type=_std, metavar="WHAT", help="in files: all (default with --log-dir), out, err or none")
    add(
        "--prefix",
        metavar="TEMPLATE",
        help="before each line on the terminal; fields {worker} {name} {rank} {local_rank} {host} {pid} {attempt} "
        f"{{stream}} {{time}} (default: {Logs.prefix!r}, or a column of names, if workers have some)",
    )
    add(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colours of prefixes: on a terminal (default; NO_COLOR and FORCE_COLOR are heeded), always or never",
    )
    add("--timestamps", action="store_true", help="begin each line on the terminal with its time")
    add(
        "--json",
        action="store_true",
        help="write lines to the terminal, and what came of the run to stderr, as JSON objects",
    )


def add_stopping(add: Add, on_success: str) -> None:
    """When and how workers are stopped.

    Args:
        on_success: what the end of one means, by default.
    """
    add("--stop-signal", metavar="SIGNAL", help="the polite signal (default: TERM)")
    add(
        "--grace",
        type=_seconds,
        default=Stop.grace,
        metavar="SECONDS",
        help="time each worker has to obey before SIGKILL (default: %(default)g)",
    )
    add(
        "--on-failure",
        choices=("stop", "continue"),
        default="stop",
        help="when a worker has failed for good: stop the others (default), or let them go on to their own end",
    )
    add(
        "--on-success",
        choices=("continue", "stop"),
        default=on_success,
        help="when a worker has ended with status 0: let the others go on, or stop them (default: %(default)s)",
    )
    add(
        "--dump-stacks",
        action="store_true",
        help="before workers are stopped, take the Python stacks of all that still run: where a hung one hangs",
    )
    add(
        "--require-clean",
        action="store_true",
        help="say what the workers left behind, or what cannot be proven to be gone, and exit with 1 then",
    )


def add_restarts(add: Add) -> None:
    """Which failures are answered by a new attempt."""
    add("--max-restarts", type=int, default=0, metavar="N", help="answer N failures by a new attempt (default: 0)")
    add(
        "--restart-scope",
        metavar="SCOPE",
        help="one: only the rank that failed, each rank N times (default); all: stop the others, then all ranks",
    )


def add_other(add: Add) -> None:
    """The rest."""
    add("--dry-run", action="store_true", help="print what would run, and run nothing")
    add("--uvloop", action=argparse.BooleanOptionalAction, default=True, help="run on uvloop where it is installed")


def statuses() -> str:
    """The exit statuses, for the end of a help text."""
    lines: list[str] = []
    for status, when in table():
        lines += [f"  {status}"] if len(status) > 7 else []
        words = textwrap.wrap(when, 76, initial_indent=" " * 11, subsequent_indent=" " * 11)
        if len(status) <= 7:
            words[0] = f"  {status:7}  {words[0].lstrip()}"
        lines += words
    return "\n".join(lines) + "\n"


def variables(args: argparse.Namespace, files: Sequence[str]) -> dict[str, str | None]:
    """Those that are set for all workers, over those of the caller: by files, then by options.

    Raises:
        SpecError: a file has none, a name is none, or a variable that was to be taken over is not set.
    """
    out: dict[str, str | None] = {}
    if files:
        from ..config import read_env  # for start-up time: most runs have none

        for file in files:
            out.update(read_env(file))
    out.update(dict.fromkeys(args.unset))
    for given in args.env:
        key, equals, value = given.partition("=")
        if not equals and key not in os.environ:
            words = "is not in the environment of this command"
            raise SpecError("--env", given, words, f"write --env {key}=VALUE, or --unset {key}")
        out[key] = value if equals else os.environ[key]
    return check_env("env", out)


def reading(one: Command) -> Command:
    """The same command; it reads our standard input."""
    same = {name: getattr(one, name) for name in ("env", "cwd", "name", "user", "group", "umask")}
    return Command(*one.argv, **same, stdin="inherit")


def command_options(args: argparse.Namespace) -> dict[str, Any]:
    """What all commands are given, as `Command` takes it.

    Raises:
        SpecError: `--umask` is none.
    """
    return {"cwd": args.cwd, "user": _account(args.user), "group": _account(args.group), "umask": _umask(args.umask)}


def group_spec(
    args: argparse.Namespace,
    entry: Command | Function | list[Command],
    env: Mapping[str, str | None],
    n: int | None = None,
    ranks: Sequence[int] | None = None,
    **more: Any,
) -> GroupSpec:
    """The whole group. Where its workers have names of their own, these stand in a column, if nobody says otherwise.

    Args:
        ranks: whose output is on the terminal.
        more: as `GroupSpec.of` takes it.
    """
    check_timeout("timeout", args.timeout)
    logs = Logs(
        dir=args.log_dir,
        tee=args.tee,
        save=args.save,
        prefix=Logs.prefix if args.prefix is None else args.prefix,
        ranks=ranks,
        timestamps=args.timestamps,
        json=args.json,
        color=args.color,
    )
    spec = GroupSpec.of(
        entry,
        n,
        name=args.name,
        env=env,
        logs=logs,
        stop=Stop(
            signal=Stop.signal if args.stop_signal is None else args.stop_signal,
            grace=args.grace,
            dump=args.dump_stacks,
        ),
        restart=_restart(args.max_restarts, args.restart_scope),
        placement=Placement(cgroup=True) if args.cgroup else None,
        on_failure=args.on_failure,
        on_success=args.on_success,
        **more,
    )
    if args.prefix is not None or not any(spec.names):
        return spec
    width = max(len(name or f"{spec.name}{rank}") for rank, name in enumerate(spec.names))
    return replace(spec, logs=replace(logs, prefix=f"{{worker:<{width}}} | "))


def _restart(most: int, scope: Any) -> Restart:
    if most == 0:
        if scope is not None:
            raise SpecError("--restart-scope", scope, "needs a number of restarts", "give --max-restarts too")
        return Restart.never()
    return Restart.on_failure(most, "one" if scope is None else scope)


def _account(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else text


def _umask(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text, 8)
    except ValueError:
        raise SpecError("--umask", text, "is no umask", "write it in octal digits, as 027") from None


def _std(text: str) -> Std:
    names = {"all": Std.ALL, "out": Std.OUT, "err": Std.ERR, "none": Std.NONE}
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; use all, out, err or none")
    return names[text]


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
