"""Optimizers and schedules."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import torch

from mlx_parity.traps.trap import A, Rng, T, Trap, arrays

_WEIGHTS_AND_GRADIENTS = arrays(w=(3, 4), grads=(6, 3, 4))
"""A weight and the gradients of six steps."""


def _in_torch(optimizer: type[torch.optim.Optimizer], w: T, grads: T, **options: Any) -> T:
    """The weight's movement over the gradients: the weight itself would hide a small one."""
    p = torch.nn.Parameter(w.detach().clone())
    opt = optimizer([p], **options)
    for g in grads:
        p.grad = g
        opt.step()
    return p.detach() - w


def _in_mlx(opt: optim.Optimizer, w: A, grads: A) -> A:
    p = {"w": w}
    for g in grads:
        p = opt.apply_gradients({"w": g}, p)
    return p["w"] - w


class AdamBiasCorrection(Trap):
    """MLX's Adam and AdamW leave the correction of their moments' bias out unless asked.

    PyTorch always divides by `1 - beta^t`. Without it the first update is
    `(1 - b1) / sqrt(1 - b2)` = 3.2 times as large, for betas of 0.9 and 0.999, and the difference
    fades only over thousands of steps. Training looks healthy, at another effective learning rate.
    """

    id = "adam-bias-correction"
    title = "Adam without bias correction"
    rows = ("1",)
    fix = "optim.Adam(lr, bias_correction=True), and the same for optim.AdamW"
    error = 3.6
    shapes = _WEIGHTS_AND_GRADIENTS

    @staticmethod
    def reference(w: T, grads: T) -> T:
        return _in_torch(torch.optim.Adam, w, grads, lr=0.01)

    @staticmethod
    def naive(w: A, grads: A) -> A:
        return _in_mlx(optim.Adam(0.01), w, grads)

    @staticmethod
    def fixed(w: A, grads: A) -> A:
        return _in_mlx(PreciseAdam(0.01, bias_correction=True), w, grads)


class PreciseAdam(optim.Adam):
    """Adam whose corrections do not cancel: `1 - b^t` as `-expm1(t log b)`."""

    def apply_single(self, gradient: A, parameter: A, state: dict) -> A:
        b1, b2 = self.betas
        m = b1 * state["m"] + (1 - b1) * gradient
        v = b2 * state["v"] + (1 - b2) * mx.square(gradient)
        state["m"], state["v"] = m, v
        c1, c2 = (-mx.expm1(self.step * float(np.log(b))) for b in (b1, b2))
        return parameter - self.learning_rate / c1 * m / (mx.sqrt(v) * mx.rsqrt(c2) + self.eps)


class AdamCorrectionPrecision(Trap):
    """MLX computes Adam's `1 - b2^t` in float32, where it cancels.

    For `b2 = 0.999` the first step's correction is 0.001 with an error of 1.3e-5 of itself, and so
    the first updates are off by about 6e-6, a hundred times float32's rounding. PyTorch computes
    the correction in Python's double precision. Harmless to training, and the first thing that an
    exact comparison of the optimizer step sees.
    """

    id = "adam-correction-precision"
    title = "Adam's bias correction cancels in float32"
    fix = "compute 1 - b^t as -mx.expm1(t * math.log(b)), in a subclass of optim.Adam"
    error = 6.7e-6

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"w": np.zeros((3, 4)), "grads": rng.standard_normal((1, 3, 4))}

    @staticmethod
    def reference(w: T, grads: T) -> T:
        return _in_torch(torch.optim.Adam, w, grads, lr=0.01)

    @staticmethod
    def naive(w: A, grads: A) -> A:
        return _in_mlx(optim.Adam(0.01, bias_correction=True), w, grads)

    @staticmethod
    def fixed(w: A, grads: A) -> A:
        return _in_mlx(PreciseAdam(0.01, bias_correction=True), w, grads)


