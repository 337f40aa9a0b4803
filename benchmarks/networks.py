"""The networks that are timed."""

import torch.nn.functional as F  # noqa: N812
from torch import nn


class Convolutional(nn.Module):
    """Four residual blocks of group norm, SiLU and convolution, 64 channels."""

    def __init__(self, width=64):
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

    def forward(self, x, t):
        hidden = self.inner(x) + t[:, None, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.outer(hidden)


class Transformer(nn.Module):
    """Four pre-norm blocks of attention and a GELU layer, width 256, 4 heads."""

    def __init__(self, width=256, heads=4):
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

    def forward(self, x, t):
        hidden = self.inner(x) + t[:, None, None]
        for block in self.blocks:
            qkv = block["qkv"](block["first"](hidden)).unflatten(-1, (3, self.heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            hidden = hidden + block["mix"](mixed)
            hidden = hidden + block["feed"](hidden)
        return self.outer(hidden)


NETWORKS = {
    "convolutional": (Convolutional, (16, 3, 16, 16)),
    "transformer": (Transformer, (16, 64, 48)),
}
