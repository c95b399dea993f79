"""Losses of the adversarial systems, in PyTorch.

Sources
    Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661): Eq. 1 and the last
    paragraph of section 3. Documents 001 and 002 write the cross-entropy with LogSoftmax over an
    axis of length one, which is zero everywhere; ERRATA.md 001-E6 and 002-E5 tell the repair.

All losses return the mean over the batch, a scalar. Logits and probabilities are (B, 1) unless said
otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bce_with_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B, ...) against targets in [0, 1] of the same shape.

    ``softplus(l) - y * l``: finite, with a gradient in [-1, 1] per element, for every finite logit.
    """
    return F.binary_cross_entropy_with_logits(logits, targets)


def bce_from_probabilities(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of probabilities in [0, 1], (B, ...), against targets of the same shape.

    PyTorch's conventions at the ends: the logarithm is cut off at -100, and the gradient
    ``(p - y) / max(p (1 - p), 1e-12)`` is finite even at 0 and 1. Prefer :func:`bce_with_logits`.
    """
    return F.binary_cross_entropy(probabilities, targets)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``-E log D(x) - E log(1 - D(G(z)))`` from logits (B, 1): the negative of Goodfellow Eq. 1.

    2 log 2 at chance, where every logit is 0.
    """
    real = bce_with_logits(real_logits, torch.ones_like(real_logits))
    fake = bce_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return real + fake


def generator_loss_nonsaturating(fake_logits: Tensor) -> Tensor:
    """``-E log D(G(z))`` from logits (B, 1): Goodfellow section 3, last paragraph.

    Its gradient tends to -1 where the discriminator is sure of the fake, so the generator learns.
    """
    return F.softplus(-fake_logits).mean()


def generator_loss_minimax(fake_logits: Tensor) -> Tensor:
    """``E log(1 - D(G(z)))`` from logits (B, 1): the generator's side of Goodfellow Eq. 1.

    Its gradient vanishes where the discriminator is sure of the fake.
    """
    return -F.softplus(fake_logits).mean()


def two_logit_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of two logits (B, 2), fake and real, against labels (B,), 0 fake or 1 real.

    What documents 001 and 002 reach for with LogSoftmax. It is the same loss as one logit:
    ``log_softmax([0, l]) = [log(1 - sigmoid(l)), log(sigmoid(l))]``.
    """
    return F.cross_entropy(logits, labels)
