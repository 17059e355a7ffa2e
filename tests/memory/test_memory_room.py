"""How much shared memory there may be: what the machine, its control groups and its file systems leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aioelastic import memory, sharing
from aioelastic.memory import _limits
from aioelastic.system import shared_memory_names

MIB = 1 << 20
MACHINE = {"/proc/meminfo": "MemTotal:       16777216 kB\nSwapTotal:       1048576 kB\n"}  # 16 GiB, and one of swap
V2 = "25 24 0:22 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
V1 = "30 24 0:26 {root} /sys/fs/cgroup/memory rw shared:12 - cgroup cgroup rw,memory\n"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What the kernel says."""
    found = dict(MACHINE)
    monkeypatch.setattr(_limits, "_lines", lambda path: found.get(path, "").splitlines())
    forget()
    yield found
    forget()


def forget() -> None:
    """What was seen."""
    _limits._known, _limits._seen = (0.0, None), (0.0, [])


GROUPS: dict[str, tuple[dict[str, str], int, int]] = {
    "none": ({}, 16384, 17408),
    "v2, its own": ({"/sys/fs/cgroup/a/b/memory.max": str(300 * MIB)}, 300, 1324),
    "v2, without swap": (
        {"/sys/fs/cgroup/a/b/memory.max": str(300 * MIB), "/sys/fs/cgroup/a/b/memory.swap.max": "0"},
        300,
        300,
    ),
    "v2, one above": (
        {"/sys/fs/cgroup/a/memory.max": str(200 * MIB), "/sys/fs/cgroup/a/b/memory.max": "max"},
        200,
        1224,
    ),
    "v2, the lowest": (
        {"/sys/fs/cgroup/a/memory.max": str(200 * MIB), "/sys/fs/cgroup/a/b/memory.max": str(900 * MIB)},
        200,
        1224,
    ),
    "v2, more than there is": ({"/sys/fs/cgroup/a/b/memory.max": str(1 << 50)}, 16384, 17408),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_control_groups_of_version_2(kind: str, files: dict[str, str]) -> None:
    more, least, most = GROUPS[kind]
    files.update({"/proc/self/cgroup": "0::/a/b\n", "/proc/self/mountinfo": V2, **more})
    assert _limits._look()[:2] == (least * MIB, most * MIB)


@pytest.mark.parametrize(
    ("root", "path", "where"),
    [
        ("/", "/a/b", "/sys/fs/cgroup/memory/a"),
        ("/a", "/a/b", "/sys/fs/cgroup/memory/b"),
        ("/docker/x", "/docker/x", "/sys/fs/cgroup/memory"),
        ("/", "/../other", "/sys/fs/cgroup/memory"),
    ],
)
def test_control_groups_of_version_1(root: str, path: str, where: str, files: dict[str, str]) -> None:
    files["/proc/self/cgroup"] = f"5:cpu,cpuacct:/z\n4:memory:{path}\n"
    files["/proc/self/mountinfo"] = V1.format(root=root)
    files[f"{where}/memory.limit_in_bytes"] = str(100 * MIB)
    files[f"{where}/memory.memsw.limit_in_bytes"] = str(150 * MIB)
    assert _limits._look()[:2] == (100 * MIB, 150 * MIB)


ALL = 1 << 50


def test_what_may_lie_idle(files: dict[str, str], tmp_path: Path) -> None:
    assert _limits.idle(None, ALL) == 2048 * MIB
    assert _limits.idle(None, 5) == 5
    files.update({"/proc/self/cgroup": "0::/a\n", "/proc/self/mountinfo": V2})
    files["/sys/fs/cgroup/a/memory.max"] = str(300 * MIB)
    forget()
    assert _limits.idle(None, ALL) == 75 * MIB
    assert _limits.idle(str(tmp_path / "gone"), ALL) == 75 * MIB


def test_a_small_file_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    about = os.statvfs(tmp_path)
    for free, most in ((16384, 16), (6144, 5), (5000, 3), (2000, 0)):
        small: Any = os.statvfs_result((4096, 4096, 16384, free, free, *about[5:]))
        monkeypatch.setattr(os, "statvfs", lambda path, small=small: small)
        assert _limits.idle(str(tmp_path), 12 * MIB if free < 16384 else ALL) // MIB == most


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("workers", [1, 6, 100])
def test_however_many_workers_keep_memory_some_is_left(version: int, workers: int, files: dict[str, str]) -> None:
    """Each has 10 MiB of its own, and would keep as much as it may."""
    if version == 2:
        files.update({"/proc/self/cgroup": "0::/a\n", "/proc/self/mountinfo": V2})
        limit, used, cached = "/sys/fs/cgroup/a/memory.max", "memory.current", "active_file"
    else:
        files.update({"/proc/self/cgroup": "4:memory:/a\n", "/proc/self/mountinfo": V1.format(root="/")})
        limit, used, cached = (
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_active_file",
        )
    home = os.path.dirname(limit)
    all_there_is = max(400, 20 * workers) * MIB
    files[limit] = str(all_there_is)
    files[f"{home}/memory.stat"] = f"anon 5\n{cached} {8 * MIB}\n"  # which the system takes back
    kept = [0] * workers
    for _ in range(10):
        for at in range(workers):
            files[f"{home}/{used}"] = str((10 * workers + 8) * MIB + sum(kept))
            forget()
            kept[at] = _limits.idle(None, kept[at] + 25 * MIB)
    left = all_there_is - sum(kept) - 10 * workers * MIB
    assert left > all_there_is // 8 - 13 * MIB
    assert sum(kept) > 20 * MIB


def test_what_lies_idle_makes_room_for_others(files: dict[str, str]) -> None:
    files.update({"/proc/self/cgroup": "0::/a\n", "/proc/self/mountinfo": V2})
    files.update({"/sys/fs/cgroup/a/memory.max": str(400 * MIB), "/sys/fs/cgroup/a/memory.current": str(100 * MIB)})
    sharing.trim()
    sharing.empty(10 * MIB, "u1")
    sharing.empty(5 * MIB, "u1")
    assert sharing.stats().idle == 15 * MIB
    files["/sys/fs/cgroup/a/memory.current"] = str(280 * MIB)
    forget()
    made = sharing.empty(40 * MIB, "u1")
    assert (sharing.stats().idle, made.nbytes) == (0, 40 * MIB)


def test_more_than_there_can_be(files: dict[str, str]) -> None:
    files.update({"/proc/self/cgroup": "0::/a\n", "/proc/self/mountinfo": V2})
    files.update({"/sys/fs/cgroup/a/memory.max": str(300 * MIB), "/sys/fs/cgroup/a/memory.swap.max": "0"})
    forget()
    sharing.trim()
    with pytest.raises(sharing.ShareLimit, match=f"cannot have {320 * MIB} bytes .* may have {300 * MIB}, with swap"):
        sharing.empty(300 * MIB + 1, "u1")
    first = sharing.empty(160 * MIB, "u1")
    with pytest.raises(sharing.ShareLimit, match=f"may have {300 * MIB}, with swap, and has {160 * MIB}"):
        sharing.empty(200 * MIB, "u1")
    del first
    second = sharing.empty(200 * MIB, "u1")  # what lay idle has gone for it
    assert (sharing.stats().segments, second.nbytes) == (1, 200 * MIB)


def test_the_machine_itself_has_limits() -> None:
    with pytest.raises(sharing.ShareLimit, match="this process may have"):
        sharing.empty(1 << 50, "u1")


IN_A_GROUP = """
import numpy
from aioelastic import sharing
queue = sharing.Queue()
for mib in range(4, 40, 2):
    queue.put_sync(numpy.ones(mib << 20, "u1"))
    assert queue.get_sync()[-1] == 1
assert sharing.stats().idle <= 50 << 20
try:
    sharing.empty(1 << 30, "u1")
except sharing.ShareLimit as exc:
    print("fine")
"""


def test_in_a_control_group() -> None:
    for base, limits in (
        (Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")),
        (Path("/sys/fs/cgroup"), ("memory.max", "memory.swap.max")),
    ):
        group = base / f"aioelastic-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limits[0]).write_text(str(200 * MIB))
        except OSError:
            group.rmdir()
            continue
        break
    else:
        pytest.skip("needs root, or a kernel that has it: a control group with a limit on memory")
    swap = 0 if limits[1] == "memory.swap.max" else 200 * MIB
    if (group / limits[1]).exists():
        (group / limits[1]).write_text(str(swap))
    join = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{IN_A_GROUP}'"
    try:
        run = subprocess.run(["sh", "-c", join], capture_output=True, text=True, check=False)
    finally:
        group.rmdir()
    assert (run.returncode, run.stdout) == (0, "fine\n"), run.stderr


def test_a_directory_that_was_removed_is_made_again(tmp_path: Path) -> None:
    sharing.configure(strategy="file", directory=tmp_path)
    try:
        before = sharing.copy(np.full(1 << 17, 1, "u1"))
        shutil.rmtree(shared_memory_names.own_directory(str(tmp_path)))
        after = sharing.copy(np.full(1 << 17, 2, "u1"))
        assert os.path.isdir(shared_memory_names.own_directory(str(tmp_path)))
        assert (np.asarray(before) == 1).all()
        assert (np.asarray(after) == 2).all()
        del before, after
        sharing.trim()
        shutil.rmtree(tmp_path)
        with pytest.raises(sharing.ShareLimit, match=f"below {tmp_path}"):
            sharing.empty(1 << 17, "u1")
    finally:
        sharing.trim()
        sharing.configure(strategy="memfd")
        memory.arena.limit = None
