"""Functions that workers run in tests: they must be found by name in another process."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import faulthandler
import os
import queue
import random
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

import aioelastic


class Odd(Exception):
    """It cannot be made again from its pickle."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Deadly(Exception):
    """Whoever writes it down is sent SIGTERM in the middle of it."""

    def __str__(self) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "told"


def told() -> None:
    raise Deadly


class Refuses:
    """It can be pickled, but not unpickled in another process than ours."""

    def __reduce__(self) -> Any:
        return (only_in, (os.getpid(),))


def hides_and_hangs(path: str) -> None:
    """Leaves a process in a session of its own, says who both are, and stays."""
    hidden = subprocess.Popen(["sleep", "1000"], start_new_session=True, env={}, stdout=subprocess.DEVNULL)
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {hidden.pid}")
    signal.pause()


def leaves_a_copy() -> int:
    """The process id of a fork, which stays, and has all that this process has."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    return pid


def leaves_a_copy_when(path: str) -> int:
    """The same, when somebody has opened and closed this FIFO."""
    pid = leaves_a_copy()
    with open(path) as file:
        file.read()
    return pid


def leaves_a_daemon() -> int:
    """One that only its mark tells to be ours."""
    null = subprocess.DEVNULL
    return subprocess.Popen(["sleep", "1000"], start_new_session=True, env={}, stdin=null, stdout=null, stderr=null).pid


def only_in(pid: int) -> int:
    if os.getpid() != pid:
        raise RuntimeError("not in this process")
    return pid


def product(x: int, y: int = 1) -> int:
    return x * y + aioelastic.rank()


async def loop_module() -> str:
    await asyncio.sleep(0)
    return type(asyncio.get_running_loop()).__module__


def who() -> tuple[int, int, int, int]:
    return aioelastic.rank(), aioelastic.world_size(), aioelastic.local_rank(), aioelastic.attempt()


def fails() -> None:
    try:
        raise KeyError("the reason")
    except KeyError as exc:
        error = ValueError("bad", aioelastic.rank())
        error.add_note("a note")
        raise error from exc


def fails_in_a_group() -> None:
    first = OSError(2, "lost")
    first.__cause__ = KeyError("inner")
    raise ExceptionGroup("several", [first, TypeError("second")])


def shows(secret: int) -> None:
    local_value = secret + 1
    raise RuntimeError(f"look at {local_value}")


def odd() -> None:
    raise Odd(1, 2)


def unpicklable() -> Any:
    return lambda: None


def unpicklable_without_cloudpickle() -> Any:
    sys.modules["cloudpickle"] = None  # type: ignore[assignment]
    return lambda: None


def refuses() -> Refuses:
    return Refuses()


def leaves(code: Any) -> None:
    sys.exit(code)


def interrupted() -> None:
    raise KeyboardInterrupt


def vanishes(code: int) -> None:
    os._exit(code)


def dies(signum: int) -> None:
    os.kill(os.getpid(), signum)


def crashes() -> None:
    ctypes.string_at(0)


def writes() -> None:
    print("by print")
    print("to stderr", file=sys.stderr)
    os.write(1, b"by write\n")
    libc = ctypes.CDLL(None)
    libc.printf(b"by printf\n")
    subprocess.run(["/bin/echo", "by a child"], check=True)


def draws() -> tuple[float, bytes]:
    return random.random(), os.urandom(8)


def leaves_a_thread_that_stays() -> int:
    """The interpreter does not end before it."""
    threading.Thread(target=threading.Event().wait).start()
    return os.getpid()


def parent() -> int:
    return os.getppid()


def inside() -> dict[str, Any]:
    """What the process is like."""
    return {
        # without that of listdir
        "fds": [int(one) for one in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{one}")],
        "stdin": os.readlink("/proc/self/fd/0"),
        "leader": os.getsid(0) == os.getpid() == os.getpgid(0),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "int": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "term": signal.getsignal(signal.SIGTERM),
        "cwd": os.getcwd(),
        "mine": os.environ.get("MINE"),
        "argv": sys.argv,
        "path": sys.path,
    }


def sleeps() -> None:
    print("asleep")
    signal.pause()


def says_up() -> None:
    print("up", flush=True)
    signal.pause()


def fails_and_lingers() -> None:
    atexit.register(signal.pause)
    raise ValueError("its own")


def long() -> str:
    return os.environ["LONG"]


def forks(child: str) -> str:
    """Two come out of it; the first has another pid, and the second leaves without returning."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    if child == "raises":
        raise ValueError("a copy")
    if child == "leaves":
        sys.exit()
    return "a copy"


