"""Models of vectors and sequences: an MLP, the MLP GAN's discriminator, recurrent, a transformer
block, normalisations, embeddings."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import torch
from torch import nn as tnn
from torch.nn import functional as F

from tests.score.family import Example, Family, Rng, called, fault, normal, setting, size, swapped

# ------------------------------------------------------------------------------------------ MLP


class MLP(tnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = tnn.Linear(4, width)
        self.act = tnn.GELU()
        self.fc2 = tnn.Linear(width, width)
        self.fc3 = tnn.Linear(width, width)
        self.out = tnn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.fc1(x))
        x = x + self.act(self.fc2(x))
        return self.out(torch.tanh(self.fc3(x)))


class PortMLP(mnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = mnn.Linear(4, width)
        self.act = mnn.GELU()
        self.fc2 = mnn.Linear(width, width)
        self.fc3 = mnn.Linear(width, width)
        self.out = mnn.Linear(width, 3)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.act(self.fc1(x))
        x = x + self.act(self.fc2(x))
        return self.out(mx.tanh(self.fc3(x)))


def mlp(rng: Rng) -> Example:
    width = size(rng, 3, 8)
    return Example(MLP(width), PortMLP(width), normal(rng, size(rng, 1, 5), 4))


def _mlp(second: str = "fc2", third: str = "fc3", residual: bool = True, stop: bool = False) -> Any:
    def forward(self: Any, x: mx.array) -> mx.array:
        x = self.act(self.fc1(x))
        y = self.act(self[second](x))
        x = x + y if residual else y
        x = mx.tanh(self[third](x)) if third else mx.tanh(x)
        return self.out(mx.stop_gradient(x) if stop else x)

    return forward


def _tuple(port: Any) -> Any:
    class Tupled(type(port)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(port.fc1.weight.shape[0])
            self.pair = (self.fc2, self.fc3)
            del self.fc2
            del self.fc3

        def __call__(self, x: mx.array) -> mx.array:
            x = self.act(self.fc1(x))
            x = x + self.act(self.pair[0](x))
            return self.out(mx.tanh(self.pair[1](x)))

    return Tupled()


def _no_bias(layer: Any) -> mnn.Linear:
    outputs, inputs = layer.weight.shape
    return mnn.Linear(inputs, outputs, bias=False)


def _trained_scale(port: Any) -> None:
    kind = type(port)
    port.scale = mx.ones(1)
    port.__class__ = type(
        kind.__name__, (kind,), {"__call__": lambda self, x: kind.__call__(self, x) * self.scale}
    )


MLP_FAMILY = Family(
    "MLP",
    mlp,
    (
        fault(
            "GELU by tanh", "act", "gelu-approximation", swapped("act", lambda _: mnn.GELU("tanh"))
        ),
        fault(
            "GELU by a sigmoid",
            "act",
            "gelu-approximation",
            swapped("act", lambda _: mnn.GELU("fast")),
        ),
        fault("ReLU for GELU", "act", "activation-kind", swapped("act", lambda _: mnn.ReLU())),
        called("a residual dropped", "", "residual-dropped", _mlp(residual=False)),
        called("two layers swapped", "", "layer-order", _mlp("fc3", "fc2")),
        called("a layer skipped", "", "layer-order", _mlp(third="")),
        called("a layer called twice", "", "layer-order", _mlp(third="fc2")),
        called("the gradient stopped", "", "gradient-stopped", _mlp(stop=True)),
        called("a bias not added", "fc2", "bias-missing", lambda self, x: x @ self.weight.T),
        called(
            "a weight transposed",
            "fc3",
            "weight-transposed",
            lambda self, x: x @ self.weight + self.bias,
        ),
        fault("no bias", "structure", "bias-missing", swapped("out", _no_bias)),
        fault("a frozen layer", "structure", "frozen-parameter", lambda p: p.fc1.freeze() and None),
        fault("layers in a tuple", "weights", "parameter-in-tuple", _tuple),
        fault("a constant that trains", "structure", "buffer-trains", _trained_scale),
        called(
            "a bias stopped",
            "fc2",
            "gradient-stopped",
            lambda self, x: x @ self.weight.T + mx.stop_gradient(self.bias),
        ),
    ),
)

# -------------------------------------------------------------------------------- discriminator


class Discriminator(tnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = tnn.Linear(6, 2 * width)
        self.fc2 = tnn.Linear(2 * width, width)
        self.fc3 = tnn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.fc1(x), 0.2)
        x = F.leaky_relu(self.fc2(x), 0.2)
        return self.fc3(x)


class PortDiscriminator(mnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = mnn.Linear(6, 2 * width)
        self.fc2 = mnn.Linear(2 * width, width)
        self.fc3 = mnn.Linear(width, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self._run(x)

    def _run(self, x: mx.array, a: float = 0.2, b: float = 0.2, last: Any = None) -> mx.array:
        x = self.fc1(x)
        x = mx.where(x > 0, x, a * x)
        x = self.fc2(x)
        x = self.fc3(mx.where(x > 0, x, b * x))
        return x if last is None else last(x)


def discriminator(rng: Rng) -> Example:
    width = size(rng, 2, 6)
    return Example(Discriminator(width), PortDiscriminator(width), normal(rng, size(rng, 1, 5), 6))


def _run(**wrong: Any) -> Any:
    return lambda self, x: self._run(x, **wrong)


DISCRIMINATOR_FAMILY = Family(
    "MLP GAN",
    discriminator,
    (
        called("slope 0.01", "", "activation-slope", _run(a=0.01, b=0.01)),
        called("slope 1e-5 off", "", "activation-slope", _run(a=0.20001, b=0.20001), True),
        called("one slope 1e-4 off", "", "activation-slope", _run(b=0.2001), True),
        called("one slope 0.3", "", "activation-slope", _run(a=0.3)),
        called("ReLU for leaky ReLU", "", "activation-slope activation-kind", _run(a=0.0, b=0.0)),
        called("probabilities for logits", "", "activation-kind", _run(last=mx.sigmoid)),
    ),
)

# ------------------------------------------------------------------------------------ recurrent


class Recurrent(tnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.lstm = tnn.LSTM(3, width, batch_first=True)
        self.gru = tnn.GRU(width, width, batch_first=True)
        self.out = tnn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.lstm(x)
        h, _ = self.gru(h)
        return self.out(h[:, -1])


class PortRecurrent(mnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.lstm = mnn.LSTM(3, width)
        self.gru = mnn.GRU(width, width)
        self.out = mnn.Linear(width, 2)

    def __call__(self, x: mx.array) -> mx.array:
        h, _ = self.lstm(x)
        return self.out(self.gru(h)[:, -1])


def recurrent(rng: Rng) -> Example:
    width = size(rng, 2, 4)
    x = normal(rng, size(rng, 1, 3), size(rng, 3, 5), 3)
    return Example(Recurrent(width), PortRecurrent(width), x)


def _with_weights(kind: Any, change: Any) -> Any:
    """A recurrent layer that computes with changed weights."""

    def forward(self: Any, *args: Any) -> Any:
        own = {k: self[k] for k in ("Wx", "Wh", "bias", "b", "bhn") if k in self}
        for k, v in change(own).items():
            self[k] = v
        try:
            return kind.__call__(self, *args)
        finally:
            for k, v in own.items():
                self[k] = v

    return forward


def _gates(order: tuple[int, ...]) -> Any:
    def change(own: dict[str, Any]) -> dict[str, Any]:
        n = len(order)
        return {
            k: mx.concatenate([mx.split(v, n)[i] for i in order])
            for k, v in own.items()
            if k != "bhn"
        }

    return change


def _reset_outside(own: dict[str, Any]) -> dict[str, Any]:
    size = own["bhn"].shape[0]
    added = mx.concatenate([own["b"][: 2 * size], own["b"][2 * size :] + own["bhn"]])
    return {"b": added, "bhn": mx.zeros(size)}


RECURRENT_FAMILY = Family(
    "recurrent",
    recurrent,
    (
        called(
            "an LSTM's gates in ONNX's order",
            "lstm",
            "gate-order",
            _with_weights(mnn.LSTM, _gates((0, 3, 1, 2))),
        ),
        called(
            "a GRU's gates exchanged",
            "gru",
            "gate-order",
            _with_weights(mnn.GRU, _gates((1, 0, 2))),
        ),
        called(
            "a GRU's second bias in the first",
            "gru",
            "recurrent-biases",
            _with_weights(mnn.GRU, _reset_outside),
        ),
        called(
            "an LSTM without its bias",
            "lstm",
            "recurrent-biases",
            _with_weights(mnn.LSTM, lambda own: {"bias": own["bias"] * 0}),
        ),
        called(
            "the last step but one",
            "",
            "index-out-of-bounds module-setting pooling-kind",
            lambda self, x: self.out(self.gru(self.lstm(x)[0])[:, -2]),
        ),
        called(
            "the mean over time",
            "",
            "index-out-of-bounds module-setting pooling-kind",
            lambda self, x: self.out(self.gru(self.lstm(x)[0]).mean(1)),
        ),
    ),
)

# ----------------------------------------------------------------------------- transformer block


class Attention(tnn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (tnn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, c // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, n, c))


class Transformer(tnn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = tnn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = tnn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = tnn.Linear(width, 2 * width), tnn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PortAttention(mnn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (mnn.Linear(width, width) for _ in range(4))

    def __call__(self, x: mx.array) -> mx.array:
        return self._run(x)

    def _run(
        self,
        x: mx.array,
        heads: int = 0,
        scale: float = 0.0,
        mask: Any = "causal",
        order: str = "qkv",
        interleaved: bool = False,
    ) -> mx.array:
        b, n, c = x.shape
        heads = heads or self.heads
        shape = (b, n, c // heads, heads) if interleaved else (b, n, heads, c // heads)
        axes = (0, 3, 1, 2) if interleaved else (0, 2, 1, 3)
        q, k, v = (self[f](x).reshape(shape).transpose(axes) for f in order)
        scale = scale or (c // heads) ** -0.5
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return self.o(y.transpose(0, 2, 1, 3).reshape(b, n, c))


class PortTransformer(mnn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = mnn.LayerNorm(width, eps=1e-6)
        self.attention = PortAttention(width, heads)
        self.norm2 = mnn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = mnn.Linear(width, 2 * width), mnn.Linear(2 * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(mnn.gelu(self.fc1(self.norm2(x))))


def transformer(rng: Rng) -> Example:
    heads = 2
    width = 8
    x = normal(rng, size(rng, 1, 3), size(rng, 3, 6), width)
    return Example(Transformer(width, heads), PortTransformer(width, heads), x)


def _post_norm(self: Any, x: mx.array) -> mx.array:
    x = self.norm1(x + self.attention(x))
    return self.norm2(x + self.fc2(mnn.gelu(self.fc1(x))))


def _no_second_norm(self: Any, x: mx.array) -> mx.array:
    x = x + self.attention(self.norm1(x))
    return x + self.fc2(mnn.gelu(self.fc1(x)))


def _no_residual(self: Any, x: mx.array) -> mx.array:
    x = x + self.attention(self.norm1(x))
    return self.fc2(mnn.gelu(self.fc1(self.norm2(x))))


def _swapped_norms(self: Any, x: mx.array) -> mx.array:
    x = x + self.attention(self.norm2(x))
    return x + self.fc2(mnn.gelu(self.fc1(self.norm1(x))))


def _tanh_gelu(self: Any, x: mx.array) -> mx.array:
    x = x + self.attention(self.norm1(x))
    return x + self.fc2(mnn.gelu_approx(self.fc1(self.norm2(x))))


TRANSFORMER_FAMILY = Family(
    "transformer block",
    transformer,
    (
        called("twice as many heads", "attention", "head-count", _run(heads=4)),
        fault(
            "another number of heads in the config",
            "attention",
            "head-count",
            setting("attention", heads=4),
        ),
        called("heads interleaved", "attention", "head-count", _run(interleaved=True)),
        called("scaled by the whole width", "attention", "attention-scale", _run(scale=8**-0.5)),
        called("the scale 0.1 % off", "attention", "attention-scale", _run(scale=0.5005), True),
        called("no causal mask", "attention", "attention-mask", _run(mask=None)),
        called("query and key exchanged", "attention", "layer-order", _run(order="kqv")),
        called("key and value exchanged", "attention", "layer-order", _run(order="qvk")),
        fault("LayerNorm eps 1e-5", "norm1", "norm-eps", setting("norm1", eps=1e-5)),
        called("normalised after the sum", "", "norm-first layer-order", _post_norm),
        called("a norm skipped", "", "layer-order", _no_second_norm),
        called("a residual dropped", "", "residual-dropped", _no_residual),
        called("two norms swapped", "", "layer-order", _swapped_norms),
        called("GELU by tanh", "", "gelu-approximation", _tanh_gelu),
    ),
)

# -------------------------------------------------------------------------------- normalisations


class Norms(tnn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.batch = tnn.BatchNorm1d(channels)
        self.group = tnn.GroupNorm(2, channels)
        self.instance = tnn.InstanceNorm1d(channels, affine=True)
        self.layer = tnn.LayerNorm(channels)
        self.rms = tnn.RMSNorm(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.instance(self.group(self.batch(x)) ** 2)
        return self.rms(self.layer(x.transpose(1, 2)) ** 2)


class PortNorms(mnn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.batch = mnn.BatchNorm(channels)
        self.group = mnn.GroupNorm(2, channels, pytorch_compatible=True)
        self.instance = mnn.InstanceNorm(channels, affine=True)
        self.layer = mnn.LayerNorm(channels)
        self.rms = mnn.RMSNorm(channels, eps=1e-6)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.instance(self.group(self.batch(x)) ** 2)
        return self.rms(self.layer(x) ** 2)


def norms(rng: Rng) -> Example:
    channels = 2 * size(rng, 2, 3)
    x = normal(rng, size(rng, 2, 4), channels, size(rng, 5, 7))
    return Example(Norms(channels), PortNorms(channels), x)


def _unfrozen(port: Any) -> None:
    port.freeze()
    port.unfreeze()


def _biased_batch_norm(self: Any, x: mx.array) -> mx.array:
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    self.running_mean = 0.9 * self.running_mean + 0.1 * mean
    self.running_var = 0.9 * self.running_var + 0.1 * var
    return (x - mean) * mx.rsqrt(var + self.eps) * self.weight + self.bias


NORMS_FAMILY = Family(
    "normalisations",
    norms,
    (
        fault(
            "GroupNorm's own groups",
            "group",
            "norm-groups",
            setting("group", pytorch_compatible=False),
        ),
        fault("InstanceNorm eps 1e-3", "instance", "norm-eps", setting("instance", eps=1e-3)),
        fault("LayerNorm eps 1e-12", "layer", "norm-eps", setting("layer", eps=1e-12), True),
        fault("RMSNorm eps 1e-5", "rms", "rmsnorm-eps", setting("rms", eps=1e-5)),
        called(
            "the running variance biased", "batch", "batchnorm-biased-variance", _biased_batch_norm
        ),
        called(
            "no shift",
            "layer",
            "norm-affine",
            lambda self, x: mx.fast.layer_norm(x, self.weight, None, self.eps),
        ),
        called(
            "no scale", "rms", "norm-affine", lambda self, x: mx.fast.rms_norm(x, None, self.eps)
        ),
        called(
            "RMSNorm for LayerNorm",
            "layer",
            "norm-kind",
            lambda self, x: mx.fast.rms_norm(x, self.weight, self.eps) + self.bias,
        ),
        called(
            "a sample's variance",
            "layer",
            "variance-ddof",
            lambda self, x: (
                (x - x.mean(-1, keepdims=True))
                * mx.rsqrt(x.var(-1, keepdims=True, ddof=1) + self.eps)
                * self.weight
                + self.bias
            ),
        ),
        fault(
            "trainable statistics",
            "structure",
            "batchnorm-unfreeze",
            _unfrozen,
        ),
    ),
)

# ------------------------------------------------------------------------------------ embeddings


class Language(tnn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.embedding = tnn.Embedding(tokens, width)
        self.position = tnn.Embedding(8, width)
        self.norm = tnn.RMSNorm(width, eps=1e-6)
        self.scale = width**0.5

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) * self.scale
        x = x + self.position(torch.arange(ids.shape[1]))
        x = F.silu(self.norm(x)) + x
        return x @ self.embedding.weight.T


class PortLanguage(mnn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.embedding = mnn.Embedding(tokens, width)
        self.position = mnn.Embedding(8, width)
        self.norm = mnn.RMSNorm(width, eps=1e-6)
        self.scale = width**0.5

    def __call__(self, ids: mx.array) -> mx.array:
        return self._run(ids)

    def _run(
        self,
        ids: mx.array,
        scale: bool = True,
        shift: int = 0,
        stop: bool = False,
        position: bool = True,
    ) -> mx.array:
        x = self.embedding(ids) * (self.scale if scale else 1.0)
        if position:
            x = x + self.position(mx.arange(ids.shape[1]) + shift)
        x = mnn.silu(self.norm(x)) + x
        weight = self.embedding.weight
        return x @ (mx.stop_gradient(weight) if stop else weight).T


def language(rng: Rng) -> Example:
    tokens, width = size(rng, 5, 9), size(rng, 3, 6)
    ids = rng.integers(0, tokens, (size(rng, 1, 3), size(rng, 2, 5)))
    return Example(Language(tokens, width), PortLanguage(tokens, width), ids)


LANGUAGE_FAMILY = Family(
    "embedding, tied",
    language,
    (
        called("embeddings not scaled", "", "scale-factor module-setting", _run(scale=False)),
        called("positions from 1", "", "index-out-of-bounds", _run(shift=1)),
        called("the tied head does not train", "", "gradient-stopped tied-array", _run(stop=True)),
        called("no positions", "", "residual-dropped", _run(position=False)),
        fault("RMSNorm's default eps", "norm", "rmsnorm-eps", setting("norm", eps=1e-5)),
        called(
            "indices off by one",
            "embedding",
            "index-out-of-bounds",
            lambda self, ids: self.weight[mx.clip(ids + 1, 0, self.weight.shape[0] - 1)],
        ),
    ),
)

FAMILIES = (
    MLP_FAMILY,
    DISCRIMINATOR_FAMILY,
    RECURRENT_FAMILY,
    TRANSFORMER_FAMILY,
    NORMS_FAMILY,
    LANGUAGE_FAMILY,
)
