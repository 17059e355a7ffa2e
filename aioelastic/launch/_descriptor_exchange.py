"""Arguments and results of calls in processes that are not ours, where they hold descriptors, as shared arrays do.

The executor of the caller pickles into a pipe, which carries no descriptors. So such a call fetches its arguments from
a socket of ours and leaves its result there: an abstract one (unix(7)), which has no file and ends with us. Only
processes of our user are served (SO_PEERCRED).
"""

from __future__ import annotations

import os
import socket
import struct
import threading

from ..child.wire import datagrams
from ..child.wire.datagrams import Packed
from ..child.worker import lent_run
from ..system import forked_copies

REST = 0.1  # seconds until a connection is tried again for which there was no descriptor
PATIENCE = 2  # seconds for what has been sent already, or is about to be


class Exchange:
    """Serves, in a thread of its own, until it is closed.

    Raises:
        OSError: out of descriptors.
    """

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind("")  # the kernel finds a name
            self._listener.listen(128)
            self._name: bytes = self._listener.getsockname()
        except BaseException:
            self._listener.close()
            raise
        self._changed = threading.Condition()
        # guarded by it
        self._closed = False
        self._peer: socket.socket | None = None  # whom the thread serves now
        self._numbers = 0
        self._offered: dict[int, Packed] = {}
        self._left: dict[int, Packed] = {}
        self._thread = threading.Thread(target=self._serve, name="aioelastic-exchange", daemon=True)
        self._thread.start()
        forked_copies.register(self)

    def place(self, packed: Packed | None = None) -> lent_run.Place:
        """Where that can be fetched, as often as wanted, and one thing can be left. It is ours to close now."""
        with self._changed:
            self._numbers += 1
            if packed is not None:
                self._offered[self._numbers] = packed
            return lent_run.Place(os.getpid(), self._name, self._numbers)

    def take(self, number: int) -> Packed:
        """What was left there. Raises `TimeoutError`."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._left or self._closed, PATIENCE)
            if number not in self._left:
                raise TimeoutError("it was not left where it should be")
            return self._left.pop(number)

    def close(self) -> None:
        """Nothing more is served, and nobody needs what is here."""
        if self._listener.fileno() < 0:
            return
        with self._changed:
            self._closed = True
            if self._peer is not None:  # who says nothing is not waited for
                self._peer.shutdown(socket.SHUT_RD)
            self._changed.notify_all()
        self._listener.shutdown(socket.SHUT_RDWR)  # for copies of it too, in processes that were forked
        self._thread.join()
        datagrams.close(self.disown())

    def disown(self) -> list[int]:
        """The descriptors, which are not its own any more; see `forked_copies`, too."""
        fds = [one.detach() for one in (self._listener, self._peer) if one is not None and one.fileno() >= 0]
        for _, more in (*self._offered.values(), *self._left.values()):
            fds += more
        self._offered.clear()
        self._left.clear()
        return fds

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                with self._changed:
                    # out of descriptors, perhaps: it stays in the line, and is tried again
                    if self._changed.wait_for(lambda: self._closed, REST):
                        return
                continue
            with peer:
                with self._changed:
                    self._peer = None if self._closed else peer
                try:
                    if self._peer is not None:
                        self._answer(peer)
                except Exception:
                    pass  # it has died meanwhile, or is nobody of ours; the others are still to be served
                with self._changed:
                    self._peer = None

    def _answer(self, peer: socket.socket) -> None:
        told = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", told)[1] != os.geteuid():
            return
        # not `settimeout`: it would make the socket non-blocking
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
        packet, fds = datagrams.receive(peer)
        if len(packet) < lent_run.HEAD.size:
            datagrams.close(fds)
            return
        (number,) = lent_run.HEAD.unpack_from(packet)
        with self._changed:
            if len(packet) > lent_run.HEAD.size:
                self._left[number] = packet[lent_run.HEAD.size :], fds
                self._changed.notify_all()
            elif number in self._offered:
                datagrams.send(peer, *self._offered[number])
