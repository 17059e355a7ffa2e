"""Workers that count, until one follows a bad pointer; the others save what they have.

aioelastic run -n 4 -- python3 docs/examples/crash.py
"""

import ctypes
import os
import signal
import sys
import time


def save(*_: object) -> None:
    print("saved, good bye")
    sys.exit(0)


def main() -> None:
    signal.signal(signal.SIGTERM, save)
    for step in range(1, 1000):
        print(f"step {step}")
        if step == 2 and os.environ.get("RANK") == "1":
            ctypes.string_at(0)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