class AdamEpsPlacement(Trap):
    """Where Adam's eps stands: behind the correction of the second moment, or before it.

    PyTorch and MLX add it to the corrected root, `sqrt(v) / sqrt(1 - b2^t) + eps`. The paper's
    other form (section 2) adds it to `sqrt(v)`, which makes it 1 / sqrt(1 - b2^t) = 32 times as
    large in the first step; TensorFlow's does so. Some put it under the root. Gradients near eps
    show it, those of a normal layer do not: optimizers are compared by themselves for that.
    """

    id = "adam-eps-placement"
    title = "Adam's eps in another place"
    fix = "mx.sqrt(v) * mx.rsqrt(1 - b2**t) + eps, in a subclass of optim.Adam"
    error = 0.90

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"w": np.zeros((3, 4)), "grads": 1e-8 * rng.uniform(0.5, 1, (6, 3, 4))}

    @staticmethod
    def reference(w: T, grads: T) -> T:
        return _in_torch(torch.optim.Adam, w, grads, lr=0.01)

    @staticmethod
    def naive(w: A, grads: A) -> A:
        class Adam(optim.Adam):
            def apply_single(self, gradient: A, parameter: A, state: dict) -> A:
                b1, b2 = self.betas
                m = state["m"] = b1 * state["m"] + (1 - b1) * gradient
                v = state["v"] = b2 * state["v"] + (1 - b2) * mx.square(gradient)
                c1, c2 = 1 - b1**self.step, 1 - b2**self.step
                root = mx.sqrt(v) + self.eps
                return parameter - self.learning_rate * mx.sqrt(c2) / c1 * m / root

        return _in_mlx(Adam(0.01), w, grads)

    @staticmethod
    def fixed(w: A, grads: A) -> A:
        return _in_mlx(PreciseAdam(0.01, bias_correction=True), w, grads)


class AdamaxBiasCorrection(Trap):
    """MLX's Adamax has no bias correction, and no option for one.

    PyTorch divides the learning rate by `1 - b1^t` (Kingma and Ba 2015, Algorithm 2). With
    `b1 = 0.9` MLX's first update is a tenth of PyTorch's.
    """

    id = "adamax-bias-correction"
    title = "Adamax has no bias correction"
    rows = ("2",)
    fix = "subclass optim.Adamax and divide the learning rate by 1 - b1**step"
    error = 0.79
    shapes = _WEIGHTS_AND_GRADIENTS

    @staticmethod
    def reference(w: T, grads: T) -> T:
        return _in_torch(torch.optim.Adamax, w, grads, lr=0.01)

    @staticmethod
    def naive(w: A, grads: A) -> A:
        return _in_mlx(optim.Adamax(0.01), w, grads)

    @staticmethod
    def fixed(w: A, grads: A) -> A:
        class Adamax(optim.Adamax):
            def apply_single(self, gradient: A, parameter: A, state: dict) -> A:
                uncorrected = super().apply_single(gradient, mx.zeros_like(parameter), state)
                return parameter + uncorrected / -mx.expm1(self.step * float(np.log(0.9)))

        return _in_mlx(Adamax(0.01), w, grads)


class SgdDampening(Trap):
    """SGD's dampening spares the first step in PyTorch and not in MLX.

    PyTorch's momentum buffer starts as the first gradient itself; MLX's starts at zero and takes
    `(1 - dampening)` of it. Momentum, Nesterov and weight decay agree otherwise.
    """

    id = "sgd-dampening"
    title = "SGD's dampening applies to the first step"
    rows = ("3",)
    fix = "start the momentum with the first gradient: state['v'] = gradient at step 1"
    error = 0.48
    shapes = _WEIGHTS_AND_GRADIENTS

    @staticmethod
    def reference(w: T, grads: T) -> T:
        return _in_torch(torch.optim.SGD, w, grads, lr=0.01, momentum=0.9, dampening=0.5)

    @staticmethod
    def naive(w: A, grads: A) -> A:
        return _in_mlx(optim.SGD(0.01, momentum=0.9, dampening=0.5), w, grads)

    @staticmethod
    def fixed(w: A, grads: A) -> A:
        class SGD(optim.SGD):
            def apply_single(self, gradient: A, parameter: A, state: dict) -> A:
                first = self.step == 1  # v <- momentum * v + (1 - dampening) * g
                lacking = self.dampening / self.momentum * gradient
                state["v"] = mx.where(first, lacking, state["v"])
                return super().apply_single(gradient, parameter, state)

        return _in_mlx(SGD(0.01, momentum=0.9, dampening=0.5), w, grads)


class OptimizerDefaults(Trap):
    """The defaults differ: Adagrad's eps is 1e-8 in MLX and 1e-10 in PyTorch.

    Likewise AdamW's and RMSprop's missing options (`amsgrad`, `centered`, RMSprop's `momentum`),
    and Adam has no `weight_decay`. Small gradients show it: here they are about 1e-7.
    """

    id = "optimizer-defaults"
    title = "Other defaults, and options that are missing"
    rows = ("4",)
    fix = "pass every option by name: optim.Adagrad(lr, eps=1e-10)"
    error = 0.083

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        grads = rng.uniform(0.5, 1, (6, 3, 4))
        return {"w": np.zeros((3, 4)), "grads": 1e-7 * grads}

    @staticmethod
    def reference(w: T, grads: T) -> T:
        return _in_torch(torch.optim.Adagrad, w, grads, lr=0.01)

    @staticmethod
    def naive(w: A, grads: A) -> A:
        return _in_mlx(optim.Adagrad(0.01), w, grads)

    @staticmethod
    def fixed(w: A, grads: A) -> A:
        return _in_mlx(optim.Adagrad(0.01, eps=1e-10), w, grads)


