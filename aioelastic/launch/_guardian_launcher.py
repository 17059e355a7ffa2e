"""A group's connection to the guardian, which starts commands, and fresh interpreters for functions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from ..child.guardian import process_start
from ..child.wire import requests
from ..model.logs import Std
from ..planning import WorkerPlan
from ..system.interpreter import interpreter
from ..watch import Poller
from . import _host_state
from ._guardian import SOON, guardian, let_go
from ._helper_process import Lost, ServedProcess, Server
from ._host_state import HostState
from ._pipe_ends import Ends
from ._standard_streams import standard


class GuardianLauncher(Server):
    """Starts commands, and fresh interpreters, by the guardian of this process: the group's connection to it.

    Its workers are no children of ours: no other part of the program can reap them, the size of our memory and our
    threads do not matter to their start, and whatever they leave behind comes back to the guardian. If this process
    dies, however, they die.
    """

    name = "guardian"
    what = "guardian"

    def __init__(
        self,
        environ: Mapping[str, str],
        poller: Poller | None = None,
        lost: Lost = None,
        state: HostState | None = None,
    ) -> None:
        """Connect to it.

        Args:
            lost: how workers end when this process dies: None at once, or a signal and the seconds to obey it.
            state: what workers begin with; None: as by the guardian that was needed last.

        Raises:
            OSError: no guardian can run here.
        """
        self.server = guardian(state)
        try:
            super().__init__(self.server.connect(environ, lost))
        except BaseException:
            let_go(self.server)
            raise
        self.session = self.server.session
        self._poller = poller

    @property
    def is_unused(self) -> bool:
        """Whether it has started nothing."""
        return self._count == 0

    def serves(self, state: HostState) -> bool:
        """Whether a worker that begins with that can be started by it."""
        return not self.gone and not self.server.was_ended and state.within(self.server.state)

    def start(self, worker: WorkerPlan, state: HostState | None = None) -> asyncio.Future[ServedProcess]:
        """See `Launcher.start`.

        Args:
            state: what it begins with, if that was read already.
        """
        if self.loop is None and not self.gone:
            self.attach(asyncio.get_running_loop())
        self._poller = self._poller or Poller(asyncio.get_running_loop())
        argv, program = worker.argv, worker.program
        if worker.function is not None:
            argv = tuple(interpreter("aioelastic.child.worker.function_run:fresh"))
            program = argv[0]
        assert program is not None
        inherited = standard(0) if worker.stdin == "inherit" and worker.function is None else None
        has_stdin = worker.function is not None or worker.stdin == "pipe" or inherited is not None
        body = (
            os.fsencode(program),
            [os.fsencode(one) for one in argv],
            process_start.packed(worker.overlay),
            None if worker.cwd is None else os.fsencode(worker.cwd),
            worker.mark,
            _streams(worker, has_stdin),
            worker.place,
            self.server.other(state or _host_state.now()),
            worker.stop_signal,
            worker.who,
            worker.numbers,
        )

        def given(ends: Ends) -> list[int]:
            stdin = ends.their_channel if worker.function is not None else ends.their_stdin or inherited
            streams = [fd for fd in (stdin, ends.their_stdout, ends.their_stderr) if fd is not None]
            if worker.tty is not None:
                streams = streams[:1]
            return [*streams, *ends.passed]

        return self.ask(requests.EXEC, worker, body, given, self._poller)

    def hear(self) -> None:
        self.was_ended = self.server.was_ended  # before what comes of it
        super().hear()

    def died(self, why: Exception | None = None) -> None:
        self.server.has_left(SOON)  # its other sockets close with this one: who asks next finds it gone
        super().died(why)

    def end(self) -> None:
        if not self.gone:
            let_go(self.server)
        super().end()


def _streams(worker: WorkerPlan, has_stdin: bool) -> int:
    if worker.tty is not None:
        return requests.TERMINAL
    has_stderr = Std.ERR in worker.pipes or worker.stderr == "stdout"
    return has_stdin | (Std.OUT in worker.pipes) << 1 | has_stderr << 2
