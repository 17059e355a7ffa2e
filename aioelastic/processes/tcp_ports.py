"""TCP ports of this network namespace: whether one is free, and who listens there (proc_net_tcp(5))."""

from __future__ import annotations

import errno
import socket

from ..child.kernel.bounded_reads import lines
from ..model.leftovers import Process
from .proc_files import describe, in_words, socket_holders

_LISTEN = b"0A"  # net/tcp_states.h, as proc_net_tcp(5) shows it
_SOCKETS = 1 << 28  # bytes of the kernel's table of them that are looked through: some 1.8 million


def is_free(port: int) -> bool:
    """Whether a server could take this TCP port at any address. What the kernel itself still keeps of a connection
    that was closed (TIME_WAIT) hinders nobody who sets SO_REUSEADDR, as servers do (socket(7))."""
    for family, where in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((where, port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return False
            if exc.errno == errno.EACCES and listening_sockets(
                port
            ):  # below 1024 for plain users: then by what listens
                return False
    return True


def holders(port: int) -> list[Process]:
    """The processes that listen there, as far as we may look."""
    return [describe(pid) for pid in socket_holders(listening_sockets(port))]


def listening_sockets(port: int) -> set[int]:
    """Inodes of the sockets that listen on a port, in this network namespace."""
    found = set()
    for name in ("tcp", "tcp6"):
        wanted = b":%04X" % port
        try:
            for line in lines(f"/proc/self/net/{name}", _SOCKETS):
                words = line.split()
                if words[3:4] == [_LISTEN] and words[1].endswith(wanted):
                    found.add(int(words[9]))
        except OSError:
            continue  # no IPv6
    return found


def taken_by(who: list[Process]) -> str:
    """`"is taken by process 5 (nginx)"`; nobody may be known."""
    return f"is taken by {', '.join(map(in_words, who))}" if who else "is taken"