class OptimizerSettings(Trap):
    """A learning rate, a beta, a weight decay that is not the original's.

    Nothing in a forward or backward pass shows it. A momentum of 0.901 for 0.9 changes the second
    update by a thousandth; only the optimizer's step, held against the original's, sees that.
    """

    id = "optimizer-settings"
    title = "The optimizer's settings differ"
    fix = "copy the settings from optimizer.param_groups of the original"
    error = 0.002
    shapes = _WEIGHTS_AND_GRADIENTS

    @staticmethod
    def reference(w: T, grads: T) -> T:
        return _in_torch(torch.optim.SGD, w, grads, lr=0.01, momentum=0.9)

    @staticmethod
    def naive(w: A, grads: A) -> A:
        return _in_mlx(optim.SGD(0.01, momentum=0.901), w, grads)

    @staticmethod
    def fixed(w: A, grads: A) -> A:
        return _in_mlx(optim.SGD(0.01, momentum=0.9), w, grads)


class WeightDecayCoupled(Trap):
    """`torch.optim.Adam(weight_decay=...)` adds the decay to the gradient; AdamW does not.

    MLX's Adam has no `weight_decay`, so AdamW comes to hand, which decays the weight itself
    (Loshchilov and Hutter 2019). Under Adam's normalisation these are different algorithms.
    """

    id = "weight-decay-coupled"
    title = "AdamW stands in for Adam with weight decay"
    rows = ("4",)
    fix = "add the decay to the gradients yourself: g + weight_decay * p, then optim.Adam"
    error = 0.072
    shapes = _WEIGHTS_AND_GRADIENTS

    @staticmethod
    def reference(w: T, grads: T) -> T:
        return _in_torch(torch.optim.Adam, w, grads, lr=0.01, weight_decay=0.1)

    @staticmethod
    def naive(w: A, grads: A) -> A:
        return _in_mlx(optim.AdamW(0.01, weight_decay=0.1, bias_correction=True), w, grads)

    @staticmethod
    def fixed(w: A, grads: A) -> A:
        p, opt = {"w": w}, PreciseAdam(0.01, bias_correction=True)
        for g in grads:
            p = opt.apply_gradients({"w": g + 0.1 * p["w"]}, p)
        return p["w"] - w


class ScheduleEnd(Trap):
    """MLX's `cosine_decay` stays at its end; PyTorch's `CosineAnnealingLR` rises again.

    After `decay_steps` updates MLX's rate is constant. PyTorch's goes back up the cosine. MLX's
    schedules also advance with every update, where PyTorch's advance when `step()` is called,
    usually once an epoch.
    """

    id = "schedule-end"
    title = "A cosine schedule that stays down"
    rows = ("4b",)
    fix = "write the schedule as a function of the step: end + (base - end) * (1 + cos(pi t / T))/2"
    error = 0.55

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"base": rng.uniform(0.05, 0.1, ())}

    @staticmethod
    def reference(base: T) -> T:
        step = torch.arange(20)  # closed form of CosineAnnealingLR(T_max=10, eta_min=0.01)
        return 0.01 + (base - 0.01) * (1 + torch.cos(torch.pi * step.to(base) / 10)) / 2

    @staticmethod
    def naive(base: A) -> A:
        schedule = optim.cosine_decay(float(np.array(base)), 10, 0.01)
        return mx.stack([schedule(mx.array(i)) for i in range(20)])

    @staticmethod
    def fixed(base: A) -> A:
        step = mx.arange(20)
        return 0.01 + (base - 0.01) * (1 + mx.cos(np.pi * step / 10)) / 2


