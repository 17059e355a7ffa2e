"""`aioelastic run`: its options, and the group that they ask for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from ..launch import check_input
from ..model.entries import Command, Function
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..model.validation import PID_MAX
from . import _module_entry
from ._options import (
    SIGNALS,
    add_other,
    add_output,
    add_restarts,
    add_stopping,
    add_workers,
    command_options,
    group_spec,
    reading,
    statuses,
    variables,
)

EXAMPLES = """\
examples:
  aioelastic run -n 4 -- python3 train.py --lr 0.1
      four workers with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set;
      their lines on this terminal, each with a prefix
  aioelastic run -n 4 --log-dir runs --ranks 0 -- ./worker
      every byte of every rank in files below runs/, only rank 0 on the terminal
  aioelastic run -n 2 --stop-signal INT --grace 120 -- python3 serve.py
      when one fails, the others get SIGINT and two minutes each before SIGKILL
  aioelastic run -n 4 --max-restarts 3 --restart-scope all -- python3 train.py
      when one fails, stop the others and restart all; three times, then fail
  aioelastic run -n 4 --preload torch -m trainer:main --lr 0.1
      trainer.main("--lr", "0.1") in four processes, forked by one that has imported torch;
      what they return is in the summary. All that follows -m NAME is theirs
  aioelastic run -n 4 -m trainer --lr 0.1
      four times `python -m trainer --lr 0.1`
  aioelastic run -c "web: python3 serve.py" -c "job: python3 work.py" --on-success stop
      two commands; when one ends, however, the other is stopped
  aioelastic run -n 8 --dump-stacks --timeout 3600 -- python3 train.py
      when one fails or the hour is over, say where the others were (best with aioelastic.record)
  aioelastic run -n 2 --dry-run --env OMP_NUM_THREADS=1 -- python3 train.py
      say what would run, and run nothing

