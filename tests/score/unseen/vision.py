"""Images: ViT, ConvNeXt, an MBConv block, super resolution, a VAE's decoder, DETR's decoder."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import torch
from torch import nn as tnn
from torch.nn import functional as F

from tests.score.family import Example, Family, Rng, image, mistake, normal, ported, size

# ------------------------------------------------------------------------------------------ ViT


class VitAttention(tnn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = tnn.Linear(dim, 3 * dim)
        self.proj = tnn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


class VitMlp(tnn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            tnn.Linear(dim, 2 * dim),
            tnn.GELU(),
            tnn.Linear(2 * dim, dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VitBlock(tnn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = (tnn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = VitAttention(dim, heads), VitMlp(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(tnn.Module):
    def __init__(self, channels: int, dim: int, heads: int, patches: int):
        super().__init__()
        self.patch_embed = tnn.Conv2d(channels, dim, 3, stride=3)
        self.cls_token = tnn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = tnn.Parameter(torch.randn(1, patches + 1, dim))
        self.blocks = tnn.Sequential(*[VitBlock(dim, heads) for _ in range(2)])
        self.norm = tnn.LayerNorm(dim, eps=1e-6)
        self.head = tnn.Linear(dim, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class SelfAttention(nn.Module):
    def __init__(self, dims: int, n_heads: int, wrong: str = ""):
        super().__init__()
        self.n_heads, self.wrong = n_heads, wrong
        self.query = nn.Linear(dims, dims)
        self.key = nn.Linear(dims, dims)
        self.value = nn.Linear(dims, dims)
        self.out = nn.Linear(dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        B, L, D = x.shape
        q, k, v = (f(x).reshape(B, L, self.n_heads, -1) for f in (self.query, self.key, self.value))
        if self.wrong == "heads not brought to the front":
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
            return self.out(y.reshape(B, L, D))
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        width = D if self.wrong == "scaled by the whole width" else q.shape[-1]
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(width))
        return self.out(y.transpose(0, 2, 1, 3).reshape(B, L, D))


class TransformerLayer(nn.Module):
    def __init__(self, dims: int, n_heads: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.attention = SelfAttention(dims, n_heads, wrong)
        self.ln1, self.ln2 = nn.LayerNorm(dims, eps=1e-6), nn.LayerNorm(dims, eps=1e-6)
        self.linear1, self.linear2 = nn.Linear(dims, 2 * dims), nn.Linear(2 * dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.ln1(x))
        h = self.linear1(self.ln2(x))
        h = nn.gelu_fast_approx(h) if self.wrong == "the fast GELU" else nn.gelu(h)
        return x + self.linear2(h)


class VisionTransformer(nn.Module):
    def __init__(self, channels: int, dims: int, n_heads: int, patches: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.patches = nn.Conv2d(channels, dims, 3, stride=3)
        self.class_embedding = mx.zeros((dims,))
        self.position_embedding = mx.zeros((patches + 1, dims))
        self.layers = [TransformerLayer(dims, n_heads), TransformerLayer(dims, n_heads, wrong)]
        eps = 1e-5 if wrong == "the last norm's eps" else 1e-6
        self.post_norm = nn.LayerNorm(dims, eps=eps)
        self.classifier = nn.Linear(dims, 5)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.patches(x)
        if self.wrong == "patches column by column":
            x = x.transpose(0, 2, 1, 3)
        x = x.flatten(1, 2)
        first = mx.broadcast_to(self.class_embedding, (x.shape[0], 1, x.shape[2]))
        parts = [x, first] if self.wrong == "the class token last" else [first, x]
        x = mx.concatenate(parts, axis=1) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.post_norm(x)[:, 0])


def vit(rng: Rng) -> Example:
    heads, x = 2, normal(rng, size(rng, 1, 3), size(rng, 1, 3), 9, 6)
    dim = heads * size(rng, 2, 4)
    sizes = (x.shape[1], dim, heads, 6)
    return ported(Vit(*sizes), lambda wrong: VisionTransformer(*sizes, wrong), x)


VIT_FAMILY = Family(
    "ViT",
    vit,
    (
        mistake("heads not brought to the front", "blocks.1.attn", "head-count axes-order"),
        mistake("scaled by the whole width", "blocks.1.attn", "attention-scale"),
        mistake("the fast GELU", "blocks.1.mlp", "gelu-approximation"),
        mistake("the last norm's eps", "norm", "norm-eps"),
        mistake("the class token last", "", "concatenation-order"),
        mistake("patches column by column", "", "flatten-order"),
    ),
)

# ------------------------------------------------------------------------------------- ConvNeXt


class LayerNorm2d(tnn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(tnn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = tnn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = tnn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = tnn.Linear(dim, 4 * dim), tnn.Linear(4 * dim, dim)
        self.gamma = tnn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(tnn.Module):
    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.stem = tnn.Sequential(tnn.Conv2d(channels, dim, 2, stride=2), LayerNorm2d(dim, 1e-6))
        self.stage = tnn.Sequential(ConvNextBlock(dim), ConvNextBlock(dim))
        self.norm = tnn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.stage(self.stem(x)).mean((-2, -1)))


class NextBlock(nn.Module):
    def __init__(self, dims: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.depthwise = nn.Conv2d(dims, dims, 7, padding=3, groups=dims)
        self.ln = nn.LayerNorm(dims, eps=1e-5 if wrong == "a norm's eps in a block" else 1e-6)
        self.up, self.down = nn.Linear(dims, 4 * dims), nn.Linear(4 * dims, dims)
        self.layer_scale = mx.ones(dims)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.depthwise(x)
        y = y if self.wrong == "no norm in a block" else self.ln(y)
        y = self.down(nn.gelu(self.up(y)))
        if self.wrong == "the layer's scale on the sum":
            return (x + y) * self.layer_scale
        if self.wrong == "no layer scale":
            return x + y
        return x + y * self.layer_scale


class Next(nn.Module):
    def __init__(self, channels: int, dims: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.patchify = nn.Conv2d(channels, dims, 2, stride=2)
        self.patch_norm = nn.LayerNorm(dims, eps=1e-6)
        self.blocks = [NextBlock(dims, wrong), NextBlock(dims)]
        self.head_norm = nn.LayerNorm(dims, eps=1e-6)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.patch_norm(self.patchify(x))
        for block in self.blocks:
            x = block(x)
        pool = mx.max if self.wrong == "the maximum over the image" else mx.mean
        return self.head_norm(pool(x, axis=(1, 2)))


def convnext(rng: Rng) -> Example:
    sizes = (size(rng, 1, 3), size(rng, 3, 5))
    return ported(ConvNext(*sizes), lambda wrong: Next(*sizes, wrong), image(rng, sizes[0], 8, 11))


CONVNEXT_FAMILY = Family(
    "ConvNeXt",
    convnext,
    (
        mistake("a norm's eps in a block", "stage.0.norm", "norm-eps"),
        mistake("no norm in a block", "stage.0", "layer-order"),
        mistake("the layer's scale on the sum", "stage.0", "layer-order"),
        mistake("no layer scale", "stage.0", "scale-factor"),
        mistake("the maximum over the image", "", "pooling-kind"),
    ),
)

# --------------------------------------------------------------------------------------- MBConv


class SqueezeExcite(tnn.Module):
    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.conv_reduce = tnn.Conv2d(channels, reduced, 1)
        self.act = tnn.SiLU()
        self.conv_expand = tnn.Conv2d(reduced, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.act(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.conv_expand(s))


class MBConv(tnn.Module):
    def __init__(self, channels: int):
        super().__init__()
        wide = 3 * channels
        self.conv_pw = tnn.Conv2d(channels, wide, 1, bias=False)
        self.bn1 = tnn.BatchNorm2d(wide, eps=1e-3, momentum=0.01)
        self.conv_dw = tnn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2 = tnn.BatchNorm2d(wide, eps=1e-3, momentum=0.01)
        self.se = SqueezeExcite(wide, 2)
        self.conv_pwl = tnn.Conv2d(wide, channels, 1, bias=False)
        self.bn3 = tnn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.bn1(self.conv_pw(x)))
        y = self.se(F.silu(self.bn2(self.conv_dw(y))))
        return x + self.bn3(self.conv_pwl(y))


class Gate(nn.Module):
    def __init__(self, channels: int, reduced: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.squeeze, self.excite = nn.Linear(channels, reduced), nn.Linear(reduced, channels)

    def __call__(self, x: mx.array) -> mx.array:
        s = self.squeeze(x.mean((1, 2), keepdims=True))
        s = nn.relu(s) if self.wrong == "ReLU in the gate" else nn.silu(s)
        s = self.excite(s)
        if self.wrong == "a hard sigmoid":
            return x * mx.clip(s / 6 + 0.5, 0, 1)
        return x * mx.sigmoid(s)


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        wide = 3 * channels
        last = 0.1 if wrong == "PyTorch's momentum in the last norm" else 0.01
        self.expand = nn.Conv2d(channels, wide, 1, bias=False)
        self.norm_a = nn.BatchNorm(wide, eps=1e-3, momentum=0.01)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        eps = 1e-5 if wrong == "PyTorch's eps in the middle norm" else 1e-3
        self.norm_b = nn.BatchNorm(wide, eps=eps, momentum=0.01)
        self.gate = Gate(wide, 2, wrong)
        self.project = nn.Conv2d(wide, channels, 1, bias=False)
        self.norm_c = nn.BatchNorm(channels, eps=1e-3, momentum=last)

    def __call__(self, x: mx.array) -> mx.array:
        y = nn.silu(self.norm_a(self.expand(x)))
        y = nn.silu(self.norm_b(self.depthwise(y)))
        y = self.norm_c(self.project(self.gate(y)))
        return nn.silu(x + y) if self.wrong == "an activation after the sum" else x + y


def mbconv(rng: Rng) -> Example:
    channels = size(rng, 2, 4)
    make = lambda wrong: InvertedResidual(channels, wrong)  # noqa: E731
    return ported(MBConv(channels), make, image(rng, channels, 4, 6))


MBCONV_FAMILY = Family(
    "MBConv",
    mbconv,
    (
        mistake("ReLU in the gate", "se", "activation-kind"),
        mistake("a hard sigmoid", "se", "activation-kind"),
        mistake("PyTorch's momentum in the last norm", "bn3", "norm-momentum"),
        mistake("PyTorch's eps in the middle norm", "bn2", "norm-eps"),
        mistake("an activation after the sum", "", "activation-kind"),
    ),
)

# ----------------------------------------------------------------------------- super resolution


class SuperResolution(tnn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.head = tnn.Conv2d(channels, width, 3, padding=1)
        self.body = tnn.Sequential(
            tnn.Conv2d(width, width, 3, padding=1), tnn.PReLU(), tnn.Conv2d(width, width, 3, 1, 1)
        )
        self.res_scale = 0.1
        self.tail = tnn.Conv2d(width, 4 * channels, 3, padding=1)
        self.shuffle = tnn.PixelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(x)
        y = y + self.body(y) * self.res_scale
        large = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.shuffle(self.tail(y)) + large


class Upscaler(nn.Module):
    def __init__(self, channels: int, width: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.conv_1, self.conv_2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.prelu = nn.PReLU()
        self.conv_out = nn.Conv2d(width, 4 * channels, 3, padding=1)
        corners = wrong == "corners aligned"
        self.resize = nn.Upsample(scale_factor=2, mode="linear", align_corners=corners)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.conv_in(x)
        r = self.conv_2(self.prelu(self.conv_1(y)))
        y = y + (r if self.wrong == "the residual not scaled" else 0.1 * r)
        y = self.conv_out(y)
        B, H, W, C = y.shape
        if self.wrong == "the block's axes before the channels":
            y = y.reshape(B, H, W, 2, 2, C // 4).transpose(0, 1, 3, 2, 4, 5)
        elif self.wrong == "rows and columns of a block exchanged":
            y = y.reshape(B, H, W, C // 4, 2, 2).transpose(0, 1, 5, 2, 4, 3)
        else:
            y = y.reshape(B, H, W, C // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        return y.reshape(B, 2 * H, 2 * W, C // 4) + self.resize(x)


def super_resolution(rng: Rng) -> Example:
    sizes = (size(rng, 1, 3), size(rng, 3, 5))
    x = image(rng, sizes[0], 4, 6)
    return ported(SuperResolution(*sizes), lambda wrong: Upscaler(*sizes, wrong), x)


SUPER_RESOLUTION_FAMILY = Family(
    "super resolution",
    super_resolution,
    (
        mistake("corners aligned", "", "upsample-corners"),
        mistake("the residual not scaled", "", "scale-factor module-setting"),
        mistake("the block's axes before the channels", "", "pixel-shuffle-order"),
        mistake("rows and columns of a block exchanged", "", "pixel-shuffle-order"),
    ),
)

# --------------------------------------------------------------------------------- VAE's decoder


class ResnetBlock(tnn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = tnn.GroupNorm(2, inputs, eps=1e-6)
        self.conv1 = tnn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = tnn.GroupNorm(2, outputs, eps=1e-6)
        self.conv2 = tnn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = tnn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class SpatialAttention(tnn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = tnn.GroupNorm(2, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            tnn.Linear(channels, channels) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        y = self.group_norm(x).view(b, c, h * w).transpose(1, 2)
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out(y).transpose(1, 2).reshape(b, c, h, w)


class Upsampler(tnn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = tnn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VaeDecoder(tnn.Module):
    def __init__(self, latent: int, channels: int):
        super().__init__()
        self.scaling_factor = 0.18215
        self.conv_in = tnn.Conv2d(latent, 2 * channels, 3, padding=1)
        self.mid_block = tnn.ModuleList(
            [ResnetBlock(2 * channels, 2 * channels), SpatialAttention(2 * channels)]
        )
        self.up_block = ResnetBlock(2 * channels, channels)
        self.upsampler = Upsampler(channels)
        self.conv_norm_out = tnn.GroupNorm(2, channels, eps=1e-6)
        self.conv_out = tnn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(z / self.scaling_factor)
        for block in self.mid_block:
            x = block(x)
        x = self.upsampler(self.up_block(x))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, eps: float = 1e-6, compatible: bool = True):
        super().__init__()
        self.norm_1 = nn.GroupNorm(2, inputs, eps=eps, pytorch_compatible=True)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm_2 = nn.GroupNorm(2, outputs, eps=1e-6, pytorch_compatible=compatible)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.skip = nn.Linear(inputs, outputs)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.conv_1(nn.silu(self.norm_1(x)))
        y = self.conv_2(nn.silu(self.norm_2(y)))
        return y + (self.skip(x) if "skip" in self else x)


class PixelAttention(nn.Module):
    def __init__(self, dims: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.norm = nn.GroupNorm(2, dims, eps=1e-6, pytorch_compatible=True)
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (
            nn.Linear(dims, dims) for _ in range(4)
        )

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        y = self.norm(x).reshape(B, H * W, C)
        q, k, v = self.query_proj(y), self.key_proj(y), self.value_proj(y)
        scores = (q * (1 / math.sqrt(C))) @ k.transpose(0, 2, 1)
        axis = 1 if self.wrong == "attention over the queries" else -1
        y = self.out_proj(mx.softmax(scores, axis=axis) @ v).reshape(B, H, W, C)
        return y if self.wrong == "attention without its residual" else x + y


class Decoder(nn.Module):
    def __init__(self, latent: int, channels: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        eps = 1e-5 if wrong == "MLX's eps in a resnet" else 1e-6
        self.input = nn.Conv2d(latent, 2 * channels, 3, padding=1)
        self.mid = [Resnet(2 * channels, 2 * channels, eps), PixelAttention(2 * channels, wrong)]
        self.up = Resnet(2 * channels, channels, compatible=wrong != "MLX's groups in a resnet")
        self.up_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_out = nn.GroupNorm(2, channels, eps=1e-6, pytorch_compatible=True)
        self.output = nn.Conv2d(channels, 3, 3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        z = z * 0.18215 if self.wrong == "the latents scaled the other way" else z / 0.18215
        x = self.input(z)
        for block in self.mid:
            x = block(x)
        x = self.up(x)
        if self.wrong == "smooth upsampling":
            x = nn.Upsample(scale_factor=2, mode="linear")(x)
        else:
            B, H, W, C = x.shape
            x = mx.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(
                B, 2 * H, 2 * W, C
            )
        return self.output(nn.silu(self.norm_out(self.up_conv(x))))


def vae(rng: Rng) -> Example:
    sizes = (size(rng, 2, 4), 4)
    x = image(rng, sizes[0], 3, 5)
    return ported(VaeDecoder(*sizes), lambda wrong: Decoder(*sizes, wrong), x)


VAE_FAMILY = Family(
    "VAE decoder",
    vae,
    (
        mistake("attention over the queries", "mid_block.1", "softmax-axis"),
        mistake("attention without its residual", "mid_block.1", "residual-dropped"),
        mistake("MLX's eps in a resnet", "mid_block.0.norm1", "norm-eps"),
        mistake("MLX's groups in a resnet", "up_block.norm2", "norm-groups"),
        mistake("the latents scaled the other way", "", "scale-factor module-setting"),
        mistake("smooth upsampling", "upsampler|", "upsample-corners"),
    ),
)

# ----------------------------------------------------------------------------------------- DETR


class DetrDecoder(tnn.Module):
    """One decoder layer over object queries, with a head of boxes."""

    def __init__(self, dim: int, heads: int, queries: int):
        super().__init__()
        self.query_embed = tnn.Embedding(queries, dim)
        self.self_attn = tnn.MultiheadAttention(dim, heads, batch_first=True)
        self.multihead_attn = tnn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1, self.linear2 = tnn.Linear(dim, 2 * dim), tnn.Linear(2 * dim, dim)
        self.norm1, self.norm2, self.norm3 = (tnn.LayerNorm(dim) for _ in range(3))
        self.bbox_embed = tnn.Linear(dim, 4)

    def forward(
        self, memory: torch.Tensor, pos: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        query_pos = self.query_embed.weight.expand(len(memory), -1, -1)
        tgt = torch.zeros_like(query_pos)
        q = tgt + query_pos
        tgt = self.norm1(tgt + self.self_attn(q, q, tgt, need_weights=False)[0])
        attended = self.multihead_attn(
            tgt + query_pos, memory + pos, memory, key_padding_mask=padding, need_weights=False
        )[0]
        tgt = self.norm2(tgt + attended)
        tgt = self.norm3(tgt + self.linear2(F.relu(self.linear1(tgt))))
        return self.bbox_embed(tgt).sigmoid()


class Detector(nn.Module):
    def __init__(self, dims: int, heads: int, queries: int, wrong: str = ""):
        super().__init__()
        self.wrong = wrong
        self.object_queries = mx.zeros((queries, dims))
        self.attention = nn.MultiHeadAttention(dims, heads, bias=True)
        self.cross_attention = nn.MultiHeadAttention(dims, heads, bias=True)
        self.fc1, self.fc2 = nn.Linear(dims, 2 * dims), nn.Linear(2 * dims, dims)
        self.ln_a, self.ln_b, self.ln_c = (nn.LayerNorm(dims) for _ in range(3))
        self.boxes = nn.Linear(dims, 4)

    def __call__(self, memory: mx.array, pos: mx.array, padding: mx.array) -> mx.array:
        wrong = self.wrong
        embed = mx.broadcast_to(self.object_queries, (memory.shape[0], *self.object_queries.shape))
        x = mx.zeros_like(embed)
        q = x + embed
        x = self.ln_a(x + self.attention(q, q, x))
        hidden = ~padding if wrong == "the mask inverted" else padding
        mask = mx.where(hidden, -1e9, 0.0)[:, None, None, :]
        q = x if wrong == "no positions of the queries in cross attention" else x + embed
        values = memory + pos if wrong == "positions in the values" else memory
        y = self.cross_attention(q, memory + pos, values, mask)
        x = x + self.ln_b(y) if wrong == "normalised before the sum" else self.ln_b(x + y)
        x = self.ln_c(x + self.fc2(nn.relu(self.fc1(x))))
        x = self.boxes(x)
        return x if wrong == "boxes without a sigmoid" else mx.sigmoid(x)


def detr(rng: Rng) -> Example:
    sizes = (2 * size(rng, 2, 4), 2, size(rng, 2, 4))
    b, n = size(rng, 1, 3), size(rng, 4, 6)
    padding = rng.random((b, n)) < 0.3
    padding[:, 0], padding[0, 1] = False, True
    inputs = {
        "memory": normal(rng, b, n, sizes[0]),
        "pos": normal(rng, b, n, sizes[0]),
        "padding": padding,
    }
    return ported(DetrDecoder(*sizes), lambda wrong: Detector(*sizes, wrong), inputs)


DETR_FAMILY = Family(
    "DETR decoder",
    detr,
    (
        mistake("the mask inverted", "multihead_attn|", "attention-mask"),
        mistake("positions in the values", "", "another-tensor"),
        mistake("no positions of the queries in cross attention", "", "residual-dropped"),
        mistake("normalised before the sum", "", "layer-order norm-first"),
        mistake("boxes without a sigmoid", "", "activation-kind"),
    ),
)

FAMILIES = (
    VIT_FAMILY,
    CONVNEXT_FAMILY,
    MBCONV_FAMILY,
    SUPER_RESOLUTION_FAMILY,
    VAE_FAMILY,
    DETR_FAMILY,
)
