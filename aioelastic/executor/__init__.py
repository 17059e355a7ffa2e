"""`WorkerExecutor`: tasks in supervised workers. In: functions and arguments. Out: futures.

One thread owns the workers; callers queue. Never here: a worker touched by another thread, or a task run twice.
"""

from __future__ import annotations

from .map_results import MapResults
from .worker_executor import WorkerExecutor

__all__ = ["MapResults", "WorkerExecutor"]