"""


def fill(parser: argparse.ArgumentParser) -> None:
    """Its options and its help."""
    parser.description = (
        "Run n copies of a command or of a Python function, or several commands. When one fails, the others are "
        "stopped and the reason is told."
    )
    parser.usage = (
        "aioelastic run [-n N] [options] -- COMMAND [ARGUMENT ...]\n"
        "       aioelastic run [-n N] [options] -m MODULE[:FUNCTION] [ARGUMENT ...]\n"
        "       aioelastic run [options] -c [NAME:]COMMAND [-c ...]"
    )
    parser.epilog = EXAMPLES + SIGNALS + statuses()
    workers = parser.add_argument_group("workers").add_argument
    workers("-n", type=int, metavar="N", help="how many workers (default: 1)")
    workers(
        "-c",
        dest="commands",
        action="append",
        default=[],
        metavar="[NAME: ]COMMAND",
        help="a command for the shell (sh -c), with a name before it as in a Procfile; several of them are a group of "
        "different commands",
    )
    add_workers(workers, "worker")
    workers(
        "--stdin",
        metavar="WHO",
        help="who reads the standard input: a rank, all (who reads first has it) or none; by default a single worker "
        "of a command does, and of several none",
    )
    workers(
        "--port",
        action="append",
        type=int,
        default=[],
        metavar="PORT",
        help="a TCP port on which workers will listen: it must be free before and after; may be repeated",
    )
    python = parser.add_argument_group("Python workers").add_argument
    python(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="MODULE[:FUNCTION] [ARGUMENT ...]",
        help="run a function with the arguments as strings, or a module as `python -m` does; the last option: what "
        "follows is passed on (but a first --). The current directory is importable",
    )
    python(
        "--preload",
        action="append",
        default=[],
        metavar="MODULES",
        help="import these once, for all workers: torch,numpy; may be repeated; for functions that a zygote starts",
    )
    python(
        "--start",
        choices=("zygote", "spawn", "fork"),
        help="how a function gets its process: forked by a warm helper (default), in a fresh interpreter, or as a "
        "copy of this one",
    )
    output = parser.add_argument_group("output").add_argument
    add_output(output)
    output(
        "--ranks", type=_ranks, metavar="LIST", help="only these on the terminal, as in 0,4-7; files are not affected"
    )
    add_stopping(parser.add_argument_group("stopping").add_argument, on_success="continue")
    add_restarts(parser.add_argument_group("beginning again").add_argument)
    add_other(parser.add_argument_group("other").add_argument)
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run, after --")


def spec_of(args: argparse.Namespace) -> GroupSpec:
    """The group.

    Raises:
        SpecError: an argument is wrong; nothing was started.
    """
    env = variables(args, args.env_file or [])
    entry = _entry(args, env)
    return group_spec(
        args,
        _reading(entry, args.n, args.stdin) if not isinstance(entry, Function) else entry,
        env,
        args.n,
        args.ranks,
        start=args.start or "zygote",
        preload=[one.strip() for part in args.preload for one in part.split(",")],
        ports=args.port,
    )


def _reading(commands: list[Command], n: int | None, who: str | None) -> Command | list[Command]:
    """The only command, or one for each rank: those that read our standard input."""
    count = (1 if n is None else n) if len(commands) == 1 else len(commands)
    entry = commands[0] if len(commands) == 1 else commands
    if who == "none" or (who is None and count != 1):
        return entry
    if who == "all":
        return [reading(one) for one in commands] if isinstance(entry, list) else reading(entry)
    if who is None:
        try:
            check_input()
        except SpecError:
            return entry  # in the background: what is typed is for the shell
        return reading(commands[0])
    if not who.isdecimal():
        raise SpecError("--stdin", who, "is not known", "give a rank, all or none")
    if len(who) > 20 or int(who) >= count:
        raise SpecError("--stdin", who, "is no rank", f"ranks are 0 to {count - 1}")
    ranks = commands if isinstance(entry, list) else commands * count
    return [reading(one) if rank == int(who) else one for rank, one in enumerate(ranks)]


def _entry(args: argparse.Namespace, env: Mapping[str, str | None]) -> list[Command] | Function:
    entry: Command | Function | list[Command]
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if args.commands and (argv or args.module is not None):
        other = argv[0] if args.module is None else "-m"
        raise SpecError(
            "-c", args.commands[0], f"is one thing to run, and {other!r} is another", "leave one of them out"
        )
    options = command_options(args)
    if args.commands:
        entry = [_shell_command(one, options) for one in args.commands]
    elif args.module is not None:
        entry = _module_entry.entry([*args.module, *args.argv], args.cwd, env)
    elif argv:
        entry = Command(*argv, **options)
    else:
        raise SpecError("COMMAND", "", "is missing", "give it last: aioelastic run -n 2 -- python3 train.py")
    if isinstance(entry, Function):
        remedies = {"stdin": "leave it out: a function reads nothing"}
        remedies |= dict.fromkeys(("user", "group", "umask"), "leave it out, or run that as this user")
        for option, remedy in remedies.items():
            if (given := getattr(args, option)) is not None:
                raise SpecError(f"--{option}", given, "is for a command", remedy)
    for option, value in (("--preload", args.preload), ("--start", args.start)):
        if value and not isinstance(entry, Function):
            raise SpecError(
                option, value, "is for a function", f"write -m package.module:function, or leave {option} out"
            )
    return [entry] if isinstance(entry, Command) else entry


def _shell_command(given: str, options: Mapping[str, Any]) -> Command:
    from ..config import NAME, SHELL  # for start-up time: most runs have none

    found = re.fullmatch(rf"\s*({NAME}):(?:\s+(.*))?", given, re.DOTALL)
    name, line = (None, given) if found is None else found.groups("")
    if not line.strip():
        raise SpecError("-c", given, "has no command", 'write -c "web: python3 serve.py", say')
    return Command(SHELL, "-c", line, name=name, **options)


def _ranks(text: str) -> list[int]:
    out: list[int] = []
    try:
        for part in text.split(","):
            low, dash, high = part.partition("-")
            first, last = int(low), int(high) if dash else int(low)
            if not 0 <= first <= last <= PID_MAX:
                raise ValueError
            out += range(first, last + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ranks; write 0,4-7") from None
    return out
