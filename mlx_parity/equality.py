"""The test of equality: bias against noise, and no tolerance.

A port in float32 never equals its original digit for digit: both round. But rounding errors at
different points are nearly independent and as often up as down, so they average out over points; a
wrong formula is wrong in the same direction at all of them and does not. So every case is evaluated
at K nearby points (each input and parameter times ``1 + 1e-3 normal``, rounded to float32, the same
numbers for both sides), and the differences from the float64 oracle

    d_k = port(point_k) - oracle(point_k)

are split per tensor into their mean ``m`` and standard deviation ``s`` over the points:

bias    ``t = |m| / (|s| / sqrt(K))``: the mean difference in units of its own standard error. About
        1 for a correct port, whatever the conditioning, the backend or the dtype.
noise   ``|s(port)| / |s(PyTorch in float32)|``: how much rougher the port's arithmetic is.

The bound on t.  If rounding errors are symmetric, ``d_k`` may be replaced by ``±d_k`` with random
signs, and Pinelis' inequality for sums of such vectors in a Hilbert space (Pinelis 1994, Annals of
Probability 22, Theorem 3.5) gives

    P(|sum d_k|^2 >= r^2 sum |d_k|^2) <= 2 exp(-r^2 / 2)

for tensors of every size, however their elements depend on one another and whatever the errors'
distribution. Solved for t, a false-alarm rate ``alpha`` needs

    t > r sqrt((K - 1) / (K - r^2)),    r^2 = 2 log(2 / alpha) < K.

With K = 128 and alpha = 1e-12 that is 10.0, so a million tensors raise a false alarm with
probability 1e-6. A fault in a few elements of a large tensor hides in the norm, so each element is
tested in the same way at ``alpha / size``.

Elementary functions are not symmetric: a tanh that is one unit high in the last place is so at all
nearby points. What counts as a difference is therefore also a matter of size: ``m`` must exceed
``FLOOR`` times PyTorch's own float32 error there (root mean square over the points, and at least
one unit in the last place of the value). Measured on MLX 0.32.4's CPU functions and small networks
of them, correct ones reach 2.1 of these units, at t up to 37; but for ``erf``, which is not good to
its last place, and which the yardstick therefore takes from MLX (:mod:`~mlx_parity.elementary`).
The bias reported is the smaller of t and of ``bound |m| / (FLOOR |error|)``, so that one number
decides: different above the bound.

Half precision.  The yardstick is PyTorch in the same precision, and the points lie further apart,
or all would round alike (:func:`spacing`). Noise is a verdict there: what a sum is kept in is part
of what a mixed-precision model means, and keeping it in half is an error that averages out. A port
is rough where its errors outrank ``ROUGH`` times PyTorch's (:func:`rougher`). Where the value is
nothing beside the errors, as the gradient of an attention's key bias is, they are what is left of
larger terms that cancel, in one library to the last digit and in the other by chance; there the
errors of the nearest tensors that are something are the measure (:func:`_scales`).

Cost.  Eight points decide nearly every tensor. Those that look suspicious are drawn afresh at 32
and again at 128 points, and only there can they be called different.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Literal

import numpy as np
from scipy import stats

Tensors = Mapping[str, np.ndarray]
"""Named arrays: a point (float32 inputs and parameters) or what was computed there (the oracle's
in float64)."""

STAGES = (8, 32, 128)
"""Points per stage. A tensor goes on to the next stage only if it looks suspicious."""

ALPHA = 1e-12
"""False-alarm rate of one tensor at the last stage: 1e-6 over a run of a million tensors."""

SCREEN = 1e-3
"""Rate at which a correct tensor is drawn again with more points: it costs only time."""

SCREEN_ROUGH = 0.05
"""The same for roughness: eight errors and four to compare with cannot say more than 0.002."""

FLOOR = 3.0
"""A difference below this many times PyTorch's own float32 error is called equal."""

ELEMENT_FLOOR = 4.0
"""How many times further a single element must be off, elements being many and functions uneven."""

