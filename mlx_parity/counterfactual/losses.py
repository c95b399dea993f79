"""Another reduction, logits for probabilities, another distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T

_DISTANCES: dict[str, Callable[..., T]] = {
    "mse_loss": F.mse_loss,
    "l1_loss": F.l1_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
}


def _loss(call: Call) -> Proposals:
    name, reduction = call.name, call.get("reduction", "mean")
    for other in ("sum", "mean", "none"):
        if other != reduction:
            yield Change(
                "kl-divergence" if name == "kl_div" else "loss-reduction",
                f"reduction {other!r} for {reduction!r}",
                lambda c, r=other: c.run(reduction=r),
            )
    if name == "cross_entropy":
        weight = call.get("weight")
        if weight is not None:
            yield Change("cross-entropy-weights", "no weights", lambda c: c.run(weight=None))
            yield Change(
                "cross-entropy-weights",
                "a mean that is not divided by the weights",
                lambda c: c.run(reduction="none").mean(),
            )
        if call.x.ndim > 2:
            yield Change(
                "cross-entropy-axis",
                "the classes on the last axis",
                lambda c: c.run(input=c.x.transpose(1, -1)),
            )
        yield Change(
            "cross-entropy-ignore-index",
            "ignored labels looked up",
            lambda c: c.run(target=c.get("target").clamp(0, c.x.shape[1] - 1)),
        )
        yield Change(
            "loss-kind",
            "label smoothing {:.4g}",
            lambda c, e: c.run(label_smoothing=min(max(e, 0.0), 1.0)),
            fit=(call.get("label_smoothing", 0.0) or 0.01, False),
        )
    if name == "binary_cross_entropy":
        yield Change(
            "bce-with-logits",
            "probabilities read as logits",
            lambda c: F.binary_cross_entropy_with_logits(c.x, c.get("target")),
        )
    if name == "binary_cross_entropy_with_logits":
        yield Change(
            "bce-with-logits",
            "a sigmoid before a loss that takes logits",
            lambda c: c.run(input=torch.sigmoid(c.x)),
        )
        yield Change(
            "bce-with-logits",
            "logits read as probabilities",
            lambda c: F.binary_cross_entropy(c.x.clamp(1e-12, 1 - 1e-7), c.get("target")),
        )
    if name == "kl_div":
        log = {"log_target": not call.get("log_target", False)}
        mean = {"reduction": "mean" if reduction == "batchmean" else "batchmean"}
        for said, change in (
            (f"the reduction {mean['reduction']!r}", mean),
            ("targets read as logarithms, or the reverse", log),
            (f"both that and the reduction {mean['reduction']!r}", mean | log),
        ):
            yield Change("kl-divergence", said, lambda c, k=change: c.run(**k))
    if name in ("cosine_embedding_loss", "cosine_similarity"):
        yield Change("cosine-similarity-loss", "1 less the result", lambda c: 1 - c.run())
    if name in _DISTANCES:
        for kind, function in _DISTANCES.items():
            if kind != name:
                yield Change(
                    "loss-kind",
                    f"{kind} for {name}",
                    lambda c, f=function: f(c.x, c.get("target"), reduction=reduction),
                )
    for key in ("beta", "delta"):
        if name == {"beta": "smooth_l1_loss", "delta": "huber_loss"}[key]:
            yield Change(
                "loss-kind",
                f"{key} {{:.6g}} for {call.get(key, 1.0):g}",
                lambda c, b, k=key: c.run(**{k: b}),
                fit=(call.get(key, 1.0), False),
            )


PROPOSALS: dict[str, Proposer] = dict.fromkeys(
    (
        *("cross_entropy", "nll_loss", "binary_cross_entropy", "kl_div", *_DISTANCES),
        *("binary_cross_entropy_with_logits", "cosine_embedding_loss", "cosine_similarity"),
    ),
    _loss,
)
