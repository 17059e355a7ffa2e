"""The words: what is asked for, what happens, and what comes of it, as frozen data and pure functions over them.

In: what the caller writes. Out: values that are checked whole, once, when they are made. Never here: I/O, an event
loop, a clock, a process.
"""
