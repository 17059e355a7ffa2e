"""Ask an interpreter, and wait for each answer.

python docs/examples/dialogue.py "6 * 7" "2 ** 100"
"""

import asyncio
import sys

from aioelastic import Command, Group, Logs, Std

PYTHON = Command(sys.executable, "-qi", tty=True, env={"PYTHON_BASIC_REPL": "1"})


async def main(questions: list[str]) -> None:
    quiet = Logs(tee=Std.NONE)
    async with Group(PYTHON, logs=quiet) as group, group[0].dialogue() as io:
        await io.read_until(">>> ", timeout=30)
        for question in questions:
            await io.send_line(question)
            answer = await io.read_until(">>> ", timeout=30)
            print(question, "is", answer.string[: answer.start()].strip())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
