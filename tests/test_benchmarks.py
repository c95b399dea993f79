"""The benchmark's own tests: what would make its figures lies is caught."""

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import contenders, systems
from benchmarks.conftest import summarise
from benchmarks.contenders import ARMS

CASE = systems.SYSTEMS[0]


@pytest.fixture(scope="module")
def two_images() -> list[np.ndarray]:
    return [np.zeros((2, 28, 28, 1), np.float32)]


def test_unevaluated_sees_promises_and_keeps_them():
    a, b = mx.ones(3), mx.zeros(3)
    mx.eval(a, b)
    promise = a + b
    tree = {"done": a, "later": [promise], "not an array": 3}
    assert contenders.unevaluated(tree) == ["later.0"]
    assert contenders.unevaluated(tree) == ["later.0"]
    mx.eval(promise)
    assert contenders.unevaluated(tree) == []


def test_a_step_that_leaves_its_work_undone_is_caught(two_images, monkeypatch):
    real = mx.eval
    monkeypatch.setattr(contenders.mx, "eval", lambda *trees: real(trees[0]))  # without the state
    with pytest.raises(contenders.NotEvaluated, match=r"mx\.eval\(loss, state\)"):
        contenders.enter(CASE, "mlx-uncompiled", two_images)


def test_a_compiled_arm_is_traced_once(two_images):
    contender = contenders.enter(CASE, "mlx-compiled", two_images)
    contender.restore()
    contender.step(0)
    assert contender.info["traces"] == 1
    assert contender.info["peak_memory_mb"] > 0


def test_mlx_that_does_not_compile_is_not_called_compiled(two_images):
    mx.disable_compile()  # what a missing g++ does, which MLX does not tell either
    try:
        with pytest.raises(contenders.NotCompiled, match=r"g\+\+"):
            contenders.enter(CASE, "mlx-compiled", two_images)
    finally:
        mx.enable_compile()


@pytest.mark.parametrize("arm", ARMS[:3])
def test_every_round_starts_from_the_same_state(two_images, arm: str):
    contender = contenders.enter(CASE, arm, two_images)

    def losses() -> np.ndarray:
        contender.restore()
        return np.array([[float(loss) for loss in contender.step(i)] for i in range(3)])

    first = losses()
    assert np.array_equal(first, losses())
    assert not np.array_equal(first[0], first[2])  # and it trains


def test_both_sides_get_the_same_numbers():
    images = np.arange(2 * 28 * 28, dtype=np.float32).reshape(2, 28, 28, 1)
    arrays = systems.inputs(CASE, images, seed=0)
    on_mlx = systems.to_mlx(CASE, arrays)
    on_torch = systems.to_torch(CASE, arrays, "cpu")
    assert on_torch[0].shape == (2, 1, 28, 28)
    assert np.array_equal(np.array(on_mlx[0])[..., 0], on_torch[0].numpy()[:, 0])
    assert np.array_equal(np.array(on_mlx[1]), on_torch[1].numpy())


def test_the_summary_has_null_where_no_arm_ran():
    rounds = {
        ("a", "mlx-compiled"): {"seconds": [0.01, 0.02, 0.01], "traces": 1, "peak_memory_mb": 5.0},
        ("a", "torch-eager"): {"seconds": [0.03]},
        ("b", "torch-eager"): {"seconds": [0.03]},
    }
    a, b = summarise(rounds, 64, "CPU")
    assert a["over_torch_eager"] == pytest.approx(3)
    assert a["images_per_second"] == pytest.approx(6400)
    assert a["compiled_over_uncompiled"] is None
    assert a["over_torch_compile"] is None
    assert b["ms_compiled"] is None
    assert b["images_per_second"] is None
    assert b["ms_torch_eager"] == pytest.approx(30)


def test_an_unknown_system_is_not_proven():
    assert systems.parity_gate("999 GAN", 1)