def stops_when_asked() -> str:
    stop = aioelastic.stopping()
    assert not stop
    print("waiting")
    assert stop.wait()
    assert stop
    return "saved"


async def stops_when_asked_async() -> str:
    stop = aioelastic.stopping()
    print("waiting")
    await stop
    return "saved"


def tells() -> int:
    aioelastic.ready()
    return 1


def waits_for(path: str) -> int:
    """Until somebody opens that named pipe."""
    with open(path) as file:
        file.read()
    return aioelastic.rank()


def zeros(size: int) -> Any:
    import numpy

    return numpy.zeros(size, dtype=numpy.uint8)


def sum_of(values: Any) -> int:
    import numpy

    array = numpy.frombuffer(values, numpy.uint8) if isinstance(values, bytes) else numpy.asarray(values)
    return int(array.sum())


def total(array: Any) -> int:
    array[0] = aioelastic.rank()  # a copy of its own
    return int(array.sum())


def nested() -> list[Any]:
    async def run() -> list[Any]:
        result = await aioelastic.supervise(aioelastic.Function(product, 2), 2)
        return [one.value for one in result]

    return asyncio.run(run())


def loaded(name: str) -> bool:
    return name in sys.modules


def named(x: int, *, y: int) -> int:
    return x * y


def fails_anywhere() -> None:
    try:
        raise KeyError("the reason")
    except KeyError as exc:
        error = ValueError("bad")
        error.add_note("a note")
        raise error from exc


def fails_plainly() -> None:
    raise ValueError("plainly")


_memory: list[Any] = []


def remember(value: Any) -> None:
    _memory.append(value)


def remembered() -> Any:
    return _memory[-1]


def grows(size: int) -> None:
    _memory.append(b"x" * size)


def waits_in(path: str) -> str:
    with open(path) as file:
        file.readline()  # not its end: a worker that was forked meanwhile has the other end, too
    return path


def touches(path: str) -> None:
    with open(path, "w"):
        pass


def kills_its_zygote() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()


def kills_its_zygote_once() -> str:
    if aioelastic.attempt() == 0:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    return "done"


def talks_nonsense() -> None:
    from aioelastic.child.worker import context

    assert context.channel is not None
    context.channel.send(b"V\x00what is this?")
    context.channel.send(b"x" * 100)
    context.channel.send(b"\x00")
    os._exit(0)


def dies_while_it_sends() -> Any:

    import numpy

    if aioelastic.rank() == 0:
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGKILL)).start()
    return numpy.ones(50_000_000, dtype=numpy.uint8)


def hangs_in_python() -> None:
    print("here")
    while True:
        pass


def hangs_in_c(holding: bool) -> None:
    """In read(2), which goes on after a signal; `holding` the interpreter lock or not."""
    library = ctypes.PyDLL(None) if holding else ctypes.CDLL(None)
    reader, _ = os.pipe()
    print("here")
    library.read(reader, ctypes.create_string_buffer(1), 1)


async def hangs_in_a_loop() -> None:
    print("here")
    await asyncio.Event().wait()


def hangs_in_threads() -> None:
    ready = threading.Barrier(3)
    for one in (waits_for_a_lock, waits_for_a_queue):
        threading.Thread(target=one, args=(ready,), daemon=True).start()
    ready.wait()
    print("here")
    threading.Event().wait()


def waits_for_a_lock(ready: threading.Barrier) -> None:
    lock = threading.Lock()
    lock.acquire()
    ready.wait()
    lock.acquire()


def waits_for_a_queue(ready: threading.Barrier) -> None:
    ready.wait()
    queue.SimpleQueue().get()


def hangs_or_fails(path: str) -> None:
    """Rank 1 fails as soon as the other has begun to hang, which a named pipe tells."""
    if aioelastic.rank() == 1:
        with open(path) as file:
            file.read()
        raise ValueError("the first")
    with open(path, "w"):
        pass
    hangs_in_c(False)


