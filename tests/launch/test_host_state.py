"""A worker begins with what its program has when it is started, whatever that was when an earlier group began.

The measure is a child that the program starts by itself at the same moment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aioelastic.launch import _host_state

# what a process has, told by itself; what differs between any two processes is left out
PROBE = """
import ctypes, json, os, resource
def state():
    out = {}
    for line in open("/proc/thread-self/status"):
        key, _, value = line.partition(":")
        if key in ("Umask", "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs",
                   "Seccomp_filters", "SigBlk", "SigIgn"):
            out[key] = value.strip()
    python = 1 << 12 | 1 << 24 | 3 << 31  # SIGPIPE and SIGXFSZ, which Python ignores; those of the C library
    out["SigIgn"] = hex(int(out["SigIgn"], 16) & ~python)
    out["nice"] = os.getpriority(os.PRIO_PROCESS, 0)
    out["policy"] = [os.sched_getscheduler(0), os.sched_getparam(0).sched_priority]
    out["cpus"] = sorted(os.sched_getaffinity(0))
    out["ioprio"] = ctypes.CDLL(None).syscall({"x86_64": 252}.get(os.uname().machine, 31), 1, 0)
    libc, mode, nodes = ctypes.CDLL(None), ctypes.c_int(), (ctypes.c_char * 512)()
    libc.syscall({"x86_64": 239}.get(os.uname().machine, 236), ctypes.byref(mode), nodes, 4096, None, 0)
    out["memory policy"] = [mode.value, bytes(nodes).hex().rstrip("0")]
    out["personality"] = libc.personality(-1)
    out["timer slack, huge pages, executable memory"] = [libc.prctl(one, 0, 0, 0, 0) for one in (30, 42, 66)]
    for what, make, undo in (("file", lambda path: os.close(os.open(path, os.O_CREAT)), os.unlink),
                             ("directory", os.mkdir, os.rmdir)):
        made = f"{os.path.dirname(__file__)}/made-{what}-{os.getpid()}"
        try:
            make(made)
            undo(made)
        except PermissionError:
            out[f"a {what} that is made"] = "is not permitted"
    out["oom_score_adj"] = open("/proc/self/oom_score_adj").read().strip()
    out["coredump_filter"] = open("/proc/self/coredump_filter").read().strip()
    out["limits"] = [resource.getrlimit(one) for one in range(15)]
    out["cgroup"] = open("/proc/self/cgroup").read()
    out["cwd"] = os.getcwd()
    names = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts", "time")
    out["namespaces"] = {one: os.readlink(f"/proc/thread-self/ns/{one}") for one in names}
    root = os.stat("/")
    out["root"] = [root.st_dev, root.st_ino]
    return out
if __name__ == "__main__":
    print(json.dumps(state()))
"""

PROGRAM = """
import asyncio, ctypes, json, os, resource, signal, subprocess, sys
from aioelastic import Command, Function, Logs, Std, supervise
import probe

QUIET = Logs(tee=Std.NONE)
libc = ctypes.CDLL(None, use_errno=True)
ME = [sys.executable, "-S", probe.__file__]

