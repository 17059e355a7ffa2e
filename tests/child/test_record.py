"""`@record` in a worker, and reading what it (or torch, or anything) left in `error.json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, kill_and_see_it_dead, needs, sh

from aioelastic import Command, Group, GroupFailed, Logs, Std, record, supervise
from aioelastic.child.worker.error_record import write_error
from aioelastic.diagnosis import read_report
from aioelastic.diagnosis._error_files import LIMIT, SHOWN
from aioelastic.model.failures import ErrorReport


def python(code: str) -> Command:
    """A worker that can import what is installed."""
    return Command(sys.executable, "-c", code)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "there" / "error.json"
    monkeypatch.setenv("AIOELASTIC_ERROR_FILE", str(path))
    return path


# --- writing ---


async def test_a_recorded_exception_reaches_the_failure() -> None:
    code = "from aioelastic import record\n@record\ndef main():\n    raise ValueError('bad lr: é')\nmain()"
    with pytest.raises(GroupFailed) as caught:
        await supervise(python(code), logs=QUIET)
    failure = caught.value.exceptions[0].failure
    assert failure.error is not None
    assert failure.error.message == "ValueError: bad lr: é"
    assert "in main" in failure.error.traceback
    assert failure.error.time is not None
    assert failure.exit is not None
    assert failure.exit.started_at < failure.error.time < failure.exit.ended_at
    assert "ValueError: bad lr: é" in failure.headline
    assert failure.exit.code == 1  # the exception went on as before


async def test_async_main() -> None:
    code = (
        "import asyncio\nfrom aioelastic import record\n"
        "@record\nasync def main():\n    await asyncio.sleep(0)\n    raise OSError(5, 'io')\nasyncio.run(main())"
    )
    result = await supervise(python(code), logs=QUIET, check=False)
    error = result.failures[0].error
    assert error is not None
    assert error.message == "OSError: [Errno 5] io"
    assert error.traceback.rstrip().endswith("OSError: [Errno 5] io")


async def test_with_logs_it_lies_beside_them(tmp_path: Path) -> None:
    code = "from aioelastic import record\n@record\ndef main():\n    1 / 0\nmain()"
    result = await supervise(python(code), logs=Logs(dir=tmp_path, tee=Std.NONE), check=False)
    assert result.log_dir is not None
    files = sorted(os.listdir(result.log_dir / "attempt_0" / "0"))
    assert files == ["error.json", "stderr.log", "stdout.log"]
    assert result.failures[0].error is not None


def test_arguments_value_and_name_pass_through(file: Path) -> None:
    @record
    def add(a: int, *, b: int) -> int:
        """Doc."""
        return a + b

    assert add(1, b=2) == 3
    assert (add.__name__, add.__doc__) == ("add", "Doc.")
    assert not file.exists()


async def test_async_value_passes_through(file: Path) -> None:
    @record
    async def main() -> int:
        return 7

    assert await main() == 7
    assert not file.exists()


def _generator() -> Any:
    yield 1


async def _async_generator() -> Any:
    yield 1


@pytest.mark.parametrize("given", [_generator, _async_generator, 5, None, "main", print])
def test_refuses_what_it_cannot_watch(given: Any) -> None:
    with pytest.raises(TypeError, match="@record decorates a plain or async function"):
        record(given)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_ways_out_are_not_failures(file: Path, kind: type[BaseException]) -> None:
    @record
    def main() -> None:
        raise kind

    @record
    async def async_main() -> None:
        raise kind

    with pytest.raises(kind):
        main()
    coroutine = async_main()
    with pytest.raises(kind):
        coroutine.send(None)
    assert not file.parent.exists()


def test_outside_a_worker_it_does_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AIOELASTIC_ERROR_FILE", raising=False)

    @record
    def main() -> None:
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        main()
    assert capsys.readouterr() == ("", "")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "exc",
    [
        Unprintable(),
        ValueError("\ud800"),
        ValueError("\0\x1b[31m\r\n"),
        ExceptionGroup("several", [ValueError("a"), OSError("b")]),
        ValueError("x" * 3_000_000),
    ],
    ids=["unprintable", "surrogate", "control", "group", "huge"],
)
def test_any_exception_goes_on_and_is_readable_afterwards(file: Path, exc: Exception) -> None:
    @record
    def main() -> None:
        raise exc

    with pytest.raises(type(exc)) as caught:
        main()
    assert caught.value is exc
    report = read_report(file)
    assert report is not None
    assert type(exc).__name__ in report.message
    assert "in main" in report.traceback
    assert os.listdir(file.parent) == ["error.json"]


def test_an_unwritable_path_does_not_hide_the_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AIOELASTIC_ERROR_FILE", str(tmp_path / "file" / "error.json"))

    @record
    def main() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        main()
    out, err = capsys.readouterr()
    assert "could not write" in err
    assert out == ""  # stdout is the program's own: others may parse it


@pytest.mark.parametrize("how", ["os.close(1); os.close(2)", "sys.stdout.close(); sys.stderr.close()"])
def test_nor_when_there_is_nowhere_to_complain(tmp_path: Path, how: str) -> None:
    (tmp_path / "file").touch()
    code = f"""
