"""The figures of bias-and-noise.md: ``python docs/figures.py`` prints them and draws the pictures.

Needs matplotlib, which nothing else does.
"""

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from torch.nn import functional as F

from mlx_parity import bound, jitter

HERE = Path(__file__).parent / "pictures"
POINTS = 512


def reference(p: dict, dtype: torch.dtype) -> np.ndarray:
    """LayerNorm, Linear, leaky ReLU."""
    x, w = (torch.tensor(p[k], dtype=dtype) for k in ("x", "w"))
    y = F.layer_norm(x, (16,), eps=1e-6) @ w.T
    return F.leaky_relu(y, 0.2).double().numpy()


def port(p: dict, eps: float = 1e-6, slope: float = 0.2) -> np.ndarray:
    y = mx.fast.layer_norm(mx.array(p["x"]), None, None, eps) @ mx.array(p["w"]).T
    return np.array(nn.leaky_relu(y, slope), dtype=np.float64)


PORTS = {
    "correct": {},
    "eps 1e-5 for 1e-6": {"eps": 1e-5},
    "slope 0.2001 for 0.2": {"slope": 0.2001},
    "slope 0.20001 for 0.2": {"slope": 0.20001},
}


def differences() -> dict[str, np.ndarray]:
    """Each port's differences from float64 at nearby points, (points, 8, 16); PyTorch's as well."""
    rng = np.random.default_rng(0)
    first = {
        "x": rng.standard_normal((8, 16)).astype(np.float32),
        "w": (rng.standard_normal((16, 16)) / 4).astype(np.float32),
    }
    points = [jitter(first, rng) for _ in range(POINTS)]
    right = [reference(p, torch.float64) for p in points]
    found = {
        name: np.stack([port(p, **wrong) - r for p, r in zip(points, right, strict=True)])
        for name, wrong in PORTS.items()
    }
    own = [reference(p, torch.float32) - r for p, r in zip(points, right, strict=True)]
    size = math.sqrt(float(np.mean(np.square(right))))
    return {k: v / size for k, v in (found | {"PyTorch in float32": np.stack(own)}).items()}


def bias(d: np.ndarray, k: int) -> float:
    """``t`` over the first ``k`` points."""
    m, s = d[:k].mean(0), d[:k].std(0, ddof=1)
    return float(np.linalg.norm(m) / (np.linalg.norm(s) / math.sqrt(k)))


def measure() -> dict[str, dict[str, float]]:
    """The table: relative error, bias at 8 and at 128 points, noise."""
    d = differences()
    spread = np.linalg.norm(d["PyTorch in float32"].std(0, ddof=1))
    return {
        name: {
            "error": float(np.sqrt(np.mean(d[name] ** 2))),
            "bias at 8": bias(d[name], 8),
            "bias at 128": bias(d[name], 128),
            "noise": float(np.linalg.norm(d[name].std(0, ddof=1)) / spread),
        }
        for name in PORTS
    }


def draw() -> None:
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "mlx-parity", "svg.fonttype": "path", "font.size": 9}
    mpl.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    d = differences()
    at = (2, 3)  # one element of the output
    green, red, grey = "#2a7f3f", "#b3312c", "#777777"

    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    for axis, name, colour in zip(
        axes, ("correct", "eps 1e-5 for 1e-6"), (green, red), strict=True
    ):
        y = d[name][:64, at[0], at[1]]
        error = y.std(ddof=1) / math.sqrt(len(y))
        axis.scatter(range(64), y, s=9, color=colour, alpha=0.7)
        axis.axhline(0, color=grey, lw=0.7)
        axis.axhspan(y.mean() - error, y.mean() + error, color=colour, alpha=0.3)
        axis.set(title=name, xlabel="point")
    axes[0].set_ylabel("port - oracle, relative")
    save(figure, "clouds")

    figure, axis = plt.subplots(figsize=(5.5, 3.2))
    ks = np.unique(np.geomspace(4, POINTS, 24).astype(int))
    for name, colour in zip(PORTS, (green, red, "#c07a1b", "#6a4fa3"), strict=True):
        axis.plot(ks, [bias(d[name], k) for k in ks], label=name, color=colour)
    some = [k for k in ks if math.isfinite(bound(int(k)))]
    axis.plot(some, [bound(int(k)) for k in some], color=grey, ls="--", label="bound")
    axis.set(xscale="log", yscale="log", xlabel="points", ylabel="bias")
    axis.legend(frameon=False, fontsize=8)
    save(figure, "growth")

    figure, axis = plt.subplots(figsize=(5.5, 3))
    for (name, row), colour in zip(
        measure().items(), (green, red, "#c07a1b", "#6a4fa3"), strict=True
    ):
        axis.scatter(row["error"], row["bias at 128"], color=colour, s=36)
        below = -11 if name.startswith("eps") else -3
        where = (row["error"], row["bias at 128"])
        axis.annotate(name, where, (6, below), textcoords="offset points")
    axis.axvline(1e-4, color=grey, lw=0.8, ls=":")
    axis.text(1.1e-4, 1.2, "a tolerance\nof 1e-4", color=grey, fontsize=8)
    axis.axhline(bound(128), color=grey, lw=0.8, ls="--")
    axis.text(1e-3, bound(128) * 1.1, "the bound", color=grey, fontsize=8, ha="right")
    axis.set(xscale="log", yscale="log", xlabel="relative error", ylabel="bias at 128 points")
    axis.set_xlim(5e-8, 1e-2)
    save(figure, "tolerance")


def save(figure, name: str) -> None:
    HERE.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    for name, row in measure().items():
        print(f"{name:24}", {k: f"{v:.2g}" for k, v in row.items()})
    draw()
