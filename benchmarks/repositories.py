"""Networks that behave like those of repositories people train, written here from their papers.

Each takes (x, t). What matters for a loss of higher order is kept: changes in place, how the time
enters, the norm, how attention and resampling are computed. Sizes are small.
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks.networks import AttentionLayers, conv, time_layers, waves


def filtered(x: Tensor, factor: int, grow: bool) -> Tensor:
    """An image resampled with the FIR filter (1, 3, 3, 1), by a convolution of every channel."""
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    channels, rows = x.shape[1], x.flatten(0, 1)[:, None]
    kernel = torch.outer(taps, taps)[None, None]
    if grow:
        rows = F.conv_transpose2d(rows, kernel * factor**2, stride=factor, padding=1)
    else:
        rows = F.conv2d(rows, kernel, stride=factor, padding=1)
    return rows.unflatten(0, (-1, channels)).squeeze(2)


class Block(nn.Module):
    """What the residual blocks below are made of; t becomes one number a channel, or two."""

    eps, times = 1e-5, 2

    def __init__(self, inner: int, outer: int, embedding: int, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.norm1, self.norm2 = (nn.GroupNorm(8, each, self.eps) for each in (inner, outer))
        self.conv1, self.conv2 = conv(inner, outer), conv(outer, outer)
        self.skip, self.time = conv(inner, outer, 1), nn.Linear(embedding, self.times * outer)


class SongBlock(Block):
    """The block of score_sde's NCSN++: t is added in place, the sum is rescaled."""

    eps, times, act = 1e-6, 1, nn.SiLU(inplace=True)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.act(self.norm1(x))
        if self.resample:
            h, x = (filtered(each, 2, self.resample == "up") for each in (h, x))
        h = self.conv1(h)
        h += self.time(embedding)[:, :, None, None]
        h = self.conv2(self.act(self.norm2(h)))
        h += self.skip(x)
        return h.div_(math.sqrt(2))