import os, sys
from aioelastic import record
@record
def main():
    {how}
    raise KeyError
try:
    main()
except KeyError:
    os._exit(42)
except BaseException:
    os._exit(43)
"""
    env = {**os.environ, "AIOELASTIC_ERROR_FILE": str(tmp_path / "file" / "error.json")}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 42


def test_a_plain_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_error(ValueError("x"), "error.json")
    assert os.listdir(tmp_path) == ["error.json"]


def test_a_full_disk_leaves_no_half(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from aioelastic.child.worker.error_record import write_error\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "write_error(ValueError('x'), sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "error.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == []


def test_of_a_long_chain_the_nearest_are_told(file: Path) -> None:
    first = exc = ValueError("number 999")
    for number in reversed(range(999)):
        later = ValueError(f"number {number}")
        later.__cause__, exc = exc, later
    write_error(exc)
    trace = json.loads(file.read_text())["aioelastic"]["traceback"]
    assert trace.endswith("ValueError: number 0\n")
    assert trace.count("ValueError") == 32
    for _ in range(999):
        assert exc.__cause__ is not None
        exc = exc.__cause__  # type: ignore[assignment]
    assert exc is first


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    """Written again and again while it is read again and again: each reading is a whole report."""
    path = tmp_path / "error.json"
    first = ValueError("a" * 100_000)
    write_error(first, str(path))
    writer = threading.Thread(target=lambda: [write_error(first, str(path)) for _ in range(100)])
    writer.start()
    try:
        while writer.is_alive():
            data = json.loads(path.read_bytes())
            assert data["message"]["message"].startswith("ValueError: aaa")
    finally:
        writer.join()


def test_importing_it_costs_no_asyncio() -> None:
    heavy = {"asyncio", "anyio", "uvloop", "psutil"}
    code = f"import sys, aioelastic; aioelastic.record; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# --- reading ---

TRACE = "Traceback (most recent call last):\n  ...\nValueError: x\n"


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (
            {"message": {"message": "ValueError: x", "extraInfo": {"py_callstack": TRACE, "timestamp": "17"}}},
            ErrorReport("ValueError: x", TRACE, 17.0, exact=False),
        ),
        ({"message": "ValueError: x", "timestamp": 17}, ErrorReport("ValueError: x", "", 17.0, exact=False)),
        ({"message": "ValueError: x", "timestamp": "17"}, ErrorReport("ValueError: x", "", 17.0, exact=False)),
        (
            {"aioelastic": {"message": "m", "traceback": TRACE, "time": 17.5}, "message": "other"},
            ErrorReport("m", TRACE, 17.5),
        ),
    ],
)
def test_schemas(tmp_path: Path, data: Any, wanted: ErrorReport) -> None:
    path = tmp_path / "error.json"
    path.write_text(json.dumps(data))
    assert read_report(path) == wanted


JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**400,
    "",
    "x",
    "nan",
    "1e999",
    [],
    [1],
    {},
    {"a": 1},
    "\ud800",
    float("nan"),
]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: ascii(junk)[:12])
def test_foreign_types_in_every_field(tmp_path: Path, junk: Any) -> None:
    """Whatever stands where, the reader takes what is usable and never raises."""
    path = tmp_path / "error.json"
    inner = {"message": "m", "extraInfo": {"py_callstack": TRACE, "timestamp": "17"}}
    info = {"py_callstack": TRACE, "timestamp": "17"}
    forms = [
        junk,
        {"message": junk, "timestamp": 1},
        {"message": "m", "timestamp": junk},
        {"message": {**inner, "message": junk}},
        {"message": {**inner, "extraInfo": junk}},
        {"message": {**inner, "extraInfo": {**info, "py_callstack": junk}}},
        {"message": {**inner, "extraInfo": {**info, "timestamp": junk}}},
        {"message": inner, "aioelastic": junk},
        *(
            {"aioelastic": {"message": "m", "traceback": TRACE, "time": 1, key: junk}}
            for key in ("message", "traceback", "time")
        ),
    ]
    for data in forms:
        path.write_bytes(_dump(data))
        report = read_report(path)
        assert report is not None, data
        assert isinstance(report.message, str)
        assert isinstance(report.traceback, str)
        assert report.time is None or isinstance(report.time, float)


def _dump(data: Any) -> bytes:
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(data).encode()
    finally:
        sys.set_int_max_str_digits(4300)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b'{"message": {"message": "Val', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"Segmentation fault\n", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"[1, 2]", "unknown form"),
        (b'{"message": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'"text"', "unknown form"),
        (b"{}", "unknown form"),
        (b"x" * (LIMIT + 1), "larger than"),
    ],
    ids=["cut", "utf16", "text", "deep list", "deep dict", "list", "long number", "string", "empty dict", "huge"],
)
def test_unusable_content_is_said(tmp_path: Path, raw: bytes, told: str) -> None:
    path = tmp_path / "error.json"
    path.write_bytes(raw)
    report = read_report(path)
    assert report is not None
    assert told in report.message
    assert report.traceback == ""


def test_a_long_message_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    path.write_text(
        json.dumps({"message": {"message": "x" * 500_000, "extraInfo": {"py_callstack": "y" * 400_000 + "z"}}})
    )
    report = read_report(path)
    assert report is not None
    assert len(report.message) == SHOWN
    assert len(report.traceback) == SHOWN
    assert report.traceback.endswith("z")  # the end of a traceback is what matters


def test_nothing_there(tmp_path: Path) -> None:
    assert read_report(tmp_path / "no") is None
    (tmp_path / "empty").touch()
    assert read_report(tmp_path / "empty") is None
    (tmp_path / "blank").write_text(" \n")
    assert read_report(tmp_path / "blank") is None
    assert read_report(tmp_path) is None  # a directory
    assert read_report(tmp_path / "empty" / "below") is None
    (tmp_path / "loop").symlink_to("loop")
    assert read_report(tmp_path / "loop") is None
    assert read_report(Path("a\0b")) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_unreadable(tmp_path: Path) -> None:
    code = (
        "import os, sys; from aioelastic.diagnosis import read_report; from pathlib import Path\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "print(read_report(Path(sys.argv[1])))"
    )
    tmp_path.chmod(0o700)
    (tmp_path / "error.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "error.json")], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr


@pytest.mark.parametrize("make", ["mkfifo", "ln -s /dev/zero", "ln -s /dev/ptmx", "mkdir"])
def test_a_worker_cannot_hang_its_supervisor_with_it(make: str) -> None:
    """A process of its own, with a bound: reading a FIFO that nobody writes would wait for ever."""
    code = f"""
