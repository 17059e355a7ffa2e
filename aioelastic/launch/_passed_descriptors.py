"""Descriptors of this program that workers are given (`Command(pass_fds=)`): duplicates, for as long as a group may
start some, so that each attempt has what they were when the group began."""

from __future__ import annotations

import errno
import fcntl

from ..model.entries import Command
from ..model.errors import SpecError
from ..model.group_spec import GroupSpec
from ..system import forked_copies
from ..system.descriptors import shut


class PassedDescriptors:
    """Made before anything else of a group, which may get a number that is not open.

    Raises:
        SpecError: one is not open.
        OSError: out of descriptors.
    """

    def __init__(self, spec: GroupSpec) -> None:
        self._held: dict[int, int] = {}
        forked_copies.register(self)
        try:
            for rank, entry in enumerate(spec.entries):
                for number in entry.pass_fds if isinstance(entry, Command) else ():
                    self._hold(number, rank)
        except BaseException:
            self.close()
            raise

    def _hold(self, number: int, rank: int) -> None:
        if number not in self._held:
            try:
                self._held[number] = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
            except OSError as exc:
                if exc.errno != errno.EBADF:
                    raise
                problem, remedy = "is not open here", "open it first, or leave it out"
                raise SpecError(f"pass_fds of rank {rank}", number, problem, remedy) from None

    def of(self, passed: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """The numbers there, each with ours of now."""
        return tuple((number, self._held[number]) for number, _ in passed)

    def disown(self) -> list[int]:
        """See `forked_copies`."""
        fds = [*self._held.values()]
        self._held.clear()
        return fds

    def close(self) -> None:
        """No more workers are started."""
        shut(*self.disown())
