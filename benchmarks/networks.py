"""The networks that are timed, in plain modules as a user would write them; each takes (x, t)."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t (B,) at geometric frequencies, (B, width)."""
    index = torch.arange(width // 2, dtype=t.dtype, device=t.device)
    angles = 1000 * t[:, None] * torch.exp(-math.log(1e4) * index / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


def time_layers(width: int, out: int) -> nn.Sequential:
    """What turns `waves` of t into the embedding of a network."""
    return nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out), nn.SiLU())


class MLP(nn.Module):
    """Three hidden layers of 512 and SiLU on points of the plane, t as one more coordinate."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


class Convolutional(nn.Module):
    """Four residual blocks of group norm, SiLU and convolution, 64 channels."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    layer
                    for _ in range(2)
                    for layer in (
                        nn.GroupNorm(8, width),
                        nn.SiLU(),
                        nn.Conv2d(width, width, 3, padding=1),
                    )
                )
            )
            for _ in range(4)
        )
        self.outer = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.inner(x) + t[:, None, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.outer(hidden)


class Transformer(nn.Module):
    """Four pre-norm blocks of attention and a GELU layer, width 256, 4 heads."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.inner, self.outer = nn.Linear(48, width), nn.Linear(width, 48)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "first": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "mix": nn.Linear(width, width),
                    "feed": nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 4 * width),
                        nn.GELU("tanh"),
                        nn.Linear(4 * width, width),
                    ),
                }
            )
            for _ in range(4)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.inner(x) + t[:, None, None]
        for block in self.blocks:
            qkv = block["qkv"](block["first"](hidden)).unflatten(-1, (3, self.heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            hidden = hidden + block["mix"](mixed)
            hidden = hidden + block["feed"](hidden)
        return self.outer(hidden)


class Residual(nn.Module):
    """Two of group norm, SiLU and convolution; t scales and shifts between them."""

    def __init__(self, inner: int, outer: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inner), nn.GroupNorm(8, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, 1)
        hidden = self.norm2(hidden) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(hidden))


class PixelAttention(nn.Module):
    """Every pixel attends to every other, after a group norm and beside a residual."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv, self.mix = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # (B, 3 · heads · c, H, W) to three of (B, heads, H · W, c)
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.transpose(-2, -1).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-2, -1)
        return x + self.mix(mixed.reshape(x.shape))


class UNet(nn.Module):
    """Residual blocks at 16×16 and 8×8 with skips, attention at 8×8, 64 and 128 channels."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width, embedding = width, 4 * width
        self.time = time_layers(width, embedding)
        self.inner = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(Residual(width, width, embedding) for _ in range(2))
        self.smaller = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.low = nn.ModuleList(
            Residual(inner, 2 * width, embedding) for inner in (width, 2 * width)
        )
        self.attend = nn.ModuleList(PixelAttention(2 * width) for _ in range(2))
        self.larger = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up = nn.ModuleList(Residual(2 * width, width, embedding) for _ in range(2))
        self.norm = nn.GroupNorm(8, width)
        self.outer = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.time(waves(t, self.width))
        hidden, skips = self.inner(x), []
        for block in self.down:
            hidden = block(hidden, embedding)
            skips.append(hidden)
        hidden = self.smaller(hidden)
        for block, attend in zip(self.low, self.attend, strict=True):
            hidden = attend(block(hidden, embedding))
        hidden = self.larger(F.interpolate(hidden, scale_factor=2, mode="nearest"))
        for block in self.up:
            hidden = block(torch.cat([hidden, skips.pop()], 1), embedding)
        return self.outer(F.silu(self.norm(hidden)))


class Level(nn.Module):
    """Blocks down and up at one resolution, and what is smaller between them."""

    def __init__(self, inner: int, widths: list[int], blocks: int, time: int, depth: int = 0):
        super().__init__()
        width, *rest = widths
        skips = [inner] + [width] * blocks
        self.down = nn.ModuleList(Residual(skip, width, time) for skip in skips[:-1])
        self.up = nn.ModuleList(Residual(width + skip, width, time) for skip in skips[::-1])
        self.attend = nn.ModuleList(PixelAttention(width) for _ in skips[1:] if depth == 1)
        if rest:
            self.smaller = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.within = Level(width, rest, blocks, time, depth + 1)
            self.larger = nn.Conv2d(rest[0], width, 3, padding=1)
        else:
            self.middle = nn.ModuleList(Residual(width, width, time) for _ in range(2))
            self.within = PixelAttention(width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        skips = [x]
        for number, block in enumerate(self.down):
            x = block(x, embedding)
            x = self.attend[number](x) if self.attend else x
            skips.append(x)
        if isinstance(self.within, Level):
            x = self.within(self.smaller(x), embedding)
            x = self.larger(F.interpolate(x, scale_factor=2, mode="nearest"))
        else:
            x = self.middle[1](self.within(self.middle[0](x, embedding)), embedding)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], 1), embedding)
        return x


class DDPM(nn.Module):
    """A U-Net of the size of DDPM++, with attention at its second level and in the middle."""

    def __init__(self, width: int = 128, factors: tuple[int, ...] = (1, 2, 2, 2), blocks: int = 4):
        super().__init__()
        self.width, self.time = width, time_layers(width, 4 * width)
        self.inner = nn.Conv2d(3, width, 3, padding=1)
        self.levels = Level(width, [factor * width for factor in factors], blocks, 4 * width)
        self.norm, self.outer = nn.GroupNorm(8, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.levels(self.inner(x), self.time(waves(t, self.width)))
        return self.outer(F.silu(self.norm(hidden)))


class DiTBlock(nn.Module):
    """Attention and a GELU layer; t shifts, scales and gates both (adaLN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        parts = self.modulation(embedding)[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        hidden = self.norm1(x) * (1 + scale1) + shift1
        qkv = self.qkv(hidden).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.mix(mixed)
        return x + gate2 * self.feed(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Diffusion transformer on 4×4 patches: four blocks of width 256, 4 heads.

    Its modulation does not start at zero as in the paper, where a new network is a linear map of
    the last layer alone and its higher derivatives vanish.
    """

    def __init__(self, size: int = 32, patch: int = 4, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.width, self.grid, self.patch = width, size // patch, patch
        self.inner = nn.Conv2d(3, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, self.grid**2, width))
        self.time = time_layers(width, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(4))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(width, 3 * patch**2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.time(waves(t, self.width))
        hidden = self.inner(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            hidden = block(hidden, embedding)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, -1)
        patches = self.outer(self.norm(hidden) * (1 + scale) + shift)
        patches = patches.unflatten(1, (self.grid, self.grid))
        patches = patches.unflatten(-1, (3, self.patch, self.patch))
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


NETWORKS = {
    "mlp": (MLP, (2048, 2)),
    "convolutional": (Convolutional, (16, 3, 16, 16)),
    "transformer": (Transformer, (16, 64, 48)),
    "unet": (UNet, (16, 3, 16, 16)),
    "dit": (DiT, (16, 3, 32, 32)),
}
