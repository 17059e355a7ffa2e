"""A `Group` that can be of any kind: who imports it can start functions, run commands as other users, and talk to
workers, when nothing can be imported any more, since the program has changed its user, say, or its root directory. The
command line knows its only group, and does without."""

from __future__ import annotations

from ..planning import check_users
from . import function_parts, worker_input
from .group import Group

__all__ = ["Group", "check_users", "function_parts", "worker_input"]