import asyncio
from aioelastic import Command, Logs, Std, supervise
entry = Command("/bin/sh", "-c", '{make} "$AIOELASTIC_ERROR_FILE"; exit 3')
result = asyncio.run(supervise(entry, logs=Logs(tee=Std.NONE), check=False))
print(result.failures[0].cause)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert done.stdout == "exit code 3\n", done.stderr


async def test_an_odd_report_of_one_rank_does_not_cost_the_others() -> None:
    big = "1" + "0" * 400
    script = f"""printf '{{"message": "m%s", "timestamp": %s}}' $RANK {big} > "$AIOELASTIC_ERROR_FILE"; exit 3"""
    result = await supervise(sh(script), logs=QUIET, check=False)
    assert result.failures[0].error == ErrorReport("m0", "", None, exact=False)


@pytest.mark.parametrize("time", ["1", "-5", "0", "1e308", "-1e308", "99999999999", '"1"', "null"])
async def test_a_report_with_an_impossible_time_changes_nothing(time: str) -> None:
    """Before the worker began or after it ended: not when it failed. The kernel's order counts then."""
    script = f"""printf '{{"aioelastic": {{"message": "liar", "time": {time}}}}}' > "$AIOELASTIC_ERROR_FILE"; """
    entry = [
        sh(script + "echo up; exec sleep 1000"),
        sh("echo up; exec sleep 1000"),
        sh(script + "echo up; sleep 1000"),
    ]
    async with Group(entry, logs=QUIET, check=False) as group:
        said = 0
        async for _ in group.lines():
            said += 1
            if said == 3:
                break
        for rank in (1, 0):
            kill_and_see_it_dead(group[rank].pid, 9)
        result = await group.wait()
    # rank 2 was stopped by us: what it wrote long before it began does not make it a failure
    assert [(one.rank, one.first) for one in result.failures] == [(1, True), (0, False)]
    assert result[2].stopped


async def test_a_worker_that_succeeds_reports_nothing(tmp_path: Path) -> None:
    script = 'echo \'{"message": "left over"}\' > "$AIOELASTIC_ERROR_FILE"'
    result = await supervise(sh(script), logs=Logs(dir=tmp_path, tee=Std.NONE))
    assert result.ok
    assert result[0].failure is None


async def test_the_temporary_place_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    await supervise(sh('echo x > "$AIOELASTIC_ERROR_FILE"; exit 1'), logs=QUIET, check=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.torch
async def test_torchs_own_record_is_read() -> None:
    needs("torch")
    code = (
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main():\n    raise ValueError('from torch')\nmain()"
    )
    result = await supervise(python(code), logs=QUIET, check=False)
    error = result.failures[0].error
    assert error is not None
    assert error.message == "ValueError: from torch"
    assert "in main" in error.traceback
    assert error.time is not None


@pytest.mark.torch
def test_torch_reads_ours(tmp_path: Path) -> None:
    needs("torch")
    path = tmp_path / "error.json"
    try:
        raise ValueError("from us")
    except ValueError as exc:
        write_error(exc, str(path))
    code = (
        "import sys\nfrom torch.distributed.elastic.multiprocessing.errors import ProcessFailure\n"
        "f = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=sys.argv[1])\n"
        "print(f.message['message'], f.timestamp > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout == "ValueError: from us True\n", done.stderr
