"""`aioelastic run -n 4 -- COMMAND...` and `aioelastic run -n 4 -m module:function ...`"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import resource
import socket
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import __version__
from ..checks import PID_MAX, check_env
from ..entry import Command, Function
from ..errors import SpecError, refusal
from ..launch import absolute, check_limits, plan, preflight
from ..placement import Placement
from ..proof import check_free
from ..restart import Restart
from ..shown import printable, text_of
from ..spec import GroupSpec, Logs, Std, Stop, check_timeout
from . import _module
from ._print import put
from ._run import run_group
from ._status import of_error, table

ROOM = 16  # descriptors that a run needs before it can say how many workers fit
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
      when one fails, stop the others and begin again with all; three times, then fail
  aioelastic run -n 4 --preload torch -m trainer:main --lr 0.1
      trainer.main("--lr", "0.1") in four processes, forked by one that has imported torch;
      what they return is in the summary. All that follows -m NAME is theirs
  aioelastic run -n 4 -m trainer --lr 0.1
      four times `python -m trainer --lr 0.1`
  aioelastic run -n 8 --dump-stacks --timeout 3600 -- python3 train.py
      when one fails or the hour is over, say where the others were (best with aioelastic.record)
  aioelastic run -n 2 --dry-run --env OMP_NUM_THREADS=1 -- python3 train.py
      say what would run, and run nothing

signals:
  SIGINT SIGTERM SIGHUP SIGQUIT   stop the workers with that signal (or --stop-signal);
                                  a second one skips the grace
  SIGUSR1 SIGUSR2 SIGWINCH        passed on to the workers
  SIGTSTP SIGCONT                 stop and continue the workers with this process

exit status:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    _open_standard_streams()
    try:
        args = _parser().parse_args(argv)
    except SystemExit as exc:  # --help, --version, wrong usage: argparse has printed
        return _say("") or (exc.code if isinstance(exc.code, int) else 2)
    try:
        spec = _spec(args)
        if args.dry_run:
            return _say(_dry_run(spec) + "\n")
        _check_descriptors()
        with asyncio.Runner(loop_factory=_loop_factory(args.uvloop)) as runner:
            work = run_group(
                spec, args.timeout, fixed_signal=args.stop_signal is not None, require_clean=args.require_clean
            )
            return runner.run(work)
    except (SpecError, OSError) as exc:
        return _complain(exc)
    except KeyboardInterrupt as exc:
        return of_error(exc)


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


def _say(text: str) -> int:
    """Print, and see that it arrived: a full disk or a reader that went away is said here, not at the interpreter's
    end."""
    problem = put(sys.stdout, text)
    return 0 if problem is None else _complain(problem)


def _complain(problem: Exception) -> int:
    words = refusal(problem) if isinstance(problem, OSError) else text_of(problem)
    put(sys.stderr, f"aioelastic run: {printable(words)}\n")
    return of_error(problem)


class _Parser(argparse.ArgumentParser):
    """Prints as we do: argparse drops what cannot be written at once."""

    def _print_message(self, message: str, file: Any = None) -> None:
        problem = put(file or sys.stderr, message)
        if problem is not None:
            self.exit(_complain(problem))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="aioelastic",
        description="Start, watch and stop groups of worker processes; leave nothing behind.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aioelastic {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run}")
    run = commands.add_parser(
        "run",
        help="run n copies of a command to their end",
        description="Run n copies of a command or of a Python function. When one fails, the others are stopped and the "
        "reason is told.",
        epilog=EXAMPLES + _statuses(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="aioelastic run [-n N] [options] -- COMMAND [ARGUMENT ...]\n"
        "       aioelastic run [-n N] [options] -m MODULE[:FUNCTION] [ARGUMENT ...]",
    )
    group = run.add_argument_group("workers")
    group.add_argument("-n", type=int, default=1, metavar="N", help="how many workers (default: 1)")
    group.add_argument("--name", default="worker", help="name of the group, for prefixes and directories")
    group.add_argument(
        "--env", action="append", default=[], metavar="K=V", help="set a variable for all workers; K= empties, K unsets"
    )
    group.add_argument("--cwd", metavar="DIR", help="directory in which the workers start")
    group.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="stop the group after this long")
    python = run.add_argument_group("Python workers")
    python.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="MODULE[:FUNCTION] [ARGUMENT ...]",
        help="run a function with the arguments as strings, or a module as `python -m` does; the last option: what "
        "follows is passed on (but a first --). The current directory is importable",
    )
    python.add_argument(
        "--preload",
        action="append",
        default=[],
        metavar="MODULES",
        help="import these once, for all workers: torch,numpy; may be repeated; for functions that a zygote starts",
    )
    python.add_argument(
        "--start",
        choices=("zygote", "spawn", "fork"),
        help="how a function gets its process: forked by a warm helper (default), in a fresh interpreter, or as a "
        "copy of this one",
    )
    output = run.add_argument_group("output")
    output.add_argument("--log-dir", metavar="DIR", help="save output below DIR/<run id>/attempt_<n>/<rank>/")
    output.add_argument(
        "--tee", type=_std, default=Std.ALL, metavar="WHAT", help="on the terminal: all, out, err or none"
    )
    output.add_argument(
        "--save", type=_std, metavar="WHAT", help="in files: all (default with --log-dir), out, err or none"
    )
    output.add_argument(
        "--prefix",
        default=Logs.prefix,
        metavar="TEMPLATE",
        help="before each line on the terminal; fields {name} {rank} {local_rank} {host} {pid} {attempt} {stream} "
        "{time} (default: %(default)r)",
    )
    output.add_argument(
        "--ranks", type=_ranks, metavar="LIST", help="only these on the terminal, as in 0,4-7; files are not affected"
    )
    output.add_argument("--timestamps", action="store_true", help="begin each line on the terminal with its time")
    output.add_argument("--json", action="store_true", help="write lines to the terminal as JSON objects")
    stopping = run.add_argument_group("stopping")
    stopping.add_argument("--stop-signal", metavar="SIGNAL", help="the polite signal (default: TERM)")
    stopping.add_argument(
        "--grace",
        type=_seconds,
        default=Stop.grace,
        metavar="SECONDS",
        help="time each worker has to obey before SIGKILL (default: %(default)g)",
    )
    again = run.add_argument_group("beginning again")
    again.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="answer N failures by a new attempt (default: 0)"
    )
    again.add_argument(
        "--restart-scope",
        metavar="SCOPE",
        help="one: only the rank that failed, each rank N times (default); all: stop the others, then all ranks",
    )
    stopping.add_argument(
        "--dump-stacks",
        action="store_true",
        help="before workers are stopped, take the Python stacks of all that still run: where a hung one hangs",
    )
    group.add_argument(
        "--port",
        action="append",
        type=int,
        default=[],
        metavar="PORT",
        help="a TCP port on which workers will listen: it must be free before and after; may be repeated",
    )
    group.add_argument(
        "--cgroup",
        action="store_true",
        help="run each worker in a control group of its own, from which nothing escapes; needs one that we may write",
    )
    stopping.add_argument(
        "--require-clean",
        action="store_true",
        help="say what the workers left behind, or what cannot be proven to be gone, and exit with 1 then",
    )
    other = run.add_argument_group("other")
    other.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    other.add_argument(
        "--uvloop", action=argparse.BooleanOptionalAction, default=True, help="run on uvloop where it is installed"
    )
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run, after --")
    return parser


def _statuses() -> str:
    lines: list[str] = []
    for status, when in table():
        lines += [f"  {status}"] if len(status) > 7 else []
        words = textwrap.wrap(when, 76, initial_indent=" " * 11, subsequent_indent=" " * 11)
        if len(status) <= 7:
            words[0] = f"  {status:7}  {words[0].lstrip()}"
        lines += words
    return "\n".join(lines) + "\n"


def _spec(args: argparse.Namespace) -> GroupSpec:
    check_timeout(args.timeout)
    env = check_env("env", _env(args.env))
    return GroupSpec.of(
        _entry(args, env),
        args.n,
        name=args.name,
        env=env,
        start=args.start or "zygote",
        preload=[one.strip() for part in args.preload for one in part.split(",")],
        ports=args.port,
        placement=Placement(cgroup=True) if args.cgroup else None,
        logs=Logs(
            dir=args.log_dir,
            tee=args.tee,
            save=args.save,
            prefix=args.prefix,
            ranks=args.ranks,
            timestamps=args.timestamps,
            json=args.json,
        ),
        stop=Stop(
            signal=Stop.signal if args.stop_signal is None else args.stop_signal,
            grace=args.grace,
            dump=args.dump_stacks,
        ),
        restart=_restart(args.max_restarts, args.restart_scope),
    )


def _restart(most: int, scope: Any) -> Restart:
    if most == 0:
        if scope is not None:
            raise SpecError("--restart-scope", scope, "needs a number of restarts", "give --max-restarts too")
        return Restart.never()
    return Restart.on_failure(most, "one" if scope is None else scope)


def _entry(args: argparse.Namespace, env: Mapping[str, str | None]) -> Command | Function:
    entry: Command | Function
    if args.module is not None:
        entry = _module.entry([*args.module, *args.argv], args.cwd, env)
    else:
        argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
        if not argv:
            raise SpecError("COMMAND", "", "is missing", "give it last: aioelastic run -n 2 -- python3 train.py")
        entry = Command(*argv, cwd=args.cwd)
    for option, value in (("--preload", args.preload), ("--start", args.start)):
        if value and not isinstance(entry, Function):
            raise SpecError(
                option, value, "is for a function", f"write -m package.module:function, or leave {option} out"
            )
    return entry


def _dry_run(spec: GroupSpec) -> str:
    environ = dict(os.environ)
    check_limits(spec)
    check_free(spec.ports)
    spec = absolute(spec)
    return str(preflight(plan(spec, run_id="<run id>", host=socket.gethostname(), environ=environ), environ))


def _loop_factory(wanted: bool) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if wanted:
        try:
            import uvloop

            return uvloop.new_event_loop
        except ImportError:
            pass  # no wheel for this platform: the stock loop does the same, a little slower
    return None


def _env(pairs: list[str]) -> dict[str, str | None]:
    out: dict[str, str | None] = {}
    for pair in pairs:
        key, given, value = pair.partition("=")
        out[key] = value if given else None
    return out


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
