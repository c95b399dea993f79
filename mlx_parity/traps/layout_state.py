"""Layouts, weights, and what a module holds."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import torch
from torch.nn import functional as F

from mlx_parity.traps.trap import A, Rng, T, Trap, arrays


class ConvKernelLayout(Trap):
    """A convolution's kernel is (out, height, width, in) in MLX and (out, in, ...) in PyTorch.

    Three channels and a 3x3 kernel fit both ways, and `load_weights(strict=True)` takes such a
    kernel untransposed: the first layer of VGG and of many another network.
    """

    id = "conv-kernel-layout"
    title = "A convolution's kernel that fits both ways"
    rows = ("29", "32")
    fix = "weight.transpose(0, 2, 3, 1) when the weights are carried"
    error = 1.2
    images = frozenset({"x", "output"})
    shapes = arrays(x=(2, 3, 5, 6), w=(4, 3, 3, 3))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return F.conv2d(x, w)

    @staticmethod
    def naive(x: A, w: A) -> A:
        conv = nn.Conv2d(3, 4, 3, bias=False)
        conv.load_weights([("weight", w)], strict=True)
        return conv(x)

    @staticmethod
    def fixed(x: A, w: A) -> A:
        conv = nn.Conv2d(3, 4, 3, bias=False)
        conv.load_weights([("weight", w.transpose(0, 2, 3, 1))], strict=True)
        return conv(x)


class ConvTransposeKernelLayout(Trap):
    """A transposed convolution's kernel is (in, out, height, width) in PyTorch.

    MLX wants (out, height, width, in). The rule of the plain convolution, (0, 2, 3, 1), gives
    (in, height, width, out): the same shape wherever a layer keeps its number of channels.
    """

    id = "conv-transpose-kernel-layout"
    title = "A transposed convolution's kernel needs a rule of its own"
    rows = ("30",)
    fix = "weight.transpose(1, 2, 3, 0) when the weights are carried"
    error = 0.87
    images = frozenset({"x", "output"})
    shapes = arrays(x=(2, 3, 4, 5), w=(3, 3, 2, 2))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return F.conv_transpose2d(x, w, stride=2)

    @staticmethod
    def naive(x: A, w: A) -> A:
        return mx.conv_transpose2d(x, w.transpose(0, 2, 3, 1), stride=2)

    @staticmethod
    def fixed(x: A, w: A) -> A:
        return mx.conv_transpose2d(x, w.transpose(1, 2, 3, 0), stride=2)


class GroupedConvTranspose(Trap):
    """Each group of a transposed convolution keeps its own block of inputs and outputs.

    PyTorch's kernel is (in, out / groups, ...), the groups along the first axis. MLX's is
    (out, ..., in / groups), the groups along the first axis as well, which is now another one.
    `nn.ConvTranspose2d` has no `groups`; `mx.conv_transpose2d` has.
    """

    id = "grouped-conv-transpose"
    title = "Groups of a transposed convolution"
    rows = ("31",)
    fix = "cut the kernel into groups, transpose each (1, 2, 3, 0), and join them on axis 0"
    error = 1.1
    images = frozenset({"x", "output"})
    shapes = arrays(x=(2, 4, 4, 5), w=(4, 2, 3, 3))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return F.conv_transpose2d(x, w, groups=2)

    @staticmethod
    def naive(x: A, w: A) -> A:
        kernel = w.transpose(0, 2, 3, 1)  # (4, 3, 3, 2): the shape fits
        return mx.conv_transpose2d(x, kernel, groups=2)

    @staticmethod
    def fixed(x: A, w: A) -> A:
        kernel = mx.concatenate([g.transpose(1, 2, 3, 0) for g in mx.split(w, 2)])
        return mx.conv_transpose2d(x, kernel, groups=2)


class LoadNotStrict(Trap):
    """`strict=False`, `Module.update` and assignment take weights of any shape.

    A bias of one element broadcasts over all channels. Only `load_weights(strict=True)` compares
    the shapes, and it cannot tell apart what fits both ways.
    """

    id = "load-not-strict"
    title = "Wrong shapes are loaded without a word"
    rows = ("33",)
    fix = "model.load_weights(path, strict=True)"
    error = 1.4
    shapes = arrays(x=(2, 4), w=(3, 4), b=(3,))

    @staticmethod
    def reference(x: T, w: T, b: T) -> T:
        return F.linear(x, w, b)

    @staticmethod
    def naive(x: A, w: A, b: A) -> A:
        linear = nn.Linear(4, 3)
        linear.load_weights([("weight", w), ("bias", b[:1])], strict=False)
        return linear(x)

    @staticmethod
    def fixed(x: A, w: A, b: A) -> A:
        linear = nn.Linear(4, 3)
        linear.load_weights([("weight", w), ("bias", b)], strict=True)
        return linear(x)


class FlattenOrder(Trap):
    """Flattened images are (C, H, W) in PyTorch and (H, W, C) in MLX.

    The Linear that follows then meets its columns in another order. Nothing raises, whatever the
    sizes.
    """

    id = "flatten-order"
    title = "The order of a flattened image"
    rows = ("34",)
    fix = "permute the Linear's columns (C, H, W) -> (H, W, C) once, or x.transpose(0, 3, 1, 2)"
    error = 1.5
    images = frozenset({"x"})
    shapes = arrays(x=(2, 3, 4, 5), w=(7, 60))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return F.linear(x.flatten(1), w)

    @staticmethod
    def naive(x: A, w: A) -> A:
        return x.flatten(1) @ w.T

    @staticmethod
    def fixed(x: A, w: A) -> A:
        return x.transpose(0, 3, 1, 2).flatten(1) @ w.T


class LinearTransposed(Trap):
    """A square weight is carried transposed, or not transposed where it should be.

    Linear's weight is (out, in) in both frameworks. Checkpoints of GPT-2 hold (in, out), and a
    weight used as `x @ w` in one place and `x @ w.T` in another fits both ways when it is square.
    """

    id = "weight-transposed"
    title = "A square weight, transposed"
    fix = "x @ weight.T for a weight (out, in); transpose it once, when it is carried"
    error = 1.5
    shapes = arrays(x=(2, 4), w=(4, 4))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return F.linear(x, w)

    @staticmethod
    def naive(x: A, w: A) -> A:
        return x @ w

    @staticmethod
    def fixed(x: A, w: A) -> A:
        return x @ w.T


def _sgd_step(model: nn.Module, x: A) -> None:
    grads = nn.value_and_grad(model, lambda m: mx.square(m(x)).sum())(model)[1]
    optim.SGD(0.1).update(model, grads)


class ParameterInTuple(Trap):
    """Modules in a tuple, and arrays whose name starts with an underscore, are no parameters.

    They compute, and are neither trained, nor saved, nor loaded. A list is searched.
    """

    id = "parameter-in-tuple"
    title = "Layers in a tuple do not train"
    rows = ("35",)
    fix = "keep layers in a list: self.layers = [nn.Linear(...), ...]"
    error = 1.3
    shapes = arrays(x=(5, 4), w=(3, 4))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return w - 0.1 * 2 * (x @ w.T).T @ x

    @staticmethod
    def naive(x: A, w: A) -> A:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = (nn.Linear(4, 3, bias=False),)
                self.layers[0].weight = w
                self.offset = mx.zeros(3)

            def __call__(self, x: A) -> A:
                return self.layers[0](x) + self.offset

        model = Model()
        _sgd_step(model, x)
        return model.layers[0].weight

    @staticmethod
    def fixed(x: A, w: A) -> A:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = [nn.Linear(4, 3, bias=False)]
                self.layers[0].weight = w
                self.offset = mx.zeros(3)

            def __call__(self, x: A) -> A:
                return self.layers[0](x) + self.offset

        model = Model()
        _sgd_step(model, x)
        return model.layers[0].weight


class ModuleNotInitialised(Trap):
    """A module whose ``__init__`` never calls ``super().__init__()`` computes, and cannot train.

    PyTorch refuses the first layer that is assigned. MLX keeps it, since a module is a dict, and
    misses what its own ``__init__`` would have set only when the parameters to train, or the mode,
    are asked for: ``nn.value_and_grad``, ``freeze`` and ``training`` raise an AttributeError about
    ``_no_grad`` or ``_training``. Ports that were only ever used for inference are published so.
    """

    id = "module-not-initialised"
    title = "A module that never called super().__init__() cannot train"
    rows = ()
    fix = "call super().__init__() first in the __init__ of each of these classes"
    error = None
    shows = "raises"
    shapes = arrays(x=(5, 4), w=(3, 4))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return w - 0.1 * 2 * (x @ w.T).T @ x

    @staticmethod
    def naive(x: A, w: A) -> A:
        class Model(nn.Module):
            def __init__(self) -> None:
                self.layer = nn.Linear(4, 3, bias=False)
                self.layer.weight = w

            def __call__(self, x: A) -> A:
                return self.layer(x)

        model = Model()
        _sgd_step(model, x)
        return model.layer.weight

    @staticmethod
    def fixed(x: A, w: A) -> A:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 3, bias=False)
                self.layer.weight = w

            def __call__(self, x: A) -> A:
                return self.layer(x)

        model = Model()
        _sgd_step(model, x)
        return model.layer.weight


class BufferTrains(Trap):
    """Every public array attribute of an MLX module is a trainable parameter.

    PyTorch's buffers have no counterpart: a diffusion schedule, an image mean, a mask are updated
    by the optimizer and saved among the weights. No forward or backward pass shows it.
    """

    id = "buffer-trains"
    title = "A constant that trains"
    rows = ("36",)
    fix = "name it with an underscore (self._betas), or model.freeze(keys=['betas'])"
    error = 0.7

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": rng.standard_normal((5, 4)), "betas": rng.uniform(0.1, 1, 4)}

    @staticmethod
    def reference(x: T, betas: T) -> T:
        return betas

    @staticmethod
    def naive(x: A, betas: A) -> A:
        class Schedule(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.betas = betas
                self.scale = mx.ones(1)

            def __call__(self, x: A) -> A:
                return x * self.betas * self.scale

        model = Schedule()
        _sgd_step(model, x)
        return model.betas

    @staticmethod
    def fixed(x: A, betas: A) -> A:
        class Schedule(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self._betas = betas
                self.scale = mx.ones(1)

            def __call__(self, x: A) -> A:
                return x * self._betas * self.scale

        model = Schedule()
        _sgd_step(model, x)
        return model._betas


class TiedArray(Trap):
    """Two modules that share an array are untied by the first update; PyTorch's stay tied.

    MLX's arrays are values: the optimizer puts a new one into each place. Each half then sees its
    own gradient only, from the first step on.
    """

    id = "tied-array"
    title = "Tied weights come apart"
    rows = ("37",)
    fix = "share the module, not the array: logits = self.embedding.as_linear(x)"
    error = 0.49

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"w": rng.standard_normal((5, 4)), "ids": np.array([0, 3, 3, 1])}

    @staticmethod
    def reference(w: T, ids: T) -> T:
        p = w.detach().clone().requires_grad_()
        (F.linear(F.embedding(ids, p), p) ** 2).sum().backward()
        assert p.grad is not None
        return -0.1 * p.grad

    @staticmethod
    def naive(w: A, ids: A) -> A:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
                self.embedding.weight = self.head.weight = w

            def __call__(self, ids: A) -> A:
                return self.head(self.embedding(ids))

        model = Model()
        _sgd_step(model, ids)
        return model.embedding.weight - w

    @staticmethod
    def fixed(w: A, ids: A) -> A:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(5, 4)
                self.embedding.weight = w

            def __call__(self, ids: A) -> A:
                return self.embedding.as_linear(self.embedding(ids))

        model = Model()
        _sgd_step(model, ids)
        return model.embedding.weight - w


class FrozenParameter(Trap):
    """A parameter trains on one side only.

    `freeze()` also leaves it out of the gradients; everything it computes is right.
    """

    id = "frozen-parameter"
    title = "A parameter is frozen on one side"
    fix = "module.unfreeze() in the port, or requires_grad_(False) in the original"
    error = 1.0
    shapes = arrays(x=(5, 4), w=(3, 4))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return -0.1 * 2 * (x @ w.T).T @ x

    @staticmethod
    def naive(x: A, w: A) -> A:
        linear = nn.Linear(4, 3)
        linear.weight, linear.bias = w, mx.zeros(3)
        linear.freeze(keys="weight")
        _sgd_step(linear, x)
        return linear.weight - w

    @staticmethod
    def fixed(x: A, w: A) -> A:
        linear = nn.Linear(4, 3)
        linear.weight, linear.bias = w, mx.zeros(3)
        _sgd_step(linear, x)
        return linear.weight - w


class SliceCopies(Trap):
    """A slice is a copy in MLX and a view in PyTorch.

    Writing to `row = a[0]` leaves `a` as it was. Writing to `a[0]` itself works in both.
    """

    id = "slice-copies"
    title = "Writing to a slice writes to a copy"
    rows = ("39",)
    fix = "assign through the array: a[0, :2] = 0"
    error = 0.075

    @staticmethod
    def reference(x: T) -> T:
        x = x.clone()
        row = x[0]
        row[:2] = 0
        return x

    @staticmethod
    def naive(x: A) -> A:
        x = mx.array(x)
        row = x[0]
        row[:2] = 0
        return x

    @staticmethod
    def fixed(x: A) -> A:
        x = mx.array(x)
        x[0, :2] = 0
        return x


class IndexOutOfBounds(Trap):
    """Indexing out of bounds does not raise in MLX, on no device.

    What it reads is whatever lies behind the array, often zero. A schedule indexed with t = 1..T
    where the original's table starts at 0 raises an IndexError in PyTorch at t = T. In MLX it is
    off by one everywhere and garbage at the end. The example stops short of the end, since what
    lies there is another number each time.
    """

    id = "index-out-of-bounds"
    title = "Indexing out of bounds is silent"
    rows = ("40",)
    fix = "tables start at 0: table[t - 1] for t in 1..T; assert on the range where t is drawn"
    error = 0.3

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"table": rng.uniform(0.5, 1, 8), "t": np.array([1, 4, 6, 7])}

    @staticmethod
    def reference(table: T, t: T) -> T:
        return table[t - 1]

    @staticmethod
    def naive(table: A, t: A) -> A:
        return table[t]

    @staticmethod
    def fixed(table: A, t: A) -> A:
        return table[t - 1]


class RecurrentBiases(Trap):
    """PyTorch's recurrent layers have two biases and MLX's one; the GRU needs part of the second.

    For the LSTM the sum of both is right. In the GRU the candidate's hidden bias is inside the
    product with the reset gate, and MLX keeps it apart as `bhn`. Adding it to `b` is wrong.
    """

    id = "recurrent-biases"
    title = "The two biases of a GRU"
    rows = ("41",)
    fix = "b = b_ih + b_hh for the first two gates, b_ih for the third; bhn = b_hh of the third"
    error = 0.3

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {
            "x": rng.standard_normal((2, 3, 4)),
            "wx": rng.standard_normal((6, 4)) / 2,
            "wh": rng.standard_normal((6, 2)),
            "b_ih": rng.standard_normal(6),
            "b_hh": rng.standard_normal(6),
        }

    @staticmethod
    def reference(x: T, wx: T, wh: T, b_ih: T, b_hh: T) -> T:
        gru = torch.nn.GRU(4, 2, batch_first=True).to(x.dtype)
        weights = {
            "weight_ih_l0": wx,
            "weight_hh_l0": wh,
            "bias_ih_l0": b_ih,
            "bias_hh_l0": b_hh,
        }
        return torch.func.functional_call(gru, weights, x)[0]

    @staticmethod
    def naive(x: A, wx: A, wh: A, b_ih: A, b_hh: A) -> A:
        gru = nn.GRU(4, 2)
        gru.Wx, gru.Wh, gru.b, gru.bhn = wx, wh, b_ih + b_hh, mx.zeros(2)
        return gru(x)

    @staticmethod
    def fixed(x: A, wx: A, wh: A, b_ih: A, b_hh: A) -> A:
        gru = nn.GRU(4, 2)
        b = mx.concatenate([(b_ih + b_hh)[:4], b_ih[4:]])
        gru.Wx, gru.Wh, gru.b, gru.bhn = wx, wh, b, b_hh[4:]
        return gru(x)


class GateOrder(Trap):
    """The gates of a recurrent layer are stacked in one weight, and the order is a convention.

    PyTorch and MLX stack an LSTM as input, forget, cell, output. Keras has the same order; ONNX
    has input, output, forget, cell, and layers written by hand have any.
    """

    id = "gate-order"
    title = "The order of a recurrent layer's gates"
    fix = "reorder the blocks of Wx, Wh and bias to input, forget, cell, output"
    error = 1.0

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {
            "x": rng.standard_normal((2, 3, 4)),
            "wx": rng.standard_normal((8, 4)) / 2,
            "wh": rng.standard_normal((8, 2)),
        }

    @staticmethod
    def reference(x: T, wx: T, wh: T) -> T:
        lstm = torch.nn.LSTM(4, 2, batch_first=True, bias=False).to(x.dtype)
        weights = {"weight_ih_l0": wx, "weight_hh_l0": wh}
        return torch.func.functional_call(lstm, weights, x)[0]

    @staticmethod
    def naive(x: A, wx: A, wh: A) -> A:
        lstm = nn.LSTM(4, 2, bias=False)
        for name, w in (("Wx", wx), ("Wh", wh)):
            i, f, g, o = mx.split(w, 4)
            setattr(lstm, name, mx.concatenate([i, o, f, g]))
        return lstm(x)[0]

    @staticmethod
    def fixed(x: A, wx: A, wh: A) -> A:
        lstm = nn.LSTM(4, 2, bias=False)
        lstm.Wx, lstm.Wh = wx, wh
        return lstm(x)[0]


class BiasMissing(Trap):
    """A layer has a bias on one side only, or has one that is not added.

    `nn.MultiHeadAttention` has none by default in MLX, and PyTorch's has four. New layers hide it:
    a convolution's bias starts at zero.
    """

    id = "bias-missing"
    title = "A bias on one side only"
    rows = ("42",)
    fix = "nn.MultiHeadAttention(dims, heads, bias=True); bias=True or False as in the original"
    error = 0.95

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {
            "x": rng.standard_normal((2, 3, 4)),
            "w": rng.standard_normal((16, 4)) / 2,
            "b": rng.standard_normal(16),
        }

    @staticmethod
    def reference(x: T, w: T, b: T) -> T:
        attention = torch.nn.MultiheadAttention(4, 2, batch_first=True).to(x.dtype)
        weights = {
            "in_proj_weight": w[:12],
            "in_proj_bias": b[:12],
            "out_proj.weight": w[12:],
            "out_proj.bias": b[12:],
        }
        return torch.func.functional_call(attention, weights, (x, x, x))[0]

    @staticmethod
    def naive(x: A, w: A, b: A) -> A:
        attention = nn.MultiHeadAttention(4, 2)
        for layer, block in zip(_projections(attention), mx.split(w, 4), strict=True):
            layer.weight = block
        return attention(x, x, x)

    @staticmethod
    def fixed(x: A, w: A, b: A) -> A:
        attention = nn.MultiHeadAttention(4, 2, bias=True)
        blocks = zip(mx.split(w, 4), mx.split(b, 4), strict=True)
        for layer, (weight, bias) in zip(_projections(attention), blocks, strict=True):
            layer.weight, layer.bias = weight, bias
        return attention(x, x, x)


def _projections(attention: nn.MultiHeadAttention) -> list[nn.Linear]:
    """In the order of PyTorch's stacked projection, and the last."""
    a = attention
    return [a.query_proj, a.key_proj, a.value_proj, a.out_proj]


