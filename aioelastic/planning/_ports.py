"""A free TCP port for the workers' rendezvous that nobody else will be handed while the group lives."""

from __future__ import annotations

import errno
import os
import socket
from typing import Self

from ..model.errors import SpecError
from ..system import forked_copies


class Port:
    """A port chosen outside the kernel's ephemeral range, reserved among supervisors of this network namespace.

    Binding port 0 and closing it hands the same port to any `connect()` or `bind(0)` that comes next. Instead:
    a random port that the kernel never hands out by itself, found free by a bind, and reserved by a name in the
    abstract unix namespace, which like the port belongs to the network namespace and dies with this process.

    Example::

        with Port() as port:
            print(port.number)
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        low, high = _ephemeral()
        if low <= 10_000 and high >= 65_535:
            low, high = 65_536, 0  # the whole range is ephemeral here: any port must do
        for _ in range(4096):
            number = _any(10_000, 65_536)
            if low <= number <= high:
                continue
            held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                held.bind(f"\0aioelastic-port-{number}")
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                    probe.bind((host, number))
            except OSError as exc:
                held.close()
                if exc.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
            self.number = number
            self._held = held
            forked_copies.register(self)
            return
        raise SpecError("MASTER_PORT", None, "no free port was found", 'name one: env={"MASTER_PORT": "29500"}')

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        return [self._held.detach()] if self._held.fileno() >= 0 else []

    def close(self) -> None:
        """End the reservation."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _any(low: int, high: int) -> int:
    """One of them. (`random` would import `hashlib`, and that a library.)"""
    return low + int.from_bytes(os.urandom(4), "little") % (high - low)


def _ephemeral() -> tuple[int, int]:
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="utf-8") as file:
            low, high = map(int, file.read().split())
    except (OSError, ValueError):
        return 32_768, 60_999
    return low, high
