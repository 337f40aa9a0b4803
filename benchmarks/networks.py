"""The networks that are timed, in plain modules as a user would write them; each takes (x, t)."""

import math
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hosm_losses import checkpoint


def waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t (B,) at geometric frequencies, (B, width)."""
    index = torch.arange(width // 2, dtype=t.dtype, device=t.device)
    angles = 1000 * t[:, None] * torch.exp(-math.log(1e4) * index / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


def time_layers(width: int, out: int) -> nn.Sequential:
    """What turns `waves` of t into the embedding of a network."""
    return nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out), nn.SiLU())


def conv(inner: int, outer: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of an image, or halves it."""
    return nn.Conv2d(inner, outer, size, stride, size // 2)


class MLP(nn.Module):
    """Three hidden layers of 512 and SiLU on points of the plane, t as one more coordinate."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner in (3, width, width):
            layers += [nn.Linear(inner, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


class Convolutional(nn.Module):
    """Four residual blocks of group norm, SiLU and convolution, 64 channels."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.inner = conv(3, width)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            twice = [(nn.GroupNorm(8, width), nn.SiLU(), conv(width, width)) for _ in range(2)]
            self.blocks.append(nn.Sequential(*twice[0], *twice[1]))
        self.outer = conv(width, 3)

    def through_blocks(self, x: Tensor, shift: Tensor) -> Tensor:
        hidden = self.inner(x) + shift[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.outer(self.through_blocks(x, t[:, None]))


class Attention(nn.Module):
    """Every token of (B, N, width) attends to every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """Two of group norm, SiLU and convolution; t scales and shifts between them."""

    def __init__(self, inner: int, outer: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inner), nn.GroupNorm(8, outer)
        self.conv1, self.conv2 = conv(inner, outer), conv(outer, outer)
        self.time = nn.Linear(embedding, 2 * outer)
        self.skip = conv(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, 1)
        hidden = self.norm2(hidden) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(hidden))


class AttentionLayers(nn.Module):
    """What attention of pixels is made of; `point` is a convolution of one pixel."""

    eps, point = 1e-5, staticmethod(partial(conv, size=1))

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, width, self.eps)
        self.qkv, self.mix = self.point(width, 3 * width), self.point(width, width)


class PixelAttention(AttentionLayers):
    """Every pixel attends to every other, after a group norm and beside a residual."""

    def forward(self, x: Tensor) -> Tensor:
        # (B, 3 · heads · c, H, W) to three of (B, heads, H · W, c)
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.transpose(-2, -1).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-2, -1)
        return x + self.mix(mixed.reshape(x.shape))


class Level(nn.Module):
    """Residual blocks of one resolution on the way down and up, with what is smaller between.

    Pixels attend to each other at the second level and at the last, which has no way up.
    """

    def __init__(self, inner: int, widths: list[int], blocks: int, time: int, depth: int = 0):
        super().__init__()
        width, *rest = widths
        inners = [inner] + [width] * (blocks - 1)
        self.down = nn.ModuleList(Residual(each, width, time) for each in inners)
        attends = depth == 1 or not rest
        self.attend = nn.ModuleList(
            PixelAttention(width) if attends else nn.Identity() for _ in inners
        )
        if rest:
            self.smaller, self.larger = conv(width, width, stride=2), conv(rest[0], width)
            self.within = Level(width, rest, blocks, time, depth + 1)
        self.up = nn.ModuleList(Residual(2 * width, width, time) for _ in inners if rest)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        skips = []
        for block, attend in zip(self.down, self.attend, strict=True):
            x = attend(block(x, embedding))
            skips.append(x)
        if self.up:
            x = self.within(self.smaller(x), embedding)
            x = self.larger(F.interpolate(x, scale_factor=2, mode="nearest"))
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], 1), embedding)
        return x


class UNet(nn.Module):
    """Residual blocks at 16×16 and 8×8 with skips, attention at 8×8, 64 and 128 channels."""

    def __init__(
        self, width: int = 64, factors: tuple[int, ...] = (1, 2), blocks: int = 2, channels=3
    ) -> None:
        super().__init__()
        self.width, self.time = width, time_layers(width, 4 * width)
        self.inner, self.outer = conv(channels, width), conv(width, channels)
        self.levels = Level(width, [factor * width for factor in factors], blocks, 4 * width)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.levels(self.inner(x), self.time(waves(t, self.width)))
        return self.outer(F.silu(self.norm(hidden)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A layer norm without weights of its own; what comes from t shifts and scales it."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention and a GELU layer; t shifts, scales and gates both (adaLN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        wide = nn.Linear(width, 4 * width)
        self.feed = nn.Sequential(wide, nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        parts = self.modulation(embedding)[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(modulated(x, shift1, scale1))
        return x + gate2 * self.feed(modulated(x, shift2, scale2))


class DiT(nn.Module):
    """Diffusion transformer on patches, its blocks in `checkpoint` where `checkpointed` is set.

    Its modulation does not start at zero as in the paper, where a new network is a linear map of
    the last layer alone and its higher derivatives vanish.
    """

    def __init__(self, size=32, patch=4, width=256, heads=4, blocks=4, channels=3) -> None:
        super().__init__()
        self.width, self.grid, self.patch = width, size // patch, patch
        self.checkpointed = False
        self.inner = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, self.grid**2, width))
        self.time = time_layers(width, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(blocks))
        self.modulation = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(width, channels * patch**2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.time(waves(t, self.width))
        hidden = self.inner(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            by = partial(checkpoint, block) if self.checkpointed else block
            hidden = by(hidden, embedding)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, -1)
        patches = self.outer(modulated(hidden, shift, scale))
        patches = patches.unflatten(1, (self.grid, self.grid))
        patches = patches.unflatten(-1, (-1, self.patch, self.patch))
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
