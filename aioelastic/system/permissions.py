"""What this program may do with a file, by its effective ids."""

from __future__ import annotations

import os

_BY_EFFECTIVE = os.access in os.supports_effective_ids


def may(path: str | os.PathLike[str], mode: int) -> bool:
    """Whether the system would let this program: access(2) asks for the real user and without capabilities, while
    open(2) and execve(2) go by the effective ones."""
    if os.access(path, mode, effective_ids=_BY_EFFECTIVE):
        return True
    if not _BY_EFFECTIVE or os.access("/", os.F_OK, effective_ids=True):
        return False
    # faccessat2(2) itself is forbidden, as in some sandboxes: what cannot be known, the start will tell
    return os.access(path, mode) if os.getuid() == os.geteuid() else os.path.exists(path)
