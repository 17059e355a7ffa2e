"""Specs are checked whole when they are made: one `SpecError` that names the field, the value and the remedy."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aioelastic import Command, Function, Group, Logs, Match, Rotate, SpecError, Std, Stop, plan, supervise
from aioelastic.model.group_spec import GroupSpec
from aioelastic.model.signal_names import parse_signal
from aioelastic.model.validation import check_env, check_timeout, prefix_fields

TRUE = Command("true")


def refused(make: Callable[[], object]) -> SpecError:
    """The error, after checking that it is whole: field, value, problem and remedy, all in one printable line."""
    with pytest.raises(SpecError) as caught:
        make()
    error = caught.value
    assert error.field
    assert error.problem
    assert error.remedy
    assert str(error).startswith(f"{error.field}=")
    assert error.problem in str(error)
    assert error.remedy in str(error)
    assert "\n" not in str(error)
    return error


@pytest.mark.parametrize("n", [0, -1, -(10**30), True, False, 1.0, 2.5, math.nan, "4", [4]])
def test_n_is_a_whole_number_from_one(n: Any) -> None:
    error = refused(lambda: GroupSpec.of(TRUE, n))
    assert error.field == "n"
    assert error.value is n
    assert "from 1" in error.remedy


@pytest.mark.parametrize("n", [10**12, 10**20])
def test_n_beyond_what_any_kernel_runs(n: int) -> None:
    """Refused at once, not after the memory for so many entries was asked for."""
    assert refused(lambda: GroupSpec.of(TRUE, n)).field == "n"
    assert refused(lambda: GroupSpec.of(lambda rank: TRUE if rank < 10_000 else 1 / 0, n)).field == "n"  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        ((), "argv"),
        (("",), "argv"),
        ((["echo", "hi"],), "argv"),
        ((("echo", "hi"),), "argv"),
        (("echo", 1), "argv[1]"),
        (("echo", None), "argv[1]"),
        (("echo", b"x"), "argv[1]"),
        ((b"echo",), "argv[0]"),
        (("echo", "a\0b"), "argv[1]"),
        (("ec\0ho",), "argv[0]"),
        (("echo", "\ud800"), "argv[1]"),
    ],
)
def test_argv(argv: tuple[Any, ...], field: str) -> None:
    assert refused(lambda: Command(*argv)).field == field


def test_argv_takes_paths_and_any_bytes_of_the_system() -> None:
    odd = os.fsdecode(b"\xff\xfe")
    assert Command(Path("/bin/echo"), Path("x"), odd).argv == ("/bin/echo", "x", odd)


@pytest.mark.parametrize(
    ("env", "field"),
    [
        (["A=1"], "env"),
        ("A=1", "env"),
        ({"": "1"}, "env key"),
        ({"A=B": "1"}, "env key"),
        ({"A\0": "1"}, "env key"),
        ({1: "1"}, "env key"),
        ({b"A": "1"}, "env key"),
        ({"A": 1}, "env['A']"),
        ({"A": b"1"}, "env['A']"),
        ({"A": True}, "env['A']"),
        ({"A": "1\0"}, "env['A']"),
        ({"A": "\ud800"}, "env['A']"),
        ({"\ud800": "1"}, "env key"),
    ],
)
def test_env(env: Any, field: str) -> None:
    assert refused(lambda: Command("true", env=env)).field == field
    assert refused(lambda: GroupSpec.of(TRUE, env=env)).field == field
    assert refused(lambda: check_env("env", env)).field == field


def test_env_remedy_shows_what_to_write() -> None:
    assert refused(lambda: Command("true", env={"N": 8})).remedy == "write '8'"  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "name",
    [
        *("API_TOKEN", "password", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "APIKEY", "X_API_KEY_FILE", "GIT_AUTH"),
        *("PGPASSWORD", "MYSQL_PWD", "SSHPASS", "passwords", "API_KEYS"),
    ],
)
def test_values_that_are_secrets_by_their_names_are_not_shown(name: str) -> None:
    env = {name: "hunter2", "TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "de", "OLDPWD": "/"}
    command = Command("true", env=env)
    spec = GroupSpec.of(command, env=env)
    planned = plan(spec)
    for text in (repr(command), repr(spec), repr(planned), str(planned), repr(Function(print).options(env=env))):
        assert "hunter2" not in text
    assert {f"  env: {name}='****'", "  env: KEYBOARD=de", "  env: OLDPWD=/"} <= set(str(planned).splitlines())
    assert command.env == env
    assert pickle.loads(pickle.dumps(command)) == command
    for wrong in ("hunter2\0", "hunter2\ud800", 1982):
        assert "hunter2" not in str(refused(lambda wrong=wrong: Command("true", env={name: wrong})))
    assert "1982" not in str(refused(lambda: Command("true", env={name: 1982})))  # type: ignore[dict-item]


def test_env_is_a_copy() -> None:
    mine: dict[str, str | None] = {"A": "1"}
    command, spec = Command("true", env=mine), GroupSpec.of(TRUE, env=mine)
    mine["A"] = "2"
    assert command.env == {"A": "1"}
    assert spec.env == {"A": "1"}


@pytest.mark.parametrize("cwd", [5, b"/", "a\0b", "", "\ud800"])
def test_cwd_text(cwd: Any) -> None:
    assert refused(lambda: Command("true", cwd=cwd)).field == "cwd"


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "\x1b[1m", "\ud800", "x" * 201, 5, b"web"])
def test_names(name: Any) -> None:
    assert refused(lambda: Command("true", name=name)).field == "name"
    assert refused(lambda: GroupSpec.of(TRUE, name=name)).field == "name"


def test_names_that_several_have_are_numbered() -> None:
    web, job = Command("web", name="web"), Command("job", name="job")
    assert GroupSpec.of([web, TRUE, Function(print), job, web]).names == ("web.1", "", "", "job", "web.2")
    assert GroupSpec.of(web, 2).names == ("web.1", "web.2")
    error = refused(lambda: GroupSpec.of([web, web, Command("other", name="web.2")]))
    assert (error.field, error.value) == ("name", "web.2")


def test_stdin() -> None:
    assert refused(lambda: Command("true", stdin="tty")).field == "stdin"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prefix", "told"),
    [
        ("{rnak}", "'rnak'"),
        ("{}", "unknown field"),
        ("{0}", "unknown field"),
        ("{name.__class__}", "unknown field"),
        ("{name[0]}", "unknown field"),
        ("{rank", "template"),
        ("rank}", "template"),
        ("{rank:{foo}}", "foo"),
        ("{rank:{}}", ""),
        ("{rank!z}", "template"),
        ("{rank:>999999999}", "wider"),
        ("{name:d}", "template"),
        ("{worker:d}", "template"),
        ("{rank:%}}", "template"),
        (None, "template"),
        (5, "template"),
        (b"{rank}", ""),
    ],
)
def test_prefix(prefix: Any, told: str) -> None:
    error = refused(lambda: Logs(prefix=prefix))
    assert error.field == "Logs.prefix"
    assert told in error.problem
    for name in ("{worker}", "{name}", "{rank}", "{host}", "{time}"):
        assert name in error.remedy


def test_prefix_fields() -> None:
    assert prefix_fields("{name}-{rank:>3} {{x}} {pid!r}") == ["name", "rank", "pid"]
    Logs(prefix="{name}{rank:03d}{local_rank}{host}{pid:>8}{attempt}{stream:<6}{time} {{}}")
    Logs(prefix="")


@pytest.mark.parametrize("given", ["NOPE", "SIGNOPE", "", "15x", 0, -1, 4242, 15.0, None, True, b"TERM", "SIGRTMIN+99"])
def test_unknown_signal(given: Any) -> None:
    error = refused(lambda: Stop(signal=given))
    assert error.field == "Stop.signal"
    assert "SIGTERM" in error.remedy


@pytest.mark.parametrize("given", ["KILL", "SIGKILL", 9, "9", signal.SIGKILL, "STOP", signal.SIGSTOP])
def test_uncatchable_signal(given: Any) -> None:
    error = refused(lambda: Stop(signal=given))
    assert error.field == "Stop.signal"
    assert "cannot be caught" in error.problem
    assert "grace=0" in error.remedy


@pytest.mark.parametrize("given", ["INT", "int", "SIGINT", "sigint", 2, "2", signal.SIGINT])
def test_forms_of_a_signal(given: Any) -> None:
    stop = Stop(signal=given)
    assert stop.signum is signal.SIGINT
    assert stop == Stop(signal=signal.SIGINT)
    assert parse_signal("x", given) is signal.SIGINT


@pytest.mark.parametrize("field", ["grace", "bound"])
@pytest.mark.parametrize(
    "given", [-1, -0.001, math.nan, math.inf, -math.inf, True, "30", None, pytest.param(10**400, id="10**400")]
)
def test_times_of_stop(field: str, given: Any) -> None:
    assert refused(lambda: Stop(**{field: given})).field == f"Stop.{field}"


@pytest.mark.parametrize("given", [-1, math.nan, "2", True])
async def test_other_times(given: Any) -> None:
    assert refused(lambda: Logs(drain=given)).field == "Logs.drain"
    assert refused(lambda: check_timeout("timeout", given)).field == "timeout"
    with pytest.raises(SpecError, match="timeout="):
        await supervise(TRUE, timeout=given)


def test_scope() -> None:
    assert refused(lambda: Stop(scope="all")).field == "Stop.scope"  # type: ignore[arg-type]
    assert refused(lambda: Stop(if_lost="wait")).field == "Stop.if_lost"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dir": 5}, "Logs.dir"),
        ({"dir": "a\0b"}, "Logs.dir"),
        ({"dir": ""}, "Logs.dir"),
        ({"dir": "\ud800"}, "Logs.dir"),
        ({"tee": "all"}, "Logs.tee"),
        ({"tee": True}, "Logs.tee"),
        ({"tee": 4}, "Logs.tee"),
        ({"tee": -1}, "Logs.tee"),
        ({"tee": {-1: Std.ALL}}, "Logs.tee key"),
        ({"tee": {"0": Std.ALL}}, "Logs.tee key"),
        ({"tee": {0: "x"}}, "Logs.tee[0]"),
        ({"tee": {0: {0: Std.OUT}}}, "Logs.tee[0]"),
        ({"dir": "x", "save": "out"}, "Logs.save"),
        ({"dir": "x", "save": {0: None}}, "Logs.save[0]"),
        ({"save": Std.ALL}, "Logs.save"),
        ({"rotate": Rotate()}, "Logs.rotate"),
        ({"match": "loss"}, "Logs.match"),
        ({"dir": "x", "rotate": 5}, "Logs.rotate"),
        ({"ranks": 0}, "Logs.ranks"),
        ({"ranks": [0, -1]}, "Logs.ranks"),
        ({"ranks": ["0"]}, "Logs.ranks"),
        ({"ranks": [True]}, "Logs.ranks"),
        ({"ranks": [[0]]}, "Logs.ranks"),
        ({"timestamps": "no"}, "Logs.timestamps"),
        ({"json": 1}, "Logs.json"),
        ({"dir": "x", "match": 5}, "Logs.match"),
        ({"dir": "x", "match": [""]}, "Match.include"),
        ({"dir": "x", "match": [None]}, "Match.include"),
        ({"callback": "f"}, "Logs.callback"),
        ({"when_full": "wait"}, "Logs.when_full"),
    ],
)
def test_logs(fields: dict[str, Any], field: str) -> None:
    assert refused(lambda: Logs(**fields)).field == field


def test_an_async_callback_would_never_run() -> None:
    async def callback(line: object) -> None: ...

    assert "async for" in refused(lambda: Logs(callback=callback)).remedy
    assert refused(lambda: Group(TRUE, on_event=callback)).field == "on_event"
    assert refused(lambda: Group(TRUE, on_event="print")).field == "on_event"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"file": ""}, "Match.file"),
        ({"file": "a/b"}, "Match.file"),
        ({"file": ".."}, "Match.file"),
        ({"file": "."}, "Match.file"),
        ({"file": "a\0"}, "Match.file"),
        ({"file": 5}, "Match.file"),
        ({"include": ("",)}, "Match.include"),
        ({"include": 5}, "Match.include"),
        ({"exclude": (5,)}, "Match.exclude"),
        ({"include": "loss\n"}, "Match.include"),
        ({"exclude": ("a", re.compile(b"\\Aend\\n"))}, "Match.exclude"),
        ({"std": 9}, "Match.std"),
        ({"std": "out"}, "Match.std"),
    ],
)
def test_match(fields: dict[str, Any], field: str) -> None:
    assert refused(lambda: Match(**fields)).field == field


def test_two_sinks_never_share_a_file() -> None:
    twice = [Match("a", file="x.log"), Match("b", file="x.log")]
    error = refused(lambda: Logs(dir="d", match=twice))
    assert error.field == "Match.file"
    assert error.value == "x.log"
    # bare patterns have matched.log together
    assert refused(lambda: Logs(dir="d", match=["a", Match("b", file="matched.log")])).field == "Match.file"
    assert [one.include for one in Logs(dir="d", match=["a", re.compile("b")]).matches] == [("a", re.compile("b"))]


def test_a_match_file_may_not_have_the_name_of_a_ranks_directory() -> None:
    logs = lambda: GroupSpec.of(TRUE, 2, logs=Logs(dir="d", match=Match("a", file="1")))  # noqa: E731
    assert refused(logs).field == "Match.file"


@pytest.mark.parametrize(("field", "given"), [("size", 0), ("size", 1.5), ("keep", -1), ("keep", True)])
def test_rotate(field: str, given: Any) -> None:
    assert refused(lambda: Rotate(**{field: given})).field == f"Rotate.{field}"


@pytest.mark.parametrize("name", ["", "x" * 201, "ü" * 101, "a/b", "a\0b", "a\nb", "\x1b[31m", 5, None])
def test_name(name: Any) -> None:
    assert refused(lambda: GroupSpec.of(TRUE, name=name)).field == "name"


@pytest.mark.parametrize("what", ["logs", "stop"])
def test_logs_and_stop_are_of_their_kind(what: str) -> None:
    assert refused(lambda: GroupSpec.of(TRUE, **{what: {"dir": "x"}})).field == what  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", ["echo hi", b"echo", None, 5, {0: TRUE}, {TRUE.argv}])
def test_entry_of_another_kind(entry: Any) -> None:
    assert refused(lambda: GroupSpec.of(entry, 2)).field == "entry"


def test_list_of_entries() -> None:
    assert GroupSpec.of([TRUE, TRUE]).entries == (TRUE, TRUE)
    assert GroupSpec.of([TRUE, TRUE], 2).entries == (TRUE, TRUE)
    assert refused(lambda: GroupSpec.of([])).field == "entry"
    error = refused(lambda: GroupSpec.of([TRUE, TRUE], 3))
    assert (error.field, error.value) == ("n", 3)
    assert "2" in error.problem
    assert refused(lambda: GroupSpec.of([TRUE, "echo"])).field == "entry[1]"  # type: ignore[list-item]
    assert refused(lambda: GroupSpec.of([TRUE, [TRUE]])).field == "entry[1]"  # type: ignore[list-item]


def test_builder() -> None:
    assert [one.argv for one in GroupSpec.of(lambda rank: Command("echo", str(rank)), 3).entries] == [
        ("echo", "0"),
        ("echo", "1"),
        ("echo", "2"),
    ]
    assert refused(lambda: GroupSpec.of(lambda rank: TRUE)).field == "n"


def test_builder_that_raises_for_rank_2() -> None:
    asked: list[int] = []

    def builder(rank: int) -> Command:
        asked.append(rank)
        if rank == 2:
            raise KeyError("no shard 2")
        return TRUE

    error = refused(lambda: GroupSpec.of(builder, 4))
    assert error.field == "entry(rank=2)"
    assert "KeyError: 'no shard 2'" in error.problem
    assert isinstance(error.__cause__, KeyError)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("junk", [None, "echo", ["echo"], 5, Command])
def test_builder_that_returns_junk(junk: Any) -> None:
    error = refused(lambda: GroupSpec.of(lambda rank: junk if rank == 2 else TRUE, 4))
    assert error.field == "entry(rank=2)"
    assert "not a Command" in error.problem


async def coroutine(rank: int) -> Command:
    raise AssertionError("it was called")


async def generator(rank: int) -> Any:
    raise AssertionError("it was called")
    yield


def takes_nothing() -> Any:
    raise AssertionError("it was called")


def takes_two(cfg: Any, steps: int) -> Any:
    raise AssertionError("it was called")


def returns_nothing(rank: int) -> None:
    raise AssertionError("it was called")


def returns_numbers(rank: int) -> list[float]:
    raise AssertionError("it was called")


def says_nothing_of_what_it_returns(rank):  # type: ignore[no-untyped-def]
    if rank < 0:
        return
    raise AssertionError("it was called")


def or_nothing(rank):  # type: ignore[no-untyped-def]
    return TRUE or None


@pytest.mark.parametrize("n", [None, 2])
@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (coroutine, "is an async function"),
        (generator, "is an async function"),
        (takes_nothing, "does not take a rank"),
        (takes_two, "does not take a rank"),
        (returns_nothing, "returns None, and no Command"),
        (returns_numbers, "returns list[float], and no Command"),
        (says_nothing_of_what_it_returns, "returns nothing, and no Command"),
    ],
)
def test_a_function_that_is_no_builder_is_not_called(fn: Any, words: str, n: int | None) -> None:
    error = refused(lambda: GroupSpec.of(fn, n))
    assert error.field == "entry"
    assert words in error.problem
    assert "Function(f, ...)" in error.remedy


@pytest.mark.parametrize(
    "given",
    [
        lambda *ranks: TRUE,
        lambda rank, more=1: TRUE,
        {0: TRUE}.get,
        or_nothing,
        functools.wraps(says_nothing_of_what_it_returns)(lambda rank: TRUE),  # a decorator may make something of it
    ],
)
def test_builders_of_any_shape(given: Any) -> None:
    assert GroupSpec.of(given, 1).entries == (TRUE,)


def test_builder_may_be_interrupted() -> None:
    def builder(rank: int) -> Command:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GroupSpec.of(builder, 1)


@pytest.mark.parametrize(
    ("logs", "field"),
    [
        (Logs(ranks=[2]), "Logs.ranks"),
        (Logs(tee={2: Std.ALL}), "Logs.tee"),
        (Logs(dir="x", save={5: Std.ALL}), "Logs.save"),
    ],
)
def test_ranks_that_do_not_exist(logs: Logs, field: str) -> None:
    error = refused(lambda: GroupSpec.of(TRUE, 2, logs=logs))
    assert error.field == field
    assert "0 to 1" in error.remedy


def test_tee_and_save_by_rank() -> None:
    logs = Logs(dir="x", tee={1: Std.OUT}, save={0: Std.ERR}, ranks=[0, 1])
    assert [logs.tees(rank) for rank in range(3)] == [Std.NONE, Std.OUT, Std.NONE]
    assert [logs.saves(rank) for rank in range(3)] == [Std.ERR, Std.NONE, Std.NONE]
    assert [Logs(ranks=[1]).tees(rank) for rank in range(2)] == [Std.NONE, Std.ALL]


SPECS: list[Any] = [
    Command("echo", "hi", env={"A": "1", "B": None}, cwd="/", stdin="inherit"),
    Rotate(1, 2),
    Match(("a", re.compile(b"b")), "c", Std.ERR, "x.log"),
    Logs(dir="x", tee={0: Std.OUT}, ranks=[0], match=["a"], rotate=Rotate()),
    Stop("INT", 1.5, "group", 2),
    GroupSpec.of([TRUE, TRUE], name="n", env={"A": "1"}),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_specs_are_values(spec: Any) -> None:
    """Equal when copied, in this and any other process; never changed."""
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.copy(spec) == spec
    assert copy.deepcopy(spec) == spec
    for field in dataclasses.fields(spec):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(spec, field.name, None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(spec, field.name)


@pytest.mark.parametrize(
    "mapping",
    [Command("true", env={"A": "1"}).env, GroupSpec.of(TRUE, env={"A": "1"}).env, Logs(tee={0: Std.OUT}).tee],
)
def test_mappings_inside_specs_are_frozen_too(mapping: Any) -> None:
    """One spec serves many groups: writing to it must not change them behind their back."""
    with pytest.raises(TypeError):
        mapping["B"] = "2"


def test_replacing_one_field() -> None:
    logs = Logs(dir="x", match=["a"], ranks=[0])
    assert dataclasses.replace(logs, prefix="") == Logs(dir="x", match=["a"], ranks=[0], prefix="")
    assert dataclasses.replace(Stop(), signal="INT") == Stop("INT")
    assert refused(lambda: dataclasses.replace(Stop(), grace=-1)).field == "Stop.grace"


def test_a_huge_value_is_cut() -> None:
    assert len(str(refused(lambda: Command("x" * 10_000 + "\0")))) < 400
