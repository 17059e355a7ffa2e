"""A group of workers from its start to its result: attempts, restarts, the cascade, and what is left at the end.

In: a `GroupSpec`. Out: events while it lives, a `GroupResult` at its end. What was started here has ended when that is
told, or the result says what has not. Never here: bytes of output, a format, or a way of starting a process.
"""
