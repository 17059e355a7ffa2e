"""What the parts of an executor need of each other: one protocol for each need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .tasks import Task

if TYPE_CHECKING:
    from ..planning import LaunchPlan, WorkerPlan
    from .slots import Slot


class TaskQueue(Protocol):
    """Whoever has the tasks: what is asked of it, and told to it, in the thread of the workers."""

    most: int
    closed: bool
    stopping: bool
    killing: bool
    needs_main: bool

    @property
    def is_broken(self) -> bool: ...

    @property
    def is_quiet(self) -> bool: ...

    def run(self, owner: object, work: Callable[[], None]) -> None: ...

    def wanted(self) -> tuple[int, int, bool]: ...

    def next(self) -> Task | None: ...

    def put_back(self, task: Task) -> None: ...

    def drop_abandoned(self) -> None: ...

    def fail_all(self, problem: Exception) -> None: ...

    def break_off(self, why: BaseException) -> None: ...

    def end(self, problem: BaseException | None, held: list[Task]) -> bool: ...

    def like(self, plan: LaunchPlan, rank: int) -> WorkerPlan: ...


class TaskGiver(Protocol):
    """Whoever gives the tasks to the workers: what these tell it. Everything is called on their loop."""

    def look(self) -> None: ...

    def wake(self) -> None: ...

    def reply(self, slot: Slot, packet: bytes, fds: list[int]) -> None: ...

    def crash(self, bug: BaseException) -> None: ...
