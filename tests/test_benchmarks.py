"""The benchmark's own tests: what would make its figures lies is caught."""

import math
import os
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch

from benchmarks import capture, contenders, machine, summary, systems
from benchmarks.contenders import break_even
from benchmarks.effort import FULL, QUICK, Budget, Effort
from benchmarks.statistics import CONFIDENCE, noise_floor, paired_ratio
from benchmarks.summary import Rounds
from mlx_parity.blas import Blas

SUBJECT = next(s for s in systems.SUBJECTS if s.name == "001 GAN")
SAMPLER = next(s for s in systems.SUBJECTS if s.name == "001 generator, sampling")


@pytest.fixture(scope="module")
def batches() -> list[systems.Arrays]:
    return [SUBJECT.draw(2, 0)]


def test_unevaluated_sees_promises_and_keeps_them():
    a, b = mx.ones(3), mx.zeros(3)
    mx.eval(a, b)
    promise = a + b
    tree = {"done": a, "later": [promise], "not an array": 3}
    assert contenders.unevaluated(tree) == ["later.0"]
    assert contenders.unevaluated(tree) == ["later.0"]
    mx.eval(promise)
    assert contenders.unevaluated(tree) == []


def test_a_step_that_leaves_its_work_undone_is_caught(batches, monkeypatch):
    real = mx.eval
    monkeypatch.setattr(contenders.mx, "eval", lambda *trees: real(trees[0]))  # without the state
    with pytest.raises(contenders.NotEvaluated, match=r"mx\.eval\(loss, state\)"):
        contenders.enter(SUBJECT, "mlx-uncompiled", batches)


def test_a_compiled_arm_is_traced_once(batches):
    contender = contenders.enter(SUBJECT, "mlx-compiled", batches)
    contender.restore()
    contender.step(0)
    assert contender.info["traces"] == 1
    assert contender.info["peak_memory_mb"] > 0


def test_mlx_that_does_not_compile_is_not_called_compiled(batches):
    mx.disable_compile()  # what a missing g++ does, which MLX does not tell either
    try:
        with pytest.raises(contenders.NotCompiled, match=r"g\+\+"):
            contenders.enter(SUBJECT, "mlx-compiled", batches)
    finally:
        mx.enable_compile()


@pytest.mark.parametrize(
    "arm", ["mlx-uncompiled", "mlx-compiled", "torch-eager", "mlx-bfloat16", "torch-bfloat16"]
)
def test_every_round_starts_from_the_same_state(batches, arm: str):
    contender = contenders.enter(SUBJECT, arm, batches)

    def losses() -> np.ndarray:
        contender.restore()
        return np.array([[float(loss) for loss in contender.step(i)] for i in range(3)])

    first = losses()
    assert np.array_equal(first, losses())
    assert not np.array_equal(first[0], first[2])  # and it trains


@pytest.mark.parametrize("arm", ["mlx-compiled", "torch-eager"])
def test_not_waiting_does_the_same_work_and_ends_with_it_done(batches, arm: str):
    waiting = contenders.enter(SUBJECT, arm, batches)
    handing_over = waiting.without_waiting()
    starts = []
    start = handing_over.start
    handing_over.start = lambda i: starts.append(start(i)) or starts[-1]
    waiting.restore()
    expected = [float(waiting.step(i)[0]) for i in range(3)]
    handing_over.restore()
    handing_over.run(3)
    assert contenders.unevaluated(starts[-1:]) == []
    assert [float(losses[0]) for losses in starts] == expected


@pytest.mark.parametrize("arm", ["mlx-uncompiled", "mlx-compiled", "torch-eager"])
def test_a_sampler_is_timed_as_it_generates(arm: str):
    contender = contenders.enter(SAMPLER, arm, [SAMPLER.draw(3, 0)])
    image = contender.step(0)["output"]
    assert tuple(image.shape) in {(3, 28, 28, 1), (3, 1, 28, 28)}
    assert not getattr(image, "requires_grad", False)


