"""Normalisations fed so little that their eps decides.

On usual data eps is a hundred-thousandth of the variance, and 5 % of it less than float32 rounds.
On a blank image, a silent second or a dead channel it is all there is: two epsilons are two
functions. So every pair of normalisations is also held against each other by itself, at inputs
whose variance is about the original's eps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.carry import flat
from mlx_parity.diagnose import Bench
from mlx_parity.equality import Finding, Tensors, compare, jitter
from mlx_parity.localise import Capture, Guilty, ModulePair
from mlx_parity.structure import copy_port

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

RUNG = "norms of faint inputs"
"""What the reports call it."""

_BATCH = tnn.modules.batchnorm._BatchNorm


def guilty_norms(pairs: Iterable[ModulePair], seed: int = 0) -> list[Guilty]:
    """The normalisations that differ at faint inputs. Both sides' modules hold the same weights."""
    rng = np.random.default_rng(seed)
    found = []
    for pair in pairs:
        shape = _shape(pair.reference) if pair.part is None else None
        if shape is None or not _may_train(pair) or _half(pair.port):
            continue
        eps: Any = pair.reference.eps
        size = math.sqrt(torch.finfo(torch.float32).eps if eps is None else eps)
        x = (size * rng.standard_normal(shape)).astype(np.float32)
        try:
            finding = _held(pair, x, rng)
        except Exception:  # it takes other inputs than its kind does, and was read within the whole
            continue
        if finding is not None:
            capture = Capture((x,), {}, None)
            found.append(Guilty(_normalising(pair), "forward", finding, capture))
    return found


def _may_train(pair: ModulePair) -> bool:
    """Whether a batch norm's copy may be put into training mode: one of the port's own making, kept
    in evaluation mode, may know no other."""
    kept = isinstance(pair.reference, _BATCH) and not pair.reference.training
    return not kept or type(pair.port) is mnn.BatchNorm


def _half(port: mnn.Module) -> bool:
    """Whether it computes in 16 bits, whose rounding nearby points share."""
    return any(a.dtype != mx.float32 for a in flat(port.parameters()).values())


def _normalising(pair: ModulePair) -> ModulePair:
    """The pair as copies that take the statistics of what they are fed."""
    theirs, ours = copy.deepcopy(pair.reference), copy_port(pair.port)
    if isinstance(theirs, _BATCH):
        theirs.train()
        ours.train()
    return replace(pair, reference=theirs, port=ours)


def _held(pair: ModulePair, x: np.ndarray, rng: np.random.Generator) -> Finding | None:
    """The finding by which a pair differs."""
    pair = _normalising(pair)
    bench = Bench(pair.reference, pair.port, (x,), {}, gradients=False, count=2)

    def outputs(found: Tensors) -> Tensors:
        return {k: a for k, a in found.items() if not k.startswith("buffer/")}

    findings = compare(
        lambda p: outputs(bench.run(bench.oracle, p)),
        lambda p: outputs(bench.run(bench.usual, p)),
        lambda p: outputs(bench.run_port(p)),
        lambda: jitter({"in.0.0": x}, rng),
    )
    wrong = next((f for f in findings if not f.ok), None)
    where = pair.reference_path or type(pair.reference).__name__
    return None if wrong is None else replace(wrong, tensor=f"{where} of faint inputs")


def _shape(module: tnn.Module) -> tuple[int, ...] | None:
    """Of inputs for a normalisation in PyTorch's layout, by its type."""
    if isinstance(module, tnn.LayerNorm | tnn.RMSNorm):
        return (4, *module.normalized_shape)
    if isinstance(module, tnn.GroupNorm):
        return (2, module.num_channels, 3, 4)
    if isinstance(module, tnn.BatchNorm1d):
        return (6, module.num_features)
    if isinstance(module, tnn.BatchNorm2d | tnn.InstanceNorm2d):
        return (2, module.num_features, 3, 4)
    if isinstance(module, tnn.InstanceNorm1d):
        return (2, module.num_features, 6)
    return None
