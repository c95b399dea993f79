"""The BLAS under MLX on Linux: replaced for MLX, untouched for PyTorch, or left with a warning.

Each case runs in an interpreter of its own, since a redirection lasts for the life of a process.
"""

import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_parity import blas

on_linux_cpu = pytest.mark.skipif(
    not sys.platform.startswith("linux") or mx.default_device().type != mx.DeviceType.cpu,
    reason="only MLX's CPU backend on Linux needs another BLAS",
)


def run_fresh(code: str, **environment: str) -> str:
    """What ``code`` prints in a fresh interpreter in which every warning is an error."""
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@on_linux_cpu
def test_openblas_is_much_faster_and_in_the_slots():
    pytest.importorskip("scipy_openblas32")
    run_fresh(
        """
import time
import mlx.core as mx
from mlx_parity import blas

a = mx.random.normal((512, 512))
mx.eval(a)

def seconds():
    times = []
    for _ in range(10):
        start = time.perf_counter()
        mx.eval(a @ a)
        times.append(time.perf_counter() - start)
    return min(times)

assert blas._linked().name == "netlib", blas._linked()
before = seconds()
used = blas.use_openblas()
assert used.fast and used.name.startswith("openblas "), used
assert used.threads >= 1
after = seconds()
assert before > 4 * after, (before, after)  # about 20
owners = {blas._owner(slot.value) for slot in blas._slots(blas.ROUTINES).values()}
assert len(owners) == 1 and "scipy_openblas" in owners.pop()
assert blas.use_openblas() is used  # a second call changes nothing
""",
        OPENBLAS_NUM_THREADS="1",  # with more, on a busy machine, they wait for one another
    )


@on_linux_cpu
@pytest.mark.parametrize("first", ["torch", "mlx.core"])
def test_torch_keeps_its_own_blas(first: str):
    """A fixed product in PyTorch stays the same to the last bit; MLX's differs in some bits."""
    pytest.importorskip("scipy_openblas32")
    run_fresh(f"""
import {first}
import numpy as np
import torch
import mlx.core as mx
from mlx_parity.blas import use_openblas

rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 257, 3001)).astype(np.float32)  # long: short sums agree bit by bit

def of_torch():
    return (torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()

before = of_torch()
assert use_openblas().name.startswith("openblas ")
assert np.array_equal(before, of_torch())
of_mlx = np.asarray(mx.array(a) @ mx.array(b).T)
rounding = 3001 * np.finfo(np.float32).eps * (np.abs(a) @ np.abs(b).T)
assert (np.abs(before - of_mlx) <= rounding).all()
assert not np.array_equal(before, of_mlx)
""")


@on_linux_cpu
@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("sys.modules['scipy_openblas32'] = None", "scipy_openblas32"),
        ("blas.ROUTINES = ('cblas_nothing',)", "cblas_nothing"),
        (
            "maps = blas._maps; "
            "blas._maps = lambda: [m._replace(permissions='r-xp') for m in maps()]",
            "write-protected",
        ),
        (
            "maps = blas._maps; "
            "blas._maps = lambda: [m._replace(permissions='rw-p') for m in maps()]",
            "address of code",
        ),
        (
            "maps = blas._maps; blas._maps = lambda: [m._replace(inode=1) for m in maps()]",
            "on disk",
        ),
    ],
)
def test_falls_back_with_one_warning_that_tells_the_cure(obstacle: str, reason: str):
    run_fresh(f"""
import sys, warnings
import mlx.core as mx
from mlx_parity import blas

linked = blas._linked()
blas._linked = lambda: linked  # the obstacle is to the replacement alone
before = {{name: slot.value for name, slot in blas._slots(blas.ROUTINES).items()}}
check_slots = blas._slots
real_maps = blas._maps
routines = blas.ROUTINES
{obstacle}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    used = blas.use_openblas()
    assert blas.use_openblas() == used
(warning,) = caught
assert warning.category is RuntimeWarning
text = str(warning.message)
assert {reason!r} in text and "pip install scipy-openblas32" in text, text
assert used.name == "netlib" and not used.fast and used.threads == 1
blas._maps = real_maps
assert before == {{name: slot.value for name, slot in check_slots(routines).items()}}
""")