def test_both_sides_get_the_same_numbers():
    arrays = SUBJECT.draw(2, seed=0)
    assert arrays["real"].shape == (2, 28, 28, 1)
    on_mlx = systems.to_mlx(SUBJECT.case, arrays)
    on_torch = systems.to_torch(SUBJECT.case, arrays, "cpu")
    assert on_torch[0].shape == (2, 1, 28, 28)
    assert np.array_equal(np.array(on_mlx[0])[..., 0], on_torch[0].numpy()[:, 0])
    assert np.array_equal(np.array(on_mlx[1]), on_torch[1].numpy())


def test_a_training_step_is_timed_on_real_digits_and_other_inputs_are_drawn():
    one, other = SUBJECT.draw(64, seed=0), SUBJECT.draw(64, seed=1)
    blank = (one["real"] == -1).mean()
    assert 0.2 < blank < 0.8  # a digit's background
    assert not np.array_equal(one["noise"], other["noise"])


def test_operations_are_counted_and_a_cpu_gets_batches_it_can_take():
    parameters = 579_728 + 566_273
    operations = systems.flops(SUBJECT, 1)
    assert 6 * parameters < operations < 12 * parameters  # forward, backward, two networks
    assert systems.flops(SUBJECT, 4) == 4 * operations == systems.count_flops(SUBJECT, 4)
    assert systems.batch_size(SUBJECT, None, on_cpu=True) == systems.LARGEST_BATCH
    assert systems.batch_size(SUBJECT, 7, on_cpu=True) == 7


def test_a_batch_that_does_not_fit_the_budget_is_halved():
    budget = 20 * systems.flops(SUBJECT, 1)
    assert systems.batch_size(SUBJECT, None, on_cpu=True, cpu_flops=budget) == 16
    assert systems.batch_size(SUBJECT, None, False, budget) == systems.LARGEST_BATCH


def rounds_of(**seconds: list[float]) -> Rounds:
    rounds = Rounds(SUBJECT)
    for arm, times in seconds.items():
        name = arm.replace("_", "-")
        rounds.seconds[name] = dict(enumerate(times))
        rounds.info[name] = {"batch": 64}
    return rounds


def test_without_waiting_is_held_against_without_waiting():
    times = {"mlx_compiled": [3.0] * 3, "mlx_async": [2.0] * 3, "torch_async": [4.0] * 3}
    row = summary.row(rounds_of(**times), "CUDA", 1e12)
    assert row["async_over_torch_async"] == pytest.approx(2)
    assert row["compiled_over_async"] == pytest.approx(2 / 3)


def test_a_row_has_null_where_no_arm_ran():
    times = [0.01, 0.02, 0.01]
    row = summary.row(rounds_of(mlx_compiled=times, torch_eager=[0.03, 0.06, 0.03]), "CPU", 1e12)
    assert row["over_torch_eager"] == pytest.approx(3)
    assert row["over_torch_eager_interval"] == pytest.approx([3, 3])
    assert row["images_per_second"] == pytest.approx(6400)
    assert row["share_of_matmul_peak"] == pytest.approx(systems.flops(SUBJECT, 64) / 0.01 / 1e12)
    assert row["compiled_over_uncompiled"] is None
    assert row["over_torch_compile"] is None
    alone = summary.row(rounds_of(torch_eager=times), "CPU", 1e12)
    assert alone["ms_compiled"] is None
    assert alone["images_per_second"] is None
    assert alone["ms_torch_eager"] == pytest.approx(10)
    assert next(table.title for table in summary.tables([row, alone])) == "A training step"


def test_bfloat16_is_held_against_float32_and_against_pytorchs():
    times = {"mlx_compiled": [3.0] * 3, "mlx_bfloat16": [2.0] * 3, "torch_bfloat16": [5.0] * 3}
    row = summary.row(rounds_of(**times), "CPU", 1e12)
    assert row["bfloat16_over_float32"] == pytest.approx(1.5)
    assert row["bfloat16_over_torch"] == pytest.approx(2.5)
    assert [t.title for t in summary.tables([row])][1].startswith("bfloat16 with float32 weights")


