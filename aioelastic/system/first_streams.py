"""What the numbers of standard output and error were when the package was imported: a program may close them later, and
open something else there, before anything of ours is loaded that needs them."""

from __future__ import annotations

import os

Identity = tuple[int, int]  # device and inode


def identity(fd: int) -> Identity | None:
    """What is open by that number; None: nothing."""
    try:
        info = os.fstat(fd)
    except OSError:
        return None
    return info.st_dev, info.st_ino


AT_FIRST = {fd: identity(fd) for fd in (1, 2)}
