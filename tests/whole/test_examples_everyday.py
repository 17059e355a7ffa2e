"""Programs of every day in docs/examples, each beside one with the best other tool: both do it, and ours is shorter."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tokenize
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from helpers import OPTIONAL, alive, lacks

from aioelastic.testing import Program

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "explanation" / "eight-programs.md"
ROW = re.compile(r"^\|.*\]\(\.\./examples/(\S+)\) \| (\d+) \|.*\]\(\.\./examples/(\S+)\) \| (\d+) \|", re.MULTILINE)
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


# --- the table ---


def lines_of_code(path: Path) -> int:
    """Lines with code on them: no blank ones, comments or docstrings. Those of a Procfile cannot be broken where they
    are wider than a page, and count as if they were."""
    text = path.read_text()
    if path.suffix != ".py":
        return sum(-(-len(one) // 88) for one in text.splitlines() if not one.startswith("#"))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for one in tokens if one.type not in NO_CODE for line in range(one.start[0], one.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            lines -= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    return len(lines)


def test_what_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""Two\nlines."""\n\n# said\nx = (1,\n  2)  # said\ndef f():\n    """One."""\n    x\n'
    )
    assert lines_of_code(tmp_path / "a.py") == 4
    (tmp_path / "Procfile").write_text(f"# said\n\na: b # c\n{88 * 'd'}\n{89 * 'e'}\n")
    assert lines_of_code(tmp_path / "Procfile") == 4


def test_the_table_is_right_and_each_of_ours_is_shorter() -> None:
    rows = ROW.findall(PAGE.read_text())
    right = [(a, str(lines_of_code(EXAMPLES / a)), b, str(lines_of_code(EXAMPLES / b))) for a, _, b, _ in rows]
    assert rows == right
    assert [a for a, ours, _, others in rows if int(ours) >= int(others)] == []
    assert sorted(b for _, _, b, _ in rows) == sorted(
        f"others/{one.name}" for one in (EXAMPLES / "others").glob("*_with_*")
    )


# --- the programs ---


def both(
    name: str, *tools: str | tuple[str, str], mark: pytest.MarkDecorator | None = None, suffix: str = ".py"
) -> Any:
    """A test of ours and of the others, by tool, or by tool and the module that it needs (skipped without it)."""
    cases = [pytest.param(f"{name}{suffix}", id="aioelastic")]
    for one in tools:
        tool, module = (one, None) if isinstance(one, str) else one
        lacking = module is not None and importlib.util.find_spec(module) is None
        reason = lacks(module) if module in OPTIONAL else f"{module} is not installed"
        marks = [pytest.mark.skipif(lacking, reason=reason), *([mark] if mark else [])]
        cases.append(pytest.param(f"others/{name}_with_{tool}{suffix}", id=tool, marks=marks))
    return pytest.mark.parametrize("name", cases)


