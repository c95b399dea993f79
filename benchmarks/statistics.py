"""How much faster, and how sure: ratios of paired times, without a normal distribution.

A pair is the same work by two arms in two neighbouring moments of one process. What slows the
machine down for longer than that divides out of the ratio; what is shorter is noise, with tails far
heavier than a normal distribution's. So the estimate is the Hodges-Lehmann estimate (Hodges and
Lehmann 1963) of the logarithms of the ratios, and its interval that of Wilcoxon's signed ranks:
exact for every symmetric distribution, and moved by an outlier no further than by a large value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Ratio:
    """An estimate and its interval, all of them ratios of times: 2 is half as fast."""

    value: float
    low: float
    high: float
    pairs: int
    confidence: float
    """That the interval covers the true ratio. Below what was asked where pairs are too few."""

    def inverse(self) -> Ratio:
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low, self.pairs, self.confidence)


def paired_ratio(
    numerator: Sequence[float], denominator: Sequence[float], confidence: float = CONFIDENCE
) -> Ratio:
    """The ratio of two arms' times, seconds, pair by pair. Raises ValueError without pairs."""
    a, b = np.asarray(numerator, float), np.asarray(denominator, float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"pairs are needed, got {a.shape} and {b.shape} times")
    if min(a.min(), b.min()) <= 0:
        raise ValueError("a time is not positive")
    logs = np.log(a) - np.log(b)
    n = len(logs)
    i, j = np.triu_indices(n)
    walsh = np.sort((logs[i] + logs[j]) / 2)
    k, reached = _signed_rank_quantile(n, confidence)
    value, low, high = (math.exp(x) for x in (np.median(walsh), walsh[k], walsh[-1 - k]))
    return Ratio(value, low, high, n, reached)


def _signed_rank_quantile(n: int, confidence: float) -> tuple[int, float]:
    """How many Walsh averages to leave out at each end, and the coverage that this gives."""
    # The number of subsets of {1..n} with each sum: the distribution of Wilcoxon's statistic.
    counts = np.zeros(n * (n + 1) // 2 + 1)
    counts[0] = 1
    for rank in range(1, n + 1):
        counts[rank:] += counts[:-rank].copy()
    below = np.cumsum(counts) / 2.0**n  # P(statistic <= k)
    k = max(0, int(np.searchsorted(below, (1 - confidence) / 2, side="right")) - 1)
    return k, 1 - 2 * float(below[k])


def noise_floor(control: Ratio) -> float:
    """The largest difference from 1 that two equal arms could have shown in this run, as a share.

    ``control`` is an arm against itself. An effect below the floor cannot be told from nothing.
    """
    return max(control.high, 1 / control.low) - 1
