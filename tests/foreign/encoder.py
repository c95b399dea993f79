"""A transformer encoder block: PyTorch's fused attention, split projections in the port."""

import math

import mlx.core as mx
import mlx.nn as nn
import torch
from torch import nn as tnn

DIM, HEADS = 12, 3


class Block(tnn.Module):
    """Pre-norm, (B, T, C) to (B, T, C); ``mask`` (B, T) is True where a key is to be ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = tnn.LayerNorm(DIM, eps=1e-6)
        self.attn = tnn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.ln_2 = tnn.LayerNorm(DIM, eps=1e-6)
        self.mlp = tnn.Sequential(tnn.Linear(DIM, 4 * DIM), tnn.GELU(), tnn.Linear(4 * DIM, DIM))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = self.ln_1(x)
        h, _ = self.attn(h, h, h, key_padding_mask=mask, need_weights=False)
        x = x + h
        return x + self.mlp(self.ln_2(x))


class Encoder(tnn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = tnn.ModuleList([Block() for _ in range(depth)])
        self.norm = tnn.LayerNorm(DIM)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x)


class SelfAttention(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.k_proj = nn.Linear(DIM, DIM)
        self.v_proj = nn.Linear(DIM, DIM)
        self.q_proj = nn.Linear(DIM, DIM)
        self.o_proj = nn.Linear(DIM, DIM)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        B, T, C = x.shape

        def split(y: mx.array) -> mx.array:
            return y.reshape(B, T, HEADS, C // HEADS).transpose(0, 2, 1, 3)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        scores = (q @ k.swapaxes(-1, -2)) / math.sqrt(C // HEADS)
        if mask is not None and self.fault != "mask":
            scores = mx.where(mask[:, None, None, :], -mx.inf, scores)
        weights = mx.softmax(scores, axis=-1)
        if self.fault == "gradient":
            weights = mx.stop_gradient(weights)
        out = (weights @ v).transpose(0, 2, 1, 3).reshape(B, T, C)
        return self.o_proj(out)


class EncoderLayer(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM, eps=1e-5 if fault == "eps" else 1e-6)
        self.attention = SelfAttention(fault)
        self.ffn_norm = nn.LayerNorm(DIM, eps=1e-6)
        self.fc1 = nn.Linear(DIM, 4 * DIM)
        self.fc2 = nn.Linear(4 * DIM, DIM)
        self.fault = fault

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        x = x + self.attention(self.attention_norm(x), mask)
        h = self.ffn_norm(x)
        h = nn.gelu_approx(self.fc1(h)) if self.fault == "gelu" else nn.gelu(self.fc1(h))
        return x + self.fc2(h)


class EncoderPort(nn.Module):
    """``fault`` is in the second layer only."""

    def __init__(self, fault: str = "", depth: int = 2) -> None:
        super().__init__()
        self.layers = [EncoderLayer(fault if i == depth - 1 else "") for i in range(depth)]
        self.final_norm = nn.LayerNorm(DIM)

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)
