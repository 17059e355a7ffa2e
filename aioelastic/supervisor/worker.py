"""What users hold of one worker: `group[rank]`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ..model.exits import Exit
from ..model.logs import Std
from ..model.states import State
from ..planning import WorkerPlan
from .worker_output import WorkerOutput

if TYPE_CHECKING:
    from ..launch import FunctionChannel
    from ..streams import Dialogue, StandardInput
    from .worker_input import WorkerInput


class Life(Protocol):
    """What a handle shows of a worker's life (`WorkerLife`)."""

    rank: int
    attempt: int
    state: State
    pid: int | None
    exit: Exit | None
    stacks: str | None
    plan: WorkerPlan
    channel: FunctionChannel | None
    input: WorkerInput | None
    output: WorkerOutput

    def check_ours(self) -> None: ...

    def send_signal(self, signum: int) -> bool: ...

    def signal_group(self, signum: int) -> bool: ...

    async def wait(self) -> Exit | None: ...

    async def stop(self) -> Exit | None: ...


class Worker:
    """One worker of a group, as `group[rank]` shows it; a restarted one is another."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def __repr__(self) -> str:
        return f"<Worker rank={self.rank} pid={self.pid} {self.state.value}>"

    @property
    def rank(self) -> int:
        """Its rank, 0 to `world_size - 1`."""
        return self._life.rank

    @property
    def attempt(self) -> int:
        """0 for the first start of its rank, 1 after the first restart, and so on."""
        return self._life.attempt

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._life.state

    @property
    def pid(self) -> int | None:
        """Its process id; None before the start, and in an executor of the caller's."""
        return self._life.pid

    @property
    def exit(self) -> Exit | None:
        """How it ended, once it has."""
        return self._life.exit

    @property
    def stacks(self) -> str | None:
        """Its Python stacks, or why there are none, when they were last taken (`Group.dump_stacks`)."""
        return self._life.stacks

    @property
    def stdin(self) -> StandardInput:
        """Its standard input, of `Command(..., stdin="pipe")`.

        Raises:
            RuntimeError: it has no such input, or that is given by `input=`, or it was not started.
        """
        self._life.check_ours()
        given = self._life.input
        if given is not None and self._life.plan.input is None:
            return given.pipe
        words = "is given by `input=`" if self._life.plan.input is not None else "is no pipe"
        if self._life.plan.stdin == "pipe" and self._life.plan.input is None:
            how = "it was not started" if self._life.pid is None else "whoever started it has made none"
            raise RuntimeError(f"the standard input of worker {self.rank} is not there: {how}")
        raise RuntimeError(f"the standard input of worker {self.rank} {words}: Command(..., stdin='pipe') has one")

    def dialogue(self) -> Dialogue:
        """Talk to it: a context in which text is sent to its standard input, and its standard output is waited for.

        Begins with what it has said already, as far as that was not found by `Group.line`. For `Command(stdin="pipe")`,
        or on a terminal (`tty=True`), where programs write each line, and ask, at once.

        Raises:
            RuntimeError: as `stdin`.
        """
        from ..streams import Dialogue  # for start-up time: see `worker_input.py`

        return Dialogue(self.stdin, partial(self._life.output.converse, Std.OUT), self._life.wait)

    def send_signal(self, signum: int) -> bool:
        """Send a signal to the worker itself. False: it does not run. Never reaches a stranger's pid.

        In an executor of the caller's the stop signal, SIGTERM and its like become true in `stopping()`, and others
        cannot be sent (False).

        Args:
            signum: its number, or a member of `signal.Signals`.

        Raises:
            PermissionError: it has changed its user.
            RuntimeError: this is a forked copy of the program that started it.
        """
        return self._life.send_signal(signum)

    def signal_group(self, signum: int) -> bool:
        """Send a signal to the worker's whole process group. False: it does not run, or may not be signalled.

        Args:
            signum: its number, or a member of `signal.Signals`.

        Raises:
            RuntimeError: this is a forked copy of the program that started it.
        """
        return self._life.signal_group(signum)

    async def wait(self) -> Exit | None:
        """Wait until it has ended; returns its `Exit` within a millisecond, however long its output still flows.

        None: it never started, or could not be killed. Cancelling the wait changes nothing for the worker.
        """
        return await self._life.wait()

    async def stop(self) -> Exit | None:
        """Stop this worker by the group's `Stop` and wait until it has ended. It then counts as stopped by us."""
        return await self._life.stop()

    async def send(self, value: Any) -> None:
        """Send an object to the function that runs there; it gets it by `aioelastic.sharing.receive`.

        Shared arrays in it stay shared; others are copied once: from 8 MiB on by other threads, so do not change them
        until this returns. Objects arrive in the order in which they were sent, by whatever tasks. Waits while the
        worker has not received what was sent before: a few hundred small objects.

        Args:
            value: what can be pickled, and shared arrays.

        Raises:
            RuntimeError: it does not run, or is no function worker.
            BrokenPipeError: it has ended.
            Exception: whatever pickling it raises.

        Example::

            async with Group(Function(serve), n=2) as group:
                await group[0].send({"weights": x})
                print(await group[0].receive())
        """
        channel = self._channel()
        from ..child.wire import datagrams, messages, sent_objects  # for start-up time: see `function_parts.py`
        from ..child.worker import function_run  # the same

        async with channel.turn:
            packet, fds = await sent_objects.ready(lambda: function_run.pack(messages.OBJECT, (value,)))
            try:
                await channel.post(packet, fds)
            finally:
                datagrams.close(fds)

    async def receive(self) -> Any:
        """The next object that the function sends by `aioelastic.sharing.send`; also after it has ended. Of the tasks
        that wait the first gets the first.

        Raises:
            RuntimeError: it was not started, or is no function worker.
            EOFError: it has ended, and there are no more.
            Exception: the object could not be unpickled.
        """
        return await self._channel().receive()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """All that it sends, until it ends."""
        from ..launch import Ended  # for start-up time: see `function_parts.py`

        while True:
            try:
                value = await self.receive()
            except Ended:
                return
            yield value

    def _channel(self) -> FunctionChannel:
        self._life.check_ours()
        if self._life.channel is None:
            words = "is no function worker that was started in a process of its own"
            raise RuntimeError(f"worker {self.rank} {words}")
        return self._life.channel
