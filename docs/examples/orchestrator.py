"""A program that owns workers: it hears what happens to them, keeps their status, and
stops all when it is told to end (SIGTERM, Ctrl-C).

python docs/examples/orchestrator.py sh -c 'echo hello from $RANK; sleep 1000'
"""

import sys

import aioelastic
from aioelastic import Command, Group, Restart, Stop, events


async def main() -> None:
    status: dict[int | None, str] = {}
    command, restart = Command(*sys.argv[1:]), Restart.on_failure(max=2)
    async with Group(command, n=3, restart=restart, stop=Stop(grace=10)) as group:
        async for event in group.events():
            match event:
                case events.Spawned():
                    status[event.rank] = f"runs as {event.pid}"
                case events.Exited():
                    status[event.rank] = str(event.exit)
                case events.Restarting():
                    status[event.rank] = f"restarts after {event.reason}"
                case _:
                    continue
            print(status, flush=True)


aioelastic.run(main)
