"""Losses."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from torch.nn import functional as F

from mlx_parity.traps.trap import A, Rng, T, Trap, arrays


def _logits(rng: Rng) -> dict[str, np.ndarray]:
    return {"logits": rng.standard_normal((5, 3)), "labels": np.array([0, 2, 1, 1, 0])}


class LossReduction(Trap):
    """Half of MLX's losses return one number per sample where PyTorch's return the mean.

    `cross_entropy`, `nll_loss`, `kl_div_loss`, `huber_loss`, `hinge_loss`, `triplet_loss`,
    `log_cosh_loss`, `margin_ranking_loss` and `cosine_similarity_loss` default to `"none"`; the
    others to `"mean"`. Summed up to train, the gradients are larger by the batch size.
    """

    id = "loss-reduction"
    title = "Losses that are not averaged"
    rows = ("21",)
    fix = "nn.losses.cross_entropy(logits, labels, reduction='mean')"
    error = 4.0
    draw = staticmethod(_logits)

    @staticmethod
    def reference(logits: T, labels: T) -> T:
        return F.cross_entropy(logits, labels)

    @staticmethod
    def naive(logits: A, labels: A) -> A:
        return nn.losses.cross_entropy(logits, labels).sum()

    @staticmethod
    def fixed(logits: A, labels: A) -> A:
        return nn.losses.cross_entropy(logits, labels, reduction="mean")


class BceWithLogits(Trap):
    """MLX's `binary_cross_entropy` expects logits; PyTorch's expects probabilities.

    Probabilities are read as logits without complaint, and the loss is a plausible number that
    never falls below 0.31. There is no `pos_weight`.
    """

    id = "bce-with-logits"
    title = "binary_cross_entropy takes logits"
    rows = ("22",)
    fix = "pass the logits, or with_logits=False for probabilities"
    error = 0.53

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"p": rng.uniform(0.1, 0.9, 6), "y": rng.integers(0, 2, 6)}

    @staticmethod
    def reference(p: T, y: T) -> T:
        return F.binary_cross_entropy(p, y.to(p.dtype))

    @staticmethod
    def naive(p: A, y: A) -> A:
        return nn.losses.binary_cross_entropy(p, y)

    @staticmethod
    def fixed(p: A, y: A) -> A:
        return nn.losses.binary_cross_entropy(p, y, with_logits=False)


class BceSaturation(Trap):
    """The gradient of cross entropy on probabilities is NaN in MLX where a sigmoid saturates.

    In float32 the sigmoid is exactly 1 from 17.33 on. MLX cuts the logarithm off at -100, but its
    derivative is 0 times infinity; PyTorch's is finite. One confident sample turns every weight of
    the model NaN, a correctly classified one as well.
    """

    id = "bce-saturation"
    shows = "not finite"
    title = "NaN gradient at a saturated probability"
    rows = ("23",)
    fix = "train on logits: nn.losses.binary_cross_entropy(logits, y)"
    error = None
    gradients = True

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"z": np.array([20.0, 0.5, -1.0]), "y": np.array([1, 1, 0])}

    @staticmethod
    def reference(z: T, y: T) -> T:
        return F.binary_cross_entropy_with_logits(z, y.to(z.dtype))

    @staticmethod
    def naive(z: A, y: A) -> A:
        return nn.losses.binary_cross_entropy(mx.sigmoid(z), y, with_logits=False)

    @staticmethod
    def fixed(z: A, y: A) -> A:
        return nn.losses.binary_cross_entropy(z, y)


class CrossEntropyAxis(Trap):
    """Classes lie on the last axis in MLX, on the second in PyTorch.

    A map of logits (N, C, H, W) carried over unchanged is read along its width. Where the sizes
    allow it, nothing is raised.
    """

    id = "cross-entropy-axis"
    title = "cross_entropy's classes are on the last axis"
    rows = ("24",)
    fix = "put the classes last (NHWC), or pass axis=1"
    error = 0.18

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"logits": rng.standard_normal((3, 4, 4)), "labels": rng.integers(0, 4, (3, 4))}

    @staticmethod
    def reference(logits: T, labels: T) -> T:
        return F.cross_entropy(logits, labels)

    @staticmethod
    def naive(logits: A, labels: A) -> A:
        return nn.losses.cross_entropy(logits, labels, reduction="mean")

    @staticmethod
    def fixed(logits: A, labels: A) -> A:
        return nn.losses.cross_entropy(logits, labels, axis=1, reduction="mean")


class CrossEntropyIgnoreIndex(Trap):
    """MLX's `cross_entropy` has no `ignore_index`: the label -100 is looked up.

    Indexing out of bounds does not raise; what it reads is finite and meaningless.
    """

    id = "cross-entropy-ignore-index"
    title = "The label -100 is not ignored"
    rows = ("24",)
    fix = "mask them: (loss * (labels != -100)).sum() / (labels != -100).sum()"
    error = 0.22

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"logits": rng.standard_normal((5, 3)), "labels": np.array([0, -100, 1, 1, -100])}

    @staticmethod
    def reference(logits: T, labels: T) -> T:
        return F.cross_entropy(logits, labels)

    @staticmethod
    def naive(logits: A, labels: A) -> A:
        return nn.losses.cross_entropy(logits, mx.clip(labels, 0, 2), reduction="mean")

    @staticmethod
    def fixed(logits: A, labels: A) -> A:
        known = labels != -100
        losses = nn.losses.cross_entropy(logits, mx.where(known, labels, 0))
        return (losses * known).sum() / known.sum()


class CrossEntropyWeights(Trap):
    """`weights` are per sample in MLX, and per class in PyTorch, which divides by their sum."""

    id = "cross-entropy-weights"
    title = "cross_entropy's weights are per sample"
    rows = ("24",)
    fix = "w = class_weights[labels]; (cross_entropy(logits, labels) * w).sum() / w.sum()"
    error = 0.14

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return _logits(rng) | {"weights": rng.uniform(0.2, 2, 3)}

    @staticmethod
    def reference(logits: T, labels: T, weights: T) -> T:
        return F.cross_entropy(logits, labels, weights)

    @staticmethod
    def naive(logits: A, labels: A, weights: A) -> A:
        return nn.losses.cross_entropy(logits, labels, weights[labels], reduction="mean")

    @staticmethod
    def fixed(logits: A, labels: A, weights: A) -> A:
        w = weights[labels]
        return nn.losses.cross_entropy(logits, labels, w).sum() / w.sum()


class KlDivergence(Trap):
    """MLX's targets are log-probabilities, and the sum runs over the classes.

    PyTorch's targets are probabilities unless `log_target=True`, and its mean divides by the number
    of elements; MLX's mean is PyTorch's `"batchmean"`.
    """

    id = "kl-divergence"
    title = "kl_div_loss: log targets, and a mean over the batch"
    rows = ("25",)
    fix = "nn.losses.kl_div_loss(log_p, mx.log(q), reduction='mean') / classes"
    error = 2.0

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        p, q = rng.dirichlet(np.ones(3), 5), rng.dirichlet(np.ones(3), 5)
        return {"log_p": np.log(p), "q": q}

    @staticmethod
    def reference(log_p: T, q: T) -> T:
        return F.kl_div(log_p, q, reduction="mean")

    @staticmethod
    def naive(log_p: A, q: A) -> A:
        return nn.losses.kl_div_loss(log_p, mx.log(q), reduction="mean")

    @staticmethod
    def fixed(log_p: A, q: A) -> A:
        return nn.losses.kl_div_loss(log_p, mx.log(q), reduction="mean") / q.shape[1]


class CosineSimilarityLoss(Trap):
    """MLX's `cosine_similarity_loss` is the similarity: minimising it drives vectors apart.

    For equal vectors it is 1. PyTorch's `CosineEmbeddingLoss` with target 1 is 1 minus that.
    """

    id = "cosine-similarity-loss"
    title = "cosine_similarity_loss is no loss"
    rows = ("26",)
    fix = "1 - nn.losses.cosine_similarity_loss(a, b, reduction='mean')"
    error = 1.1
    shapes = arrays(a=(4, 3), b=(4, 3))

    @staticmethod
    def reference(a: T, b: T) -> T:
        return F.cosine_embedding_loss(a, b, torch.ones(4))

    @staticmethod
    def naive(a: A, b: A) -> A:
        return nn.losses.cosine_similarity_loss(a, b, reduction="mean")

    @staticmethod
    def fixed(a: A, b: A) -> A:
        return 1 - nn.losses.cosine_similarity_loss(a, b, reduction="mean")


class LossBroadcast(Trap):
    """PyTorch broadcasts (N, 1) against (N,) to (N, N) with a warning; MLX raises.

    Then the original is wrong: it averages over all pairs. The port cannot be equal to it before
    someone decides which of the two was meant.
    """

    id = "loss-broadcast"
    shows = "raises"
    title = "A loss over shapes that broadcast"
    rows = ("27",)
    fix = "repair the original: loss(predictions.squeeze(1), targets)"
    error = None
    shapes = arrays(predictions=(4, 1), targets=(4,))

    @staticmethod
    def reference(predictions: T, targets: T) -> T:
        return F.mse_loss(predictions, targets)

    @staticmethod
    def naive(predictions: A, targets: A) -> A:
        return nn.losses.mse_loss(predictions, targets)

    @staticmethod
    def fixed(predictions: A, targets: A) -> A:
        return mx.square(predictions - targets).mean()  # over all pairs, as the original does


class TripletEps(Trap):
    """The triplet loss's eps is added under the root in MLX, to the difference in PyTorch.

    On ordinary data it is a difference of 1e-7, at distances of about 1e-3 one in the first digit.
    """

    id = "triplet-eps"
    title = "The triplet loss's eps"
    rows = ("28",)
    fix = "mx.linalg.norm(anchor - positive + 1e-6, axis=-1), and so on: write the loss out"
    error = 0.089

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        a = rng.standard_normal((4, 3))
        near, far = (a + 1e-3 * rng.standard_normal((4, 3)) for _ in range(2))
        return {"a": a, "p": near - a, "n": far - a}

    @staticmethod
    def reference(a: T, p: T, n: T) -> T:
        return F.triplet_margin_loss(torch.zeros_like(a), p, n, margin=1e-3, reduction="none")

    @staticmethod
    def naive(a: A, p: A, n: A) -> A:
        return nn.losses.triplet_loss(mx.zeros_like(a), p, n, margin=1e-3)

    @staticmethod
    def fixed(a: A, p: A, n: A) -> A:
        def distance(b: A) -> A:
            return mx.sqrt(mx.square(0 - b + 1e-6).sum(-1))

        return mx.maximum(distance(p) - distance(n) + 1e-3, 0)


class LossKind(Trap):
    """Another loss: L2 for L1, smooth L1 for Huber, other smoothing or another beta.

    Smooth L1 is Huber's loss divided by beta; at beta 1 they are the same.
    """

    id = "loss-kind"
    title = "Another loss, or another parameter of it"
    fix = "use the original's loss with its beta, delta or label_smoothing"
    error = 0.5
    shapes = arrays(x=(6,), y=(6,))

    @staticmethod
    def reference(x: T, y: T) -> T:
        return F.smooth_l1_loss(x, y, beta=0.5)

    @staticmethod
    def naive(x: A, y: A) -> A:
        return nn.losses.huber_loss(x, y, delta=0.5, reduction="mean")

    @staticmethod
    def fixed(x: A, y: A) -> A:
        return nn.losses.smooth_l1_loss(x, y, beta=0.5)