BEYOND_DOUBT = 100.0
"""How many times over the bound a difference is believed at once: t > 540 at 8 points, and hundreds
of PyTorch's own errors, are no accident of rounding, and the later stages would only cost time."""

NOTHING = 1e-6
"""A tensor this much smaller than PyTorch's float32 error of it is zero, but for rounding: measured
1e-8 where a gradient must be zero, float64's rounding over float32's."""

JITTER = 1e-3
"""Relative distance between the points: far in units of rounding, near for everything else."""

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""One unit in the last place of 1."""

ROUGH = 4.0
"""In half precision: how many times PyTorch's errors in the same precision a port's may be. Half of
it called none of 138 drawn shapes of correct ports rough."""


def spacing(precision: str) -> float:
    """The distance between points at which roundings to ``precision`` are independent.

    What is left of a rounding error in the mean over ``1 + s normal`` times the number is a share
    of ``exp(-2 (pi s / unit)^2)``, where ``unit`` is the last place relative to the number, at most
    EPS. At twice that it is 10^-34; at an eighth of it, which is what ``JITTER`` is in bfloat16,
    three quarters. In float32 ``JITTER`` is 8,000 units.
    """
    return max(JITTER, 2 * EPS[precision])


@dataclass(frozen=True)
class Finding:
    """What the test of equality found for one tensor."""

    tensor: str
    verdict: Literal["equal", "different", "rough", "not finite", "shape"]
    bias: float
    """The smaller of t and of what the size of the difference allows: different above ``bound``."""
    bound: float
    """What t had to exceed, with the points of the last stage reached."""
    noise: float
    relative_error: float
    """Root-mean-square difference from the oracle, relative to the oracle."""
    visible: float
    """The smallest difference, relative to the tensor, that would have been seen."""
    points: int
    size: int
    worst: tuple[int, ...] | None = None
    """The element that differs most, where the elements decided."""
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.verdict == "equal"

    def __str__(self) -> str:
        if self.detail:
            return f"{self.tensor}: {self.verdict}: {self.detail}"
        text = (
            f"{self.tensor}: {self.verdict}, bias {self.bias:.3g} (bound {self.bound:.3g} at "
            f"{self.points} points), noise {self.noise:.2g}, relative error "
            f"{self.relative_error:.2g}"
        )
        if self.worst is not None:
            text += f", worst at {list(self.worst)}"
        if self.ok:
            text += f"; a relative difference of {self.visible:.1g} would have been seen"
        return text


def bound(points: int, alpha: float = ALPHA) -> float:
    """The t that a correct tensor exceeds with probability at most ``alpha``.

    Infinite where there are too few points for such an ``alpha``.

    Holds for every size and every symmetric distribution of the errors (Pinelis 1994).
    """
    r2 = 2 * math.log(2 / alpha)
    return math.inf if points <= r2 else math.sqrt(r2 * (points - 1) / (points - r2))


def jitter(
    point: Tensors, rng: np.random.Generator, scale: float = JITTER
) -> dict[str, np.ndarray]:
    """A nearby point: floating arrays times ``1 + scale * normal`` in float32; others unchanged."""
    near = {}
    for name, array in point.items():
        if np.issubdtype(array.dtype, np.floating):
            factor = np.asarray(rng.standard_normal(array.shape))  # a number alone is no array
            factor *= scale
            factor += 1
            factor *= array
            near[name] = factor.astype(np.float32)
        else:
            near[name] = array
    return near


SKETCH = 1 << 18
"""Of a larger tensor the test sees so many sums of its elements, with fixed random signs.

A sum of errors that are as often up as down is one itself, so the bound holds as before; the sum of
squares is kept on average, and no element is left out. It saves most of the memory and the time
that a large network's gradients would take."""