class SongAttention(AttentionLayers):
    """Attention of pixels by einsum over both axes of the image, rescaled."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, 1)
        w = torch.einsum("bchw,bcij->bhwij", q, k) * x.shape[1] ** -0.5
        w = torch.softmax(w.flatten(3), -1).reshape(w.shape)
        h = torch.einsum("bhwij,bcij->bchw", w, v)
        return (x + self.mix(h)) / math.sqrt(2)


class EDMBlock(Block):
    """The block of EDM: t scales and shifts a norm in one call; the rest is added in place."""

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            kernel = x.new_ones(1, 1, 2, 2).expand(x.shape[1], -1, -1, -1)
            return F.conv_transpose2d(x, kernel, stride=2, groups=x.shape[1])
        return x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        before = self.resampled(x)
        h = self.conv1(self.resampled(F.silu(self.norm1(x))))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, 1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), scale + 1))
        h = self.conv2(h).add_(self.skip(before))
        return h.mul_(0.5**0.5)


class EDMAttention(AttentionLayers):
    """Attention of EDM: heads folded into the batch, softmax in float32, added in place."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))
        q, k, v = qkv.reshape(len(x) * self.heads, x.shape[1] // self.heads, 3, -1).unbind(2)
        logits = torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5)
        weights = logits.softmax(2, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        mixed = torch.einsum("nqk,nck->ncq", weights, v)
        return self.mix(mixed.reshape(x.shape)).add_(x).mul_(0.5**0.5)


class _TwoLevels(nn.Module):
    """A U-Net at 32×32 and 16×16, where pixels attend to each other."""

    def __init__(self, block: type[nn.Module], attention: type[nn.Module], width: int = 32):
        super().__init__()
        self.width, time = width, 4 * width
        self.time, self.inner = time_layers(width, time), conv(3, width)
        self.large = block(width, width, time)
        self.down = block(width, 2 * width, time, "down")
        self.attend = attention(2 * width)
        self.up = block(4 * width, 2 * width, time, "up")
        self.last = block(3 * width, width, time)
        self.norm, self.outer = nn.GroupNorm(8, width), conv(width, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.time(waves(t, self.width))
        large = self.large(self.inner(x), embedding)
        small = self.down(large, embedding)
        h = self.up(torch.cat([self.attend(small), small], 1), embedding)
        h = self.last(torch.cat([h, large], 1), embedding)
        return self.outer(F.silu(self.norm(h), inplace=True))


class GuidedBlock(Block):
    """The block of guided-diffusion: norms in float32, scale and shift after the second."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = torch.chunk(self.time(embedding).type(h.dtype)[..., None, None], 2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.dropout(F.silu(h), 0.1, self.training))


class GuidedAttention(AttentionLayers):
    """Attention of guided-diffusion: in one dimension, q and k scaled alike."""

    point = staticmethod(partial(nn.Conv1d, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        batch, width, *spatial = x.shape
        x = x.reshape(batch, width, -1)
        qkv = self.qkv(self.norm(x))
        channels = width // self.heads
        q, k, v = qkv.reshape(batch * self.heads, 3 * channels, -1).split(channels, dim=1)
        scale = 1 / math.sqrt(math.sqrt(channels))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        mixed = torch.einsum("bts,bcs->bct", weights, v).reshape(batch, width, -1)
        return (x + self.mix(mixed)).reshape(batch, width, *spatial)


class Guided(nn.Module):
    """Like guided-diffusion's U-Net: scale-shift norms, dropout, checkpoints if wanted."""

    def __init__(self, width: int = 32, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.width, time, self.use_checkpoint = width, 4 * width, use_checkpoint
        self.time = time_layers(width, time)
        self.inner = conv(3, width)
        self.down = GuidedBlock(width, width, time)
        self.middle = GuidedBlock(width, 2 * width, time)
        self.attend = GuidedAttention(2 * width)
        self.up = GuidedBlock(3 * width, width, time)
        self.norm, self.outer = nn.GroupNorm(8, width), conv(width, 3)

    def through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        return hosm.checkpoint(block, *inputs) if self.use_checkpoint else block(*inputs)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.time(waves(t, self.width))
        large = self.through(self.down, self.inner(x), embedding)
        small = self.through(self.middle, F.avg_pool2d(large, 2), embedding)
        small = self.through(self.attend, small)
        h = torch.cat([F.interpolate(small, scale_factor=2, mode="nearest"), large], 1)
        return self.outer(F.silu(self.norm(self.through(self.up, h, embedding))))


class PolicyBlock(nn.Module):
    """The block of Diffusion Policy: convolution, group norm and Mish; t scales and shifts."""

    def __init__(self, inner: int, outer: int, embedding: int) -> None:
        super().__init__()
        self.first, self.second = policy_layers(inner, outer), policy_layers(outer, outer)
        self.time = nn.Sequential(nn.Mish(), nn.Linear(embedding, 2 * outer))
        self.skip = nn.Conv1d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        parts = self.time(embedding).reshape(len(x), 2, -1, 1)
        h = parts[:, 0] * self.first(x) + parts[:, 1]
        return self.second(h) + self.skip(x)


def policy_layers(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(inner, outer, 5, padding=2), nn.GroupNorm(8, outer), nn.Mish())


class PolicyUNet(nn.Module):
    """Diffusion Policy's U-Net of actions (B, channels, horizon), with 25 group norms."""

    def __init__(self, channels: int = 2, widths: tuple[int, ...] = (32, 64, 128), time: int = 32):
        super().__init__()
        self.width, pairs = time, list(pairwise((channels, *widths)))
        self.time = nn.Sequential(nn.Linear(time, 4 * time), nn.Mish(), nn.Linear(4 * time, time))
        make = partial(PolicyBlock, embedding=time)
        self.down = nn.ModuleList(
            nn.ModuleList([make(inner, outer), make(outer, outer)]) for inner, outer in pairs
        )
        self.smaller = nn.ModuleList(nn.Conv1d(each, each, 3, 2, 1) for each in widths[:-1])
        self.middle = nn.ModuleList(make(widths[-1], widths[-1]) for _ in range(2))
        self.up = nn.ModuleList(
            nn.ModuleList([make(2 * outer, inner), make(inner, inner)])
            for inner, outer in reversed(pairs[1:])
        )
        self.larger = nn.ModuleList(nn.ConvTranspose1d(w, w, 4, 2, 1) for w in widths[-2::-1])
        last = nn.Conv1d(widths[0], channels, 1)
        self.outer = nn.Sequential(*policy_layers(widths[0], widths[0]), last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding, skips = self.time(waves(t, self.width)), []
        for blocks, smaller in zip(self.down, [*self.smaller, nn.Identity()], strict=True):
            for block in blocks:
                x = block(x, embedding)
            skips.append(x)
            x = smaller(x)
        for block in self.middle:
            x = block(x, embedding)
        for blocks, larger in zip(self.up, self.larger, strict=True):
            x = torch.cat([x, skips.pop()], 1)
            for block in blocks:
                x = block(x, embedding)
            x = larger(x)
        return self.outer(x)


NCSNpp = partial(_TwoLevels, SongBlock, SongAttention)
EDM = partial(_TwoLevels, EDMBlock, EDMAttention)
