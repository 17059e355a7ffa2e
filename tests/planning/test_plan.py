"""`plan()` is pure; and the environment that workers get."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import random
import string
import sys
from pathlib import Path

import pytest
from helpers import QUIET, py, sh

from aioelastic import Command, Logs, Match, Std, Stop, plan, supervise
from aioelastic.model.group_spec import GroupSpec
from aioelastic.planning import TAG, merged

TWINS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
EVERYTHING = GroupSpec.of(
    lambda rank: Command("echo", f"a b {rank}", env={"X": str(rank), "Y": None}, cwd="somewhere"),
    3,
    name="trainer",
    env={"X": "group", "Z": "group"},
    logs=Logs(dir="no/such/dir", tee={1: Std.OUT}, save={0: Std.ERR}, match=Match("loss")),
    stop=Stop("INT", 5, "group"),
)


def test_same_in_same_out() -> None:
    environ = {"PATH": "/nowhere", "PYTHONUNBUFFERED": "0", TAG: "above/0/0"}
    one, two = (
        plan(EVERYTHING, run_id="r", host="h", master_port=7, environ=dict(environ), attempt=2) for _ in range(2)
    )
    assert one == two
    assert str(one) == str(two)
    assert pickle.loads(pickle.dumps(one)) == one
    assert copy.deepcopy(one) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.run_id = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.workers[0].rank = 5  # type: ignore[misc]


def test_does_not_depend_on_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan(EVERYTHING, environ={})
    monkeypatch.chdir(tmp_path)
    assert plan(EVERYTHING, environ={}) == before


def test_touches_nothing() -> None:
    """No file is opened, no directory listed, no process started, no socket made: Python's own audit is the witness."""
    seen: list[str] = []
    on = [True]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if on[0] and event.partition(".")[0] in {"open", "os", "subprocess", "socket", "shutil", "tempfile", "pathlib"}:
            seen.append(event)

    sys.addaudithook(hook)  # there is no way to take one off; this one goes quiet
    try:
        environ = dict(os.environ)
        text = str(plan(EVERYTHING, environ={"A": "1"}))
    finally:
        on[0] = False
    assert seen == []
    assert dict(os.environ) == environ
    assert "trainer" in text


def test_str_tells_all_of_it() -> None:
    text = str(plan(EVERYTHING, run_id="the-run", host="h", master_port=1234, environ={}))
    for word in (
        "'trainer'",
        "3 worker(s) on h",
        "the-run",
        "no/such/dir/the-run",
        "127.0.0.1",
        "1234",
        "SIGINT (group), SIGKILL after 5 s each",
        "rank 2: echo 'a b 2'",
        "cwd: somewhere",
        "stdin: null",
        "unset Y",
        "env: X=2",
        "env: Z=group",
        "env: WORLD_SIZE=3",
    ):
        assert word in text, word
    blocks = text.split("\nrank ")
    assert "attempt_0/0/stderr.log" in blocks[1]
    assert "stdout.log" not in blocks[1]
    assert "stdout: tee" in blocks[2]
    assert "tail only" in blocks[3]


def test_environment_of_each_rank() -> None:
    made = plan(GroupSpec.of(Command("x"), 3, name="g"), run_id="r", master_port=29_400, attempt=1)
    for worker in made.workers:
        env = worker.environ({})
        assert env["RANK"] == env["LOCAL_RANK"] == str(worker.rank)
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == "3"
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", "29400")
        for name in TWINS:
            assert env[f"AIOELASTIC_{name}"] == env[name]
        assert (env["AIOELASTIC_RUN_ID"], env["AIOELASTIC_NAME"], env["AIOELASTIC_ATTEMPT"]) == ("r", "g", "1")


