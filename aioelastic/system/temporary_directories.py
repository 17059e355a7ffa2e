"""Where temporary files are. (`tempfile` does the same, but takes 3 ms to import.)"""

from __future__ import annotations

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