@on_linux_cpu
def test_wrong_products_are_noticed_and_reverted():
    """The single-precision routine in double precision's slot: a wrong argument type."""
    pytest.importorskip("scipy_openblas32")
    run_fresh("""
import warnings
import mlx.core as mx
from mlx_parity import blas

before = {name: slot.value for name, slot in blas._slots(blas.ROUTINES).items()}
address = blas._address
blas._address = lambda library, name: address(
    library, "scipy_cblas_sgemm" if name == "scipy_cblas_dgemm" else name
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    used = blas.use_openblas()
assert "float64 products under MLX are wrong" in str(caught[0].message), caught[0].message
assert used.name == "netlib"
after = {name: slot.value for name, slot in blas._slots(blas.ROUTINES).items()}
assert {k: blas._owner(v) for k, v in before.items()} == {
    k: blas._owner(v) for k, v in after.items()
}
a = mx.ones((65, 33), mx.float64)
with mx.stream(mx.cpu):
    assert ((a.T @ a) == 65).all().item()
""")


@on_linux_cpu
def test_borrowed_for_a_while_and_given_back():
    pytest.importorskip("scipy_openblas32")
    run_fresh("""
import mlx.core as mx
from mlx_parity import blas

def held():
    return {name: blas._owner(slot.value) for name, slot in blas._slots(blas.ROUTINES).items()}

before = held()
for _ in range(2):
    with blas.borrowed() as used:
        assert used.name.startswith("openblas "), used
        assert all("openblas" in path for path in held().values()), held()
        with blas.borrowed() as again:
            assert again == used
        assert (mx.ones((33, 65)) @ mx.ones((65, 17)) == 65).all().item()
    owners = {path for path in held().values()}
    assert not any("openblas" in path for path in owners), owners
with blas.borrowed():
    assert blas._in_use is None
assert blas.use_openblas().fast
with blas.borrowed() as kept:
    pass
assert all("openblas" in path for path in held().values())
""")


@on_linux_cpu
def test_threads_follow_the_environment():
    pytest.importorskip("scipy_openblas32")
    code = "from mlx_parity.blas import use_openblas; print(use_openblas().threads)"
    assert run_fresh(code, OPENBLAS_NUM_THREADS="1").strip() == "1"


def test_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blas.mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(blas, "_use_openblas_on_linux", lambda: pytest.fail("must not be called"))
    used = blas.use_openblas()
    assert used.name == ""
    assert used.fast
    assert "GPU" in used.note
    assert str(used) == used.note


def test_a_mac_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blas.mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    monkeypatch.setattr(blas, "_use_openblas_on_linux", lambda: pytest.fail("must not be called"))
    assert blas.use_openblas().name == "accelerate"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x7fELF\x01\x01", "ELF64"),
        (b"\xcf\xfa\xed\xfe\x00\x00", "ELF64"),
        (b"\x7fELF\x02\x01", "machine 243"),  # RISC-V
    ],
)
def test_other_object_files_are_refused(header: bytes, message: str):
    elf = header + bytes(12) + struct.pack("<H", 243) + bytes(44)
    with pytest.raises(OSError, match=message):
        blas._slot_offsets(elf, blas.ROUTINES)


@on_linux_cpu
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64's relocations")
def test_slots_are_those_that_the_linker_lists():
    path = blas._library("libmlx.so")[0].path
    listing = subprocess.run(["readelf", "-rW", path], capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("no readelf here")
    expected = {
        words[4]: int(words[0], 16)
        for words in (line.split() for line in listing.stdout.splitlines())
        if len(words) > 4 and words[4] in blas.ROUTINES
    }
    offsets, _ = blas._slot_offsets(Path(path).read_bytes(), blas.ROUTINES)
    assert offsets == expected


def test_the_kit_knows_nothing_of_our_models():
    source = Path(blas.__file__).read_text()
    assert "mlx_impl" not in source
    assert "reference." not in source