class HeadCount(Trap):
    """The number of attention heads is not the original's.

    It appears in no weight's shape: any divisor of the width fits.
    """

    id = "head-count"
    title = "The number of attention heads"
    fix = "nn.MultiHeadAttention(dims, num_heads=...) with the original's num_heads"
    error = 0.65
    shapes = arrays(q=(2, 3, 8), k=(2, 3, 8), v=(2, 3, 8))

    @staticmethod
    def reference(q: T, k: T, v: T) -> T:
        q, k, v = (a.unflatten(-1, (4, 2)).transpose(1, 2) for a in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    @staticmethod
    def naive(q: A, k: A, v: A) -> A:
        return _attend(q, k, v, heads=2)

    @staticmethod
    def fixed(q: A, k: A, v: A) -> A:
        return _attend(q, k, v, heads=4)


def _attend(q: A, k: A, v: A, heads: int) -> A:
    q, k, v = (mx.unflatten(a, -1, (heads, -1)).transpose(0, 2, 1, 3) for a in (q, k, v))
    scale = q.shape[-1] ** -0.5
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(0, 2, 1, 3).flatten(2)


class EncoderLayerDefaults(Trap):
    """MLX's TransformerEncoderLayer normalises first; PyTorch's normalises after the sum.

    Also: dropout 0 against 0.1, an inner width of four times the model's against 2048, and
    attention without biases.
    """

    id = "norm-first"
    title = "Normalisation before or after the residual sum"
    rows = ("42",)
    fix = "nn.TransformerEncoderLayer(..., norm_first=False)"
    error = 1.9
    shapes = arrays(x=(3, 6), w=(6, 6))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return F.layer_norm(x + x @ w.T, (6,))

    @staticmethod
    def naive(x: A, w: A) -> A:
        return x + mx.fast.layer_norm(x, None, None, 1e-5) @ w.T

    @staticmethod
    def fixed(x: A, w: A) -> A:
        return mx.fast.layer_norm(x + x @ w.T, None, None, 1e-5)


class WeightsMissing(Trap):
    """A tensor of one side has no counterpart on the other.

    A `Sequential` calls its children `layers.0` in MLX and `0` in PyTorch, attributes may be
    renamed, projections fused. Whatever is not carried keeps its initial value.
    """

    id = "weights-missing"
    title = "Weights that are not carried"
    rows = ("35",)
    fix = "rename them: mlx_parity.carry(reference, port, rename={'net': 'body'})"
    error = 1.3
    shapes = arrays(x=(2, 4), w=(3, 4))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return F.linear(x, w)

    @staticmethod
    def naive(x: A, w: A) -> A:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Linear(4, 3, bias=False)
                self.body.weight = mx.full((3, 4), 0.5)  # its initial value, say

        model = Model()
        model.load_weights([("net.weight", w)], strict=False)
        return model.body(x)

    @staticmethod
    def fixed(x: A, w: A) -> A:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Linear(4, 3, bias=False)

        model = Model()
        model.load_weights([("body.weight", w)], strict=True)
        return model.body(x)
