"""The same as ../benchmark.py with the standard library."""

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(args: argparse.Namespace) -> None:
    for run in range(args.runs):
        logs = Path(args.logs, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{run}")
        logs.mkdir(parents=True)
        output, errors = logs / "stdout.log", logs / "stderr.log"
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            began = time.monotonic_ns()
            # preexec_fn is not safe where there are threads, and slows each start
            process = subprocess.Popen(
                args.command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, [args.cpu]),  # noqa: PLW1509
            )
        pidfd = os.pidfd_open(process.pid)
        try:
            in_time = select.select([pidfd], [], [], args.timeout)[0]
            ended = time.monotonic_ns()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            os.close(pidfd)
        if not in_time:
            sys.exit(f"run {run} did not end within {args.timeout:g} s")
        if process.returncode != 0:
            words = errors.read_text(errors="replace").splitlines()[-20:]
            sys.exit("\n".join([f"run {run} failed: {process.returncode}", *words]))
        print(
            f"run {run}: {(ended - began) / 1e6:.3f} ms, "
            f"CPU {(used.ru_utime + used.ru_stime) * 1e3:.3f} ms, "
            f"{used.ru_maxrss / 2**10:.1f} MiB, output in {output}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cpu", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--logs", default="runs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    main(parser.parse_args())
