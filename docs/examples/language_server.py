"""Ask a language server what it can do.

python docs/examples/language_server.py basedpyright-langserver --stdio
"""

import asyncio
import json
import sys
from typing import Any

from aioelastic import Command, Group, Logs, Std
from aioelastic.streams import Dialogue


async def send(io: Dialogue, message: dict[str, Any]) -> None:
    body = json.dumps({"jsonrpc": "2.0", **message}).encode()
    await io.send(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))


async def receive(io: Dialogue) -> Any:
    header = await io.read_until(r"Content-Length: (\d+)\r\n(.+\r\n)*\r\n", timeout=30)
    return json.loads(await io.read_exactly(int(header[1]), timeout=30))


async def ask(io: Dialogue, number: int, method: str, params: Any = None) -> Any:
    await send(io, {"id": number, "method": method, "params": params})
    while (answer := await receive(io)).get("id") != number or "method" in answer:
        pass  # it tells of other things, too
    return answer["result"]


async def main(server: list[str]) -> None:
    quiet = Logs(tee=Std.NONE)
    async with (
        Group(Command(*server, stdin="pipe"), logs=quiet) as group,
        group[0].dialogue() as io,
    ):
        told = await ask(
            io,
            1,
            "initialize",
            {"processId": None, "rootUri": None, "capabilities": {}},
        )
        print(told["serverInfo"]["name"], "can:", *sorted(told["capabilities"]))
        await ask(io, 2, "shutdown")
        await send(io, {"method": "exit"})
        await group.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
