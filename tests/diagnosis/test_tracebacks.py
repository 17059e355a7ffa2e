"""Which exception ended a Python program: real outputs of real programs, and texts made to mislead."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import QUIET, py
from test_outcome import exit_with

from aioelastic import supervise
from aioelastic.diagnosis import Facts, cause_of, raised


def stderr_of(code: str, **more: str) -> str:
    """What a real Python says."""
    env = {"PATH": "/usr/bin:/bin", **more}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=150)
    return done.stderr


AT_EXIT = "import atexit, sys\natexit.register(lambda: print('wandb: Run finished', file=sys.stderr))\n"
REAL: dict[str, tuple[str, str]] = {
    "plain": ("raise RuntimeError('no')", "RuntimeError: no"),
    "no message": ("raise KeyError", "KeyError"),
    "of a module": (
        "import json; json.loads('')",
        "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    ),
    "a local class": (
        "def f():\n    class Odd(Exception): pass\n    raise Odd('x')\nf()",
        "f.<locals>.Odd: x",
    ),
    "not an error by name": ("class Boom(Exception): pass\nraise Boom('x')", "Boom: x"),
    "at exit": (AT_EXIT + "raise ValueError('bad lr')", "ValueError: bad lr"),
    "several lines": ("raise ValueError('1 error\\nlr\\n  Input should be a number')", "ValueError: 1 error"),
    "an empty first line": ("raise ValueError('\\nlr')", "ValueError: "),
    "notes": ("e = ValueError('x'); e.add_note('Hint: y'); e.add_note('KeyError: z'); raise e", "ValueError: x"),
    "a message like frames": ("raise ValueError('x\\n  File \"a.py\", line 1, in f\\n    g()')", "ValueError: x"),
    "no str": ("class E(Exception):\n    def __str__(self): 1/0\nraise E", "E: <exception str() failed>"),
    "context": ("try: 1/0\nexcept Exception: raise KeyError('late')", "KeyError: 'late'"),
    "cause": ("try: 1/0\nexcept Exception as e: raise KeyError('late') from e", "KeyError: 'late'"),
    "a group": (
        "raise ExceptionGroup('several', [ValueError('a'), ExceptionGroup('in', [KeyError('b')])])",
        "ExceptionGroup: several (2 sub-exceptions)",
    ),
    "a group of raised ones": (
        "def f():\n    raise ValueError('a')\ntry: f()\nexcept Exception as e: raise ExceptionGroup('g', [e])",
        "ExceptionGroup: g (1 sub-exception)",
    ),
    "after a group": (
        "try: raise ExceptionGroup('several', [ValueError('a')])\nexcept Exception: raise OSError('then')",
        "OSError: then",
    ),
    "syntax": ("def f(:", "SyntaxError: invalid syntax"),
    "syntax of eval": ("eval('a b')", "SyntaxError: invalid syntax"),
    "deep": ("def f(n): return f(n + 1)\nf(0)", "RecursionError: maximum recursion depth exceeded"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "deleted": ("class D:\n    def __del__(self): 1/0\nd = D(); del d\nimport sys; sys.exit(1)", ""),
    "deleted later": (
        "class D:\n    def __del__(self): 1/0\nimport builtins; builtins.keep = D()\nraise ValueError('mine')",
        "ValueError: mine",
    ),
    "a thread": (
        "import threading\nt = threading.Thread(target=lambda: 1/0); t.start(); t.join(); raise SystemExit(1)",
        "",
    ),
    "a chain in a thread": (
        (
            "import threading\ndef f():\n    try: 1/0\n    except Exception: raise KeyError('x')\n"
            "t = threading.Thread(target=f); t.start(); t.join(); raise SystemExit(1)"
        ),
        "",
    ),
    "a thread after it": (
        (
            "import threading, atexit\nthreading.Thread(target=lambda: (threading.main_thread().join(), 1/0)).start()\n"
            "raise ValueError('main')"
        ),
        "ValueError: main",
    ),
    "at exit raises": ("import atexit; atexit.register(lambda: 1/0); raise ValueError('x')", "ValueError: x"),
    "only at exit": ("import atexit; atexit.register(lambda: 1/0)", ""),
    "the hook raises": (
        "import sys\nsys.excepthook = lambda *a: {}['hook']\nraise ValueError('original')",
        "ValueError: original",
    ),
    "a task": (
        (
            "import asyncio\nasync def f(): 1/0\nasync def main():\n"
            "    t = asyncio.create_task(f()); await asyncio.sleep(0)\n"
            "    del t\nasyncio.run(main()); raise SystemExit(1)"
        ),
        "",
    ),
    "a callback": (
        (
            "import asyncio\nasync def main():\n"
            "    asyncio.get_running_loop().call_soon(lambda: 1/0); await asyncio.sleep(0)\n"
            "asyncio.run(main()); raise SystemExit(1)"
        ),
        "",
    ),
    "a logger that fails": ("import logging; logging.warning('%d', 'x'); raise SystemExit(1)", ""),
    "a child of multiprocessing": (
        (
            "import multiprocessing as m\np = m.get_context('fork').Process(target=lambda: 1/0); p.start(); p.join()\n"
            "raise SystemExit(1)"
        ),
        "",
    ),
    "a pool's task": (
        (
            "import concurrent.futures as c, multiprocessing as m\ndef f(): return 1/0\n"
            "with c.ProcessPoolExecutor(1, m.get_context('fork')) as e: e.submit(f).result()"
        ),
        "ZeroDivisionError: division by zero",
    ),
    "faulthandler's dump": ("import faulthandler; faulthandler.dump_traceback(); raise SystemExit(1)", ""),
    "a stack": ("import traceback; traceback.print_stack(); raise SystemExit(1)", ""),
    "a warning": ("import warnings; warnings.warn('ValueError: x'); raise SystemExit(1)", ""),
    "nothing": ("raise SystemExit(1)", ""),
    "words only": ("import sys; sys.exit('ValueError: x')", ""),
}


@pytest.mark.parametrize("name", REAL)
def test_real_programs(name: str) -> None:
    code, wanted = REAL[name]
    said = stderr_of(code)
    assert raised(said) == wanted, said
    # with the prefix that torch, or an outer supervisor, puts before each line, and as a terminal has it
    assert raised("".join(f"[rank0]: {line}\n" for line in said.splitlines())) in (wanted, "")
    assert raised(said.replace("\n", "\r\n")) == wanted


def test_colours() -> None:
    said = stderr_of("def f(): 1/0\nf()", FORCE_COLOR="1", PYTHON_COLORS="1")
    assert raised(said) == "ZeroDivisionError: division by zero"
    made = (
        '\x1b[1mTraceback (most recent call last):\x1b[0m\n  File \x1b[35m"x"\x1b[0m, line 1, in f\n'
        "\x1b[1;35mE\x1b[0m: \x1b[35mx\x1b[0m"
    )
    assert raised(made) == "E: x"


BEGIN = "Traceback (most recent call last):\n"
FRAME = '  File "x.py", line 1, in f\n    g()\n    ^^^\n'
MADE: dict[str, tuple[str, str]] = {
    "cut at the beginning": (f'{FRAME}  File "y.py", line 3, in g\nValueError: x\n', "ValueError: x"),
    "cut in a frame": (f'ile "a.py", line 7, in <module>\n    main()\n{FRAME}ValueError: x\n', "ValueError: x"),
    "cut at the end": (BEGIN + FRAME, ""),
    "cut in its first line": ("ack (most recent call last):\n" + FRAME + "ValueError: x", "ValueError: x"),
    "an earlier one and a cut one": (BEGIN + FRAME + "KeyError: 1\n" + BEGIN + FRAME, "KeyError: 1"),
    "another process in between": (f"{BEGIN}{FRAME}step 3: loss 0.1\n{FRAME}ValueError: x\n", "ValueError: x"),
    "a line like an error's": (f"{BEGIN}{FRAME}done: all\n{FRAME}ValueError: x\n", "ValueError: x"),
    "a logger in between": (f"{BEGIN}{FRAME}INFO: hello\nValueError: x\n", "ValueError: x"),
    "a logger behind": (f"{BEGIN}{FRAME}ValueError: x\nERROR: lost\nTypeError: y\n", "ValueError: x"),
    "two ranks mixed": (
        (
            "[rank0]: Traceback (most recent call last):\n[rank1]: Traceback (most recent call last):\n"
            '[rank0]:   File "x", line 1, in f\n[rank1]:   File "x", line 1, in f\n[rank0]: ValueError: a\n'
            "[rank1]: KeyError: b\n"
        ),
        "KeyError: b",
    ),
    "words that only look like one": ("ValueError: x\nKeyError: y\n", ""),
    "a dump": (
        'Fatal Python error: Aborted\n\nCurrent thread 0x1 (most recent call first):\n  File "x", line 3 in f\n',
        "",
    ),
    "a syntax error of its own file": (
        '  File "job.py", line 3\n    def f(:\n          ^\nSyntaxError: invalid syntax\n',
        "SyntaxError: invalid syntax",
    ),
    "and words behind": (
        'starting\n  File "job.py", line 3\n    x\nIndentationError: unexpected indent\nbash: exit\n',
        "IndentationError: unexpected indent",
    ),
    "a line of somebody's code": ('  File "job.py", line 3\n    x\nall is well\n', ""),
}


@pytest.mark.parametrize("name", MADE)
def test_made_up_texts(name: str) -> None:
    text, wanted = MADE[name]
    assert raised(text) == wanted


def test_any_text_is_read_in_time_and_never_raises() -> None:
    """Seeded: pieces of tracebacks in any order, and the longest lines that there can be."""
    pieces = [
        *(
            BEGIN,
            FRAME,
            "ValueError: x\n",
            "KeyError",
            "  + Exception Group " + BEGIN,
            "  | ",
            "    | ",
            "  +-+--- 1 ---\n",
        ),
        *("\n", "\r", "\x1b[31m", "Exception ignored in: x\n", '  File "', '", line 1', ", in f\n", "a.b" * 50),
        *("INFO: x\n", " " * 100, "\0", "é", "\ud800", "<locals>.", ": version `", "The above exception was "),
    ]
    seed = random.Random(14)
    for _ in range(2_000):
        raised("".join(seed.choices(pieces, k=seed.randrange(60))))
    began = time.process_time()
    for piece in pieces:
        for more in ("", "x", "\n", ": "):
            raised((piece + more) * (200_000 // len(piece + more)))
            said = ((piece + more) * (16_384 // len(piece + more)))[-16_384:]
            cause_of(Facts(exit_with(1), said=said))
            cause_of(Facts(exit_with(127), said=said))
    assert time.process_time() - began < 60  # most take a millisecond, and something quadratic minutes


# --- what is made of it ---


async def test_what_is_read_from_stderr_is_never_certain(tmp_path: Path) -> None:
    """The program has caught it, printed it, and ended for another reason: nobody can tell that from outside."""
    caught = "import sys, traceback\ntry: 1/0\nexcept Exception: traceback.print_exc()\nsys.exit(1)"
    why = (await supervise(py(caught), logs=QUIET, check=False))[0].why
    assert why is not None
    assert str(why) == "probably raised: ZeroDivisionError: division by zero"
    assert not why.certain


async def test_what_went_on_is_no_cause() -> None:
    code = "import threading, sys\nt = threading.Thread(target=lambda: 1/0); t.start(); t.join(); sys.exit(1)"
    why = (await supervise(py(code), logs=QUIET, check=False))[0].why
    assert why is not None
    assert why.kind == "exit_code"


def test_words_of_others_are_no_certain_cause() -> None:
    fatal = "Fatal Python error: Segmentation fault\n"
    assert cause_of(Facts(exit_with(signal=15), said=fatal)).kind == "foreign_signal"  # a child's
    assert cause_of(Facts(exit_with(signal=11), said=fatal)).certain
    assert not cause_of(Facts(exit_with(signal=6), said=fatal)).certain
    assert not cause_of(Facts(exit_with(1), said=fatal)).certain
    library = "ImportError: libx.so: cannot open shared object file: No such file or directory"
    assert not cause_of(Facts(exit_with(1), said=f"{library}\n")).certain
    assert cause_of(Facts(exit_with(1), raised=library)).certain
    own = cause_of(Facts(exit_with(1), raised="ValueError: mine", said=f"{library}\n"))
    assert (own.kind, own.evidence) == ("exception", ("ValueError: mine",))
