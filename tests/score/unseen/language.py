"""Text: T5, a LLaMA layer with a cache, a mixture of experts, CLIP's text tower, BERT."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from torch import nn as tnn
from torch.nn import functional as F

from tests.score.family import Example, Family, Rng, mistake, normal, ported, size

# ------------------------------------------------------------------------------------------- T5


class T5Norm(tnn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = tnn.Parameter(torch.ones(dim))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(variance + self.variance_epsilon)


class T5Attention(tnn.Module):
    def __init__(self, dim: int, heads: int, buckets: int):
        super().__init__()
        self.n_heads, self.num_buckets, self.max_distance = heads, buckets, 16
        self.q, self.k, self.v, self.o = (tnn.Linear(dim, dim, bias=False) for _ in range(4))
        self.relative_attention_bias = tnn.Embedding(buckets, heads)

    def bucket(self, relative: torch.Tensor) -> torch.Tensor:
        half = self.num_buckets // 2
        found = (relative > 0).long() * half
        distance = relative.abs()
        exact = half // 2
        far = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        large = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
        return found + torch.where(distance < exact, distance, large)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = (
            f(x).view(b, n, self.n_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        at = torch.arange(n)
        bias = self.relative_attention_bias(self.bucket(at[None, :] - at[:, None]))
        scores = q @ k.transpose(3, 2) + bias.permute(2, 0, 1)
        y = scores.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, n, c))


class T5Ff(tnn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.wi_0, self.wi_1 = (tnn.Linear(dim, 2 * dim, bias=False) for _ in range(2))
        self.wo = tnn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5Block(tnn.Module):
    def __init__(self, dim: int, heads: int, buckets: int):
        super().__init__()
        self.layer_norm_1, self.SelfAttention = T5Norm(dim), T5Attention(dim, heads, buckets)
        self.layer_norm_2, self.DenseReluDense = T5Norm(dim), T5Ff(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.SelfAttention(self.layer_norm_1(x))
        return x + self.DenseReluDense(self.layer_norm_2(x))


class RelativeBias(nn.Module):
    def __init__(self, buckets: int, heads: int, wrong: str = ""):
        super().__init__()
        self.buckets, self.wrong = buckets, wrong
        self.table = nn.Embedding(buckets, heads)

    def __call__(self, length: int) -> mx.array:
        at = np.arange(length)
        relative = at[None, :] - at[:, None]
        if self.wrong == "the distance's sign turned":
            relative = -relative
        half = self.buckets if self.wrong == "one direction's buckets" else self.buckets // 2
        found = (relative > 0) * half
        distance, exact = np.abs(relative), half // 2
        far = np.log(np.maximum(distance, 1) / exact) / np.log(16 / exact) * (half - exact)
        large = np.minimum(exact + far.astype(np.int64), half - 1)
        found = found + np.where(distance < exact, distance, large)
        return self.table(mx.array(np.minimum(found, self.buckets - 1))).transpose(2, 0, 1)


class RelativeAttention(nn.Module):
    def __init__(self, dims: int, heads: int, buckets: int, wrong: str = ""):
        super().__init__()
        self.heads, self.wrong = heads, wrong
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (
            nn.Linear(dims, dims, bias=False) for _ in range(4)
        )
        self.relative = RelativeBias(buckets, heads, wrong)

    def __call__(self, x: mx.array) -> mx.array:
        B, L, _ = x.shape
        q = self.query_proj(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        k = self.key_proj(x).reshape(B, L, self.heads, -1).transpose(0, 2, 3, 1)
        v = self.value_proj(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        scale = q.shape[-1] ** -0.5 if self.wrong == "scores scaled, which T5's are not" else 1
        scores = (q * scale) @ k
        if self.wrong != "no relative bias":
            scores = scores + self.relative(L)
        y = (mx.softmax(scores, axis=-1) @ v).transpose(0, 2, 1, 3).reshape(B, L, -1)
        return self.out_proj(y)


class GatedFeedForward(nn.Module):
    def __init__(self, dims: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.gate, self.up = (nn.Linear(dims, 2 * dims, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * dims, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gelu = nn.gelu if self.wrong == "the exact GELU" else nn.gelu_approx
        return self.down(gelu(self.gate(x)) * self.up(x))


class EncoderBlock(nn.Module):
    def __init__(self, dims: int, heads: int, buckets: int, wrong: str = ""):
        super().__init__()
        self.attention = RelativeAttention(dims, heads, buckets, wrong)
        self.ffn = GatedFeedForward(dims, wrong)
        eps = 1e-5 if wrong == "MLX's eps" else 1e-6
        self.ln1, self.ln2 = nn.RMSNorm(dims, eps=1e-6), nn.RMSNorm(dims, eps=eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.ln1(x))
        return x + self.ffn(self.ln2(x))


def t5(rng: Rng) -> Example:
    heads = 2
    sizes = (heads * size(rng, 2, 4), heads, 8)
    x = normal(rng, size(rng, 1, 3), size(rng, 6, 9), sizes[0])
    return ported(T5Block(*sizes), lambda wrong: EncoderBlock(*sizes, wrong), x)


T5_FAMILY = Family(
    "T5 block",
    t5,
    (
        mistake("the distance's sign turned", "SelfAttention", "position-offset"),
        mistake("one direction's buckets", "SelfAttention", ""),
        mistake("scores scaled, which T5's are not", "SelfAttention", "attention-scale"),
        mistake("no relative bias", "SelfAttention", "residual-dropped"),
        mistake("the exact GELU", "DenseReluDense", "gelu-approximation"),
        mistake("MLX's eps", "layer_norm_2", "rmsnorm-eps norm-eps"),
    ),
)

# ---------------------------------------------------------------------------------------- LLaMA


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class LlamaAttention(tnn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.rope_theta = 500000.0
        self.q_proj = tnn.Linear(dim, dim, bias=False)
        self.k_proj = tnn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = tnn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = tnn.Linear(dim, dim, bias=False)

    def rotary(self, x: torch.Tensor, start: int) -> torch.Tensor:
        half = torch.arange(0, self.head_dim, 2, dtype=x.dtype) / self.head_dim
        at = torch.arange(start, start + x.shape[2], dtype=x.dtype)
        angles = at[:, None] * self.rope_theta**-half
        cos, sin = (torch.cat((f(angles),) * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + rotate_half(x) * sin

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        b, n, c = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, -1).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.num_kv_heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.num_kv_heads, -1).transpose(1, 2)
        start = past_k.shape[2]
        q, k = self.rotary(q, start), self.rotary(k, start)
        k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        groups = self.num_heads // self.num_kv_heads
        keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, c)), k, v


class LlamaMlp(tnn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gate_proj, self.up_proj = (tnn.Linear(dim, 2 * dim, bias=False) for _ in range(2))
        self.down_proj = tnn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(tnn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(dim, heads, kv_heads), LlamaMlp(dim)
        self.input_layernorm = tnn.RMSNorm(dim, eps=1e-5)
        self.post_attention_layernorm = tnn.RMSNorm(dim, eps=1e-5)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, k, v = self.self_attn(self.input_layernorm(x), mask, past_k, past_v)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class GroupedAttention(nn.Module):
    def __init__(self, dims: int, n_heads: int, n_kv_heads: int, wrong: str = ""):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.wrong = n_heads, n_kv_heads, wrong
        d = dims // n_heads
        self.scale = d**-0.5
        self.wq, self.wo = (nn.Linear(dims, dims, bias=False) for _ in range(2))
        self.wkv = nn.Linear(dims, 2 * n_kv_heads * d, bias=False)
        base = 10000 if wrong == "the usual base" else 500000.0
        self.rope = nn.RoPE(d, traditional=wrong == "pairs of neighbours", base=base)

    def __call__(
        self, x: mx.array, mask: mx.array, cache: tuple[mx.array, mx.array]
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        B, L, _ = x.shape
        q = self.wq(x).reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        kv = self.wkv(x).reshape(B, L, 2 * self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        k, v = mx.split(kv, 2, axis=1)
        offset = 0 if self.wrong == "positions from 0 behind a cache" else cache[0].shape[2]
        q = self.rope(q, offset=offset)
        if self.wrong != "keys not rotated":
            k = self.rope(k, offset=offset)
        if self.wrong == "the cache behind":
            k, v = mx.concatenate([k, cache[0]], 2), mx.concatenate([v, cache[1]], 2)
        else:
            k, v = mx.concatenate([cache[0], k], 2), mx.concatenate([cache[1], v], 2)
        keys, values = k, v
        if self.wrong == "key heads tiled":
            groups = self.n_heads // self.n_kv_heads
            keys, values = (mx.tile(a, (1, groups, 1, 1)) for a in (k, v))
        y = mx.fast.scaled_dot_product_attention(q, keys, values, scale=self.scale, mask=mask)
        return self.wo(y.transpose(0, 2, 1, 3).reshape(B, L, -1)), (k, v)


class SwiGLU(nn.Module):
    def __init__(self, dims: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.w1, self.w3 = (nn.Linear(dims, 2 * dims, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * dims, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        if self.wrong == "gate and up exchanged":
            return self.w2(self.w1(x) * nn.silu(self.w3(x)))
        return self.w2(nn.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, dims: int, n_heads: int, n_kv_heads: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.attention = GroupedAttention(dims, n_heads, n_kv_heads, wrong)
        self.feed_forward = SwiGLU(dims, wrong)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(dims, eps=1e-5) for _ in range(2))

    def __call__(
        self, x: mx.array, mask: mx.array, past_k: mx.array, past_v: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        y, cache = self.attention(self.attention_norm(x), mask, (past_k, past_v))
        h = x + y
        residual = x if self.wrong == "the residual from before attention" else h
        return residual + self.feed_forward(self.ffn_norm(h)), *cache


def llama(rng: Rng) -> Example:
    heads, kv = 4, 2
    d = 2 * size(rng, 2, 3)
    sizes = (heads * d, heads, kv)
    b, n, past = size(rng, 1, 2), size(rng, 2, 4), size(rng, 2, 3)
    mask = np.triu(np.full((n, past + n), -np.inf, np.float32), past + 1)
    inputs = {
        "x": normal(rng, b, n, sizes[0]),
        "mask": mask,
        "past_k": normal(rng, b, kv, past, d),
        "past_v": normal(rng, b, kv, past, d),
    }
    return ported(LlamaLayer(*sizes), lambda wrong: Layer(*sizes, wrong), inputs)


LLAMA_FAMILY = Family(
    "LLaMA layer",
    llama,
    (
        mistake("the usual base", "self_attn", "module-setting"),
        mistake("pairs of neighbours", "self_attn", "rotary-layout"),
        mistake("positions from 0 behind a cache", "self_attn", "position-offset"),
        mistake("keys not rotated", "self_attn", "position-offset"),
        mistake("the cache behind", "self_attn", "concatenation-order"),
        mistake("key heads tiled", "self_attn", "repeat-interleaves"),
        mistake("gate and up exchanged", "mlp", "layer-order gate-order"),
        mistake("the residual from before attention", "", "another-tensor"),
    ),
)

# ------------------------------------------------------------------------------------------ MoE


class Expert(tnn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.w1, self.w3 = (tnn.Linear(dim, 2 * dim, bias=False) for _ in range(2))
        self.w2 = tnn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Moe(tnn.Module):
    def __init__(self, dim: int, experts: int):
        super().__init__()
        self.top_k = 2
        self.gate = tnn.Linear(dim, experts, bias=False)
        self.experts = tnn.ModuleList([Expert(dim) for _ in range(experts)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        picked = outputs.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (picked * weights[..., None]).sum(-2)


class SparseBlock(nn.Module):
    def __init__(self, dims: int, experts: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.router = nn.Linear(dims, experts, bias=False)
        self.experts = [SwiGLU(dims) for _ in range(experts)]

    def __call__(self, x: mx.array) -> mx.array:
        logits, k = self.router(x), 2
        if self.wrong == "one expert too few":
            k = 1
        order = logits if self.wrong == "the least likely experts" else -logits
        chosen = mx.stop_gradient(mx.argpartition(order, kth=k - 1, axis=-1)[..., :k])
        scores = mx.softmax(logits, axis=-1, precise=True)
        scores = mx.take_along_axis(scores, chosen, axis=-1)
        if self.wrong != "the chosen weights not normalised":
            scores = scores / scores.sum(-1, keepdims=True)
        if self.wrong == "the router does not train":
            scores = mx.stop_gradient(scores)
        outputs = mx.stack([expert(x) for expert in self.experts], axis=-2)
        return (mx.take_along_axis(outputs, chosen[..., None], axis=-2) * scores[..., None]).sum(-2)


def moe(rng: Rng) -> Example:
    sizes = (size(rng, 3, 5), 4)
    x = normal(rng, size(rng, 1, 2), size(rng, 2, 4), sizes[0])
    return ported(Moe(*sizes), lambda wrong: SparseBlock(*sizes, wrong), x)


MOE_FAMILY = Family(
    "mixture of experts",
    moe,
    (
        mistake("one expert too few", "", "module-setting"),
        mistake("the least likely experts", "", "topk-order"),
        mistake("the chosen weights not normalised", "", "scale-factor"),
        mistake("the router does not train", "", "gradient-stopped"),
    ),
)

# ------------------------------------------------------------------------------------ CLIP's text


class ClipLayer(tnn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = tnn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_1, self.ln_2 = tnn.LayerNorm(dim), tnn.LayerNorm(dim)
        self.c_fc, self.c_proj = tnn.Linear(dim, 2 * dim), tnn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = self.c_fc(self.ln_2(x))
        return x + self.c_proj(y * torch.sigmoid(1.702 * y))


class ClipText(tnn.Module):
    def __init__(self, words: int, dim: int, heads: int):
        super().__init__()
        self.token_embedding = tnn.Embedding(words, dim)
        self.positional_embedding = tnn.Parameter(torch.randn(10, dim))
        self.resblocks = tnn.ModuleList([ClipLayer(dim, heads) for _ in range(2)])
        self.ln_final = tnn.LayerNorm(dim)
        self.text_projection = tnn.Parameter(torch.randn(dim, dim))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        n = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:n]
        mask = torch.full((n, n), -math.inf, dtype=x.dtype).triu(1)
        for block in self.resblocks:
            x = block(x, mask)
        x = self.ln_final(x)[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection
        return x / x.norm(dim=-1, keepdim=True)


class TextLayer(nn.Module):
    def __init__(self, dims: int, heads: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.attention = nn.MultiHeadAttention(dims, heads, bias=True)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dims), nn.LayerNorm(dims)
        self.mlp_in, self.mlp_out = nn.Linear(dims, 2 * dims), nn.Linear(2 * dims, dims)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        y = self.layer_norm1(x)
        x = x + self.attention(y, y, y, mask)
        y = self.mlp_in(self.layer_norm2(x))
        y = nn.gelu(y) if self.wrong == "the exact GELU" else nn.gelu_fast_approx(y)
        return x + self.mlp_out(y)


class TextModel(nn.Module):
    def __init__(self, words: int, dims: int, heads: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.tokens = nn.Embedding(words, dims)
        self.positions = mx.zeros((10, dims))
        self.layers = [TextLayer(dims, heads), TextLayer(dims, heads, wrong)]
        self.final_layer_norm = nn.LayerNorm(dims)
        self.projection = nn.Linear(dims, dims, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        B, N = tokens.shape
        x = self.tokens(tokens) + self.positions[:N]
        mask = nn.MultiHeadAttention.create_additive_causal_mask(N)
        if self.wrong == "no causal mask":
            mask = None
        for layer in self.layers:
            x = layer(x, mask)
        x = self.final_layer_norm(x)
        if self.wrong == "the last token pooled":
            x = x[:, -1]
        else:
            x = x[mx.arange(B), tokens.argmax(-1)]
        x = self.projection(x)
        if self.wrong == "not normalised":
            return x
        if self.wrong == "normalised by the sum of squares":
            return x / (x * x).sum(-1, keepdims=True)
        return x / mx.linalg.norm(x, axis=-1, keepdims=True)


def clip(rng: Rng) -> Example:
    heads = 2
    sizes = (size(rng, 7, 9), heads * size(rng, 2, 4), heads)
    b, n = size(rng, 2, 3), size(rng, 4, 6)
    text = rng.integers(0, sizes[0] - 1, (b, n))
    text[np.arange(b), rng.integers(1, n - 1, b)] = sizes[0] - 1  # the end of each text
    return ported(ClipText(*sizes), lambda wrong: TextModel(*sizes, wrong), text)


CLIP_FAMILY = Family(
    "CLIP's text tower",
    clip,
    (
        mistake("the exact GELU", "resblocks.1", "gelu-approximation activation-kind"),
        mistake("no causal mask", "resblocks.0.attn", "attention-mask"),
        mistake("the last token pooled", "", "index-out-of-bounds pooling-kind"),
        mistake("not normalised", "", "scale-factor"),
        mistake("normalised by the sum of squares", "", "root-missing"),
    ),
)

# ----------------------------------------------------------------------------------------- BERT


class BertEmbeddings(tnn.Module):
    def __init__(self, words: int, dim: int):
        super().__init__()
        self.word_embeddings = tnn.Embedding(words, dim)
        self.position_embeddings = tnn.Embedding(12, dim)
        self.token_type_embeddings = tnn.Embedding(2, dim)
        self.LayerNorm = tnn.LayerNorm(dim, eps=1e-12)
        self.dropout = tnn.Dropout(0.1)

    def forward(self, ids: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        x = x + self.position_embeddings(torch.arange(ids.shape[1]))
        return self.dropout(self.LayerNorm(x))


class BertAttention(tnn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.dense = (tnn.Linear(dim, dim) for _ in range(4))
        self.LayerNorm = tnn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
            for f in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(c // self.heads)
        y = (scores + mask).softmax(-1) @ v
        return self.LayerNorm(x + self.dense(y.permute(0, 2, 1, 3).reshape(b, n, c)))


class Bert(tnn.Module):
    def __init__(self, words: int, dim: int, heads: int):
        super().__init__()
        self.embeddings = BertEmbeddings(words, dim)
        self.attention = BertAttention(dim, heads)
        self.intermediate, self.output = tnn.Linear(dim, 2 * dim), tnn.Linear(2 * dim, dim)
        self.LayerNorm = tnn.LayerNorm(dim, eps=1e-12)
        self.pooler = tnn.Sequential(tnn.Linear(dim, dim), tnn.Tanh())

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        x = self.embeddings(input_ids, token_type_ids)
        hidden = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        x = self.attention(x, hidden)
        x = self.LayerNorm(x + self.output(F.gelu(self.intermediate(x))))
        return {"last_hidden_state": x, "pooler_output": self.pooler(x[:, 0])}


class Embeddings(nn.Module):
    def __init__(self, words: int, dims: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.words, self.positions = nn.Embedding(words, dims), nn.Embedding(12, dims)
        self.types = nn.Embedding(2, dims)
        self.norm = nn.LayerNorm(dims, eps=1e-5 if wrong == "MLX's eps" else 1e-12)

    def __call__(self, ids: mx.array, types: mx.array) -> mx.array:
        x = self.words(ids) + self.positions(mx.arange(ids.shape[1]))
        if self.wrong == "the padding word's embedding zeroed":
            x = x - self.words(mx.zeros_like(ids)) * (ids == 0)[..., None]
        return self.norm(x if self.wrong == "no token types" else x + self.types(types))


class BertModel(nn.Module):
    def __init__(self, words: int, dims: int, heads: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.embed = Embeddings(words, dims, wrong)
        self.attention = nn.MultiHeadAttention(dims, heads, bias=True)
        self.ln1, self.ln2 = (nn.LayerNorm(dims, eps=1e-12) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(dims, 2 * dims), nn.Linear(2 * dims, dims)
        self.pooler = nn.Linear(dims, dims)

    def __call__(
        self, input_ids: mx.array, token_type_ids: mx.array, attention_mask: mx.array
    ) -> dict[str, Any]:
        x = self.embed(input_ids, token_type_ids)
        keep = mx.expand_dims(attention_mask, (1, 2)).astype(x.dtype)
        bias = (1 - keep) * -1e4
        if self.wrong == "the mask as it is":
            bias = keep
        if self.wrong == "the queries masked, not the keys":
            bias = bias.transpose(0, 1, 3, 2)
        x = self.ln1(x + self.attention(x, x, x, bias))
        x = self.ln2(x + self.linear2(nn.gelu(self.linear1(x))))
        first = x.mean(1) if self.wrong == "the mean pooled" else x[:, 0]
        pooled = self.pooler(first)
        if self.wrong != "the pooler without its tanh":
            pooled = mx.tanh(pooled)
        return {"last_hidden_state": x, "pooler_output": pooled}


def bert(rng: Rng) -> Example:
    heads = 2
    sizes = (size(rng, 6, 9), heads * size(rng, 2, 4), heads)
    shape = (size(rng, 2, 3), size(rng, 4, 6))
    lengths = rng.integers(2, shape[1], shape[0])
    mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    inputs = {
        "input_ids": rng.integers(1, sizes[0], shape) * mask,
        "token_type_ids": rng.integers(0, 2, shape),
        "attention_mask": mask,
    }
    return ported(Bert(*sizes), lambda wrong: BertModel(*sizes, wrong), inputs)


BERT_FAMILY = Family(
    "BERT",
    bert,
    (
        mistake("MLX's eps", "embeddings.LayerNorm", "norm-eps"),
        mistake("the padding word's embedding zeroed", "embeddings", ""),
        mistake("no token types", "embeddings", "residual-dropped"),
        mistake("the mask as it is", "attention|", "attention-mask"),
        mistake("the queries masked, not the keys", "attention|", "attention-mask"),
        mistake("the mean pooled", "", "index-out-of-bounds pooling-kind"),
        mistake("the pooler without its tanh", "pooler|", "activation-kind"),
    ),
)

FAMILIES = (T5_FAMILY, LLAMA_FAMILY, MOE_FAMILY, CLIP_FAMILY, BERT_FAMILY)