def run(name: str, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """To its end. A crash may leave a core dump: it has a directory of its own."""
    return subprocess.run([sys.executable, EXAMPLES / name, *map(str, args)], cwd=cwd, text=True, capture_output=True)


def started(name: str, *args: str, env: dict[str, str] | None = None) -> Program:
    """In the background. What it writes to stderr comes by stdout, too."""
    argv = [str(EXAMPLES / name), *args]
    source = f"import runpy, sys; sys.argv = {argv!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return Program(source, env=env, before=["/bin/sh", "-c", 'exec "$@" 2>&1', "sh"])


@both("model_servers", "asyncio", ("circus", "circus"))
def test_model_servers(name: str) -> None:
    with started(name, "/bin/sh", "-c", "echo ready; exec sleep 1000", env={"PORT": "0"}) as service:

        def servers() -> dict[int, dict[str, Any]]:
            with opener.open(f"{url}/models") as answer:
                return {one["pid"]: one for one in json.load(answer)}

        for _ in range(2):
            assert service.line("[worker").endswith("]: ready")
        url = re.findall(r"http://\S+", service.line("INFO:     Uvicorn running on"))[0]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        before = servers()
        crashed, other = before
        os.kill(crashed, signal.SIGKILL)
        assert service.line("[worker").endswith("]: ready")
        after = servers()
        assert (len(after), crashed in after, after[other]) == (2, False, before[other])
        if "circus" not in name:  # which counts none
            assert sorted(one["restarts"] for one in after.values()) == [0, 1]
            assert {one["state"] for one in after.values()} == {"running"}
        service.send_signal(signal.SIGTERM)
        service.wait()
        assert "Application shutdown complete" in service.output
        assert not any(map(alive, {**before, **after}))


@both("sweep", ("pebble", "pebble"))
def test_sweep(name: str, tmp_path: Path) -> None:
    ran = run(name, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    progress, table = ran.stdout.splitlines()[:12], ran.stdout.splitlines()[12:]
    assert progress[-1].startswith("12 of 12 done:")
    told = {(rate, power): outcome for rate, power, outcome in (row.split(maxsplit=2) for row in table)}
    assert len(told) == 12
    assert 0 < float(told["0.01", "2"]) < 4
    assert "SIGSEGV" in told["0.5", "2"]
    assert told["1.0", "4"].startswith("OverflowError(")


@both("benchmark", "subprocess")
def test_benchmark(name: str, tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    ran = run(name, "--runs", 2, "--cpu", cpu, "grep", "Cpus_allowed_list", "/proc/self/status", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    for number, line in enumerate(ran.stdout.splitlines()):
        kept = re.fullmatch(rf"run {number}: [0-9.]+ ms, CPU [0-9.]+ ms, [0-9.]+ MiB, output in (.+)", line)
        assert kept
        assert (tmp_path / kept[1]).read_text().split() == ["Cpus_allowed_list:", str(cpu)]
    late = run(name, "--timeout", "0.01", "sleep", "1000", cwd=tmp_path)
    assert (late.returncode, "did not end within 0.01 s" in late.stderr) == (1, True)
    failed = run(name, "sh", "-c", "echo oops >&2; exit 3", cwd=tmp_path)
    assert (failed.returncode, "oops" in failed.stderr, "3" in failed.stderr) == (1, True, True)


@both("pipeline", "multiprocessing")
def test_pipeline(name: str, tmp_path: Path) -> None:
    (tmp_path / "good").write_text("1\n2.5\n" * 20)  # more than there is room for in the queues
    (tmp_path / "bad").write_text("1\noops\n" + "2\n" * 20)
    ran = run(name, "good", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "sum 70.0\n", "")
    ran = run(name, "bad", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "parse" in ran.stderr
    assert ran.stderr.rstrip().endswith("ValueError: could not convert string to float: 'oops\\n'")


@both("ranks", ("torch", "torch"), mark=pytest.mark.torch)
def test_ranks(name: str, tmp_path: Path) -> None:
    if "torch" in name:  # which each of its ranks imports, for two seconds
        ran = run(name, 1, 1, 2, 4, 5, cwd=tmp_path)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[195]\n", "")
        return
    ran = run(name, 3, 1, 2, 4, 5, cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[120, 50, 25]\n", "")
    ran = run(name, 3, 1, 2, 0, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("rank 2 ")
    assert ran.stderr.rstrip().endswith("ZeroDivisionError: integer division or modulo by zero")


@both("dialogue", ("pexpect", "pexpect"))
def test_dialogue(name: str, tmp_path: Path) -> None:
    ran = run(name, "6 * 7", "2 ** 10", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "6 * 7 is 42\n2 ** 10 is 1024\n", "")
    ran = run(name, "6 * 7", "__import__('os').abort()", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "6 * 7 is 42\n")
    assert ("signal 6" if "pexpect" in name else "SIGABRT") in ran.stderr


LANGUAGE_SERVER = r"""
import json, sys
source, sink = sys.stdin.buffer, sys.stdout.buffer
asked = None
while asked != "exit":
    size = int(source.readline().split()[1])
    source.readline()
    message = json.loads(source.read(size))
    asked = message["method"]
    known = {"serverInfo": {"name": "gr\u00fc\u00dfe"}, "capabilities": {"hoverProvider": True, "b": "\u2026" * 2000}}
    answers = {"initialize": [{"method": "hello"}, {"id": 1, "result": known}], "shutdown": [{"id": 2, "result": None}]}
    for answer in answers.get(asked, ()):
        body = json.dumps(answer, ensure_ascii=False).encode()
        sink.write(b"Content-Length: %d\r\nContent-Type: x\r\n\r\n%b" % (len(body), body))
        sink.flush()
"""


def test_language_server(tmp_path: Path) -> None:
    ran = run("language_server.py", sys.executable, "-c", LANGUAGE_SERVER, cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "grüße can: b hoverProvider\n", "")


@both("test_server", "subprocess")
def test_test_server(name: str, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", tmp_path / "pytest.ini"]
    ran = subprocess.run([*command, EXAMPLES / name], cwd=tmp_path, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stdout
    assert "1 passed" in ran.stdout


@both("orchestrator", "asyncio")
def test_orchestrator(name: str) -> None:
    def status() -> dict[int, str]:
        said: dict[int, str] = ast.literal_eval("{" + program.line("{"))
        return said

    def running(greetings: int) -> dict[int, str]:
        while len(said := status()) < 3 or not all(one.startswith("runs as") for one in said.values()):
            pass
        while program.output.count("]: hello") < greetings:
            program.line()
        return said

    with started(name, "/bin/sh", "-c", "echo hello >&2; exec sleep 1000") as program:
        first = running(3)
        os.kill(int(first[1].split()[-1]), signal.SIGKILL)
        while not status()[1].startswith("restarts after"):
            pass
        again = running(4)
        assert (again[0], again[1] == first[1], again[2]) == (first[0], False, first[2])
        program.send_signal(signal.SIGTERM)
        assert program.wait() == 128 + signal.SIGTERM
        assert not any(alive(int(one.split()[-1])) for said in (first, again) for one in said.values())


@both("Procfile", ("honcho", "honcho"), suffix="")
def test_procfile(name: str, tmp_path: Path) -> None:
    port = 20_000 + os.getpid() % 10_000  # not one that the system gives to others
    if "honcho" in name:
        argv = ["honcho", "start", "-f", str(EXAMPLES / name), "-p", str(port)]
        source = f"import sys; sys.argv = {argv!r}; from honcho.command import main; main()"
    else:
        argv = ["aioelastic", "up", "-f", str(EXAMPLES / name), "--port", str(port), "--max-restarts", "2"]
        source = f"import sys; sys.argv = {argv!r}; from aioelastic.cli import program; program()"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the python3 of the Procfile
    there = ["/bin/sh", "-c", f'cd {shlex.quote(str(tmp_path))}; exec "$@" 2>&1', "sh"]
    with Program(source, env={"PATH": path}, before=there) as program:

        def heard(words: str, count: int = 1) -> None:
            while program.output.count(words) < count:
                program.line()

        heard("| Serving HTTP on 127.0.0.1")
        heard("| ready")
        (tmp_path / "jobs").write_text("echo one two\n")
        heard("| one two")
        (tmp_path / "page").write_text("hello")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/page") as answer:
            assert answer.read() == b"hello"
        for time in (2, 3):
            (tmp_path / "jobs").write_text("exit 3\n")
            heard("| ready", time)
        (tmp_path / "jobs").write_text("exit 3\n")
        assert program.wait() == 3
        assert "worker" in re.findall(r".*(?:exit code |with |rc=)3\b.*", program.output)[-1]
    with pytest.raises(urllib.error.URLError, match="Connection refused"):
        opener.open(f"http://127.0.0.1:{port}/page")