def test_both_sides_round_to_bfloat16_in_its_arms_and_only_there(batches):
    """A loss of the first step, with one network's first weights and the same inputs."""
    losses = {}
    for arm in ("mlx-compiled", "mlx-bfloat16", "torch-eager", "torch-bfloat16"):
        contender = contenders.enter(SUBJECT, arm, batches)
        contender.restore()
        losses[arm] = float(contender.step(0)[0])
    for side, arm in (("mlx-compiled", "mlx-bfloat16"), ("torch-eager", "torch-bfloat16")):
        assert losses[side] != losses[arm]
        assert abs(losses[side] / losses[arm] - 1) < 2**-6


def test_what_is_timed_in_bfloat16_is_proven_in_bfloat16():
    half = SUBJECT.in_bfloat16()
    assert half is not None
    assert (half.case.dtype, half.case.held) == ("bfloat16", "float32")
    unproven = [s.name for s in systems.SUBJECTS if s.in_bfloat16() is None]
    assert unproven == ["latent diffusion", "VGG style transfer"]


def test_pairs_are_of_the_same_block():
    rounds = rounds_of(mlx_compiled=[1, 2, 3], torch_eager=[2, 4, 6])
    del rounds.seconds["mlx-compiled"][0]  # a block that was not timed
    assert rounds.ratio("torch-eager").pairs == 2
    assert rounds.ratio("torch-eager").value == pytest.approx(2)


def test_the_first_call_is_split_into_trace_code_and_step():
    called = {"first_call_ms": 1000.0, "trace_ms": 200.0}
    assert summary.code_generation(called, ms=30) == 770
    assert summary.code_generation(called, ms=900) == 0
    assert summary.code_generation({}, ms=30) is None


def test_the_harness_takes_less_than_a_hundredth_of_the_shortest_step():
    """One image through the smallest generator, less than anything that the benchmark times."""
    contender = contenders.enter(SAMPLER, "mlx-compiled", [SAMPLER.draw(1, 0)])
    step_ms = min(contenders._milliseconds(contender.step) for _ in range(20))
    assert summary.harness_share({"steps_per_round": 1}, step_ms) < 0.01
    assert summary.harness_share({"steps_per_round": 1}, 1e-3) > 0.01  # it is measured
    assert summary.harness_share({}, step_ms) is None


def test_compiling_pays_for_itself_or_never():
    assert break_even({"first_call_ms": 1000.0}, uncompiled_ms=30, compiled_ms=20) == 97
    assert break_even({"first_call_ms": 1000.0}, uncompiled_ms=20, compiled_ms=20) is None
    assert break_even({"first_call_ms": 10.0}, uncompiled_ms=30, compiled_ms=20) == 0


@pytest.mark.parametrize("tf32", [True, False])
def test_pytorch_rounds_as_mlx_may(tf32: bool, monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", str(int(tf32)))
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    try:
        machine.allow_torch_what_mlx_may()
        assert (matmul.allow_tf32, convolution.allow_tf32) == (tf32, tf32)
        assert machine.identity(Blas("netlib", False, 1, ""))["torch_tf32"] is tf32
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


@pytest.mark.skipif(mx.metal.is_available(), reason="here the trace can be made")
def test_a_gpu_trace_without_a_mac_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="Apple silicon"):
        capture.check(tmp_path)


def test_a_gpu_trace_is_one_step_and_overwrites_none(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(mx.metal, "start_capture", lambda path: done.append(path))
    monkeypatch.setattr(mx.metal, "stop_capture", lambda: done.append("stopped"))
    path = capture.trace("002 GAN, sampling", tmp_path, lambda i: done.append(i))
    assert done == [str(tmp_path / "002-GAN-sampling.gputrace"), 0, "stopped"]
    path.touch()
    with pytest.raises(FileExistsError, match="another folder"):
        capture.trace("002 GAN, sampling", tmp_path, lambda i: None)


def test_an_interrupted_benchmark_is_not_saved_and_the_others_are():
    from benchmarks.conftest import pytest_sessionfinish

    done, broken = (SimpleNamespace(stats=SimpleNamespace(data=d)) for d in ([0.1], []))
    benchmarks = [done, broken]
    plugin = SimpleNamespace(benchmarks=benchmarks)
    pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace(_benchmarksession=plugin)))
    assert plugin.benchmarks == [done]


