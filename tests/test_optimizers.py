"""Adam and Linear: PyTorch's numbers, one trace, savable and schedulable, MLX's own interface."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten

from mlx_impl.layers import Linear
from mlx_impl.optimizers import Adam

STEPS = 30


def gradients():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((7, 5)).astype(np.float32) for _ in range(STEPS)]


def run_torch(betas, lr=1e-3, dtype=torch.float64):
    p = torch.nn.Parameter(torch.ones(7, 5, dtype=dtype))
    optimizer = torch.optim.Adam([p], lr=lr, betas=betas)
    for g in gradients():
        p.grad = torch.from_numpy(g).to(dtype)
        optimizer.step()
    return p.detach().numpy()


@pytest.mark.parametrize("betas", [(0.5, 0.999), (0.9, 0.999), (0.0, 0.9)])
@pytest.mark.parametrize("compiled", [False, True])
def test_adam_is_torchs(betas, compiled):
    parameters = {"w": mx.ones((7, 5))}
    optimizer = Adam(1e-3, betas)
    optimizer.init(parameters)
    state, traces = [optimizer.state], 0

    def update(gradient, parameters):
        nonlocal traces
        traces += 1
        return optimizer.apply_gradients({"w": gradient}, parameters)

    step = mx.compile(update, inputs=state, outputs=state) if compiled else update
    for g in gradients():
        parameters = step(mx.array(g), parameters)
        mx.eval(parameters, state)
    error = np.abs(np.array(parameters["w"]) - run_torch(betas)).max()
    float32 = np.abs(run_torch(betas, dtype=torch.float32) - run_torch(betas)).max()
    assert error <= 3 * float32
    assert traces == (1 if compiled else STEPS)


def test_adam_saves_and_resumes():
    grads = gradients()
    straight, first = Adam(1e-3), Adam(1e-3)
    p = q = {"w": mx.ones((7, 5))}
    for g in grads:
        p = straight.apply_gradients({"w": mx.array(g)}, p)
    for g in grads[:10]:
        q = first.apply_gradients({"w": mx.array(g)}, q)
    second = Adam(1e-3)
    second.state = tree_unflatten(tree_flatten(first.state))
    for g in grads[10:]:
        q = second.apply_gradients({"w": mx.array(g)}, q)
    assert mx.array_equal(p["w"], q["w"])
    assert isinstance(second, optim.Adam)
    assert {k for k, _ in tree_flatten(second.state)} == {"step", "learning_rate", "w.m", "w.v"}


def test_adam_takes_a_schedule_compiled():
    schedule = optim.step_decay(1e-1, 0.1, 1)  # 0.1, 0.01, ...
    optimizer, parameters = Adam(schedule), {"w": mx.zeros((3,))}
    optimizer.init(parameters)
    state = [optimizer.state]
    step = mx.compile(
        lambda g, p: optimizer.apply_gradients({"w": g}, p), inputs=state, outputs=state
    )
    moves = []
    for _ in range(3):
        new = step(mx.ones((3,)), parameters)
        mx.eval(new, state)
        moves.append((parameters["w"] - new["w"])[0].item())
        parameters = new
    assert moves == pytest.approx([0.1, 0.01, 0.001], rel=1e-4)


def test_adam_without_correction_is_mlxs():
    p, g = {"w": mx.ones((4,))}, {"w": mx.full((4,), 0.3)}
    ours = Adam(1e-3, bias_correction=False).apply_gradients(g, p)["w"]
    assert mx.array_equal(ours, optim.Adam(1e-3).apply_gradients(g, p)["w"])


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (5,), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_mlxs(shape, bias):
    layer, plain = Linear(5, 4, bias=bias), nn.Linear(5, 4, bias=bias)
    plain.update(layer.parameters())
    x = mx.random.normal(shape)

    def loss(module, x):
        return (module(x) ** 2).sum()

    assert layer(x).shape == plain(x).shape
    assert mx.allclose(layer(x), plain(x), atol=1e-6)
    ours, theirs = (nn.value_and_grad(module, loss)(module, x)[1] for module in (layer, plain))
    for (name, a), (_, b) in zip(tree_flatten(ours), tree_flatten(theirs), strict=True):
        assert mx.allclose(a, b, atol=1e-5), name
    dx = [mx.grad(lambda x, m=module: loss(m, x))(x) for module in (layer, plain)]
    assert mx.allclose(*dx, atol=1e-5)
