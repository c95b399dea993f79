"""Sound and sequences: Whisper's encoder, WaveNet, Mamba, a GRU with attention, a VQ-VAE."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from torch import nn as tnn
from torch.nn import functional as F

from tests.score.family import Example, Family, Rng, mistake, normal, ported, size

# -------------------------------------------------------------------------------------- Whisper


def sinusoids(length: int, channels: int) -> torch.Tensor:
    step = math.log(10000) / (channels // 2 - 1)
    rates = torch.exp(-step * torch.arange(channels // 2))
    angles = torch.arange(length)[:, None] * rates[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class WhisperAttention(tnn.Module):
    def __init__(self, n_state: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.query = tnn.Linear(n_state, n_state)
        self.key = tnn.Linear(n_state, n_state, bias=False)
        self.value, self.out = (tnn.Linear(n_state, n_state) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        scale = (c // self.n_head) ** -0.25
        q, k, v = (
            f(x).view(b, n, self.n_head, -1).permute(0, 2, 1, 3)
            for f in (self.query, self.key, self.value)
        )
        w = F.softmax((q * scale) @ (k * scale).transpose(-1, -2), dim=-1)
        return self.out((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))


class WhisperBlock(tnn.Module):
    def __init__(self, n_state: int, n_head: int):
        super().__init__()
        self.attn = WhisperAttention(n_state, n_head)
        self.attn_ln, self.mlp_ln = tnn.LayerNorm(n_state), tnn.LayerNorm(n_state)
        self.mlp = tnn.Sequential(
            tnn.Linear(n_state, 2 * n_state), tnn.GELU(), tnn.Linear(2 * n_state, n_state)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.attn_ln(x))
        return x + self.mlp(self.mlp_ln(x))


class WhisperEncoder(tnn.Module):
    def __init__(self, mels: int, frames: int, n_state: int, n_head: int):
        super().__init__()
        self.conv1 = tnn.Conv1d(mels, n_state, 3, padding=1)
        self.conv2 = tnn.Conv1d(n_state, n_state, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", sinusoids(frames, n_state))
        self.blocks = tnn.ModuleList([WhisperBlock(n_state, n_head) for _ in range(2)])
        self.ln_post = tnn.LayerNorm(n_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(x)))).permute(0, 2, 1)
        x = x + self.positional_embedding[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


def positions(length: int, dims: int, wrong: str = "") -> mx.array:
    half = dims // 2
    steps = half if wrong == "the rates of another formula" else half - 1
    angles = np.arange(length)[:, None] * np.exp(-math.log(10000) / steps * np.arange(half))
    sin, cos = np.sin(angles), np.cos(angles)
    if wrong == "sines and cosines in turn":
        return mx.array(np.stack([sin, cos], -1).reshape(length, dims).astype(np.float32))
    if wrong == "cosines before sines":
        sin, cos = cos, sin
    return mx.array(np.concatenate([sin, cos], 1).astype(np.float32))


class AudioAttention(nn.Module):
    def __init__(self, dims: int, heads: int, wrong: str = ""):
        super().__init__()
        self.heads, self.wrong = heads, wrong
        self.query_proj, self.out_proj = nn.Linear(dims, dims), nn.Linear(dims, dims)
        self.key_proj = nn.Linear(dims, dims, bias=False)
        self.value_proj = nn.Linear(dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        B, L, D = x.shape
        scale = (D // self.heads) ** -0.25
        q = self.query_proj(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3) * scale
        k = self.key_proj(x).reshape(B, L, self.heads, -1).transpose(0, 2, 3, 1)
        if self.wrong != "half of the scale":
            k = k * scale
        v = self.value_proj(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)
        y = mx.softmax(q @ k, axis=-1) @ v
        if self.wrong == "heads not brought back":
            return self.out_proj(y.reshape(B, L, D))
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(B, L, D))


class AudioLayer(nn.Module):
    def __init__(self, dims: int, heads: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.self_attn = AudioAttention(dims, heads, wrong)
        self.ln_attn, self.ln_ffn = nn.LayerNorm(dims), nn.LayerNorm(dims)
        self.fc1, self.fc2 = nn.Linear(dims, 2 * dims), nn.Linear(2 * dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.ln_attn(x))
        return x + self.fc2(nn.gelu(self.fc1(self.ln_ffn(x))))


class AudioEncoder(nn.Module):
    def __init__(self, mels: int, frames: int, dims: int, heads: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.conv_a = nn.Conv1d(mels, dims, 3, padding=1)
        self.conv_b = nn.Conv1d(dims, dims, 3, stride=2, padding=1)
        self._positions = positions(frames, dims, wrong)
        self.layers = [AudioLayer(dims, heads, wrong), AudioLayer(dims, heads)]
        self.norm = nn.LayerNorm(dims)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.gelu(self.conv_a(x))
        x = self.conv_b(x) if self.wrong == "no second activation" else nn.gelu(self.conv_b(x))
        x = x + self._positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def whisper(rng: Rng) -> Example:
    heads = 2
    frames = size(rng, 4, 6)
    sizes = (size(rng, 2, 4), frames, 2 * heads * size(rng, 1, 2) + 4, heads)
    x = normal(rng, size(rng, 1, 3), sizes[0], 2 * frames - 1)
    return ported(WhisperEncoder(*sizes), lambda wrong: AudioEncoder(*sizes, wrong), x)


WHISPER_FAMILY = Family(
    "Whisper's encoder",
    whisper,
    (
        mistake("sines and cosines in turn", "", "constant-differs"),
        mistake("cosines before sines", "", "concatenation-order constant-differs"),
        mistake("the rates of another formula", "", "constant-differs"),
        mistake("half of the scale", "blocks.0.attn", "attention-scale scale-factor"),
        mistake("heads not brought back", "blocks.0.attn", "head-count flatten-order axes-order"),
        mistake("no second activation", "", "activation-kind"),
    ),
)

# -------------------------------------------------------------------------------------- WaveNet


class WaveLayer(tnn.Module):
    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.padding = 2 * dilation
        self.dilated = tnn.Conv1d(channels, 2 * channels, 3, dilation=dilation)
        self.res, self.skip = tnn.Conv1d(channels, channels, 1), tnn.Conv1d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.dilated(F.pad(x, (self.padding, 0))).chunk(2, dim=1)
        y = torch.tanh(a) * torch.sigmoid(b)
        return (x + self.res(y)) * math.sqrt(0.5), self.skip(y)


class WaveNet(tnn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.embed = tnn.Conv1d(1, channels, 1)
        self.layers = tnn.ModuleList([WaveLayer(channels, 2**i) for i in range(3)])
        self.out = tnn.Conv1d(channels, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, skips = self.embed(x), 0
        for layer in self.layers:
            x, skip = layer(x)
            skips = skips + skip
        return self.out(F.relu(skips))


class GatedLayer(nn.Module):
    def __init__(self, channels: int, dilation: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.dilation = 1 if wrong == "not dilated" else dilation
        self.conv = nn.Conv1d(channels, 2 * channels, 3, dilation=self.dilation)
        self.residual = nn.Linear(channels, channels)
        self.to_skip = nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        before = 2 * self.dilation
        pads = (before, 0)
        if self.wrong == "it looks ahead":
            pads = (0, before)
        if self.wrong == "padded on both sides":
            pads = (self.dilation, self.dilation)
        a, b = mx.split(self.conv(mx.pad(x, ((0, 0), pads, (0, 0)))), 2, axis=-1)
        if self.wrong == "gate and filter exchanged":
            a, b = b, a
        y = mx.tanh(a) * mx.sigmoid(b)
        h = x + self.residual(y)
        if self.wrong != "the sum not scaled":
            h = h * math.sqrt(0.5)
        return h, self.to_skip(h if self.wrong == "the skip from the sum" else y)


class Wave(nn.Module):
    def __init__(self, channels: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.input = nn.Linear(1, channels)
        self.stack = [GatedLayer(channels, 2**i, wrong if i == 1 else "") for i in range(3)]
        self.output = nn.Linear(channels, 2)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.input(x)
        skips = []
        for layer in self.stack:
            x, skip = layer(x)
            skips.append(skip)
        total = skips[-1] if self.wrong == "the last skip alone" else sum(skips)
        return self.output(nn.relu(total))


def wavenet(rng: Rng) -> Example:
    channels = size(rng, 2, 4)
    x = normal(rng, size(rng, 1, 3), 1, size(rng, 9, 13))
    return ported(WaveNet(channels), lambda wrong: Wave(channels, wrong), x)


WAVENET_FAMILY = Family(
    "WaveNet",
    wavenet,
    (
        mistake("not dilated", "layers.1|layers.1.dilated", "conv-geometry"),
        mistake("it looks ahead", "layers.1", "conv-geometry"),
        mistake("padded on both sides", "layers.1", "conv-geometry"),
        mistake("gate and filter exchanged", "layers.1", "gate-order"),
        mistake("the sum not scaled", "layers.1", "scale-factor"),
        mistake("the skip from the sum", "layers.1", "another-tensor"),
        mistake("the last skip alone", "", "residual-dropped"),
    ),
)

# ---------------------------------------------------------------------------------------- Mamba


class Mamba(tnn.Module):
    def __init__(self, dim: int, state: int):
        super().__init__()
        inner, self.dt_rank, self.d_state = 2 * dim, 2, state
        self.in_proj = tnn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = tnn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = tnn.Linear(inner, self.dt_rank + 2 * state, bias=False)
        self.dt_proj = tnn.Linear(self.dt_rank, inner)
        self.A_log = tnn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1))
        self.D = tnn.Parameter(torch.ones(inner))
        self.out_proj = tnn.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :n].transpose(1, 2))
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt, A = F.softplus(self.dt_proj(dt)), -torch.exp(self.A_log)
        h, ys = 0, []
        for t in range(n):
            decay = torch.exp(dt[:, t, :, None] * A)
            h = decay * h + dt[:, t, :, None] * B[:, t, None, :] * x[:, t, :, None]
            ys.append((h * C[:, t, None, :]).sum(-1))
        y = torch.stack(ys, 1) + self.D * x
        return self.out_proj(y * F.silu(z))


class MambaMixer(nn.Module):
    def __init__(self, dims: int, state: int, wrong: str = ""):
        super().__init__()
        inner, self.rank, self.state_size, self.wrong = 2 * dims, 2, state, wrong
        self.input_proj = nn.Linear(dims, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner)
        self.ssm_proj = nn.Linear(inner, 2 + 2 * state, bias=False)
        self.dt = nn.Linear(2, inner)
        self.A_log, self.D = mx.zeros((inner, state)), mx.zeros((inner,))
        self.output_proj = nn.Linear(inner, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        wrong = self.wrong
        x, z = mx.split(self.input_proj(x), 2, axis=-1)
        if wrong == "the gate's half taken for the input":
            x, z = z, x
        pads = (1, 2) if wrong == "the convolution centred" else (3, 0)
        x = self.conv(mx.pad(x, ((0, 0), pads, (0, 0))))
        x = x if wrong == "no activation after the convolution" else nn.silu(x)
        delta, B, C = mx.split(self.ssm_proj(x), [self.rank, self.rank + self.state_size], axis=-1)
        if wrong == "B and C exchanged":
            B, C = C, B
        delta, A = self.dt(delta), -mx.exp(self.A_log)
        if wrong != "the step not positive":
            delta = nn.softplus(delta)
        h, ys = mx.zeros((x.shape[0], x.shape[2], self.state_size)), []
        for t in range(x.shape[1]):
            step = delta[:, t, :, None]
            h = mx.exp(step * A) * h + step * B[:, t, None, :] * x[:, t, :, None]
            ys.append((h * C[:, t, None, :]).sum(-1))
        y = mx.stack(ys, axis=1)
        if wrong != "no skip through D":
            y = y + self.D * x
        return self.output_proj(y * (z if wrong == "the gate not activated" else nn.silu(z)))


def mamba(rng: Rng) -> Example:
    sizes = (size(rng, 2, 4), size(rng, 2, 4))
    x = normal(rng, size(rng, 1, 3), size(rng, 4, 6), sizes[0])
    return ported(Mamba(*sizes), lambda wrong: MambaMixer(*sizes, wrong), x)


MAMBA_FAMILY = Family(
    "Mamba",
    mamba,
    (
        mistake("the gate's half taken for the input", "", "gate-order"),
        mistake("the convolution centred", "", "conv-geometry"),
        mistake("no activation after the convolution", "", "activation-kind"),
        mistake("B and C exchanged", "", "gate-order"),
        mistake("the step not positive", "", "activation-kind"),
        mistake("no skip through D", "", "residual-dropped"),
        mistake("the gate not activated", "", "activation-kind"),
    ),
)

# ------------------------------------------------------------------------- a GRU with attention


class GruClassifier(tnn.Module):
    def __init__(self, words: int, width: int, hidden: int):
        super().__init__()
        self.embedding = tnn.Embedding(words, width)
        self.gru = tnn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.attention = tnn.Linear(2 * hidden, 1)
        self.classifier = tnn.Linear(2 * hidden, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.embedding(ids))
        weights = torch.softmax(self.attention(torch.tanh(states)), dim=1)
        return F.log_softmax(self.classifier((weights * states).sum(1)), dim=-1)


class AttentiveGru(nn.Module):
    def __init__(self, words: int, width: int, hidden: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.embed = nn.Embedding(words, width)
        self.forward_gru, self.backward_gru = nn.GRU(width, hidden), nn.GRU(width, hidden)
        self.score = nn.Linear(2 * hidden, 1)
        self.head = nn.Linear(2 * hidden, 3)

    def __call__(self, ids: mx.array) -> mx.array:
        wrong = self.wrong
        x = self.embed(ids)
        ahead, back = self.forward_gru(x), self.backward_gru(x[:, ::-1])
        if wrong != "the backward states left reversed":
            back = back[:, ::-1]
        parts = [back, ahead] if wrong == "the directions exchanged" else [ahead, back]
        states = mx.concatenate(parts, axis=-1)
        scores = self.score(states if wrong == "no tanh before the scores" else mx.tanh(states))
        weights = mx.softmax(scores, axis=-1 if wrong == "softmax over one score" else 1)
        pooled = (weights * states).sum(1)
        if wrong == "pooled by the mean":
            pooled = states.mean(1)
        logits = self.head(pooled)
        if wrong == "probabilities for their logarithms":
            return mx.softmax(logits, axis=-1)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def gru(rng: Rng) -> Example:
    sizes = (size(rng, 5, 8), size(rng, 2, 4), size(rng, 3, 5))
    ids = rng.integers(0, sizes[0], (size(rng, 2, 3), size(rng, 3, 5)))
    return ported(GruClassifier(*sizes), lambda wrong: AttentiveGru(*sizes, wrong), ids)


GRU_FAMILY = Family(
    "GRU with attention",
    gru,
    (
        mistake("the backward states left reversed", "gru|", "sequence-reversed"),
        mistake("the directions exchanged", "gru|", "concatenation-order"),
        mistake("no tanh before the scores", "", "activation-kind"),
        mistake("softmax over one score", "", "softmax-axis"),
        mistake("pooled by the mean", "", ""),
        mistake("probabilities for their logarithms", "", "activation-kind"),
    ),
)

# ----------------------------------------------------------------------------- vector quantising


class Quantizer(tnn.Module):
    def __init__(self, codes: int, width: int):
        super().__init__()
        self.codebook = tnn.Embedding(codes, width)
        self.beta = 0.25

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.cdist(z, self.codebook.weight).argmin(-1)
        q = self.codebook(chosen)
        loss = F.mse_loss(q, z.detach()) + self.beta * F.mse_loss(z, q.detach())
        return z + (q - z).detach(), loss


class VqVae(tnn.Module):
    def __init__(self, inputs: int, codes: int, width: int):
        super().__init__()
        self.encoder = tnn.Sequential(tnn.Linear(inputs, 8), tnn.ELU(), tnn.Linear(8, width))
        self.quantizer = Quantizer(codes, width)
        self.decoder = tnn.Sequential(tnn.Linear(width, 8), tnn.ELU(), tnn.Linear(8, inputs))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, loss = self.quantizer(self.encoder(x))
        return self.decoder(q), loss


class VectorQuantizer(nn.Module):
    def __init__(self, codes: int, width: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.embed = mx.zeros((codes, width))

    def __call__(self, z: mx.array) -> tuple[mx.array, mx.array]:
        wrong, sg = self.wrong, mx.stop_gradient
        if wrong == "no gradient stopped in the loss":
            sg = lambda a: a  # noqa: E731
        distance = (z**2).sum(-1, keepdims=True) - 2 * z @ self.embed.T + (self.embed**2).sum(-1)
        q = self.embed[mx.stop_gradient(mx.argmin(distance, axis=-1))]
        beta = 1.0 if wrong == "no beta" else 0.25
        loss = ((q - sg(z)) ** 2).mean() + beta * ((z - sg(q)) ** 2).mean()
        if wrong == "beta on the other term":
            loss = 0.25 * ((q - sg(z)) ** 2).mean() + ((z - sg(q)) ** 2).mean()
        if wrong == "no straight-through gradient":
            return mx.stop_gradient(q), loss
        return z + mx.stop_gradient(q - z), loss


class Codec(nn.Module):
    def __init__(self, inputs: int, codes: int, width: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.down = [nn.Linear(inputs, 8), nn.Linear(8, width)]
        self.vq = VectorQuantizer(codes, width, wrong)
        self.up = [nn.Linear(width, 8), nn.Linear(8, inputs)]

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        alpha = 0.5 if self.wrong == "another alpha of ELU" else 1.0
        q, loss = self.vq(self.down[1](nn.elu(self.down[0](x))))
        return self.up[1](nn.elu(self.up[0](q), alpha)), loss


def vq(rng: Rng) -> Example:
    sizes = (size(rng, 3, 5), size(rng, 4, 6), size(rng, 2, 3))
    return ported(
        VqVae(*sizes), lambda wrong: Codec(*sizes, wrong), normal(rng, size(rng, 3, 5), sizes[0])
    )


VQ_FAMILY = Family(
    "VQ-VAE",
    vq,
    (
        mistake("no gradient stopped in the loss", "quantizer", "gradient-flows"),
        mistake("no beta", "quantizer", "scale-factor module-setting"),
        mistake("beta on the other term", "quantizer", "scale-factor"),
        mistake("no straight-through gradient", "quantizer", "gradient-stopped"),
        mistake("another alpha of ELU", "decoder|decoder.1|", "activation-slope"),
    ),
)

FAMILIES = (WHISPER_FAMILY, WAVENET_FAMILY, MAMBA_FAMILY, GRU_FAMILY, VQ_FAMILY)
