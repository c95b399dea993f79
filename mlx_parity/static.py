"""What two module trees and two optimizers show without being run: rules that read attributes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.carry import flat, reference_tensors
from mlx_parity.layers import kind, port_modules
from mlx_parity.layout import distance
from mlx_parity.localise import ModulePair

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402


@dataclass(frozen=True)
class Clue:
    """A rule that fits: the trap, where, and the two values."""

    trap_id: str
    where: str
    evidence: str


Clues = Iterator[tuple[str, str]]
"""Trap id and evidence."""


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return not math.isclose(a, b, rel_tol=1e-7)
    return bool(a != b)


def _said(what: str, ours: Any, theirs: Any) -> str:
    def short(v: Any) -> Any:
        return f"{v:g}" if isinstance(v, float) else v

    return f"{what} is {short(ours)} in the port and {short(theirs)} in the original"


def _tuple(value: Any, count: int = 2) -> tuple[Any, ...]:
    if isinstance(value, tuple | list):
        return tuple(value)
    return (value,) * count


_TORCH_NORMS = (
    tnn.LayerNorm,
    tnn.GroupNorm,
    tnn.RMSNorm,
    tnn.modules.batchnorm._BatchNorm,
    tnn.modules.instancenorm._InstanceNorm,
)
_MLX_NORMS = (mnn.LayerNorm, mnn.GroupNorm, mnn.RMSNorm, mnn.BatchNorm, mnn.InstanceNorm)


def _norms(theirs: Any, ours: Any) -> Clues:
    if not (isinstance(theirs, _TORCH_NORMS) and isinstance(ours, _MLX_NORMS)):
        return
    kinds: dict[type, type] = {
        tnn.LayerNorm: mnn.LayerNorm,
        tnn.GroupNorm: mnn.GroupNorm,
        tnn.RMSNorm: mnn.RMSNorm,
        tnn.modules.instancenorm._InstanceNorm: mnn.InstanceNorm,
        tnn.modules.batchnorm._BatchNorm: mnn.BatchNorm,
    }
    expected = next(m for t, m in kinds.items() if isinstance(theirs, t))
    if not isinstance(ours, expected):
        yield "norm-kind", f"{type(ours).__name__} stands for {type(theirs).__name__}"
        return
    eps = theirs.eps
    if isinstance(theirs, tnn.RMSNorm):
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        if _differ(eps, ours.eps):
            yield "rmsnorm-eps", _said("eps", ours.eps, eps)
    elif _differ(eps, ours.eps):
        yield "norm-eps", _said("eps", ours.eps, eps)
    if getattr(theirs, "weight", None) is not None and "weight" not in ours:
        yield "norm-affine", "the original has a weight and a bias, the port has none"
    if getattr(theirs, "weight", None) is None and "weight" in ours:
        yield "norm-affine", "the port has a weight and a bias, the original has none"
    if isinstance(theirs, tnn.LayerNorm) and len(theirs.normalized_shape) > 1:
        yield (
            "layernorm-shape",
            f"the original normalises over {len(theirs.normalized_shape)} axes, "
            f"{list(theirs.normalized_shape)}; MLX's LayerNorm over the last",
        )
    if isinstance(theirs, tnn.GroupNorm):
        if theirs.num_groups != ours.num_groups:
            yield "norm-groups", _said("num_groups", ours.num_groups, theirs.num_groups)
        elif 1 < theirs.num_groups < theirs.num_channels and not ours.pytorch_compatible:
            yield (
                "norm-groups",
                f"pytorch_compatible is False, with {theirs.num_groups} groups of "
                f"{theirs.num_channels} channels",
            )
    if isinstance(theirs, tnn.modules.batchnorm._BatchNorm):
        if theirs.momentum is not None and _differ(theirs.momentum, ours.momentum):
            yield "norm-momentum", _said("momentum", ours.momentum, theirs.momentum)
        if theirs.track_running_stats != ours.track_running_stats:
            yield (
                "training-mode",
                _said("track_running_stats", ours.track_running_stats, theirs.track_running_stats),
            )


_CONV = (tnn.Conv1d, tnn.Conv2d, tnn.Conv3d)
_TRANSPOSED = (tnn.ConvTranspose1d, tnn.ConvTranspose2d, tnn.ConvTranspose3d)
_MLX_CONV = (mnn.Conv1d, mnn.Conv2d, mnn.Conv3d)
_MLX_TRANSPOSED = (mnn.ConvTranspose1d, mnn.ConvTranspose2d, mnn.ConvTranspose3d)


def _convs(theirs: Any, ours: Any) -> Clues:
    plain = isinstance(theirs, _CONV) and isinstance(ours, _MLX_CONV)
    transposed = isinstance(theirs, _TRANSPOSED) and isinstance(ours, _MLX_TRANSPOSED)
    if not (plain or transposed):
        return
    count = theirs.weight.ndim - 2
    for name in ("stride", "padding", "dilation", *(("output_padding",) if transposed else ())):
        a, b = getattr(theirs, name), getattr(ours, name, 0)
        if isinstance(a, str):  # "same" or "valid"
            a = 0 if a == "valid" else tuple(k // 2 for k in theirs.kernel_size)
        if _tuple(a, count) != _tuple(b, count):
            yield "conv-geometry", _said(name, list(_tuple(b, count)), list(_tuple(a, count)))
    if plain and theirs.groups != getattr(ours, "groups", 1):
        yield "conv-geometry", _said("groups", getattr(ours, "groups", 1), theirs.groups)
    if transposed and theirs.groups != 1:
        yield "grouped-conv-transpose", f"the original has {theirs.groups} groups, MLX's layer 1"
    if theirs.padding_mode != "zeros" and any(_tuple(ours.padding, count)):
        yield "padding-mode", f"the original pads with {theirs.padding_mode!r}, the port with zeros"


def _biases(theirs: Any, ours: Any) -> Clues:
    """Of Linear and of convolutions."""
    layers = (tnn.Linear, *_CONV, *_TRANSPOSED)
    ports = (mnn.Linear, *_MLX_CONV, *_MLX_TRANSPOSED)
    if isinstance(theirs, layers) and isinstance(ours, ports):
        there, here = theirs.bias is not None, "bias" in ours
        if there != here:
            has, lacks = ("original", "port") if there else ("port", "original")
            yield "bias-missing", f"the {has} has a bias, the {lacks} has none"


_ACTIVATIONS: dict[type, type] = {
    tnn.ReLU: mnn.ReLU,
    tnn.LeakyReLU: mnn.LeakyReLU,
    tnn.GELU: mnn.GELU,
    tnn.SiLU: mnn.SiLU,
    tnn.Tanh: mnn.Tanh,
    tnn.Sigmoid: mnn.Sigmoid,
    tnn.ELU: mnn.ELU,
    tnn.Softplus: mnn.Softplus,
    tnn.ReLU6: mnn.ReLU6,
    tnn.Mish: mnn.Mish,
    tnn.SELU: mnn.SELU,
    tnn.Hardswish: mnn.Hardswish,
}
_GELU = {"none": "none", "tanh": "tanh", "precise": "tanh", "fast": "sigmoid"}


def _activations(theirs: Any, ours: Any) -> Clues:
    expected = _ACTIVATIONS.get(type(theirs))
    if expected is None:
        return
    if type(ours) in _ACTIVATIONS.values() and type(ours) is not expected:
        yield "activation-kind", f"{type(ours).__name__} stands for {type(theirs).__name__}"
    elif isinstance(theirs, tnn.LeakyReLU) and isinstance(ours, mnn.LeakyReLU):
        if _differ(float(theirs.negative_slope), float(ours._negative_slope)):
            yield "activation-slope", _said("slope", ours._negative_slope, theirs.negative_slope)
        elif theirs.negative_slope > 1:
            yield "leaky-relu-steep", f"the slope is {theirs.negative_slope:g}"
    elif isinstance(theirs, tnn.ELU) and isinstance(ours, mnn.ELU):
        if _differ(float(theirs.alpha), float(ours._alpha)):
            yield "activation-slope", _said("alpha", ours._alpha, theirs.alpha)
    elif isinstance(theirs, tnn.GELU) and isinstance(ours, mnn.GELU):
        if _GELU.get(ours._approx) != theirs.approximate:
            yield "gelu-approximation", _said("the approximation", ours._approx, theirs.approximate)
    elif isinstance(theirs, tnn.Softplus) and (theirs.beta, theirs.threshold) != (1, 20):
        yield "module-setting", f"MLX's Softplus has no beta; the original's is {theirs.beta}"


def _pools(theirs: Any, ours: Any) -> Clues:
    kinds = {tnn.MaxPool2d: mnn.MaxPool2d, tnn.AvgPool2d: mnn.AvgPool2d}
    expected = kinds.get(type(theirs))
    if expected is None or not hasattr(ours, "_pooling_function"):
        return
    if type(ours) is not expected:
        yield "pool-window", f"{type(ours).__name__} stands for {type(theirs).__name__}"
        return
    for name, there in (
        ("kernel_size", theirs.kernel_size),
        ("stride", theirs.stride if theirs.stride is not None else theirs.kernel_size),
    ):
        here = _tuple(getattr(ours, f"_{name}"))
        if here != _tuple(there):
            yield "pool-window", _said(name, list(here), list(_tuple(there)))
    padding = ours._padding
    here = tuple(p[0] if isinstance(p, tuple | list) else p for p in _tuple(padding))
    here = here[1:3] if len(here) == 4 else here
    if here != _tuple(theirs.padding):
        yield "pool-window", _said("padding", list(here), list(_tuple(theirs.padding)))
    if theirs.ceil_mode:
        yield "pool-window", "the original has ceil_mode, which MLX lacks"
    if getattr(theirs, "count_include_pad", True) is False and any(_tuple(theirs.padding)):
        yield "pool-padding", "the original has count_include_pad=False, which MLX lacks"


def _upsampling(theirs: Any, ours: Any) -> Clues:
    if not (isinstance(theirs, tnn.Upsample) and isinstance(ours, mnn.Upsample)):
        return
    modes = {"nearest": "nearest", "bilinear": "linear", "linear": "linear", "bicubic": "cubic"}
    if modes.get(theirs.mode) != ours.mode:
        yield "upsample-corners", _said("mode", ours.mode, theirs.mode)
    elif bool(theirs.align_corners) != bool(ours.align_corners) and ours.mode != "nearest":
        yield (
            "upsample-corners",
            _said("align_corners", ours.align_corners, bool(theirs.align_corners)),
        )
    if theirs.scale_factor is None:
        return
    there = tuple(float(s) for s in _tuple(theirs.scale_factor))
    here = tuple(float(s) for s in _tuple(ours.scale_factor))
    if there != here:
        yield "upsample-size", _said("scale_factor", list(here), list(there))


def _others(theirs: Any, ours: Any) -> Clues:
    if isinstance(theirs, tnn.MultiheadAttention) and isinstance(ours, mnn.MultiHeadAttention):
        if theirs.num_heads != ours.num_heads:
            yield "head-count", _said("num_heads", ours.num_heads, theirs.num_heads)
        if (theirs.in_proj_bias is not None) != ("bias" in ours.query_proj):
            yield "bias-missing", "the projections of one side have biases, the other's have none"
    encoders = tnn.TransformerEncoderLayer, mnn.TransformerEncoderLayer
    if isinstance(theirs, encoders[0]) and isinstance(ours, encoders[1]):
        first = _said("norm_first", ours.norm_first, theirs.norm_first)
        yield from [("norm-first", first)] if theirs.norm_first != ours.norm_first else []
    if isinstance(theirs, tnn.Dropout) and isinstance(ours, mnn.Dropout):
        here = 1 - ours._p_1
        if _differ(float(theirs.p), float(here)):
            yield "module-setting", _said("p", float(here), float(theirs.p))
    embeddings = isinstance(theirs, tnn.Embedding) and isinstance(ours, mnn.Embedding)
    if embeddings and theirs.padding_idx is not None:
        yield "embedding-padding", f"the original's padding_idx is {theirs.padding_idx}"
    if isinstance(theirs, tnn.RNNBase) and isinstance(ours, mnn.LSTM | mnn.GRU | mnn.RNN):
        here = "bias" in ours or "b" in ours
        if theirs.bias != here:
            yield "recurrent-biases", _said("bias", here, theirs.bias)


def _constants(theirs: Any, ours: Any) -> Clues:
    """Buffers that the port does not hold as weights but has computed for itself."""
    own = {
        key: np.array(value.astype(mx.float32), np.float64)
        for module in [ours, *(m for _, m in ours.named_modules())]
        for key, value in module.items()
        if isinstance(value, mx.array) and key.startswith("_")
    }
    for name, buffer in theirs.named_buffers(recurse=False):
        right = buffer.detach().to(torch.float64).numpy()
        alike = {k: a for k, a in own.items() if a.squeeze().shape == right.squeeze().shape}
        if not buffer.is_floating_point() or right.size < 2 or not alike:
            continue
        off = {k: distance(right.squeeze(), a.squeeze()) for k, a in alike.items()}
        nearest = min(off, key=lambda k: off[k])
        if off[nearest] > _ROUNDING:
            yield (
                "constant-differs",
                f"{nearest} of the port is not {name} of the original: it is {off[nearest]:.2g} of "
                "its size away",
            )


_ROUNDING = 1e-5
"""Relative distance below which two computations of a constant are the same."""

_HEADS = ("num_heads", "n_heads", "heads", "n_head", "num_attention_heads", "nhead")


def _settings(theirs: Any, ours: Any) -> Clues:
    """Numbers and flags that both sides keep under one name, in modules of the user's own."""
    if type(theirs).__module__.startswith("torch.") or type(ours).__module__.startswith("mlx."):
        return
    own = {k.lstrip("_"): v for k, v in [*vars(ours).items(), *ours.items()]}
    for key, there in vars(theirs).items():
        here = own.get(key.lstrip("_"))
        if key in ("training", "call_super_init") or key.startswith("_"):
            continue
        numbers = int | float | bool | str
        if not (isinstance(there, numbers) and isinstance(here, numbers)):
            continue
        if there in _says_what_it_is(theirs) and here in _says_what_it_is(ours):
            continue
        if isinstance(there, str) != isinstance(here, str) or not _differ(there, here):
            continue
        trap = "module-setting"
        if key in _HEADS:
            trap = "head-count"
        elif "scale" in key and isinstance(there, float):
            trap = "attention-scale"
        elif key in ("eps", "epsilon", "norm_eps"):
            trap = "norm-eps"
        elif key in ("slope", "negative_slope"):
            trap = "activation-slope"
        yield trap, _said(key, here, there)