def blocks_the_signal(number: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    print("here")
    signal.sigwait([signal.SIGTERM])


def lets_the_signal_kill(number: int) -> None:
    faulthandler.unregister(number)
    print("here")
    signal.pause()


def becomes_another_program() -> None:
    print("here")
    os.execv("/bin/sh", ["sh", "-c", "echo there; exec sleep 1000"])


def supervises_a_fork() -> None:
    """A worker with a worker of its own, which is a copy of it."""

    async def run() -> None:
        entry = aioelastic.Function(hangs_in_c, False)
        async with aioelastic.Group(entry, start="fork", logs=aioelastic.Logs(tee=aioelastic.Std.NONE)) as group:
            async for one in group.lines():
                assert one.text == "here", one.text
                break
            print(repr((await group.dump_stacks())[0]))

    asyncio.run(run())
    hangs_in_c(False)


def place() -> dict[str, Any]:
    """Where this process runs."""
    with open("/proc/self/oom_score_adj") as file:
        oom_score_adj = int(file.read())
    with open("/proc/self/numa_maps") as file:
        memory = file.readline().split()[1]
    return {
        "cpus": sorted(os.sched_getaffinity(0)),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score_adj": oom_score_adj,
        "NOFILE": resource.getrlimit(resource.RLIMIT_NOFILE),
        "memory": memory,
    }


def printed(path: str) -> None:
    """A file, to stdout."""
    with open(path) as file:
        print(file.read(), end="")


def many_objects_then(count: int) -> str:
    """Sends so many, which nobody receives, and returns."""
    for number in range(count):
        aioelastic.sharing.send(number)
    return "value"


def leaves_four_that_send() -> None:
    """As the loaders of data do that outlive their worker: they send as long as somebody takes it."""
    begun, beginning = os.pipe()
    for _ in range(4):
        if os.fork() == 0:
            os.write(beginning, b".")
            try:
                while True:
                    aioelastic.sharing.send([bytes(40)] * 200)
            finally:
                os._exit(0)
    for _ in range(4):
        os.read(begun, 1)
    os._exit(0)


def leaves_a_child(code: int) -> None:
    """End at once, and leave a child in the process group."""
    subprocess.Popen(["sleep", "1000"])
    os._exit(code)


def returns_twice() -> str:
    """In a forked copy, too."""
    return "copy" if os.fork() == 0 else "itself"


def stops_to_be_looked_at(closes: bool = False) -> str:
    if closes:  # as daemons do
        os.close(0)
    breakpoint()  # noqa: T100
    return "went on"


def has_a_debugger_of_its_own() -> str:
    def hook() -> str:
        return "its own"

    sys.breakpointhook = hook
    return str(breakpoint())  # type: ignore[func-returns-value]  # noqa: T100


def quotient(one: int, other: int) -> float:
    return one / other


async def async_quotient(one: int, other: int) -> float:
    await asyncio.sleep(0)
    return one / other


def called(fn: Any) -> Any:
    return fn()


def dies_of(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def notes_and_forks(path: str) -> int:
    """The copy, too, returns."""
    with open(path, "a") as file:
        file.write("called\n")
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return pid


def enters(path: str) -> str:
    """A gate; else it is seen that this was called."""
    if path.endswith("gate"):
        return waits_in(path)
    touches(path)
    return path


def uses_a_forked_executor() -> int:
    with aioelastic.WorkerExecutor(1, start="fork") as executor:
        return executor.submit(abs, -3).result()


class Opened:
    """Has the writing end of a fifo, in whatever process it is unpickled, as long as it lives."""

    def __init__(self, path: str, fd: int = -1) -> None:
        self.path, self.fd = path, fd

    def __reduce__(self) -> Any:
        return _opened, (self.path,)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _opened(path: str) -> Opened:
    return Opened(path, os.open(path, os.O_WRONLY))


def has_and_fails(one: Opened) -> None:
    raise ValueError(one.path)


def waits_unless(path: str) -> None:
    """For ever, unless there is such a file."""
    while not os.path.exists(path):
        signal.pause()


def kills_its_parent(seen: str) -> None:
    """Whoever has started it, and with that one itself; one byte more is in the file then."""
    with open(seen, "a") as file:
        file.write("x")
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()
