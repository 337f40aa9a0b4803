"""What `taylor.laplacian` costs of a function with one number for each sample, beside torch.func.

python -m benchmarks.directional [--smoke]

Times of a Laplacian and of its parameter gradient over one evaluation of the function, in turns in
one process. "fermions, d" is log|ψ| of d/3 particles in three dimensions, the log of a determinant
of orbitals that see all particles; "poisson" is a network of the plane; both are in float64.
Beside the time is the largest difference from "hessian in reverse", over the largest Laplacian:
"hessian" has those of determinants wrong.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from benchmarks.experiment import parser, times
from benchmarks.intervals import ratio_of_medians
from hosm_losses import taylor

PARTICLES = {2: 256, 10: 32, 30: 8}  # and how many samples


class Fermions(nn.Module):
    """log|ψ| of particles (B, 3 n): the matrix of n orbitals, which see each particle and all."""

    def __init__(self, n: int, width: int = 32) -> None:
        super().__init__()
        self.enter, self.mix = nn.Linear(3, width), nn.Linear(2 * width, width)
        self.leave = nn.Linear(width, n)

    def forward(self, x: Tensor) -> Tensor:
        r = x.unflatten(-1, (-1, 3))
        h = torch.tanh(self.enter(r))
        h = h + torch.tanh(self.mix(torch.cat([h, h.mean(-2, keepdim=True).expand_as(h)], -1)))
        orbitals = self.leave(h) * torch.exp(-0.5 * r.square().sum(-1, keepdim=True))
        return torch.linalg.slogdet(orbitals)[1]


def functions() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The functions by name, and samples."""
    layers = nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    torch.manual_seed(0)
    yield "poisson", nn.Sequential(*layers, nn.Flatten(0)).double(), torch.rand(128, 2).double()
    for n, count in PARTICLES.items():
        yield f"fermions, {3 * n}", Fermions(n).double(), torch.randn(count, 3 * n).double()


def laplacians(function: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to the Laplacian of a function."""
    units = torch.eye(x.shape[1], dtype=x.dtype)

    def along(v: Tensor) -> Tensor:
        slope = grad(lambda point: function(point).sum())
        return (jvp(slope, (x,), (v.expand_as(x),))[1] * v).sum(1)

    def trace(outer: Callable) -> Tensor:
        whole = vmap(outer(jacrev(lambda row: function(row[None])[0])))
        return torch.einsum("bii->b", whole(x))

    return {
        "ours": lambda: taylor.laplacian(function, x),
        "jvp of grad": lambda: vmap(along)(units).sum(0),
        "hessian": lambda: trace(jacfwd),
        "hessian in reverse": lambda: trace(jacrev),
    }


def compare(name: str, function: nn.Module, x: Tensor, rounds: int) -> None:
    """Print the times of each way over an evaluation, and its error."""
    found = laplacians(function, x)
    values = {way: route().detach() for way, route in found.items()}
    exact = values["hessian in reverse"]
    ways: dict[str, Callable[[], object]] = {"evaluation": torch.no_grad()(lambda: function(x))}
    for way, route in found.items():
        ways[f"laplacian, {way}"] = torch.no_grad()(route)
        ways[f"its gradient, {way}"] = lambda route=route: route().square().mean().backward()
    seconds = times(ways, rounds)
    for way in ways:
        ratio = ratio_of_medians(seconds[way], seconds["evaluation"])
        error = (values[way.partition(", ")[2] or "ours"] - exact).abs().max() / exact.abs().max()
        print(name, way, ratio, f"error {float(error):.0e}")


def main() -> None:
    count, rounds = (2, 2) if parser(__doc__).parse_args().smoke else (None, 12)
    for name, function, x in functions():
        compare(name, function, x[:count], rounds)


if __name__ == "__main__":
    main()
