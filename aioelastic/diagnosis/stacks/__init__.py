"""Where does it hang? In: live workers. Out: the Python stacks of each, as text, within a bound.

Never here: a signal to a process that may die of it, an exception for a worker that does not answer, or a wait for a
disk. What cannot be told is said in words instead.
"""

from ._collector import BOUND, Stacks

__all__ = ["BOUND", "Stacks"]
