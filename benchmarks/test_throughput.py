"""Training steps and samples per second: MLX compiled and not, against PyTorch on the same device.

    python -m pytest benchmarks --benchmark-enable

All arms of a system stay alive and are timed in turn, forth and back (ABBA), so that a slow spell
of the machine meets all of them. Ratios are of neighbours in time. Every round starts from the same
evaluated state.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import capture, contenders, machine, systems
from benchmarks.contenders import ARMS, BFLOAT16, SAME_AS, Contender
from benchmarks.effort import Budget, effort
from benchmarks.systems import Subject

BATCHES = 4
SAMPLE_SECONDS = 0.1
"""Steps are timed together until they take about this long."""
LONGEST_ROUND = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arm" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    left_out = set() if option("--torch-compile") else {"torch-compile"}
    if machine.torch_device() == "cpu":
        left_out.add("torch-async")
    if not option("--bfloat16") and machine.backend() == "CPU":
        left_out |= {*BFLOAT16}
    arms = [arm for arm in ARMS if arm not in left_out]
    how = effort(metafunc.config)
    subjects = [subject for subject in systems.SUBJECTS if how.takes(subject)]
    metafunc.parametrize(
        ("subject", "block", "arm"),
        [
            pytest.param(subject, block, arm, id=f"{subject.name}-{arm}-{block}".replace(" ", "-"))
            for subject, block in product(subjects, range(how.pairs))
            for arm in (arms if block % 2 == 0 else arms[::-1])
            if arm not in BFLOAT16 or subject.in_bfloat16()
        ],
    )


class Ring:
    """The contenders of one subject, entered as they are asked for, left when another comes."""

    def __init__(self, data: str, batch_size: int | None, cpu_flops: float):
        self.data, self.asked, self.cpu_flops = data, batch_size, cpu_flops
        self.subject: Subject | None = None

    def get(self, subject: Subject, arm: str) -> Contender:
        if subject is not self.subject:
            self.leave()
            self.subject = subject
            on_cpu = machine.torch_device() == "cpu"
            self.batch_size = systems.batch_size(subject, self.asked, on_cpu, self.cpu_flops)
            seeds = range(BATCHES)
            self.batches = [subject.draw(self.batch_size, seed, self.data) for seed in seeds]
        if arm not in self.contenders:
            original = SAME_AS.get(arm)
            if original is None:
                self.contenders[arm] = contenders.enter(subject, arm, self.batches)
            elif arm.endswith("-async"):
                self.contenders[arm] = self.get(subject, original).without_waiting()
            else:
                self.contenders[arm] = self.get(subject, original)
            # Or Python's collector would walk two frameworks and pytest within some of the steps.
            gc.collect()
            gc.freeze()
        return self.contenders[arm]

    def leave(self) -> None:
        gc.unfreeze()
        self.contenders: dict[str, Contender] = {}
        mx.clear_cache()

    @property
    def steps(self) -> int:
        """In a round: the same for all arms, so that each begins as often."""
        return min(LONGEST_ROUND, max(1, math.ceil(SAMPLE_SECONDS / self._warm)))

    @property
    def repeats(self) -> int:
        """Of a round in a block. What is short is disturbed more, and cheap to do again."""
        return 2 if self._warm < SAMPLE_SECONDS else 1

    @property
    def _warm(self) -> float:
        return self.contenders["mlx-compiled"].info["warm_ms"] / 1e3


@pytest.mark.parametrize("subject", systems.SUBJECTS, ids=lambda subject: subject.name)
def test_metal_capture(ring: Ring, subject: Subject, request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--metal-capture")
    assert capture.trace(subject.name, folder, ring.get(subject, "mlx-compiled").step).exists()


@pytest.fixture(scope="session")
def ring(request: pytest.FixtureRequest) -> Iterator[Ring]:
    option = request.config.getoption
    ring = Ring(option("--data"), option("--batch-size"), effort(request.config).cpu_flops)
    yield ring
    ring.leave()


@pytest.fixture(scope="session")
def gates(request: pytest.FixtureRequest) -> dict[str, str]:
    """Why a case must not be timed, "" where it may."""
    if not request.config.option.benchmark_enable:
        return {}
    timed = [item for item in request.session.items if isinstance(item, pytest.Function)]
    params: list[Mapping[str, Any]] = [item.callspec.params for item in timed]
    names = [_proven(p["subject"], p["arm"]).case.name for p in params]
    return systems.parity_gates(names, effort(request.config).examples)


def _proven(subject: Subject, arm: str) -> Subject:
    """Whose proof an arm needs: what is timed in bfloat16 is proven in bfloat16."""
    return (subject.in_bfloat16() if arm in BFLOAT16 else None) or subject


# torch.compile warns of its own use of what PyTorch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_throughput(
    benchmark: BenchmarkFixture,
    record: Callable[..., None],
    ring: Ring,
    subject: Subject,
    block: int,
    arm: str,
    gates: dict[str, str],
    budget: Budget,
) -> None:
    if benchmark.disabled:
        pytest.skip("a timing: ask for it with --benchmark-enable")
    if arm.startswith("torch") and machine.torch_device() is None:
        pytest.skip("PyTorch has no device of the class that MLX runs on")
    if why := gates[_proven(subject, arm).case.name]:
        pytest.fail(f"{subject.name} is not timed, its port is not proven:\n{why}", pytrace=False)
    try:
        ring.get(subject, "mlx-compiled")
        contender = ring.get(subject, arm)
    except contenders.NotCompiled as error:
        pytest.fail(f"{subject.name} {arm} is not reported: {error}", pytrace=False)

    steps = ring.steps
    benchmark.group = f"{subject.name}: {steps} steps"
    others, start = machine.others_cpu_seconds(), time.perf_counter()
    benchmark.pedantic(contender.run, (steps,), setup=contender.restore, rounds=ring.repeats)
    taken = time.perf_counter() - start
    budget.spend(subject.name, taken)
    info = dict(contender.info)
    if others is not None:
        info["others_cpu"] = max(0.0, (machine.others_cpu_seconds() or 0) - others) / taken
    # the better of a round's repeats: what disturbs a step only ever makes it longer
    seconds = float(np.min(benchmark.stats.stats.data)) / steps
    info |= {
        "batch": ring.batch_size,
        "kind": subject.kind,
        "steps_per_second": 1 / seconds,
        "images_per_second": ring.batch_size / seconds,
        "steps_per_round": steps,
    }
    benchmark.extra_info |= info
    assert math.isfinite(seconds)
    record(subject, arm, block, seconds, info)
