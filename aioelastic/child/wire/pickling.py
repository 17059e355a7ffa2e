"""How anything is pickled: with a look at each object on its way, which notes what of it is found in the main module,
and says of what is of no use in another process what to do instead."""

from __future__ import annotations

import copyreg
import functools
import io
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any, Protocol

from . import main_names

# What a failure to pickle is raised as, by pickle and by objects that refuse. Whatever else comes out of it is not
# about pickling: a time-out that the handler of a signal has raised, or something wrong in somebody's `__reduce__`.
FAILURES = (pickle.PicklingError, TypeError, AttributeError)

# what to do instead, and the types of which it is true: by name, so that nothing has to be imported
_INSTEAD = {
    "make it in the worker": """
        _thread.lock _thread.RLock _thread._local _thread._ThreadHandle threading.Condition threading.Event
        threading.Semaphore threading.Barrier threading.Thread concurrent.futures._base.Executor
        concurrent.futures._base.Future multiprocessing.pool.Pool""",
    'give it to a function as an argument with start="fork", or let aioelastic.sharing.Queue tell what it would': """
        multiprocessing.synchronize.SemLock multiprocessing.synchronize.Condition multiprocessing.synchronize.Event
        multiprocessing.synchronize.Barrier""",
    "use an aioelastic.sharing.Queue": """
        multiprocessing.queues.Queue multiprocessing.queues.SimpleQueue queue.Queue _queue.SimpleQueue""",
    'use an array of aioelastic.sharing, or give it to a function as an argument with start="fork"': """
        multiprocessing.sharedctypes.SynchronizedBase mmap.mmap""",
    "its number alone would travel, which is another file there: use an aioelastic.sharing.Queue, or send()": """
        multiprocessing.connection._ConnectionBase""",
    "give its address, and connect in the worker": """
        socket.socket _socket.socket _ssl._SSLContext multiprocessing.connection.Listener""",
    "give its path, and open it in the worker": "_io._IOBase tempfile._TemporaryFileWrapper posix.ScandirIterator",
    "give a list of what it yields, or the function and its arguments": """
        builtins.generator builtins.async_generator""",
    "give the async function and its arguments: the worker runs it in an event loop of its own": """
        builtins.coroutine _asyncio.Task _asyncio.Future asyncio.events.AbstractEventLoop""",
    "give what it is opened by, and connect in the worker": """
        sqlite3.Connection sqlite3.Cursor psycopg2.extensions.connection psycopg2.extensions.cursor
        psycopg.Connection psycopg.Cursor psycopg.AsyncConnection pymysql.connections.Connection
        MySQLdb.connections.Connection sqlalchemy.engine.base.Engine sqlalchemy.engine.base.Connection
        duckdb.DuckDBPyConnection _duckdb.DuckDBPyConnection pymongo.mongo_client.MongoClient _gdbm.gdbm _dbm.dbm""",
    "it is of this process: give the number of the GPU, and make it in the worker (arrays on a GPU do travel)": """
        pycuda._driver.Context pycuda._driver.Stream pycuda._driver.Event pycuda._driver.DeviceAllocation
        cuda.bindings.driver.CUcontext cuda.bindings.driver.CUstream cuda.bindings.driver.CUevent
        numba.cuda.cudadrv.driver.Context numba.cuda.cudadrv.driver.Stream cupy.cuda.stream.Stream
        torch.cuda.streams.Stream torch.cuda.graphs.CUDAGraph""",
}
_TABLE = {name: words for words, names in _INSTEAD.items() for name in names.split()}
_CODE = (type, types.FunctionType, types.ModuleType)  # what cloudpickle is for
_BY_NAME = "define it at the top level of a module, under its own name, or install cloudpickle"
# of these, those that would be pickled, by cloudpickle or at all, as something else, or for which something that they
# hold would be blamed
_SAID_OTHERWISE = (
    ("multiprocessing.connection", "Connection"),
    ("_io", "TextIOWrapper"),
    ("torch.cuda", "Stream"),
    ("queue", "Queue"),
    ("queue", "LifoQueue"),
    ("queue", "PriorityQueue"),
    ("concurrent.futures.thread", "ThreadPoolExecutor"),
    ("asyncio.unix_events", "_UnixSelectorEventLoop"),
)


class Reducing(Protocol):
    """How some objects are reduced in one message: those of a type; and those derived from one of several types."""

    reducers: dict[type, Callable[[Any], Any]]
    derived: list[tuple[tuple[type, ...], Callable[[Any], Any]]]


