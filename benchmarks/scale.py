"""What a training step of a large network takes, counted on the device "meta".

    python -m benchmarks.scale [--dirty]

writes results/scale.json in a quarter of an hour, and `python -m benchmarks --page-only` fills
docs/benchmark_tables.md from it. FLOPs are those of matrix products and convolutions. Activations
are the bytes of all tensors that are alive at once, at the highest: what one sample more in the
batch adds to it. Weights, gradients and Adam's two moments are 4 bytes each. Attention keeps its
weights, as it does above order one.
"""

import json
import weakref
from functools import partial
from typing import Any

import torch
from tests.cases import CountFlops
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import parser
from benchmarks.networks import DiT, conv, time_layers, waves
from benchmarks.repositories import SongAttention, SongBlock

FILE = results.DIRECTORY / "scale.json"
BATCHES, FEW, GPUS, ROOM, SHARDS = (64, 128), 32, (8, 64, 512), 80e9, 64  # ROOM is bytes of a GPU
LOSSES = {
    "order 1": hosm.FirstOrderDSM,
    "order 2": hosm.SecondOrderDSM,
    "order 2, `probes=Paired()`": partial(hosm.SecondOrderDSM, probes=hosm.Paired()),
    "order 3": hosm.ThirdOrderDSM,
    "order 3, `fraction=0.25`": partial(hosm.ThirdOrderDSM, fraction=0.25),
    "order 3, `probes=Paired()`": partial(hosm.ThirdOrderDSM, probes=hosm.Paired()),
}
CHECKPOINT = ", blocks in `checkpoint`"
CHECKPOINTED = ["order 2", "order 3"]


class Block(SongBlock):
    """A residual block, after which pixels attend to each other if they are to."""

    def __init__(self, inner: int, outer: int, time: int, attends: bool, resample: str = ""):
        super().__init__(inner, outer, time, resample)
        self.attend = SongAttention(outer) if attends else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attend(super().forward(x, embedding))


class Song(nn.Module):
    """A U-Net of NCSN++'s blocks in the sizes of its deep network for CIFAR-10."""

    def __init__(self, width: int = 128, factors: tuple[int, ...] = (1, 2, 2, 2), blocks: int = 8):
        super().__init__()
        self.width, time = width, 4 * width
        self.time, self.inner = time_layers(width, time), conv(3, width)
        self.down, self.up, skips, inner = nn.ModuleList(), nn.ModuleList(), [width], width
        for level, factor in enumerate(factors):
            for _ in range(blocks):
                self.down.append(Block(inner, factor * width, time, level == 1))
                inner = factor * width
                skips.append(inner)
            if level + 1 < len(factors):
                self.down.append(Block(inner, inner, time, False, "down"))
                skips.append(inner)
        self.middle = nn.ModuleList(Block(inner, inner, time, each) for each in (True, False))
        for level, factor in reversed([*enumerate(factors)]):
            for i in range(blocks + 1):
                attends = level == 1 and i == blocks
                self.up.append(Block(inner + skips.pop(), factor * width, time, attends))
                inner = factor * width
            if level:
                self.up.append(Block(inner, inner, time, False, "up"))
        self.norm, self.outer = nn.GroupNorm(8, inner), conv(inner, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.time(waves(t, self.width))
        skips = [h := self.inner(x)]
        for block in self.down:
            skips.append(h := block(h, embedding))
        for block in self.middle:
            h = block(h, embedding)
        for block in self.up:
            h = block(h if block.resample else torch.cat([h, skips.pop()], 1), embedding)
        return self.outer(nn.functional.silu(self.norm(h)))


NETWORKS = {
    "deep NCSN++, CIFAR-10": (Song, (3, 32, 32)),
    "DiT-XL/2, latents 4×32×32": (partial(DiT, 32, 2, 1152, 16, 28, 4), (4, 32, 32)),
    "2 billion, latents 4×64×64": (partial(DiT, 64, 2, 1792, 28, 36, 4), (4, 64, 64)),
}


class Alive(TorchDispatchMode):
    """The most bytes that tensors made inside of it hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.seen = 0, 0, set[int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            storage = each.untyped_storage() if isinstance(each, Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return made

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def step(name: str, loss: str) -> dict[str, float]:
    """FLOPs of a step, and bytes of its activations, for a sample."""
    make, shape = NETWORKS[name]
    with torch.device("meta"):
        network = make()
    network.checkpointed = loss.endswith(CHECKPOINT)
    make_loss = LOSSES[loss.removesuffix(CHECKPOINT)]
    objective = make_loss(hosm.ScoreModel(network, hosm.VPSchedule()))
    found = []
    for batch in BATCHES:
        with sdpa_kernel(SDPBackend.MATH), CountFlops() as flops, Alive() as alive:
            objective(torch.empty(batch, *shape, device="meta")).backward()
        network.zero_grad()
        found.append((flops.total, alive.most))
    flops, memory = ((b - a) / (BATCHES[1] - BATCHES[0]) for a, b in zip(*found, strict=True))
    return {"flops": flops, "memory": memory}


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(each.numel() for each in NETWORKS[name][0]().parameters())


def weights(count: int, gpus: int) -> dict[str, float]:
    """GB of weights, gradients and moments on a GPU, and GB that it sends in a step."""
    # FSDP2 shards the loss as a whole: all weights and all gradients are on each GPU for a time.
    sharded, sent = 16 * count / gpus + 8 * count, 2 * 4 * count * (gpus - 1) / gpus
    return {"ddp": 16 * count / 1e9, "fsdp2": sharded / 1e9, "sent": sent / 1e9}


def measure(name: str) -> dict[str, Any]:
    count = parameters(name)
    kept = {"fit_ddp": 16 * count, "fit_fsdp2": 1e9 * weights(count, SHARDS)["fsdp2"]}
    rows: dict[str, dict[str, float]] = {}
    more = [loss + CHECKPOINT for loss in CHECKPOINTED] if "latents" in name else []
    for loss in tqdm([*LOSSES, *more], name):
        row = rows[loss] = step(name, loss)
        row |= {f"{key}_ratio": row[key] / rows["order 1"][key] for key in ("flops", "memory")}
        fits = {key: (ROOM - each) // row["memory"] for key, each in kept.items()}
        # A fraction holds one sample at least, and copies of the gradients are beside it: a few
        # samples take more than the slope says.
        unknown = "fraction" in loss
        row |= {key: None if unknown and each < FEW else each for key, each in fits.items()}
    gpus = {str(each): weights(count, each) for each in GPUS}
    return {"parameters": count, "losses": rows, "gpus": gpus}


def main() -> None:
    where = results.environment(dirty=parser(__doc__, smoke=False).parse_args().dirty)
    report = {"environment": where, "networks": {name: measure(name) for name in NETWORKS}}
    FILE.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
