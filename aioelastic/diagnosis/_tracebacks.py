"""Which exception ended a Python program, by the last of its stderr. Pure; takes time in proportion to the text.

What a program prints proves nothing: it may print tracebacks of what it has caught, of its children, or made-up ones.
So this is a reading, the likeliest one, and whoever uses it says so.
"""

from __future__ import annotations

import re

LONGEST = 65_536  # characters of a text that are looked at, its last
NOISE = 20  # lines of others between the last frame of a traceback and its exception, at most
FOREIGN = 300  # lines with another prefix in the midst of one, at most

# texts: `re` compiles each when it is first needed, and only after a failure one is
_COLOUR = r"\x1b\[[0-9;]*m"  # Python 3.13 has coloured ones
# what is before it on its line: nothing, a prefix ("[rank0]: "), or the margin of an exception group
_HEAD = r"(?P<margin>.{0,200}?)(?P<group>(?:\+ )?Exception Group )?Traceback \(most recent call last\):\s*$"
_FRAME = r'  File "[^"]*", line \d+(?P<of>, in )?'
_RAISED = r"[^\W\d]\w*(?:\.[\w<>]+)*(?::(?: |$)|$)"
# a name that an exception is likely to have, where nothing else says that it is one
_LIKELY = r"[\w.<>]*(?:Error|Exception|Exit|Interrupt|Warning|Group|Iteration|Timeout|Fault)(?::|$)"
_WITHOUT_HEAD = r"(?:SyntaxError|IndentationError|TabError)(?::|$)"  # of the program's own file
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
# what comes before a traceback of something that went on afterwards
_WENT_ON = (
    r"Exception (?:ignored|in|occurred during) |Unhandled exception in |Error in (?:atexit|sys\.excepthook)"
    r"|(?:Task|Future) exception was never retrieved|(?:future|task|handle|transport|protocol|message|context): "
    r"|--- Logging error ---|Process \S+:\s*$|Object created at "
)


def raised(text: str) -> str:
    """The line that names the exception of the last traceback that ended something, as `"ValueError: bad lr"`; the
    first line of it, if its message has several. "" where there is none.

    Tracebacks of what went on (`Exception ignored in`, threads, tasks, children of multiprocessing) do not count, and
    of a chain the last one does, of an exception group the group itself.
    """
    lines = [re.sub(_COLOUR, "", one.rstrip("\r")) for one in text[-LONGEST:].split("\n")]
    found, end = "", 0
    went_on: dict[str, bool] = {}  # by margin: whether the last traceback is of something that did
    if any(re.match(_FRAME, one) for one in lines[:3]):  # the beginning may be cut off, in the middle of a traceback
        found, end = _exception(lines, 0, "", _LIKELY)
    for index, line in enumerate(lines):
        if (head := re.match(_HEAD, line)) is not None:
            margin = outer = head["margin"]
            if margin.endswith("| "):  # a part of a group, which is told as a whole
                continue
            if head["group"]:
                margin, outer = f"{margin}| ", margin.removesuffix("  ")
            before = _before(lines, index, outer)
            if not before.startswith(_CHAINED):
                went_on[outer] = re.match(_WENT_ON, before) is not None
            told, after = _exception(lines, index + 1, margin, _RAISED)
            end = max(end, after) if told and not margin else end
            if told and not went_on.get(outer):
                found = told
        elif index >= end and (frame := re.match(_FRAME, line)) is not None and frame["of"] is None:
            told, after = _exception(lines, index, "", _WITHOUT_HEAD)
            found, end = (told, after) if told else (found, end)
    return found


def _exception(lines: list[str], index: int, margin: str, like: str) -> tuple[str, int]:
    """Of the traceback whose frames begin at `index`: the line that names its exception, if any, and where it ends."""
    indented, noise, foreign = False, 0, 0
    while index < len(lines) and noise < NOISE and foreign < FOREIGN:
        line = lines[index]
        index += 1
        if not line.startswith(margin):  # another process on the same stream, or an inner part of a group
            foreign += 1
            continue
        line = line[len(margin) :]
        if re.match(_HEAD, line) is not None:
            break
        if not line.strip():
            continue
        if line[0] in " \t":
            indented = True
        elif indented and re.match(like, line) and not _is_noise(line, lines[index : index + 1], margin):
            return line, index
        else:
            noise += 1
    return "", index


_LEVELS = ("TRACE", "DEBUG", "INFO", "NOTICE", "WARN", "WARNING", "ERROR", "CRITICAL", "FATAL")  # of loggers


def _is_noise(line: str, following: list[str], margin: str) -> bool:
    """Whether it is somebody else's in the midst of a traceback, which goes on behind it, or a line of a logger."""
    word = line.partition(":")[0]
    if word in _LEVELS:  # INFO: ...
        return True
    goes_on = any(one.startswith(margin) and re.match(_FRAME, one[len(margin) :]) for one in following)
    return goes_on and re.match(_LIKELY, line) is None


def _before(lines: list[str], index: int, margin: str) -> str:
    """The last line above it that is neither empty nor indented."""
    for line in reversed(lines[max(index - 12, 0) : index]):
        line = line.removeprefix(margin)
        if line.strip() and line[0] not in " \t":
            return line
    return ""
