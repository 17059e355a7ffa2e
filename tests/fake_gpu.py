"""The stand-in for a GPU: its driver is compiled from `fake/libcuda.c`, and memory of it can be looked at from here.

Other processes load the same library by importing this module: its path is in the environment.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PATH = "FAKE_CUDA_LIBRARY"
NAME = "FAKE_CUDA_NAME"
KINDS = ("memory", "scratch", "mapped", "reserved", "events", "streams", "contexts")
SOURCES = Path(__file__).parent / "fake"


def compiled(directory: Path, name: str = "libcuda") -> Path | None:
    """The library, made there; None where there is no C compiler."""
    compiler = next((one for one in map(shutil.which, ("cc", "gcc", "clang")) if one), None)
    if compiler is None:
        return None
    out = directory / f"{name}.so.1"
    argv = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(out), f"{SOURCES}/{name}.c"]
    subprocess.run([*argv, f"-Wl,-soname,{name}.so.1", "-lpthread", "-ldl"], check=True)
    return out


class Fake:
    """What tests order of it, and ask."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)  # whoever wants a library of that name from now on gets this one
        self.library.fakeHold.argtypes = self.library.fakeGo.argtypes = [ctypes.c_void_p]
        self.library.fakeMine.restype = ctypes.c_size_t
        self.library.fakeLimit.argtypes = [ctypes.c_size_t]
        self.library.fakeLog.restype = ctypes.c_size_t
        self.library.fakeLog.argtypes = [ctypes.c_char_p, ctypes.c_size_t]

    def fail(self, name: str, status: int = 999, after: int = 0, times: int = 1) -> None:
        """Let the next calls of that name fail, behind some that do not."""
        self.library.fakeFail(name.encode(), after, status, times)

    def mend(self) -> None:
        """Nothing fails any more, nothing is held or captured, memory is plenty."""
        self.library.fakeMend()
        self.library.fakeRelease()
        self.library.fakeLimit(1 << 40)

    def hold(self, stream: int = 0) -> None:
        """Work on a stream, the default one if not said, does not go on. 2 is that of this thread."""
        self.library.fakeHold(stream)

    def go(self, stream: int = 0) -> None:
        """It goes on."""
        self.library.fakeGo(stream)

    def mine(self) -> int:
        """The default stream of this thread alone, which handle 2 is here, for other threads."""
        return int(self.library.fakeMine())

    def contexts(self, device: int) -> int:
        """How often the context of a device is held in this process."""
        return int(self.library.fakePrimary(device))

    def idle(self) -> None:
        """Wait until all streams have done what they can."""
        self.library.fakeIdle()

    def limit(self, nbytes: int) -> None:
        """Memory of each GPU, for this process."""
        self.library.fakeLimit(nbytes)

    def calls(self) -> list[tuple[str, int]]:
        """What was called since it was asked last, each with its thread."""
        room = self.library.fakeLog(None, 0)
        text = ctypes.create_string_buffer(room + 4096)
        used = self.library.fakeLog(text, room + 4096)
        return [(name, int(thread)) for name, thread in (one.split() for one in text.raw[:used].decode().splitlines())]

    def names(self) -> list[str]:
        """As `calls`, without the threads."""
        return [name for name, _ in self.calls()]

    def live(self) -> dict[str, int]:
        """What was made in this process and not undone."""
        self.idle()
        counts = {kind: self.library.fakeLive(kind.encode()) for kind in KINDS}
        return {kind: count for kind, count in counts.items() if count}


@functools.cache
def fake() -> Fake:
    """That of this process."""
    return Fake(os.environ[PATH])


def memory_of(pid: int | str = "self") -> set[str]:
    """The pieces of the GPUs' memory that a process keeps from being free, by their inodes."""
    found = set()
    name = f"/memfd:fake-gpu-{os.environ[NAME]} "
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(name):
                found.add(str(os.stat(f"/proc/{pid}/fd/{fd}").st_ino))
        except OSError:
            pass  # that of listdir itself
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if name in line:
            found.add(line.split()[4])
    return found


def seen(x: Any) -> Any:
    """The memory of an array on a fake GPU, as numpy sees it."""
    told = x.__cuda_array_interface__
    raw = types.SimpleNamespace(__array_interface__={key: told[key] for key in told if key != "stream"})
    return np.asarray(raw)