class UnusedParameters(Trap):
    """A parameter that the loss does not reach has a gradient of zero in MLX, and None in PyTorch.

    PyTorch's optimizers skip None. MLX's update with zero: AdamW decays the weight, and momentum
    goes on moving it.
    """

    id = "unused-parameters"
    title = "Unused parameters are updated"
    rows = ("6",)
    fix = "freeze what the loss does not use: model.head.freeze(), or leave it out of the gradients"
    error = 0.001
    shapes = arrays(used=(4,), unused=(4,))

    @staticmethod
    def reference(used: T, unused: T) -> dict[str, T]:
        p, q = (torch.nn.Parameter(w.detach().clone()) for w in (used, unused))
        opt = torch.optim.AdamW([p, q], lr=0.01, weight_decay=0.1)
        (p**2).sum().backward()
        opt.step()
        return {"used": p, "unused": q}

    @staticmethod
    def naive(used: A, unused: A) -> dict[str, A]:
        p = {"used": used, "unused": unused}
        grads = mx.grad(lambda p: (p["used"] ** 2).sum())(p)
        opt = optim.AdamW(0.01, weight_decay=0.1, bias_correction=True)
        return opt.apply_gradients(grads, p)

    @staticmethod
    def fixed(used: A, unused: A) -> dict[str, A]:
        p = {"used": used}
        grads = mx.grad(lambda p: (p["used"] ** 2).sum())(p)
        opt = optim.AdamW(0.01, weight_decay=0.1, bias_correction=True)
        return opt.apply_gradients(grads, p) | {"unused": unused}


class HalfPrecisionWeights(Trap):
    """The optimizer runs on weights of bfloat16, and most of its updates are lost.

    A weight of 0.5 has a unit in the last place of 0.0039, so an update of Adam's of 0.0002 rounds
    away, however often it comes. The moments are bfloat16 as well, and in it a beta of 0.999 is 1:
    `v` never decays. PyTorch's mixed precision keeps the weights and the optimizer in float32 and
    rounds where it multiplies.
    """

    id = "half-precision-weights"
    title = "Adam on bfloat16 weights loses its updates"
    fix = "keep the parameters float32 and cast them in the forward: w.astype(mx.bfloat16)"
    error = 1.0

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"w": np.full((3, 4), 0.5), "grads": rng.uniform(0.5, 1.5, (20, 3, 4))}

    @staticmethod
    def reference(w: T, grads: T) -> T:
        return _in_torch(torch.optim.Adam, w, grads, lr=2e-4)

    @staticmethod
    def naive(w: A, grads: A) -> A:
        half = w.astype(mx.bfloat16)
        return _in_mlx(optim.Adam(2e-4, bias_correction=True), half, grads.astype(mx.bfloat16))

    @staticmethod
    def fixed(w: A, grads: A) -> A:
        return _in_mlx(PreciseAdam(2e-4, bias_correction=True), w, grads)


class NullDirection(Trap):
    """A bias before a normalisation has no gradient, and Adam makes full steps of its rounding.

    The normalisation subtracts the mean, so the bias does nothing and its gradient is zero. What
    float32 computes is rounding of about 1e-8, another in each framework, and Adam divides it by
    its own size: the bias takes steps towards the learning rate in a random direction, 4e-4 of
    1e-3 in the example. No output changes. It is no fault of a port and shows as noise, four orders
    of magnitude of it; a comparison of the weights by a tolerance calls it different.
    """

    id = "null-direction"
    shows = "noise"
    title = "A bias before a normalisation wanders under Adam"
    rows = ("20",)
    fix = "leave the bias out: nn.Conv2d(..., bias=False) before a normalisation, on both sides"
    error = 4.2e12
    shapes = arrays(x=(8, 4), w=(3, 4), b=(3,), target=(8, 3))

    @staticmethod
    def reference(x: T, w: T, b: T, target: T) -> dict[str, T]:
        b = b.detach().clone().requires_grad_()
        y = torch.nn.functional.batch_norm(x @ w.T + b, None, None, training=True)
        ((y - target) ** 2).mean().backward()
        assert b.grad is not None
        return {"gradient": b.grad, "output": y}

    @staticmethod
    def naive(x: A, w: A, b: A, target: A) -> dict[str, A]:
        def output(b: A) -> A:
            y = x @ w.T + b
            return (y - y.mean(0)) * mx.rsqrt(y.var(0) + 1e-5)

        gradient = mx.grad(lambda b: ((output(b) - target) ** 2).mean())(b)
        moved = optim.Adam(1e-3).apply_gradients({"b": gradient}, {"b": b})["b"]
        return {"gradient": b - moved, "output": output(b)}

    @staticmethod
    def fixed(x: A, w: A, b: A, target: A) -> dict[str, A]:
        y = x @ w.T
        y = (y - y.mean(0)) * mx.rsqrt(y.var(0) + 1e-5)
        return {"gradient": mx.zeros_like(b), "output": y}