def _says_what_it_is(module: Any) -> tuple[Any, ...]:
    """What a module may note about itself, which no output depends on: its class, its size."""
    cls = type(module)
    names = (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")
    if isinstance(module, tnn.Module):
        return (*names, sum(p.numel() for p in module.parameters()))
    return (*names, sum(a.size for a in flat(module.parameters()).values()))


def _mode(theirs: Any, ours: Any) -> Clues:
    modes = (tnn.modules.batchnorm._NormBase, tnn.modules.dropout._DropoutNd)
    if isinstance(theirs, modes) and theirs.training != ours.training:
        said = {True: "training", False: "evaluation"}
        yield (
            "training-mode",
            f"the port is in {said[ours.training]} mode, the original in {said[theirs.training]}",
        )


RULES: tuple[Callable[[Any, Any], Clues], ...] = (
    _norms,
    _convs,
    _biases,
    _activations,
    _pools,
    _upsampling,
    _others,
    _constants,
    _settings,
    _mode,
)


def of_pair(pair: ModulePair) -> list[Clue]:
    """What one pair of modules shows."""
    where = pair.reference_path or type(pair.reference).__name__
    return [Clue(t, where, e) for rule in RULES for t, e in rule(pair.reference, pair.port)]


def of_trees(reference: tnn.Module, port: mnn.Module, paired: Iterable[ModulePair]) -> list[Clue]:
    """What the trees show as wholes: who trains, who is tied, what lies in tuples, dtypes."""
    found: list[Clue] = []
    paired = list(paired)
    there = {p.port_path: p.reference_path for p in paired}
    names = _counterparts(reference, port, there)
    tensors = reference_tensors(reference)
    trained = set(flat(port.trainable_parameters()))
    arrays = flat(port.parameters())
    parameters = {k: p.requires_grad for k, p in reference.named_parameters()}
    for name, source in names.items():
        right, here = parameters.get(source, False), name in trained
        if here and source not in parameters and source in tensors:
            statistics = source.rpartition(".")[2].startswith("running_")
            trap = "batchnorm-unfreeze" if statistics else "buffer-trains"
            found.append(Clue(trap, source, "a buffer of the original trains in the port"))
        elif right and not here:
            found.append(Clue("frozen-parameter", source, "frozen in the port, trains there"))
        elif here and source in parameters and not right:
            found.append(Clue("frozen-parameter", source, "frozen there, trains in the port"))
        wanted = tensors[source].dtype
        if wanted == torch.float32 and arrays[name].dtype in (mx.float16, mx.bfloat16):
            short = str(arrays[name].dtype).removeprefix("mlx.core.")
            found.append(Clue("type-promotion", source, f"{short} in the port, float32 there"))
    known = set(names)
    buffers = {n for n, _ in reference.named_buffers()}
    twice = {n for n, _ in reference.named_parameters(remove_duplicate=False)}  # tied ones too
    modules = port_modules(port)
    for name in sorted(trained - known - twice):
        size = arrays[name].size
        if kind(modules.get(name.rpartition(".")[0])) or not mx.issubdtype(
            arrays[name].dtype, mx.floating
        ):
            continue  # a layer's weight is no constant, and no optimizer moves a whole number
        if name in buffers or _plain_tensor(reference, name):
            found.append(Clue("buffer-trains", name, "a constant of the original trains"))
        elif not any(t.numel() == size for k, t in tensors.items() if k not in names.values()):
            found.append(Clue("buffer-trains", name, "the port trains what the original has not"))
    for path, key in _tuples(port):
        where = there.get(path, path) or type(reference).__name__
        found.append(Clue("parameter-in-tuple", where, f"{key} is a tuple of modules"))
    found += _tied(reference, arrays, names)
    return found


def _plain_tensor(reference: tnn.Module, name: str) -> bool:
    owner: Any = reference
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return isinstance(owner, torch.Tensor) and not isinstance(owner, tnn.Parameter)


def _counterparts(reference: tnn.Module, port: mnn.Module, there: dict[str, str]) -> dict[str, str]:
    """Port tensor to reference tensor, for modules that are paired and tensors of equal name."""
    tensors = reference_tensors(reference)
    found = {}
    for name in flat(port.parameters()):
        path, _, last = name.rpartition(".")
        if path in there:
            source = ".".join(p for p in (there[path], last) if p)
            if source in tensors:
                found[name] = source
    return found


def _tuples(port: mnn.Module) -> list[tuple[str, str]]:
    found = []
    for path, module in port.named_modules():
        for key, value in module.items():
            if isinstance(value, tuple) and any(isinstance(v, mnn.Module) for v in value):
                found.append((path, key))
        for key, value in vars(module).items():
            if isinstance(value, tuple) and any(isinstance(v, mnn.Module) for v in value):
                found.append((path, key))
    return found


def _tied(reference: tnn.Module, arrays: dict[str, mx.array], names: dict[str, str]) -> list[Clue]:
    shared: dict[int, list[str]] = {}
    for name, parameter in reference.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    found = []
    for same in shared.values():
        if len(same) > 1 and sum(n in names.values() or n in arrays for n in same) > 1:
            found.append(Clue("tied-array", same[0], f"one tensor there, {len(same)} in the port"))
    return found


def of_optimizers(theirs: torch.optim.Optimizer, ours: Any, where: str = "optimizer") -> list[Clue]:
    """What two optimizers' settings show."""
    found = [Clue(t, where, e) for t, e in _optimizers(theirs, ours)]
    return sorted(found, key=lambda c: c.trap_id == "adam-correction-precision")  # the smallest


def _optimizers(theirs: torch.optim.Optimizer, ours: Any) -> Clues:
    group = theirs.param_groups[0]
    kinds: dict[type, type] = {
        torch.optim.AdamW: optim.AdamW,
        torch.optim.Adam: optim.Adam,
        torch.optim.SGD: optim.SGD,
        torch.optim.RMSprop: optim.RMSprop,
        torch.optim.Adagrad: optim.Adagrad,
        torch.optim.Adadelta: optim.AdaDelta,
        torch.optim.Adamax: optim.Adamax,
    }
    expected = kinds.get(type(theirs))
    decay = group.get("weight_decay", 0)
    here: Any
    if type(theirs) is torch.optim.Adam and decay and isinstance(ours, optim.AdamW):
        yield "weight-decay-coupled", "AdamW stands for Adam with weight decay"
        return
    if isinstance(ours, optim.Adamax) and isinstance(theirs, torch.optim.Adamax):
        if type(ours) is optim.Adamax:
            yield "adamax-bias-correction", "MLX's own Adamax corrects no bias"
    elif expected is not None and not isinstance(ours, expected):
        yield (
            "optimizer-settings",
            f"{type(ours).__name__} stands for {type(theirs).__name__}",
        )
        return
    rate = float(ours.learning_rate.item())
    if not math.isclose(rate, group["lr"], rel_tol=1e-6):
        yield "optimizer-settings", _said("the learning rate", rate, group["lr"])
    if isinstance(ours, optim.Adam) and not isinstance(ours, optim.Adamax):
        if not ours.bias_correction:
            yield "adam-bias-correction", "bias_correction is False"
        elif type(ours).apply_single in (optim.Adam.apply_single, optim.AdamW.apply_single):
            yield "adam-correction-precision", "MLX's own correction, 1 - b2**t in float32"
    for key, name in (
        ("betas", "betas"),
        ("eps", "eps"),
        ("weight_decay", "weight_decay"),
        ("momentum", "momentum"),
        ("nesterov", "nesterov"),
        ("alpha", "alpha"),
        ("rho", "rho"),
    ):
        if key not in group:
            continue
        there = group[key]
        if not hasattr(ours, name):
            if there:
                yield "optimizer-defaults", f"MLX's {type(ours).__name__} has no {name}"
            continue
        here = getattr(ours, name)
        if isinstance(there, tuple):
            if any(_differ(float(a), float(b)) for a, b in zip(there, here, strict=True)):
                yield "optimizer-settings", _said(name, list(here), list(there))
        elif _differ(float(there), float(here)):
            trap = "optimizer-defaults" if key == "eps" else "optimizer-settings"
            yield trap, _said(name, here, there)
    if group.get("dampening") and group.get("momentum"):
        yield "sgd-dampening", f"dampening is {group['dampening']:g}"
    if group.get("amsgrad") or group.get("centered"):
        yield "optimizer-defaults", "MLX has neither amsgrad nor centered"