def die(name: str, examples: int) -> str:
    os._exit(1)


def test_a_climb_that_raises_or_dies_has_proven_nothing(monkeypatch):
    assert "ValueError" in systems.parity_gates(["999 GAN"], 1)["999 GAN"]
    monkeypatch.setattr(systems, "parity_gate", die)
    assert "BrokenProcessPool" in systems.parity_gates(["001 GAN"], 1)["001 GAN"]


def test_gates_leave_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    systems.parity_gates([], 1)
    assert os.environ["OPENBLAS_NUM_THREADS"] == "2"
    assert "MLX_ENABLE_TF32" not in os.environ


def test_a_quick_run_takes_the_cheaper_systems_steps():
    assert all(FULL.takes(subject) for subject in systems.SUBJECTS)
    quick = {subject.name for subject in systems.SUBJECTS if QUICK.takes(subject)}
    assert {"000 GAN", "001 GAN", "002 GAN", "003 style transfer", "004 diffusion"} <= quick
    assert not quick & {"U-Net diffusion", "VGG style transfer", "001 generator, sampling"}


def test_a_system_that_had_its_time_begins_no_further_block_and_ends_the_one_begun():
    budget = Budget(Effort(4, 2, seconds=1, examples=1, cpu_flops=1, dearest=1, sampling=True))
    budget.spend("a", 5.0)
    assert [budget.is_over("a", block) for block in range(4)] == [False, False, True, True]
    assert not budget.is_over("b", 2)
    budget.spend("b", 5.0)
    assert not budget.is_over("b", 2)  # begun
    assert budget.is_over("b", 3)


# the statistics


def heavy_tailed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Logarithms of times: Student's t with two degrees of freedom, whose variance is infinite."""
    return 0.05 * rng.standard_t(2, n)


@pytest.mark.parametrize("pairs", [8, 10, 16])
@pytest.mark.parametrize("effect", [1.0, 1.07])
def test_the_interval_covers_the_truth_as_often_as_it_says(pairs: int, effect: float):
    rng = np.random.default_rng(pairs)
    trials, missed = 2000, 0
    for _ in range(trials):
        drift = np.cumsum(rng.normal(0, 0.2, pairs))  # of the machine, which both of a pair meet
        a = effect * np.exp(drift + heavy_tailed(rng, pairs))
        b = np.exp(drift + heavy_tailed(rng, pairs))
        ratio = paired_ratio(a, b)
        missed += not ratio.low <= effect <= ratio.high
        assert ratio.confidence >= CONFIDENCE
    # binomial: five standard deviations above the promised rate
    rate = 1 - CONFIDENCE
    assert missed <= trials * rate + 5 * math.sqrt(trials * rate)
    assert missed > 0  # an interval that is never wrong is too wide


def test_an_interval_of_few_pairs_says_how_little_it_is_worth():
    assert paired_ratio([1, 2, 3, 4], [1, 2, 3, 4]).confidence == pytest.approx(0.875)


def test_one_wild_pair_moves_the_estimate_little():
    quiet = np.full(10, 1.1)
    wild = quiet.copy()
    wild[3] = 50
    assert paired_ratio(wild, np.ones(10)).value == pytest.approx(1.1)


def test_a_ratio_and_its_inverse():
    ratio = paired_ratio([2.0] * 8, [1.0] * 8)
    assert (ratio.value, ratio.inverse().value) == (2, 0.5)
    there, back = paired_ratio([2, 3, 2], [1, 1, 1]), paired_ratio([1, 1, 1], [2, 3, 2])
    assert there.low == pytest.approx(back.inverse().low)
    assert there.high == pytest.approx(back.inverse().high)


def test_the_noise_floor_is_the_worse_side_of_the_control():
    assert noise_floor(paired_ratio([1.02] * 8, [1.0] * 8)) == pytest.approx(0.02)
    assert noise_floor(paired_ratio([1.0] * 8, [1.02] * 8)) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([1], [1, 2], "pairs"), ([], [], "pairs"), ([0.0], [1.0], "not positive")],
)
def test_times_that_are_no_pairs_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_ratio(a, b)
