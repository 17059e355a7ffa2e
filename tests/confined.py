"""The tests of shared memory where there is little of everything, as an ordinary user: 512 MiB of memory (a control
group), 64 MiB of /dev/shm (a tmpfs in a mount namespace), 128 descriptors. All pass that pass without.

Run as root: `python tests/confined.py`, with options for pytest, and tests in place of all these.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY, SHM = 512 << 20, 64 << 20  # bytes
DESCRIPTORS = 128
TESTS = ("sharing/test_sharing*.py", "memory/test_memory_*.py")
USER = 65_532  # that nobody is
CONFINED = "--confined"  # what follows is for the process that is about to be pytest
HOUSE = Path(__file__).parents[1]
GROUPS = Path("/sys/fs/cgroup")
# of util.h and sched.h
_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20000, 1 << 12, 1 << 14, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def control_group() -> Iterator[Path | None]:
    """One with that memory and no more swap, of whichever version there is; None: it cannot be had here."""
    old = GROUPS / "memory"
    made = (old if old.is_dir() else GROUPS) / f"aioelastic-confined-{os.getpid()}"
    if old.is_dir():
        limits = {"memory.limit_in_bytes": MEMORY, "memory.memsw.limit_in_bytes": MEMORY}
    else:
        limits = {"memory.max": MEMORY, "memory.swap.max": 0}
    try:
        made.mkdir()
    except OSError as exc:
        print(f"left out: the control group, which cannot be made: {exc}", flush=True)
        yield None
        return
    try:
        for name, limit in limits.items():
            if (made / name).exists():
                (made / name).write_text(str(limit))
            else:
                print(f"left out: {name}, which there is not here", flush=True)
        yield made
    finally:
        for left in range(200, 0, -1):
            try:
                made.rmdir()
                break
            except OSError:  # the kernel is still at the end of its last process
                if left == 1:
                    raise
                time.sleep(0.05)


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    told = [None if one is None else os.fsencode(one) for one in (source, target, kind, options)]
    if _libc.mount(*told[:3], flags, told[3]):
        raise OSError(ctypes.get_errno(), f"mount {target}")


def make_reachable(*directories: str) -> None:
    """By every user, in this namespace: below the home of root, say, there is nothing else then."""
    found = {}
    for one in directories:
        closed = [above for above in Path(one).parents if not above.stat().st_mode & stat.S_IXOTH]
        if closed:
            found[one] = closed[-1], os.open(one, os.O_PATH)
    for above in {above for above, _ in found.values()}:
        mount("tmpfs", str(above), "tmpfs", options="mode=755")
    for one, (_, fd) in found.items():
        os.makedirs(one, exist_ok=True)
        mount(f"/proc/self/fd/{fd}", one, flags=_MS_BIND)
        os.close(fd)


def confine(group: str) -> None:
    """In the process that is about to be pytest."""
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    if _libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    mount("tmpfs", "/dev/shm", "tmpfs", options=f"size={SHM},mode=1777")
    make_reachable(sys.base_prefix, sys.prefix)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)


def main(argv: list[str]) -> int:
    if argv[:1] == [CONFINED]:
        confine(argv[1])
        os.execl(sys.executable, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *argv[2:])
    if os.geteuid() != 0:
        print("tests/confined.py needs root: nothing was run")
        return 2
    with tempfile.TemporaryDirectory(dir="/tmp") as home, control_group() as group:
        for name in ("aioelastic", "tests", "pyproject.toml"):  # the checkout may be root's alone
            source = HOUSE / name
            copied = shutil.copytree if source.is_dir() else shutil.copy
            copied(source, Path(home, name))
        subprocess.run(["chown", "-R", f"{USER}:{USER}", home], check=True)
        tests = [*argv]
        if all(one.startswith("-") for one in argv):
            tests += [str(one.relative_to(HOUSE)) for kind in TESTS for one in sorted(HOUSE.glob(f"tests/{kind}"))]
        env = {**os.environ, "HOME": home, "TMPDIR": home, "PYTHONPATH": home}
        return subprocess.run(
            [sys.executable, __file__, CONFINED, str(group or ""), *tests], cwd=home, env=env, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
