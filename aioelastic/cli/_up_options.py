"""`aioelastic up`: its options, and the group that they ask for."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Mapping, Sequence

from ..config import PORT_MAX, SHELL, Process, commands, place, read_procfile
from ..model.entries import names_of
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..model.validation import PID_MAX, check_whole
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

PORT = 5000
EXAMPLES = """\
A line of a Procfile is `name: command`; the command is run by `sh -c`, with PORT and PS set: 5000 and
web.1 for the first process, 5100 for the next one. Empty lines, and those that begin with #, are skipped.

Variables are read from the file .env beside the Procfile, if there is one; --env-file takes others
instead, and --env-file /dev/null none.

examples:
  aioelastic up
      all processes of ./Procfile, with the variables of ./.env
  aioelastic up web clock --formation web=2
      two of web, one of clock, and nothing else
  aioelastic up -f Procfile.dev --port 8000 --env DEBUG=1
      another Procfile; PORT begins at 8000
  aioelastic up --on-success continue
      a process that ends with status 0 does not end the others
  aioelastic up --dry-run
      say what would run, and run nothing

"""


def fill(parser: argparse.ArgumentParser) -> None:
    """Its options and its help."""
    parser.description = (
        "Run the processes of a Procfile. When one ends, however it ends, the others are stopped; its status is that "
        "of this command."
    )
    parser.usage = "aioelastic up [-f FILE] [options] [PROCESS ...]"
    parser.epilog = EXAMPLES + SIGNALS + statuses()
    processes = parser.add_argument_group("processes").add_argument
    processes("-f", "--procfile", default="Procfile", metavar="FILE", help="the Procfile (default: %(default)s)")
    processes(
        "--formation",
        action="append",
        default=[],
        metavar="NAME=N,...",
        help="how many of each: web=2,worker=4; those that are not named run once, and with 0 not at all",
    )
    processes(
        "--port",
        type=int,
        metavar="PORT",
        help=f"PORT of the first process: each of its copies has the next one, and each process the next hundred "
        f"(default: the variable PORT, or {PORT})",
    )
    add_workers(processes, "app")
    processes(
        "--stdin",
        metavar="NAME",
        help="the process that reads the standard input, as web or web.1; by default none does",
    )
    add_output(parser.add_argument_group("output").add_argument)
    add_stopping(parser.add_argument_group("stopping").add_argument, on_success="stop")
    add_restarts(parser.add_argument_group("beginning again").add_argument)
    add_other(parser.add_argument_group("other").add_argument)
    parser.add_argument("processes", nargs="*", metavar="PROCESS", help="only these; all when none is named")


def spec_of(args: argparse.Namespace) -> GroupSpec:
    """The group.

    Raises:
        SpecError: an argument or a file is wrong; nothing was started.
    """
    processes = read_procfile(args.procfile)
    counts = _counts(processes, args.procfile, args.formation, args.processes)
    env = variables(args, _beside(args.procfile) if args.env_file is None else args.env_file)
    for one in processes:
        if counts[one.name]:
            _check_syntax(args.procfile, one)
    entries = commands(processes, counts, _port(args.port, env), command_options(args))
    if args.stdin is not None:
        names = names_of(entries)
        if args.stdin not in names:
            raise SpecError("--stdin", args.stdin, "is no process that is to run", f"there is {', '.join(names[:10])}")
        at = names.index(args.stdin)
        entries[at] = reading(entries[at])
    return group_spec(args, entries, env)


def _beside(procfile: str) -> list[str]:
    """The file of variables that belongs to it, if there is one; a virtual environment may have that name, too."""
    path = os.path.join(os.path.dirname(procfile), ".env")
    return [path] if os.path.exists(path) and not os.path.isdir(path) else []


def _counts(
    processes: Sequence[Process], path: str, formation: Sequence[str], chosen: Sequence[str]
) -> Mapping[str, int]:
    """How many of each run."""
    names = [one.name for one in processes]
    remedy = f"{path} has {', '.join(names[:10])}"
    for name in chosen:
        if name not in names:
            raise SpecError("PROCESS", name, f"is not in {path}", remedy)
    counts = {name: int(not chosen or name in chosen) for name in names}
    running = {name for name, count in counts.items() if count}
    for part in [one for given in formation for one in given.split(",")]:
        name, equals, number = part.partition("=")
        if not equals or not (number.isascii() and number.isdecimal()):
            raise SpecError("--formation", part, "is no NAME=N", "write web=2,worker=4, say")
        if name not in names:
            raise SpecError("--formation", part, f"is of a process that is not in {path}", remedy)
        count = int(number.lstrip("0")[:20] or "0")
        check_whole(f"--formation {name}", count, 0, PID_MAX)
        if name not in running:
            raise SpecError("--formation", part, "is of a process that is not to run", f"name it, too: {name}")
        counts[name] = count
    if not any(counts.values()):
        raise SpecError("--formation", ",".join(formation), "leaves nothing to run", "let one of them be 1 or more")
    return counts


def _port(given: int | None, env: Mapping[str, str | None]) -> int:
    """The first one: of the option, the files and other options, or the caller."""
    field, value = ("--port", given) if given is not None else ("PORT", env.get("PORT", os.environ.get("PORT")) or PORT)
    try:
        port = int(value)
    except ValueError:
        port = 0
    if not 1 <= port <= PORT_MAX:
        raise SpecError(field, value, "is no port", f"give a number from 1 to {PORT_MAX}")
    return port


def _check_syntax(path: str, process: Process) -> None:
    """Whether the shell understands it: a quote that is not closed is told with its line, before anything starts."""
    argv = [SHELL, "-n", "-c", process.command]
    try:
        ran = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return  # the start will tell
    if ran.returncode:
        said = ran.stderr.decode(errors="backslashreplace").strip().partition("\n")[0]
        words = f"is not understood by the shell: {said}"
        raise SpecError(f"{place(path, process.line)}: {process.name}", process.command, words, "mend the command")
