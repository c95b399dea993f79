"""mx.compile: what a trace freezes."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import torch

from mlx_parity.traps.trap import A, Rng, T, Trap, arrays


class CompileState(Trap):
    """State that a compiled step does not list among its inputs and outputs stays as it was.

    The optimizer's moments and step counter keep their first values, the running statistics too,
    and a changed learning rate is ignored. Where the model itself is left out, MLX raises later,
    on an array "without a primitive".
    """

    id = "compile-state"
    title = "State left out of a compiled step"
    rows = ("57",)
    fix = "s = [model.state, optimizer.state]; mx.compile(step, inputs=s, outputs=s)"
    error = 0.63

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": rng.uniform(0.5, 1, 4)}

    @staticmethod
    def reference(x: T) -> T:
        velocity = torch.zeros_like(x)
        for _ in range(3):
            velocity = 0.9 * velocity + x
        return velocity

    @staticmethod
    def naive(x: A) -> A:
        state = {"velocity": mx.zeros_like(x)}

        @mx.compile
        def step(x: A) -> A:
            return 0.9 * state["velocity"] + x

        for _ in range(3):
            state["velocity"] = state["velocity"]  # nothing comes out of the compiled step
            velocity = step(x)
        return velocity

    @staticmethod
    def fixed(x: A) -> A:
        state = {"velocity": mx.zeros_like(x)}

        @partial(mx.compile, inputs=state, outputs=state)
        def step(x: A) -> A:
            state["velocity"] = 0.9 * state["velocity"] + x
            return state["velocity"]

        for _ in range(3):
            velocity = step(x)
        return velocity


class CompileLearningRate(Trap):
    """A learning rate that is changed after compilation is ignored.

    It is read once, when the step is traced, unless the optimizer's state is among the inputs.
    """

    id = "compile-learning-rate"
    title = "A compiled step keeps its learning rate"
    rows = ("57",)
    fix = "inputs=[model.state, optimizer.state], and set optimizer.learning_rate between steps"
    error = 0.82
    shapes = arrays(g=(4,))

    @staticmethod
    def reference(g: T) -> T:
        return -0.1 * g - 0.01 * g

    @staticmethod
    def naive(g: A) -> A:
        opt = optim.SGD(0.1)
        step = mx.compile(lambda p, g: opt.apply_gradients({"w": g}, {"w": p})["w"])
        p = step(mx.zeros(4), g)
        opt.learning_rate = 0.01
        return step(p, g)

    @staticmethod
    def fixed(g: A) -> A:
        opt = optim.SGD(0.1)
        opt.init({"w": g})
        step = mx.compile(
            lambda p, g: opt.apply_gradients({"w": g}, {"w": p})["w"],
            inputs=opt.state,
            outputs=opt.state,
        )
        p = step(mx.zeros(4), g)
        opt.learning_rate = 0.01
        return step(p, g)


class CompileRandomState(Trap):
    """Random numbers drawn in a compiled function are the same at every call.

    Dropout and noise are frozen unless `mx.random.state` is among the inputs and outputs. The
    example counts how many elements of two draws are equal.
    """

    id = "compile-random-state"
    title = "A compiled step draws the same numbers again"
    rows = ("58",)
    fix = "add mx.random.state to the inputs and outputs of mx.compile, or pass the noise in"
    error = None
    exact = True

    @staticmethod
    def reference(x: T) -> T:
        noise = [torch.randn(x.shape) for _ in range(2)]
        return (noise[0] == noise[1]).sum().to(x.dtype)

    @staticmethod
    def naive(x: A) -> A:
        draw = mx.compile(lambda x: x + mx.random.normal(x.shape))
        return (draw(x) == draw(x)).sum().astype(mx.float32)

    @staticmethod
    def fixed(x: A) -> A:
        state = mx.random.state
        draw = mx.compile(lambda x: x + mx.random.normal(x.shape), inputs=state, outputs=state)
        return (draw(x) == draw(x)).sum().astype(mx.float32)


class CompileTrainingFlag(Trap):
    """train() and eval() are Python attributes, and a trace keeps what it saw.

    Compiled in training mode, a model goes on dropping and normalising by the batch after
    `model.eval()`, even with `model.state` among the inputs.
    """

    id = "compile-training-flag"
    title = "A compiled model stays in training mode"
    rows = ("59",)
    fix = "compile one function for training and another for evaluation, each after its mode is set"
    error = 0.59
    draw = staticmethod(lambda rng: {"x": rng.standard_normal((5, 4))})

    @staticmethod
    def reference(x: T) -> T:
        norm = torch.nn.BatchNorm1d(4).to(x.dtype)
        norm(x)
        return norm.eval()(x)

    @staticmethod
    def naive(x: A) -> A:
        norm = nn.BatchNorm(4)
        call = mx.compile(lambda x: norm(x), inputs=norm.state, outputs=norm.state)
        call(x)
        norm.eval()
        return call(x)

    @staticmethod
    def fixed(x: A) -> A:
        norm = nn.BatchNorm(4)
        mx.compile(lambda x: norm(x), inputs=norm.state, outputs=norm.state)(x)
        norm.eval()
        return mx.compile(lambda x: norm(x), inputs=norm.state, outputs=norm.state)(x)


class CompileAttribute(Trap):
    """Python numbers that a compiled function reads from outside are constants of its trace."""

    id = "compile-attribute"
    title = "A compiled function keeps Python's numbers"
    rows = ("60",)
    fix = "pass what changes as an mx.array argument"
    error = 0.5

    @staticmethod
    def reference(x: T) -> T:
        return 2 * x

    @staticmethod
    def naive(x: A) -> A:
        settings = {"scale": 1.0}
        call = mx.compile(lambda x: settings["scale"] * x)
        call(x)
        settings["scale"] = 2.0
        return call(x)

    @staticmethod
    def fixed(x: A) -> A:
        call = mx.compile(lambda x, scale: scale * x)
        call(x, mx.array(1.0))
        return call(x, mx.array(2.0))


class CompileShapeless(Trap):
    """`shapeless=True` keeps the sizes that Python read at the first call.

    Whatever `x.shape` was used for, a reshape, a mean's divisor, is a constant of the trace. Other
    sizes then give wrong numbers or wrong shapes, and nothing raises.
    """

    id = "compile-shapeless"
    title = "shapeless=True keeps the first sizes"
    rows = ("61",)
    fix = "leave shapeless out: a new shape is traced again; or compute without x.shape"
    error = 2.0

    @staticmethod
    def reference(x: T) -> T:
        return x.sum(0) / x.shape[0]

    @staticmethod
    def naive(x: A) -> A:
        call = mx.compile(lambda x: x.sum(0) / x.shape[0], shapeless=True)
        call(x[:1])
        return call(x)

    @staticmethod
    def fixed(x: A) -> A:
        call = mx.compile(lambda x: x.sum(0) / x.shape[0])
        call(x[:1])
        return call(x)


class CompileEval(Trap):
    """`.item()`, `print`, `mx.eval` and NumPy inside a compiled function raise."""

    id = "compile-eval"
    shows = "raises"
    title = "Evaluation inside a compiled function"
    rows = ("62",)
    fix = "keep numbers as arrays inside: mx.where for a branch; read them outside"
    error = None

    @staticmethod
    def reference(x: T) -> T:
        return x / x.abs().max()

    @staticmethod
    def naive(x: A) -> A:
        return mx.compile(lambda x: x / mx.abs(x).max().item())(x)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.compile(lambda x: x / mx.abs(x).max())(x)
