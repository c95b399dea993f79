"""Losses of the adversarial systems, in MLX.

Sources
    Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661): Eq. 1 and the last
    paragraph of section 3. Documents 001 and 002 write the cross-entropy with LogSoftmax over an
    axis of length one, which is zero everywhere; ERRATA.md 001-E6 and 002-E5 tell the repair.

All losses return the mean over the batch, a scalar. Logits and probabilities are (B, 1) unless said
otherwise. Half precision is raised to float32 first, as ``torch.autocast`` does on a GPU.
"""

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.precision import raised


def bce_with_logits(logits: mx.array, targets: mx.array) -> mx.array:
    """Binary cross-entropy of logits (B, ...) against targets in [0, 1] of the same shape.

    ``softplus(l) - y * l``: finite, with a gradient in [-1, 1] per element, for every finite logit.
    """
    return nn.losses.binary_cross_entropy(raised(logits), raised(targets), reduction="mean")


@mx.custom_function
def _bce_elements(probabilities: mx.array, targets: mx.array) -> mx.array:
    log_p = mx.maximum(mx.log(probabilities), -100.0)
    log_not_p = mx.maximum(mx.log(1 - probabilities), -100.0)
    return -(targets * log_p + (1 - targets) * log_not_p)


@_bce_elements.vjp
def _bce_elements_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, mx.array]:
    # MLX clips the logarithm but not its derivative, so autodiff gives 0 * inf = NaN at p = 0 and
    # p = 1 (in float32 a sigmoid is 1 from logit 17.33 on). This is PyTorch's derivative instead.
    p, y = primals
    d_p = (p - y) / mx.maximum(p * (1 - p), 1e-12)
    d_y = mx.maximum(mx.log(1 - p), -100.0) - mx.maximum(mx.log(p), -100.0)
    return cotangent * d_p, cotangent * d_y


def bce_from_probabilities(probabilities: mx.array, targets: mx.array) -> mx.array:
    """Binary cross-entropy of probabilities in [0, 1], (B, ...), against targets of the same shape.

    PyTorch's conventions at the ends: the logarithm is cut off at -100, and the gradient
    ``(p - y) / max(p (1 - p), 1e-12)`` is finite even at 0 and 1, where
    ``nn.losses.binary_cross_entropy(with_logits=False)`` has NaN. Prefer :func:`bce_with_logits`.
    """
    # MLX's stub says that a custom function returns object.
    return cast(mx.array, _bce_elements(raised(probabilities), raised(targets))).mean()


def discriminator_loss(real_logits: mx.array, fake_logits: mx.array) -> mx.array:
    """``-E log D(x) - E log(1 - D(G(z)))`` from logits (B, 1): the negative of Goodfellow Eq. 1.

    2 log 2 at chance, where every logit is 0.
    """
    real = bce_with_logits(real_logits, mx.ones_like(real_logits))
    fake = bce_with_logits(fake_logits, mx.zeros_like(fake_logits))
    return real + fake


def generator_loss_nonsaturating(fake_logits: mx.array) -> mx.array:
    """``-E log D(G(z))`` from logits (B, 1): Goodfellow section 3, last paragraph.

    Its gradient tends to -1 where the discriminator is sure of the fake, so the generator learns.
    """
    return mx.logaddexp(0.0, -raised(fake_logits)).mean()


def generator_loss_minimax(fake_logits: mx.array) -> mx.array:
    """``E log(1 - D(G(z)))`` from logits (B, 1): the generator's side of Goodfellow Eq. 1.

    Its gradient vanishes where the discriminator is sure of the fake.
    """
    return -mx.logaddexp(0.0, raised(fake_logits)).mean()


def two_logit_loss(logits: mx.array, labels: mx.array) -> mx.array:
    """Cross-entropy of two logits (B, 2), fake and real, against labels (B,), 0 fake or 1 real.

    What documents 001 and 002 reach for with LogSoftmax. It is the same loss as one logit:
    ``log_softmax([0, l]) = [log(1 - sigmoid(l)), log(sigmoid(l))]``.
    """
    return nn.losses.cross_entropy(raised(logits), labels, reduction="mean")