def torchrun(rank: int) -> dict[str, str]:
    """All that a worker of torchrun has (docs of torchrun, and `_start_workers` of its agent), as by another job."""
    words = {"MASTER_ADDR": "192.0.2.7", "MASTER_PORT": "29500", "RANK": str(rank), "LOCAL_RANK": "1"}
    words |= {"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "3", "GROUP_WORLD_SIZE": "8"}
    words |= {"ROLE_NAME": "default", "ROLE_RANK": str(rank), "ROLE_WORLD_SIZE": "64"}
    words |= {"TORCHELASTIC_RUN_ID": "outer", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "9"}
    words |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": "/tmp/outer/error.json"}
    return words | {"TORCHELASTIC_TIMER_FILE": "/tmp/watchdog_timer_outer"}


def test_what_scripts_for_torchrun_read() -> None:
    outer = torchrun(25)
    spec = GroupSpec.of(Command("x"), 2, name="g")
    env = plan(spec, run_id="r", master_port=29_400, attempt=1, environ=outer).workers[1].environ(outer)
    assert {key: env.get(key) for key in outer} == {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29400",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "g",
        "ROLE_RANK": "1",
        "ROLE_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "r",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_ERROR_FILE": None,
        "TORCHELASTIC_TIMER_FILE": None,
    }


def test_a_role_has_the_ranks_that_the_caller_gives() -> None:
    spec = GroupSpec.of(lambda rank: Command("x", env={"RANK": str(8 + rank)}), 2, env={"WORLD_SIZE": "16"})
    env = plan(spec).workers[1].environ({})
    assert (env["ROLE_RANK"], env["ROLE_WORLD_SIZE"]) == ("9", "16")
    env = plan(GroupSpec.of(Command("x"), env={"ROLE_RANK": "5", "GROUP_RANK": "2"})).workers[0].environ({})
    assert (env["ROLE_RANK"], env["GROUP_RANK"], env["RANK"]) == ("5", "2", "0")


def test_names_of_workers() -> None:
    made = plan(GroupSpec.of([Command("x", name="web"), Command("y"), Command("z", name="web")]))
    assert [one.name for one in made.workers] == ["web.1", "", "web.2"]
    assert {"rank 0 (web.1): x", "rank 1: y", "rank 2 (web.2): z"} <= set(str(made).splitlines())
    (again,) = plan(GroupSpec.of([Command("x", name="web")] * 3), attempt=1, ranks=(2,)).workers
    assert again.name == "web.3"


def test_who_wins() -> None:
    """The caller's environ < what we set < the group's env < the command's env; None unsets."""
    entry = [
        Command("x"),
        Command("x", env={"A": "command", "B": None, "MASTER_ADDR": "command", "RANK": None}),
    ]
    spec = GroupSpec.of(
        entry, env={"A": "group", "B": "group", "C": None, "MASTER_PORT": "1", "PYTHONUNBUFFERED": None}
    )
    base = {"A": "caller", "B": "caller", "C": "caller", "D": "caller", "WORLD_SIZE": "77", "PYTHONUNBUFFERED": "1"}
    first, second = (one.environ(base) for one in plan(spec, environ=base).workers)
    assert (first["A"], first["B"], first["D"]) == ("group", "group", "caller")
    assert "C" not in first
    assert "PYTHONUNBUFFERED" not in first
    assert first["WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == "1"
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert second["A"] == "command"
    assert "B" not in second
    assert "RANK" not in second
    assert second["MASTER_ADDR"] == "command"


def test_a_twin_says_what_its_variable_says() -> None:
    spec = GroupSpec.of(Command("x"), env={"MASTER_PORT": "29500", "MASTER_ADDR": "10.0.0.1"})
    env = plan(spec, master_port=1).workers[0].environ({})
    assert env["AIOELASTIC_MASTER_PORT"] == env["MASTER_PORT"] == "29500"
    assert env["AIOELASTIC_MASTER_ADDR"] == env["MASTER_ADDR"] == "10.0.0.1"


def test_the_lineage_is_ours_alone() -> None:
    spec = GroupSpec.of(Command("x", env={TAG: None}), env={TAG: "forged"})
    assert plan(spec, run_id="r").workers[0].environ({})[TAG] == "r/0/0"
    assert plan(spec, run_id="r", environ={TAG: "above/3/0"}).workers[0].environ({})[TAG] == "above/3/0:r/0/0"


def test_pythons_unbuffered_output_is_the_callers_choice() -> None:
    spec = GroupSpec.of(Command("x"))
    assert plan(spec, environ={}).workers[0].environ({})["PYTHONUNBUFFERED"] == "1"
    assert plan(spec, environ={"PYTHONUNBUFFERED": ""}).workers[0].environ({})["PYTHONUNBUFFERED"] == ""


@pytest.mark.parametrize("seed", range(20))
def test_merged_against_a_plain_loop(seed: int) -> None:
    """Random mappings; the inputs come out as they went in."""
    rng = random.Random(seed)

    def some(none: bool) -> dict[str, str | None]:
        return {
            rng.choice(string.ascii_uppercase): None if none and rng.random() < 0.3 else str(rng.random())
            for _ in range(rng.randrange(20))
        }

    base: dict[str, str] = {key: str(value) for key, value in some(False).items()}
    overlay = some(True)
    before = dict(base), dict(overlay)
    out = merged(base, overlay)
    assert (base, overlay) == before
    for key in string.ascii_uppercase:
        if key in overlay:
            assert out.get(key) == overlay[key]
        else:
            assert out.get(key) == base.get(key)


@pytest.mark.parametrize("seed", range(3))
async def test_random_env_arrives_byte_for_byte(seed: int) -> None:
    """Any name without '=' and NUL, any value without NUL, through a real execve(2)."""
    rng = random.Random(seed)
    letters = [chr(one) for one in range(1, 256) if one != ord("=")] + ["é", "日", "\udcff", "\n", " "]
    mine: dict[str, str | None] = {
        "K" + "".join(rng.choices(letters, k=rng.randrange(8))): "".join(rng.choices(letters, k=rng.randrange(50)))
        for _ in range(20)
    }
    code = "import os; os.write(1, b'\\0'.join(k + b'=' + v for k, v in sorted(os.environb.items()) if k[:1] == b'K'))"
    result = await supervise(py(code, env=mine), logs=QUIET)
    wanted = sorted((os.fsencode(key), os.fsencode(value or "")) for key, value in mine.items())
    assert result[0].stdout.tail == b"\0".join(key + b"=" + value for key, value in wanted)


async def test_what_a_worker_really_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_CALLER", "yes")
    monkeypatch.setenv("GONE", "no")
    monkeypatch.setenv("RANK", "99")
    before = dict(os.environ)
    mine: dict[str, str | None] = {"GONE": None, "NEW": "a b"}
    script = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $FROM_CALLER ${GONE-unset} $NEW"'
    result = await supervise(sh(script), n=2, env=mine, logs=QUIET)
    assert [str(one.stdout) for one in result] == ["0 0 2 yes unset a b\n", "1 1 2 yes unset a b\n"]
    assert dict(os.environ) == before
    assert mine == {"GONE": None, "NEW": "a b"}


async def test_all_ranks_share_one_port_and_groups_do_not() -> None:
    script = 'echo "$MASTER_PORT $AIOELASTIC_MASTER_PORT"; exec sleep 0'
    one = await supervise(sh(script), n=3, logs=QUIET)
    ports = {port for worker in one for port in str(worker.stdout).split()}
    assert len(ports) == 1
    assert 1024 <= int(ports.pop()) <= 65_535
