"""Training steps per second: MLX compiled and not, against PyTorch on the same device.

    python -m pytest benchmarks --benchmark-enable

The arms are timed in turn, several times over, so that a slow spell of the machine meets all of
them; the table takes the median over all rounds. Every round starts from the same evaluated state.
"""

import math
import time
from collections.abc import Callable
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import contenders, machine, systems
from benchmarks.contenders import ARMS, Contender
from mlx_parity import Case

BATCHES = 4
ROUNDS, STEPS, BLOCKS = 5, 6, 4
QUICK = (3, 4, 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arm" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    arms = [arm for arm in ARMS if arm != "torch-compile" or option("--torch-compile")]
    blocks = range(QUICK[2] if option("--quick") else BLOCKS)
    metafunc.parametrize(
        ("case", "block", "arm"),
        [
            pytest.param(case, block, arm, id=f"{case.name}-{arm}-{block}".replace(" ", "-"))
            # Back and forth, ABBA: a drift of the machine's speed cancels as well.
            for case, block in product(systems.SYSTEMS, blocks)
            for arm in (arms if block % 2 == 0 else arms[::-1])
        ],
    )


@pytest.fixture(scope="session")
def batches(images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """A few batches (B, H, W, C), drawn with replacement where there are fewer images."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(images), (BATCHES, batch_size), replace=len(images) < batch_size * 4)
    return [images[indices] for indices in drawn]


# an arm that is skipped, or must not be timed, leaves the fixture unused
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
# torch.compile warns of its own use of what PyTorch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_train_step(
    benchmark: BenchmarkFixture,
    record: Callable[..., None],
    batches: list[np.ndarray],
    case: Case,
    block: int,
    arm: str,
    quick: bool,
) -> None:
    if benchmark.disabled:
        pytest.skip("a timing: ask for it with --benchmark-enable")
    if arm.startswith("torch") and machine.torch_device() is None:
        pytest.skip("PyTorch has no device of the class that MLX runs on")
    if why := systems.parity_gate(case.name, 2 if quick else 5):
        pytest.fail(f"{case.name} is not timed, its port is not proven:\n{why}", pytrace=False)
    try:
        contender = contenders.enter(case, arm, batches)
    except contenders.NotCompiled as error:
        pytest.fail(f"{case.name} {arm} is not reported: {error}", pytrace=False)

    rounds, steps, _ = QUICK if quick else (ROUNDS, STEPS, BLOCKS)

    def train(contender: Contender) -> None:
        for i in range(steps):
            contender.step(i)

    benchmark.group = f"{case.name}: {steps} steps"
    others, start = machine.others_cpu_seconds(), time.perf_counter()
    benchmark.pedantic(train, (contender,), setup=contender.restore, rounds=rounds, warmup_rounds=1)
    if others is not None:
        taken = (machine.others_cpu_seconds() or 0) - others
        contender.info["others_cpu"] = max(0.0, taken) / (time.perf_counter() - start)
    seconds = [t / steps for t in benchmark.stats.stats.data]
    per_second = 1 / float(np.median(seconds))
    benchmark.extra_info |= contender.info | {
        "steps_per_second": per_second,
        "images_per_second": per_second * len(batches[0]),
        "steps_per_round": steps,
    }
    assert math.isfinite(per_second)
    record(case.name, arm, seconds, benchmark.extra_info)
    mx.clear_cache()
