"""How much time a run of ``nox -s bench`` may spend on each system."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import pytest

from benchmarks.systems import CPU_FLOPS, Subject


@dataclass(frozen=True)
class Effort:
    """What the row of one system may cost."""

    pairs: int
    """Blocks of a system, in each of which every arm is timed once."""
    least_pairs: int
    """Blocks that are timed however long they take. A 99 % interval needs 8."""
    seconds: float
    """Of timing, after which no further block is begun."""
    examples: int
    """Shapes at which the parity gate climbs, fewer of a dear case."""
    cpu_flops: float
    """A CPU gets batches of no more operations than this in a step."""
    dearest: float
    """Cases of a higher :attr:`mlx_parity.Case.cost` are left out."""
    sampling: bool
    """Whether samplers are timed as well as training steps."""

    def takes(self, subject: Subject) -> bool:
        return subject.case.cost <= self.dearest and (self.sampling or subject.kind == "step")


FULL = Effort(12, 8, seconds=15, examples=5, cpu_flops=CPU_FLOPS, dearest=math.inf, sampling=True)
QUICK = Effort(6, 5, seconds=1, examples=1, cpu_flops=2.5e9, dearest=12, sampling=False)


def effort(config: pytest.Config) -> Effort:
    return QUICK if config.getoption("--quick") else FULL


class Budget:
    """What each system has cost so far, and whether its next block is still begun."""

    def __init__(self, allowed: Effort):
        self.allowed = allowed
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._over: dict[tuple[str, int], bool] = {}

    def spend(self, system: str, seconds: float) -> None:
        self._spent[system] += seconds

    def is_over(self, system: str, block: int) -> bool:
        """The same answer for every arm of a block: half a block has no ratios."""
        if (system, block) not in self._over:
            spent = self._spent[system] >= self.allowed.seconds
            self._over[system, block] = block >= self.allowed.least_pairs and spent
        return self._over[system, block]
