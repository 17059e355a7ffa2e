"""What a function worker says on its channel: that it is ready, its value, or its error."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable

from .child import _failure, _socket, _wire
from .errors import RemoteError
from .launch import Answer
from .watch import Poller


class Replies(Answer):
    """Reads `channel` (closed by us at the end) from the moment of the start."""

    def __init__(
        self,
        poller: Poller,
        channel: socket.socket,
        on_ready: Callable[[], None],
        on_task: Callable[[bytes, list[int]], None] | None = None,
    ) -> None:
        super().__init__()
        self._poller = poller
        self._channel: socket.socket | None = channel
        self._on_ready = on_ready
        self._on_task = on_task
        poller.add_reader(channel.fileno(), self._read)

    def send(self, packet: bytes, fds: list[int]) -> None:
        """Send it something. `OSError`: it is gone, or full."""
        if self._channel is None:
            raise BrokenPipeError("it is gone")
        _socket.send(self._channel, packet, fds)

    def no_more(self) -> None:
        """Tell it that nothing more will be sent."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_WR)

    def finish(self) -> None:
        """It has exited: read what is left, and close."""
        while self._channel is not None and self._read():
            pass
        self._close()

    def _read(self) -> bool:
        """One message. False: there was none, or it was the last."""
        assert self._channel is not None
        try:
            packet, fds = _socket.receive(self._channel)
        except BlockingIOError:
            return False
        except (OSError, ValueError) as exc:
            self.nonsense = self.nonsense or f"it sent something that is not ours: {exc}"
            self._close()
            return False
        if not packet:
            self._close()
            return False
        try:
            self._take(packet, fds)
        except Exception as exc:  # unpickling runs the code of others: anything may come
            words = f"its result could not be unpickled here: {type(exc).__name__}: {exc}"
            self.nonsense = self.nonsense or words
        finally:
            _socket.close(fds)
        return True

    def _take(self, packet: bytes, fds: list[int]) -> None:
        kind = packet[:1]
        if self._on_task is not None and kind in (_wire.DONE, _wire.FAILED):
            self._on_task(packet, fds)
        elif kind == _wire.VALUE:
            with main_has_both_names():
                (self.value,) = _wire.decode(packet, fds)
            self.has_value = True
        elif kind == _wire.ERROR:
            self.error = remote_error(packet, fds)
        elif kind == _wire.RUNS:
            self._on_ready()
        else:
            raise ValueError(f"a message of kind {kind!r}")

    def _close(self) -> None:
        if self._channel is not None:
            self._poller.remove(self._channel.fileno())
            self._channel.close()
            self._channel = None


def remote_error(packet: bytes, fds: list[int]) -> RemoteError:
    """From an `ERROR` or `FAILED` message."""
    phase, told = _wire.decode(packet, fds)
    with main_has_both_names():
        exc, why = _failure.rebuild(told["packed"])
    return RemoteError(phase, told["type"], told["message"], told["traceback"], exc, why)


class main_has_both_names:
    """A worker knows our main module by another name, as in multiprocessing: so do we while we unpickle."""

    def __enter__(self) -> None:
        self._added = "__mp_main__" not in sys.modules and "__main__" in sys.modules
        if self._added:
            sys.modules["__mp_main__"] = sys.modules["__main__"]

    def __exit__(self, *_: object) -> None:
        if self._added:
            del sys.modules["__mp_main__"]