def checked(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def prctl(*args):
    checked(libc.prctl(*args, *[0] * (5 - len(args))))

def syscall(number, *args):
    checked(libc.syscall(number, *args))

def drop(number):
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    checked(libc.capget(header, data))
    for at in range(3):
        data[at] &= ~(1 << number)
    checked(libc.capset(header, data))

def limit(which, change):
    resource.setrlimit(which, change(*resource.getrlimit(which)))

def write(path, text):
    with open(path, "w") as file:
        file.write(text)

def moved():
    for kind in ("pids", "cpu", "freezer", ""):
        home = f"/sys/fs/cgroup/{kind}".rstrip("/")
        if os.path.exists(f"{home}/cgroup.procs"):
            os.makedirs(f"{home}/aioelastic-test-{os.getppid()}", exist_ok=True)
            with open(f"{home}/aioelastic-test-{os.getppid()}/cgroup.procs", "w") as file:
                file.write(str(os.getpid()))
            return
    raise OSError("no control groups")

def landlock(access):
    handled = ctypes.c_uint64(access)
    ruleset = libc.syscall(444, ctypes.byref(handled), 8, 0)
    checked(ruleset < 0)
    try:
        checked(libc.syscall(446, ruleset, 0))
    finally:
        os.close(ruleset)

def unshared(flag):
    checked(libc.unshare(flag))

CHANGES = {
    "umask": lambda: os.umask(0o007),
    "directory": lambda: os.chdir("/usr"),
    "soft limit": lambda: limit(resource.RLIMIT_NOFILE, lambda soft, hard: (soft - 7, hard)),
    "soft limit back": lambda: limit(resource.RLIMIT_NOFILE, lambda soft, hard: (soft + 7, hard)),
    "hard limit": lambda: limit(resource.RLIMIT_NOFILE, lambda soft, hard: (soft - 9, hard - 8)),
    "hard limit back": lambda: limit(resource.RLIMIT_NOFILE, lambda soft, hard: (soft, hard + 8)),
    "core limit": lambda: limit(resource.RLIMIT_CORE, lambda soft, hard: (0, hard)),
    "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, 4),
    "nice back": lambda: os.setpriority(os.PRIO_PROCESS, 0, 0),
    "one CPU": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    "all CPUs": lambda: os.sched_setaffinity(0, set(range(os.cpu_count()))),
    "batch": lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)),
    "other": lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)),
    "I/O priority": lambda: syscall({"x86_64": 251}.get(os.uname().machine, 30), 1, 0, 2 << 13 | 7),
    "I/O idle": lambda: syscall({"x86_64": 251}.get(os.uname().machine, 30), 1, 0, 3 << 13),
    "oom_score_adj": lambda: write("/proc/self/oom_score_adj", "77"),
    "oom_score_adj back": lambda: write("/proc/self/oom_score_adj", "0"),
    "coredump_filter": lambda: write("/proc/self/coredump_filter", "1"),
    "SIGHUP ignored": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    "SIGHUP again": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    "SIGUSR1 blocked": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}),
    "dumped too": lambda: write("/proc/self/coredump_filter", "33"),
    "control group": moved,
    "memory policy": lambda: syscall({"x86_64": 238}.get(os.uname().machine, 237), 2, (1).to_bytes(8, "little"), 65),
    "memory policy back": lambda: syscall({"x86_64": 238}.get(os.uname().machine, 237), 0, None, 0),
    "personality": lambda: checked(libc.personality(0x0040000) < 0),  # ADDR_NO_RANDOMIZE
    "another personality": lambda: checked(libc.personality(0x4000000) < 0),  # STICKY_TIMEOUTS
    "timer slack": lambda: prctl(29, 70_000),
    "no huge pages": lambda: prctl(41, 1),
    "huge pages": lambda: prctl(41, 0),
    "host name": lambda: unshared(0x04000000),
    "IPC": lambda: unshared(0x08000000),
    "network": lambda: unshared(0x40000000),
    "mounts": lambda: unshared(0x00020000),
    "control group namespace": lambda: unshared(0x02000000),
    "time": lambda: unshared(0x00000080),
    "groups": lambda: os.setgroups([7, 9]),
    "group": lambda: os.setresgid(5, 5, 5),
    "bounding set": lambda: prctl(24, 25),  # PR_CAPBSET_DROP, CAP_SYS_TIME
    "securebits": lambda: prctl(28, 1 << 2),  # PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP
    "capabilities": lambda: drop(22),  # CAP_SYS_BOOT
    "root directory": lambda: os.chroot("/"),
    "no_new_privs": lambda: prctl(38, 1),
    "Landlock": lambda: landlock(1 << 8),  # no files are made; nothing in /proc tells it
    "more of Landlock": lambda: landlock(1 << 7),  # nor directories
    "user namespace": lambda: unshared(0x10000000),
    "no memory that becomes executable": lambda: prctl(65, 1),
}

async def both():
    command = await supervise(Command(*ME), logs=QUIET, timeout=60)
    function = await supervise(Function(probe.state), logs=QUIET, timeout=60)
    return json.loads(str(command[0].stdout)), json.loads(json.dumps(function[0].value))

def own():
    def unblock():
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return json.loads(subprocess.run(ME, capture_output=True, preexec_fn=unblock, check=True).stdout)

async def main():
    for name in ["nothing", *CHANGES]:
        try:
            if name != "nothing":
                CHANGES[name]()
        except (OSError, ValueError) as exc:
            print(json.dumps([name, "not here", str(exc)]), flush=True)
            continue
        want = own()
        try:
            command, function = await both()
        except Exception as exc:
            print(json.dumps([name, "raised", f"{type(exc).__name__}: {exc}"]), flush=True)
            continue
        differ = [f"{kind} {key}: {got.get(key)!r}, not {want.get(key)!r}"
                  for kind, got in (("command", command), ("function", function))
                  for key in {**want, **got} if got.get(key) != want.get(key)]
        print(json.dumps([name, "differs" if differ else "same", "; ".join(differ)]), flush=True)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: Any) -> dict[str, tuple[str, str]]:
    """What came of each change: (verdict, words)."""
    home = tmp_path_factory.mktemp("state")
    (home / "probe.py").write_text(PROBE)
    (home / "program.py").write_text(PROGRAM)
    home.chmod(0o755)
    ran = subprocess.run([sys.executable, home / "program.py"], capture_output=True, text=True, timeout=300)
    for made in Path("/sys/fs/cgroup").glob(f"*/aioelastic-test-{os.getpid()}"):
        made.rmdir()
    assert ran.stderr == ""
    return {name: (verdict, words) for name, verdict, words in map(json.loads, ran.stdout.splitlines())}


