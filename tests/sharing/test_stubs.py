"""Stubs in place of torch, as tests and applications that avoid an import make them: sharing works beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NUMBA = ["numba", "numba.cuda", "numba.cuda.cudadrv", "numba.cuda.cudadrv.devicearray"]
NAMES = ["torch", "torch.cuda", "numpy", "numpy.random", "cupy", *NUMBA]
STUBS = f"""
import sys, types
from unittest.mock import MagicMock
def stub(name):
    one = types.ModuleType(name)
    if KIND == "classes":
        one.Tensor = one.ndarray = one.DeviceNDArray = type("Array", (), {{}})
    return {{"mocks": MagicMock(), "none": None}}.get(KIND, one)
for name in {NAMES}:
    sys.modules[name] = stub(name)
def same(one): return one
"""
APP = """
import stubs, array, asyncio
from aioelastic import Function, Logs, Std, WorkerExecutor, sharing, supervise
async def main(given):
    result = await supervise(Function(stubs.same, given), n=1, start=START, logs=Logs(tee=Std.NONE))
    return result[0].value
if __name__ == "__main__":
    given = {"a": bytes(100_000), "b": array.array("d", [1, 2])}
    assert asyncio.run(main(given)) == given
    with WorkerExecutor(1, start=START) as executor:
        assert executor.submit(stubs.same, given).result(60) == given
    shared = sharing.copy(sharing.copy(array.array("d", range(6)))[::2])
    assert list(shared.buffer) == [0, 2, 4]
    assert list(asyncio.run(main(shared)).buffer) == [0, 2, 4]
    print("fine")
"""


@pytest.mark.long
@pytest.mark.parametrize("start", ["zygote", "spawn", "fork"])
@pytest.mark.parametrize("kind", ["modules", "classes", "mocks", "none"])
def test_stubs_are_taken_for_absent(kind: str, start: str, tmp_path: Path) -> None:
    (tmp_path / "stubs.py").write_text(STUBS.replace("KIND", repr(kind)))
    (tmp_path / "app.py").write_text(APP.replace("START", repr(start)))
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
