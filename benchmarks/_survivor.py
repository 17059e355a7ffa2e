"""A worker and its family, for survival.py: each tells the benchmark who it is, then sleeps until it is ended.

python -S _survivor.py NAME worker: the worker, which starts a grandchild, a grandchild in a session of its own, and a
daemon (fork, setsid, fork, an empty environment). Each connects to the abstract socket NAME (unix(7)), sends its role,
and goes on once the benchmark, which learns the pid from the kernel (SO_PEERCRED), holds its pidfd. As a function:
`worker(NAME)`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

LIFE = 100  # seconds after which each ends by itself, should the benchmark be killed
ROLES = ("worker", "grandchild", "setsid", "daemon")


def tell(name: str, role: str) -> None:
    """Say who we are, and wait until that was understood."""
    signal.alarm(LIFE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.connect(f"\0{name}")
        end.send(role.encode())
        end.recv(1)


def sleep(*_: object) -> None:
    while True:
        signal.pause()


def daemon(name: str) -> None:
    """What daemon(3) does, and an environment that says nothing of where it came from."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.execve(sys.executable, [sys.executable, "-S", __file__, name, "tell-daemon"], {})


def worker(name: str) -> None:
    """The worker itself, also as a function of a pool."""
    argv = [sys.executable, "-S", os.path.abspath(__file__), name]
    null = subprocess.DEVNULL
    family = [
        subprocess.Popen([*argv, "grandchild"], stdin=null, stdout=null, stderr=null),
        subprocess.Popen([*argv, "setsid"], start_new_session=True, stdin=null, stdout=null, stderr=null),
    ]
    subprocess.run([*argv, "daemon"], check=True, stdin=null, stdout=null, stderr=null)
    tell(name, "worker")
    sleep(family)  # which nobody waits for, but which must not be collected


if __name__ == "__main__":
    where, role = sys.argv[1:]
    if role == "worker":
        worker(where)
    elif role == "daemon":
        daemon(where)
    else:
        tell(where, role.removeprefix("tell-"))
        sleep()