NAMES = [line.split('"')[1] for line in PROGRAM.splitlines() if line.startswith('    "') and '": ' in line]


@pytest.mark.long
@pytest.mark.parametrize("name", ["nothing", *NAMES])
def test_it_is_that_of_the_program_now(told: dict[str, tuple[str, str]], name: str) -> None:
    verdict, words = told[name]
    if verdict == "not here":
        pytest.skip(f"needs root, or a kernel that has it: {name}: {words}")
    assert (verdict, words) == ("same", "")


def run(program: str, *args: str, before: tuple[str, ...] = ()) -> str:
    """What it prints; nothing on stderr."""
    ran = subprocess.run([*before, sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=150)
    assert ran.stderr == ""
    return ran.stdout


@pytest.mark.parametrize("how", ["command", "direct", "zygote", "spawn", "fork"])
def test_a_later_attempt_is_restricted_as_its_program_is_by_then(tmp_path: Path, how: str) -> None:
    """The guardian, the zygote and the helper thread of that group are older."""
    program = (
        PROGRAM.partition("CHANGES =")[0]
        + """
from aioelastic import Restart, events
def make():
    open(os.environ["MADE"] + os.environ["AIOELASTIC_ATTEMPT"], "x").close()
    raise SystemExit(1)
def restrict(event):
    if isinstance(event, events.Restarting):
        try:
            landlock(1 << 8)  # no files are made
        except OSError:
            print("not here")
async def main(how):
    given = dict(logs=QUIET, restart=Restart.on_failure(1), on_event=restrict, check=False, timeout=60)
    if how in ("command", "direct"):
        given["launcher"] = "direct" if how == "direct" else "guardian"
        entry = Command("sh", "-c", 'touch "$MADE$AIOELASTIC_ATTEMPT"; exit 1')
    else:
        entry, given["start"] = Function(make), how
    prctl(38, 1)  # no_new_privs
    result = await supervise(entry, **given)
    print([os.path.exists(os.environ["MADE"] + one) for one in "01"])
if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
"""
    )
    (tmp_path / "probe.py").write_text("")
    (tmp_path / "program.py").write_text(program)
    words = [sys.executable, str(tmp_path / "program.py"), how]
    ran = subprocess.run(
        words, capture_output=True, text=True, timeout=100, env={**os.environ, "MADE": str(tmp_path / "made")}
    )
    if "not here" in ran.stdout:
        pytest.skip("needs root, or a kernel that has it: Landlock")
    assert (ran.stdout, ran.stderr) == ("[True, False]\n", "")


def test_children_in_another_pid_namespace() -> None:
    """After unshare(CLONE_NEWPID) a process can start no thread (clone(2)): said at once, and nothing waits."""
    out = run(
        """
import asyncio, ctypes
from aioelastic import Command, Function, SpecError, supervise
asyncio.run(supervise(Command("true")))
if ctypes.CDLL(None).unshare(0x20000000):
    print("not here")
for what in (Command("true"), Function(abs, -1)):
    try:
        asyncio.run(supervise(what, timeout=30))
    except SpecError as exc:
        print(exc)
"""
    )
    if "not here" in out:
        pytest.skip("needs root")
    words = "thread='aioelastic-proc' cannot be had: can't start new thread; raise `ulimit -u`, or pids.max"
    assert [one.startswith(words) for one in out.splitlines()] == [True, True]


def test_what_the_c_library_ignores_for_itself_is_not_the_programs(tmp_path: Path) -> None:
    """Its posix_spawn(3) has its own two signals ignored in what it starts; Python 3.13 uses that."""
    code = "from aioelastic.launch import _host_state; print({32, 33} & set(_host_state.now().given[-1]))"
    out = [(os.POSIX_SPAWN_OPEN, 1, tmp_path / "out", os.O_WRONLY | os.O_CREAT, 0o600)]
    argv = [sys.executable, "-c", code]
    pid = os.posix_spawn(sys.executable, argv, os.environ, file_actions=out, setsigdef=[signal.SIGINT])
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "out").read_text() == "set()\n"


def test_without_proc_system_calls_tell_the_same() -> None:
    """But for what only files there tell: I/O priority, what the kernel kills first, what it dumps."""
    umask, nice, policy, _, _, _, cpus, *habits, limits, ignored = _host_state.now().given
    _host_state.close_idle()
    told = _host_state.without_proc()
    of_python = (signal.SIGPIPE, signal.SIGXFSZ)
    ignored = tuple(set(ignored) - set(of_python))
    assert told.given == (umask, nice, policy, 0, None, None, cpus, *habits, limits, ignored)
    assert told.no_guardian == "there is no /proc here"
