"""The cost of the runs: counted FLOPs and memory of a step, and the resulting hours.

    python cost.py --sde ve --size deep --tflops 100

Nothing is trained: the tensors are on the device "meta", which has shapes but no values. FLOPs are
counted for matrix products and convolutions. Memory is what one additional image takes in all
tensors that are alive at once.
"""

import argparse
import weakref
from typing import Any

import torch
from networks import LOSSES, SIZES, WEIGHTS, objective, score_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SHAPE = (3, 32, 32)
BATCHES = (8, 16)
# Network evaluations per image. Three quantities take 66 evaluations each, all with a Jacobian
# product, for their ODEs; the bound takes 72. For comparison, a step of order one takes three.
EVALUATION = 3 * 66 * 2 + 72


class Flops(TorchDispatchMode):
    """Counts FLOPs. Unlike `FlopCounterMode`, it does not replace operators by others."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Memory(TorchDispatchMode):
    """Records the largest number of bytes that tensors made inside it occupy at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.keys = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.keys:
                self.keys.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self.keys.discard(key)
        self.now -= size


def step(sde: str, size: str, loss: str) -> tuple[float, float]:
    """Return the FLOPs and the bytes that a step takes per image."""
    with torch.device("meta"):
        model = score_model(sde, size)
    higher = {} if loss == "first" else {"weights": WEIGHTS[loss]}
    loss_of = objective(model, loss, times="log_sigma_hat", **higher)
    counts = []
    for batch in BATCHES:
        x0 = torch.empty(batch, *SHAPE, device="meta")
        with sdpa_kernel(SDPBackend.MATH), Flops() as flops, Memory() as memory:
            loss_of(x0).backward()
        loss_of.zero_grad()
        counts.append((flops.total, memory.most))
    (one, two), (other, more) = counts
    return (other - one) / (BATCHES[1] - BATCHES[0]), (more - two) / (BATCHES[1] - BATCHES[0])


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--sde", choices=("ve", "vp"), default="ve", help="noise schedule")
    add("--size", choices=SIZES, default="paper", help="network")
    add("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="rows of the table")
    add("--steps", type=int, default=500_000, help="of the first stage")
    add("--more", type=int, default=20_000, help="steps of a stage that continues")
    add("--batch", type=int, default=128, help="images a step")
    add("--tflops", type=float, default=100.0, help="that a GPU does in a second, on average")
    args = parser.parse_args(argv)

    def hours(flops: float) -> str:
        one = flops / (args.tflops * 1e12 * 3600)
        return f"{one:.3g} | {one / 8:.3g}"

    print("| Stage | GFLOPs an image | over order one | MiB an image | hours, 1 GPU | 8 GPUs |")
    print("| --- | --- | --- | --- | --- | --- |")
    first, memory = step(args.sde, args.size, "first")
    stages = [("order one", "first", args.steps), *((f"`{n}`", n, args.more) for n in args.losses)]
    for stage, loss, steps in stages:
        flops, memory = step(args.sde, args.size, loss)
        cells = f"{flops / 1e9:.3g} | {flops / first:.3g} | {memory / 2**20:.3g}"
        whole = hours(flops * args.batch * steps)
        print(f"| {stage}, {steps} steps | {cells} | {whole} |")
    flops = first / 3 * EVALUATION
    print(f"| evaluation, 10000 images | {flops / 1e9:.3g} | – | – | {hours(flops * 10_000)} |")


if __name__ == "__main__":
    main()
