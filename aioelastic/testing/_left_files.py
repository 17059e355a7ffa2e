"""Names in /dev/shm, and ours among the temporary files: which are left by us, on a machine that others use too."""

from __future__ import annotations

import contextlib
import os
import time
from fnmatch import fnmatch
from pathlib import Path

from ..processes.proc_files import pids
from ..system.temporary_directories import temporary
from ._process_tree import descendants

SHM = "/dev/shm"
AGAIN, LONGEST = 0.1, 2.0  # seconds: a name that nobody holds is looked at again so often, and for so long


def names() -> dict[str, str]:
    """Identity and path of what our user has there."""
    found: dict[str, str] = {}
    for place, prefix in ((SHM, ""), (temporary(), "aioelastic-shares-")):
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    about = entry.stat(follow_symlinks=False)
                    if about.st_uid == os.geteuid() and entry.name.startswith(prefix):
                        found[f"{entry.path}\0{about.st_dev}:{about.st_ino}"] = entry.path
    return found


def ours(new: list[str], ignore: tuple[str, ...]) -> list[str]:
    """Those of them that no stranger has open, and that stay: one may be just coming or going."""
    new = [one for one in new if not any(fnmatch(os.path.basename(_path(one)), pattern) for pattern in ignore)]
    until = time.monotonic() + LONGEST
    while new:
        held = _held_by_strangers()
        there = names()
        new = [one for one in new if one in there and one.partition("\0")[2] not in held]
        if not new or time.monotonic() > until:
            break
        time.sleep(AGAIN)
    return [_path(one) for one in new]


def _path(identity: str) -> str:
    return identity.partition("\0")[0]


def _held_by_strangers() -> set[str]:
    """Device and inode of what others have mapped or open, as far as we may look."""
    family = descendants()
    held: set[str] = set()
    for pid in pids():
        if pid in family or pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text("utf-8", "replace").splitlines():
                fields = line.split(None, 5)
                major, _, minor = fields[3].partition(":")
                held.add(f"{os.makedev(int(major, 16), int(minor, 16))}:{fields[4]}")
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    about = os.stat(f"/proc/{pid}/fd/{fd}")
                    held.add(f"{about.st_dev}:{about.st_ino}")
    return held
