"""What may go wrong between processes that share memory."""

from __future__ import annotations


class SharingError(Exception):
    """Any of the below."""


class NotShareable(SharingError, TypeError):
    """This object cannot be shared; the message says what to do instead."""


class ShareLost(SharingError):
    """Memory, or a queue, of a process that is gone, and that nobody else holds."""


class ShareLimit(SharingError, MemoryError):
    """No room: the system has no more shared memory, or this process no more file descriptors."""


class ShareLeakWarning(ResourceWarning):
    """Shared memory was still held when its scope ended. The message names owner, holders, age and size."""


# what the code of others raises that cannot say what it is asked; and nothing else, so that what a signal's handler
# raises meanwhile (a time-out, say) is not taken for it
FAILURES = (
    SharingError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AssertionError,
    BufferError,
    ImportError,
    RuntimeError,
    SystemError,
)
