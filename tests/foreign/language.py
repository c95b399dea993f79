"""A causal language model: learned positions, tied embedding, a float mask, several outputs."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import torch
from torch import nn as tnn

WORDS, LENGTH, DIM, HEADS = 13, 8, 8, 2


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class CausalBlock(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1 = tnn.LayerNorm(DIM)
        self.c_attn = tnn.Linear(DIM, 3 * DIM)
        self.c_proj = tnn.Linear(DIM, DIM)
        self.ln2 = tnn.LayerNorm(DIM)
        self.fc = tnn.Linear(DIM, 2 * DIM)
        self.proj = tnn.Linear(2 * DIM, DIM)
        self.drop = tnn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln1(x)).split(DIM, dim=2)
        q, k, v = (t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in (q, k, v))
        y = tnn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))
        h = tnn.functional.gelu(self.fc(self.ln2(x)), approximate="tanh")
        return x + self.drop(self.proj(h))


class Language(tnn.Module):
    """Tokens (B, T) and an additive mask (T, T), -inf above the diagonal, to an object."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = tnn.Embedding(WORDS, DIM)
        self.wpe = tnn.Parameter(torch.randn(1, LENGTH, DIM))
        self.h = tnn.ModuleList([CausalBlock(), CausalBlock()])
        self.ln_f = tnn.LayerNorm(DIM)
        self.lm_head = tnn.Linear(DIM, WORDS, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> Output:
        x = self.wte(tokens) + self.wpe[:, : tokens.shape[1]]
        for block in self.h:
            x = block(x, mask)
        hidden = self.ln_f(x)
        return Output(self.lm_head(hidden), hidden)


class CausalBlockPort(nn.Module):
    """As mlx-examples would write it; the projection split in three, ``c_attn`` nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn = nn.MultiHeadAttention(DIM, HEADS, bias=True)
        self.norm2 = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, 2 * DIM)
        self.down = nn.Linear(2 * DIM, DIM)
        self.dropout = nn.Dropout(0.1)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        h = self.norm1(x)
        x = x + self.dropout(self.attn(h, h, h, mask))
        h = self.up(self.norm2(x))
        return x + self.dropout(self.down(nn.gelu_approx(h)))


class LanguagePort(nn.Module):
    """Called as ``port(mask, tokens)``."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.token_embedding = nn.Embedding(WORDS, DIM)
        self.positions = mx.zeros((LENGTH, DIM))
        self.blocks = [CausalBlockPort(), CausalBlockPort()]
        self.norm = nn.LayerNorm(DIM)

    def __call__(self, mask: mx.array, tokens: mx.array) -> dict[str, mx.array]:
        start = 1 if self.fault == "positions" else 0
        x = self.token_embedding(tokens) + self.positions[start : start + tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        hidden = self.norm(x)
        if self.fault == "tied":
            return {
                "logits": self.token_embedding.as_linear(mx.stop_gradient(hidden)),
                "hidden": hidden,
            }
        return {"logits": self.token_embedding.as_linear(hidden), "hidden": hidden}
