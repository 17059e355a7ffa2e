"""Run a command several times on one CPU: time, use of resources, output kept.

python docs/examples/benchmark.py --runs 5 --cpu 0 --timeout 60 sort /etc/passwd
"""

import argparse
import asyncio

from aioelastic import Command, Logs, Placement, Std, supervise


async def main(args: argparse.Namespace) -> None:
    for run in range(args.runs):
        result = await supervise(
            Command(*args.command),
            placement=Placement(cpus=[args.cpu]),
            timeout=args.timeout,
            logs=Logs(dir=args.logs, tee=Std.NONE),
        )
        one = result[0]
        assert one.exit
        assert one.usage
        print(
            f"run {run}: {one.exit.duration * 1e3:.3f} ms, "
            f"CPU {(one.usage.user + one.usage.system) * 1e3:.3f} ms, "
            f"{one.usage.max_rss / 2**20:.1f} MiB, output in {one.stdout.path}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cpu", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--logs", default="runs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asyncio.run(main(parser.parse_args()))
