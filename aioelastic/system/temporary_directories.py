"""Where temporary files are. (`tempfile` does the same, but takes 3 ms to import.)"""

from __future__ import annotations

import io
import os
import sys

from .permissions import may


def temporary() -> str:
    """Where temporary files are; `tempfile.gettempdir()` tries it by a file, which stays if we are killed meanwhile."""
    said = getattr(sys.modules.get("tempfile"), "tempdir", None)  # whoever sets it has imported that
    if said is not None:
        return os.fspath(said) if isinstance(said, str) else os.fsdecode(said)
    given = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    places = [os.path.abspath(one) for one in (*given, "/tmp", "/var/tmp", "/usr/tmp") if one]
    return next((one for one in places if os.path.isdir(one) and may(one, os.W_OK | os.X_OK)), "/tmp")


def unnamed_file(prefix: str) -> io.FileIO:
    """One that goes with its descriptor. `prefix`: of the name that it has for an instant, where it needs one.

    Raises:
        OSError: none can be made.
    """
    where = temporary()
    try:
        fd = os.open(where, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # not every file system has such
        path = os.path.join(where, f"{prefix}{os.urandom(8).hex()}")
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.unlink(path)
    return io.FileIO(fd, "r+")
