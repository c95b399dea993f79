"""Weight files between PyTorch and MLX, for a declared pair of modules.

A checkpoint is data, and is read as data: ``.pth`` with ``weights_only=True``, or safetensors. No
pickle is ever executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.carry import flat, reference_tensors
from mlx_parity.errors import CarryError, ParityError
from mlx_parity.weights import FoundPlan, find_plan

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

TORCH_FILES = (".pth", ".pt", ".bin")
FILES = (*TORCH_FILES, ".safetensors")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights", "module")
"""Keys under which checkpoints keep their weights beside an optimizer's state and more."""

_DTYPES = {torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}


class FileError(ParityError):
    """A weight file cannot be read, or is not for these modules."""


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name; wrappers and ``module.`` prefixes are taken off."""
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            arrays = mx.load(str(path))
        except Exception as error:
            raise FileError(f"{path} is no safetensors file: {error}") from error
        assert isinstance(arrays, dict)
        return {n: _torch(a) for n, a in arrays.items()}
    if path.suffix not in TORCH_FILES:
        raise FileError(f"{path}: only {', '.join(FILES)} can be read")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise FileError(
            f"{path} holds more than tensors, or is no checkpoint, and is not unpickled: save it "
            f"again as torch.save(model.state_dict(), ...) where you trust it ({first})"
        ) from error
    return _unwrapped(data, path)


def _unwrapped(data: Any, path: Path) -> dict[str, torch.Tensor]:
    while isinstance(data, Mapping) and not any(isinstance(v, torch.Tensor) for v in data.values()):
        inner = next((data[k] for k in WRAPPERS if isinstance(data.get(k), Mapping)), None)
        if inner is None:
            break
        data = inner
    if not isinstance(data, Mapping):
        raise FileError(f"{path} holds {type(data).__name__}, and no tensors by name")
    tensors = {str(n): t for n, t in data.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise FileError(f"{path} holds no tensors; its keys are {', '.join(map(str, data))[:200]}")
    if all(n.startswith("module.") for n in tensors):
        tensors = {n.removeprefix("module."): t for n, t in tensors.items()}
    return tensors


def _torch(array: mx.array) -> torch.Tensor:
    back = {v: k for k, v in _DTYPES.items()}
    if array.dtype in back:
        return torch.from_numpy(np.array(array.astype(mx.float32))).to(back[array.dtype])
    return torch.from_numpy(np.array(array))


def _mlx(array: np.ndarray, dtype: torch.dtype) -> mx.array:
    made = mx.array(array)
    return made.astype(_DTYPES[dtype]) if dtype in _DTYPES else made


def to_mlx(
    source: Path, target: Path, reference: tnn.Module, port: mnn.Module, **options: Any
) -> int:
    """A PyTorch checkpoint to an MLX safetensors file for ``port``; returns how many arrays.

    Options are those of :func:`mlx_parity.check` on weights: ``map``, ``sanitize``, ``flatten``, …
    """
    if target.suffix != ".safetensors":
        raise FileError(f"{target}: MLX's weights are written as .safetensors")
    tensors = read(source)
    plan = _planned(reference, port, options)
    wanted = reference_tensors(reference)
    tied = _tied(reference)
    missing = [n for n in wanted if n not in tensors and not (tied.get(n, set()) & set(tensors))]
    if missing:
        raise FileError(
            f"{source} lacks {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}, which "
            f"{type(reference).__name__} has; it holds {', '.join(list(tensors)[:5])} …"
        )
    arrays: dict[str, np.ndarray] = {}
    for n, tensor in wanted.items():
        there = tensors[n] if n in tensors else tensors[(tied[n] & set(tensors)).pop()]
        if there.shape != tensor.shape:
            raise FileError(
                f"{source}: {n} is {list(there.shape)}, where {type(reference).__name__} has "
                f"{list(tensor.shape)}"
            )
        arrays[n] = (there.float() if there.is_floating_point() else there).numpy()
    made = plan.to_port(arrays)
    dtypes = {link.port: tensors.get(link.sources[0], torch.empty(0)).dtype for link in plan.links}
    weights = {n: _mlx(a, dtypes[n]) for n, a in made.items()}
    mx.save_safetensors(str(target), weights)
    return len(weights)


def to_torch(
    source: Path, target: Path, reference: tnn.Module, port: mnn.Module, **options: Any
) -> int:
    """An MLX safetensors file of ``port`` to a PyTorch state dict; returns how many tensors.

    Two biases of PyTorch's that MLX holds as one come back as their sum and zero.
    """
    if target.suffix not in TORCH_FILES:
        raise FileError(f"{target}: PyTorch's weights are written as {', '.join(TORCH_FILES)}")
    arrays = read(source)
    plan = _planned(reference, port, options)
    have = flat(port.parameters())
    missing = [n for n in have if n not in arrays]
    if missing:
        raise FileError(
            f"{source} lacks {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}, which "
            f"{type(port).__name__} has; it holds {', '.join(list(arrays)[:5])} …"
        )
    numbers = {n: a.float().numpy() for n, a in arrays.items() if n in have}
    for n, a in numbers.items():
        if a.shape != tuple(have[n].shape):
            raise FileError(
                f"{source}: {n} is {list(a.shape)}, where {type(port).__name__} has "
                f"{list(have[n].shape)}"
            )
    values = plan.values(numbers)
    for link in plan.links:
        if link.invertible or len(link.sources) != 2:
            continue
        first, second = link.sources
        if first not in values and second not in values:
            values[first] = numbers[link.port]
            values[second] = np.zeros_like(numbers[link.port])
    tensors = reference_tensors(reference)
    lost = [n for n in tensors if n not in values and n not in plan.ignored]
    if lost:
        raise CarryError(f"{', '.join(lost[:5])} cannot be told from what MLX holds")
    state = dict(reference.state_dict())
    canonical = {id(t): n for n, t in tensors.items()}
    for name, tensor in reference.state_dict(keep_vars=True).items():
        source_name = canonical.get(id(tensor), name)
        if source_name in values:
            state[name] = torch.from_numpy(np.ascontiguousarray(values[source_name]))
    torch.save(state, target)
    return len(state)


def _planned(reference: tnn.Module, port: mnn.Module, options: Mapping[str, Any]) -> FoundPlan:
    if not isinstance(reference, tnn.Module) or not isinstance(port, mnn.Module):
        raise FileError("the case's reference and port have to be modules: they hold the weights")
    return find_plan(reference, port, **options)


def _tied(reference: tnn.Module) -> dict[str, set[str]]:
    """For each tensor the other names under which a state dict holds it."""
    names: dict[int, set[str]] = {}
    for name, tensor in reference.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), set()).add(name)
    return {n: names.get(id(t), {n}) for n, t in reference_tensors(reference).items()}
