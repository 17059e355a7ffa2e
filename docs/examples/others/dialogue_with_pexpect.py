"""The same as ../dialogue.py with pexpect."""

import os
import sys

import pexpect


def main(questions: list[str]) -> None:
    env = {**os.environ, "PYTHON_BASIC_REPL": "1"}
    python = pexpect.spawn(
        sys.executable, ["-qi"], timeout=30, env=env, echo=False, encoding="utf-8"
    )
    with python as io:  # the end of a child in a session of its own is nobody's task
        try:
            io.expect(">>> ")
            for question in questions:
                io.sendline(question)
                io.expect(">>> ")
                print(question, "is", io.before.strip())
        except pexpect.EOF:
            io.close()
            said, how = io.before, f"{io.exitstatus} or signal {io.signalstatus}"
            sys.exit(f"python failed: exit code {how}; the last that came: {said}")


if __name__ == "__main__":
    main(sys.argv[1:])