class _Looking:
    """What both picklers do with each object that is not plain data.

    Attributes:
        main: something is to be found in the main module.
        last: the object that came last: the one that cannot be pickled, if it cannot.
        how: some objects are reduced.
    """

    main = False
    last: Any = None
    how: Reducing | None = None
    _refused: frozenset[type] = frozenset()

    def look(self, one: Any) -> Any:
        """How it is reduced; `NotImplemented`: as pickle does it."""
        self.last = one
        kind = type(one)
        if kind in self._refused and kind not in copyreg.dispatch_table and _instead(one):
            raise TypeError(f"cannot pickle {_name(kind)!r} object")
        where = getattr(one, "__module__", None)  # as `pickle.whichmodule`: it may be reduced to a name in there
        if where == main_names.NAME:
            self.main = True
        elif where == main_names.ALIAS:
            self.main = True
            main_names.rename(one)
        if self.how is not None:
            if reducer := self.how.reducers.get(kind):
                return reducer(one)
            for bases, reducer in self.how.derived:
                if issubclass(kind, bases) and kind not in copyreg.dispatch_table:
                    return reducer(one)
        return NotImplemented


class _ByName(pickle.Pickler, _Looking):
    def reducer_override(self, one: Any) -> Any:
        return self.look(one)


@functools.cache
def _by_value() -> Any:
    import cloudpickle

    class ByValue(cloudpickle.Pickler, _Looking):  # type: ignore[misc]
        def reducer_override(self, one: Any) -> Any:
            reduced = self.look(one)
            return super().reducer_override(one) if reduced is NotImplemented else reduced

    return ByValue


def dumps(
    body: Any,
    place: Callable[[pickle.PickleBuffer], bool] | None = None,
    by_value: bool = False,
    how: Reducing | None = None,
) -> tuple[bytes, bool]:
    """The pickle, and whether something in it is of the main module.

    Args:
        place: the buffer callback (PEP 574).
        by_value: by cloudpickle.
        how: some objects are reduced.

    Raises:
        PicklingError, TypeError, AttributeError: it cannot be pickled, with what to do instead, where that is known.
        BaseException: whatever the code of others raises meanwhile.
    """
    out = io.BytesIO()
    pickler: Any
    pickler = (_by_value() if by_value else _ByName)(out, protocol=5, buffer_callback=place)
    pickler._refused, pickler.how = _refused(), how
    try:
        pickle.Pickler.dump(pickler, body)
    except (*FAILURES, RuntimeError) as exc:  # multiprocessing refuses by the latter
        if words := _instead(pickler.last):
            raise _refusal(pickler.last, words) from exc  # no variable holds it, or it would hold all of this
        if is_pickles_own(exc) and not by_value and issubclass(type(pickler.last), _CODE):
            exc.args = (f"{exc}: {_BY_NAME}",)
            exc.__dict__["remedy"] = _BY_NAME
        raise
    return out.getvalue(), pickler.main


def is_pickles_own(exc: BaseException) -> bool:
    """Whether it is pickle itself that has raised it, and none of the code of others that it called: then it may be
    tried by value. Else it was raised in a frame of that code, or of the handler of a signal."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if not isinstance(exc, FAILURES) or remedy_of(exc) not in ("", _BY_NAME):
        return False
    return trace is not None and trace.tb_frame.f_code is dumps.__code__


def remedy_of(exc: BaseException) -> str:
    """What to do instead, which its words end with; empty if that is not known."""
    return str(exc.__dict__.get("remedy", ""))


def _refusal(last: Any, words: str) -> TypeError:
    told = TypeError(f"cannot pickle {_name(type(last))!r} object: {words}")
    told.__dict__["remedy"] = words
    return told


def _instead(one: Any) -> str:
    kind = type(one)
    if one is sys.stdout or one is sys.stderr:
        return ""  # by value, they are those of the worker
    return next((words for base in kind.__mro__ if (words := _TABLE.get(_name(base), ""))), "")


def _name(kind: type) -> str:
    return ".".join(str(type.__getattribute__(kind, one)) for one in ("__module__", "__qualname__"))


_seen = -1
_found: frozenset[type] = frozenset()


def _refused() -> frozenset[type]:
    """The types themselves, of the modules that are loaded."""
    global _seen, _found
    if len(sys.modules) != _seen:
        _seen = len(sys.modules)
        found = (getattr(sys.modules.get(module), name, None) for module, name in _SAID_OTHERWISE)
        _found = frozenset(one for one in found if isinstance(one, type))
    return _found