# --- another library that has arrays on the GPU: as much of cupy as is asked for ---


@contextmanager
def context(device: int = 0) -> Iterator[Any]:
    """The driver itself, for a library that uses it in this thread."""
    from cuda.bindings import driver

    def check(result: Any) -> Any:
        assert int(result[0]) == 0, result
        return result[1] if len(result) > 1 else None

    check(driver.cuInit(0))
    check(driver.cuCtxPushCurrent(check(driver.cuDevicePrimaryCtxRetain(device))))
    try:
        yield types.SimpleNamespace(
            **{
                name: (lambda *args, name=name: check(getattr(driver, name)(*args)))
                for name in dir(driver)
                if name.startswith("cu")
            },
            raw=driver,
        )
    finally:
        check(driver.cuCtxPopCurrent())
        check(driver.cuDevicePrimaryCtxRelease(device))


class ndarray:
    """An array over memory that `owner` keeps."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: Any, typestr: str, owner: Any) -> None:
        self.dtype = np.dtype(typestr)
        self.shape = shape
        self.owner = owner
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "data": (address, False),
            "stream": None,
        }

    def part(self, start: int, stop: int) -> ndarray:
        """Of one dimension."""
        at = self.__cuda_array_interface__["data"][0] + start * self.dtype.itemsize
        return ndarray(at, (stop - start,), None, self.dtype.str, self.owner)


class Memory:
    """Of one kind: `plain` (cudaMalloc), `managed`, `default` (cudaMallocAsync), `pool`, or `expandable`."""

    def __init__(self, kind: str, nbytes: int) -> None:
        self.kind, self.nbytes = kind, nbytes
        with context() as cu:
            if kind == "plain":
                self.address = int(cu.cuMemAlloc(nbytes))
            elif kind == "managed":
                self.address = int(cu.cuMemAllocManaged(nbytes, 1))
            elif kind == "default":
                self.address = int(cu.cuMemAllocAsync(nbytes, 0))
            elif kind == "pool":
                told = cu.raw.CUmemPoolProps()
                told.handleTypes = cu.raw.CUmemAllocationHandleType(1)
                self.pool = cu.cuMemPoolCreate(told)
                self.address = int(cu.cuMemAllocFromPoolAsync(nbytes, self.pool, 0))
            else:
                self._expandable()

    def _expandable(self) -> None:
        """As torch's expandable segments: pieces of 2 MiB that lie side by side."""
        from aioelastic.gpu import _vmm

        count = -(-self.nbytes // (2 << 20))
        pieces = [_vmm.create(0, 2 << 20) for _ in range(count)]
        self.address = _vmm.attach(0, [fd for _, fd in pieces], [2 << 20] * count)
        self.nbytes = count * (2 << 20)
        for address, fd in pieces:
            _vmm.unmap(address, [2 << 20])
            os.close(fd)

    def __del__(self) -> None:
        with context() as cu:
            if self.kind == "expandable":
                from aioelastic.gpu import _vmm

                _vmm.unmap(self.address, [2 << 20] * (self.nbytes // (2 << 20)))
            else:
                cu.cuMemFree(self.address)
            if self.kind == "pool":
                cu.cuMemPoolDestroy(self.pool)


def theirs(kind: str, values: Any) -> ndarray:
    """An array of theirs with these values, in memory of that kind."""
    values = np.asarray(values)
    owner = Memory(kind, values.nbytes)
    one = ndarray(owner.address, values.shape, None, values.dtype.str, owner)
    seen(one)[...] = values
    return one


def install() -> None:
    """From now on this process has a cupy."""
    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray = ndarray
    cupy.asarray = lambda x: ndarray(
        x.__cuda_array_interface__["data"][0], x.shape, x.strides, x.__cuda_array_interface__["typestr"], x
    )
    cupy.cuda = types.SimpleNamespace(
        get_current_stream=lambda device_id=-1: types.SimpleNamespace(ptr=0),
        runtime=types.SimpleNamespace(getDeviceCount=lambda: 2),
    )
    sys.modules["cupy"] = cupy
