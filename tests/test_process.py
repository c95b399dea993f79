"""What the commands and the benchmark tell their process before MLX works in it."""

import sys

import pytest

from mlx_impl import process
from mlx_impl.__main__ import main
from tests.frameworks import REPOSITORY, run

FAULTS = """
import resource
import mlx.core as mx
from mlx_impl import process
{tune}
mx.set_default_device(mx.cpu)
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for i in range(9):
    mx.eval(mx.full((1 << 24,), i))  # 64 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
# The median: on a busy machine an array may not be free yet when the next is made.
print(sorted(b - a for a, b in zip(faults, faults[1:]))[4])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    pages = (1 << 26) // 4096
    without, tuned, asked_not_to = (
        int(run(FAULTS.format(tune=tune), REPOSITORY, **environment).stdout)
        for tune, environment in [
            ("", {}),
            ("process.tune()", {}),
            ("process.tune()", {"MALLOC_MMAP_THRESHOLD_": "1048576"}),
        ]
    )
    assert tuned < pages / 10
    if without < pages / 2:
        pytest.skip("this system's allocator, or its huge pages, keep memory by themselves")
    assert asked_not_to > pages / 2


@pytest.mark.parametrize(("given", "expected"), [({}, "0"), ({"MLX_USE_CUDA_GRAPHS": "1"}, "1")])
def test_cuda_graphs_are_off_unless_asked_for(given, expected, monkeypatch):
    monkeypatch.delenv("MLX_USE_CUDA_GRAPHS", raising=False)  # a command tested before sets it
    code = """
import os
from mlx_impl import process
before = process.settings()
process.tune()
print(os.environ["MLX_USE_CUDA_GRAPHS"], before["cuda_graphs"], process.settings()["cuda_graphs"])
"""
    assert run(code, REPOSITORY, **given).stdout.split() == [expected, "True", str(expected == "1")]


def test_every_command_tells_its_process(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(process, "tune", lambda: told.append(True))
    assert main(["sample", str(tmp_path / "nothing")]) != 0
    assert told