class _Sums:
    """First and second moments of one tensor's differences over the points seen so far."""

    def __init__(self, oracle: np.ndarray):
        self.size = oracle.size
        self.folded = oracle.size > SKETCH
        rows = -(-oracle.size // SKETCH)
        self.signs = np.random.default_rng(oracle.size).choice((-1.0, 1.0), rows)
        shape = (SKETCH,) if self.folded else oracle.shape
        self.count = self.count_ref = 0
        self.port = np.zeros(shape)
        self.port2 = np.zeros(shape)
        self.ref = np.zeros(shape)
        self.ref2 = 0.0
        self.own2 = np.zeros(shape)
        """What PyTorch's errors come to in a sum of their squares. In a sum with signs two that are
        the same at every point, as the rounding of a constant is, would seem to be no error."""
        self.value2 = np.zeros(shape)
        self.errors: list[float] = []
        """The norm of the port's difference at each point, and of PyTorch's at every other one."""
        self.errors_ref: list[float] = []

    def _difference(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """``a - b``; of a large tensor row after row, added up with a sign for each row."""
        if not self.folded:
            return np.subtract(a, b, dtype=np.float64)
        total, rows = np.zeros(SKETCH), zip(self.signs, _rows(a), _rows(b), strict=True)
        for sign, x, y in rows:
            total[: x.size] += sign * np.subtract(x, y, dtype=np.float64)
        return total

    def _squares(self, a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
        """The square of ``a - b``, or of ``a``, added up without signs."""
        if not self.folded:
            return np.square(a if b is None else np.subtract(a, b, dtype=np.float64))
        total = np.zeros(SKETCH)
        zero = np.zeros(1)
        for x, y in zip(_rows(a), repeat(zero) if b is None else _rows(b), strict=b is not None):
            total[: x.size] += np.square(np.subtract(x, y, dtype=np.float64))
        return total

    def add(self, oracle: np.ndarray, port: np.ndarray) -> None:
        d = self._difference(port, oracle)
        self.count += 1
        self.port += d
        self.errors.append(float(np.linalg.norm(d)))
        self.port2 += d * d
        self.value2 += self._squares(oracle)

    def add_usual(self, oracle: np.ndarray, reference: np.ndarray) -> None:
        r = self._difference(reference, oracle)
        self.count_ref += 1
        self.ref += r
        error = float(np.linalg.norm(r))
        self.ref2 += error * error
        self.errors_ref.append(error)
        self.own2 += self._squares(reference, oracle)

    def spread_of_usual(self) -> float:
        """The norm of PyTorch's standard deviation over the points."""
        about_mean = self.ref2 - float(np.square(self.ref).sum()) / self.count_ref
        return math.sqrt(max(about_mean, 0.0) / (self.count_ref - 1))


def _rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """A large tensor in pieces that stay in a processor's cache."""
    flat = array.reshape(-1)
    return (flat[i : i + SKETCH] for i in range(0, flat.size, SKETCH))


def _spread(total: np.ndarray, squares: np.ndarray, count: int) -> np.ndarray:
    return np.sqrt(np.maximum(squares - total * total / count, 0.0) / (count - 1))


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else (0.0 if a == 0 else math.inf)


def rougher(port: Sequence[float], usual: Sequence[float], alpha: float) -> bool:
    """Whether errors of the one kind are larger than those of the other, by their ranks alone.

    Mann and Whitney's test, one-sided at ``alpha``: how often an error of the first kind exceeds
    one of the second, beyond every other time. No distribution is assumed, and a rare event, such
    as an Adam step whose gradient changed its sign, is large once and weighs no more than once.
    The normal distribution in place of the statistic's own is on the safe side: 1.3e-12 for 9e-14
    at seven standard deviations, with 128 and 64 errors.
    """
    n, m = len(port), len(usual)
    if not n or not m:
        return False
    a, b = np.array(port)[:, None], np.array(usual)[None]
    excess = float((a > b).sum() - (a < b).sum()) / 2
    return excess > float(stats.norm.isf(alpha)) * math.sqrt(n * m * (n + m + 1) / 12)


def _judge(
    name: str,
    sums: _Sums,
    t_bound: float,
    element_bound: float,
    floor: float,
    alpha: float,
    rough: float | None,
    scale: float,
) -> Finding:
    count, root = sums.count, math.sqrt(sums.count)
    mean = sums.port / count
    spread = _spread(sums.port, sums.port2, count)
    value = np.sqrt(sums.value2 / count)
    ulp = np.spacing(value.astype(np.float32)).astype(np.float64)
    own = np.sqrt(
        sums.own2 / sums.count_ref + ulp * ulp
    )  # PyTorch's own float32 error, per element

    m, deviation, rounding, v = (float(np.linalg.norm(a)) for a in (mean, spread, own, value))
    if v < NOTHING * math.sqrt(sums.ref2 / sums.count_ref):
        v = 0.0  # nothing that a difference could be relative to
    bias = min(_ratio(m * root, deviation), t_bound * _ratio(m, floor * rounding))
    different = bias > t_bound

    worst = None
    if not different and mean.size > 1 and math.isfinite(element_bound):
        usual = np.hypot(own, np.spacing(np.float32(v / math.sqrt(mean.size))))
        excess = np.abs(mean) * root - element_bound * spread
        excess = np.where(np.abs(mean) > ELEMENT_FLOOR * floor * usual, excess, -np.inf)
        at = int(np.argmax(excess))
        if excess.flat[at] > 0:
            different = True
            if not sums.folded:
                worst = tuple(int(i) for i in np.unravel_index(at, mean.shape))

    verdict: Literal["equal", "different", "rough"] = "different" if different else "equal"
    if rough is not None and not different:
        least = max(float(np.linalg.norm(ulp)) / 12**0.5, scale * math.sqrt(sums.size))
        limits = [rough * max(error, least) for error in sums.errors_ref]
        if rougher(sums.errors, limits, alpha):
            verdict = "rough"

    return Finding(
        tensor=name,
        verdict=verdict,
        bias=bias,
        bound=t_bound,
        noise=_ratio(deviation, max(sums.spread_of_usual(), float(np.linalg.norm(ulp)) / 12**0.5)),
        relative_error=_relative(math.sqrt(float(sums.port2.sum()) / count), v),
        visible=_relative(max(t_bound * deviation / root, floor * rounding), v),
        points=count,
        size=sums.size,
        worst=worst,
    )


Place = Callable[[str], tuple[str, ...]]
"""Where a tensor stands, by its name: its kind, then modules from the outermost, and its own name.
Tensors are the nearer the more of this they share; of different kinds they are strangers."""


def _scales(sums: Mapping[str, _Sums], place: Place) -> dict[str, float]:
    """For each tensor that is nothing beside its errors: PyTorch's error, per element, of its kin.

    Rounding errs by a share of what is rounded. An error a million times the value stems from terms
    as large, which cancel; a layer's weight, whose gradient is a sum of the same terms, shows what
    rounding makes of them. Kin are the nearest that are something.
    """

    def nothing(moments: _Sums) -> bool:
        value = math.sqrt(float(moments.value2.sum()) / moments.count)
        return value <= NOTHING * max(*moments.errors, *moments.errors_ref)

    null = {n for n, moments in sums.items() if nothing(moments)}
    errors = {
        n: float(np.median(moments.errors_ref)) / math.sqrt(moments.size)
        for n, moments in sums.items()
        if n not in null
    }
    found: dict[str, float] = {}
    for name in null:
        path = place(name)
        for shared in range(len(path) - 1, 0, -1):
            kin = [e for n, e in errors.items() if place(n)[:shared] == path[:shared]]
            if kin:
                found[name] = math.sqrt(math.fsum(e * e for e in kin) / len(kin))
                break
    return found


def _relative(size: float, value: float) -> float:
    """``size`` relative to ``value``; 0 where the oracle is zero and all would show."""
    return size / value if value > 0 else 0.0


def compare(
    oracle: Callable[[Tensors], Tensors],
    reference: Callable[[Tensors], Tensors],
    port: Callable[[Tensors], Tensors],
    draw: Callable[[], Tensors],
    *,
    stages: Iterable[int] = STAGES,
    alpha: float = ALPHA,
    floor: float = FLOOR,
    rough: float | None = None,
    place: Place = lambda name: (name,),
    enough: Callable[[Finding], bool] = lambda finding: False,
    narrow: Callable[[set[str]], None] = lambda pending: None,
) -> list[Finding]:
    """Hold ``port`` against ``oracle`` at points from ``draw``; one finding per named tensor.

    ``oracle`` is the reference in float64, ``reference`` the same in the port's precision (it only
    measures how much rounding is usual). All three map a point to named tensors of equal names and
    shapes. With ``rough``, errors that many times as large as ``reference``'s are a verdict too, or
    as those of the tensor's kin by ``place`` where its value is nothing.
    Raises ``ValueError`` where the oracle itself is not finite: then the point is no test.
    """
    stages = tuple(stages)
    findings: dict[str, Finding] = {}
    pending: set[str] | None = None  # None: every tensor
    scales: dict[str, float] = {}
    for stage, points in enumerate(stages):
        last = stage == len(stages) - 1
        sums: dict[str, _Sums] = {}
        for k in range(points):
            point = draw()
            right = oracle(point)
            found = port(point)
            broken = _broken(right, found)
            if broken:
                return broken
            judged = right if pending is None else pending
            for name in judged:
                if name not in sums:
                    sums[name] = _Sums(right[name])
                sums[name].add(right[name], found[name])
            del found  # a large model's results on three sides at once would be most of the memory
            if k % 2 == 0:  # a yardstick: half the points do
                found = reference(point)
                for name in judged:
                    if name in found:
                        sums[name].add_usual(right[name], found[name])
                del found
            del right, judged  # the same, where every tensor is judged
        if pending is None and rough is not None:
            scales = _scales(sums, place)
        pending = set()
        for name, moments in sums.items():
            if last:
                t_bound, element_bound = (
                    bound(points, alpha),
                    bound(points, alpha / moments.port.size),
                )
            else:
                t_bound = float(stats.t.isf(SCREEN / 2, points - 1))
                element_bound = float(stats.t.isf(SCREEN / 2 / moments.port.size, points - 1))
            level = alpha if last else SCREEN_ROUGH
            scale = scales.get(name, 0.0)
            finding = _judge(name, moments, t_bound, element_bound, floor, level, rough, scale)
            findings[name] = finding
            sure = finding.verdict == "different" and finding.bias >= BEYOND_DOUBT * finding.bound
            if not finding.ok and not sure:
                pending.add(name)
        if not pending:
            break
        if any(not f.ok and n not in pending and enough(f) for n, f in findings.items()):
            return [f for n, f in findings.items() if n not in pending]
        narrow(pending)
    return list(findings.values())


def _broken(right: Tensors, ported: Tensors) -> list[Finding]:
    """Findings that no statistics are needed for: missing tensors, wrong shapes, NaN, infinity."""

    def broken(name: str, verdict: Literal["not finite", "shape"], detail: str) -> Finding:
        nan = math.nan
        return Finding(name, verdict, nan, nan, nan, nan, nan, 1, 0, detail=detail)

    found = []
    for name, array in right.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"the reference itself gives {_first_bad(array)} in {name!r}: look for NaN or "
                "infinity in the weights or the data before comparing"
            )
        if name not in ported:
            found.append(broken(name, "shape", "the port does not compute it"))
        elif ported[name].shape != array.shape:
            detail = f"{list(ported[name].shape)} for the reference's {list(array.shape)}"
            found.append(broken(name, "shape", detail))
        elif not np.isfinite(ported[name]).all():
            found.append(broken(name, "not finite", _first_bad(ported[name])))
    extra = sorted(set(ported) - set(right))
    found += [broken(name, "shape", "the reference does not compute it") for name in extra]
    return found


def _first_bad(array: np.ndarray) -> str:
    at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    return f"{array[at]} at {list(at)}" if at else str(array[()])
