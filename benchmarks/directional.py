"""Derivatives along directions and Laplacians of any function, beside torch.func.

python -m benchmarks.directional [--smoke]

Times over one evaluation of the network, in turns in one process. A Laplacian is that of all axes
for the MLP, and along four directions for images. torch.func has PyTorch's own operators, with the
kernel of attention that it can differentiate: where it has norms, its gradients are wrong.

Functions with one number for each sample have one way more, jvp of grad. "fermions, d" is log|ψ|
of d/3 particles in three dimensions, the log of a determinant of orbitals that see all particles;
"poisson" is a network of the plane; both are in float64. Beside the time is the largest difference
from "hessian in reverse", over the largest Laplacian: "hessian" has those of determinants wrong.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.experiment import parser, times
from benchmarks.intervals import ratio_of_medians
from benchmarks.steps import NETWORKS
from hosm_losses import taylor

NAMES = ("mlp", "unet", "dit")
PARTICLES = {2: 256, 10: 32, 30: 8}  # and how many samples


def laplacians(network: Callable, x: Tensor, w: Tensor) -> Iterator[tuple[str, Callable]]:
    """Ways to the sum of second derivatives along directions (K, B, *), or along all axes."""

    def nested(v: Tensor) -> Tensor:
        return jvp(lambda point: jvp(network, (point,), (v,))[1], (x,), (v,))[1]

    yield "ours", lambda: taylor.jet(network, x, w, "sum")[2]
    yield "nested jvp", lambda: vmap(nested)(w).sum(0)
    if x.ndim == 2:
        for name, outer in (("hessian", jacfwd), ("hessian in reverse", jacrev)):
            whole = vmap(outer(jacrev(lambda row: network(row[None])[0])))
            yield name, lambda whole=whole: torch.einsum("b...ii->b...", whole(x))


def routes(network: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to a Jacobian-vector product, a Laplacian and its gradient, by name."""
    t = torch.full((len(x),), 0.5)

    def evaluate(point: Tensor) -> Tensor:
        return network(point, t[: len(point)])

    if x.ndim == 2:
        w = torch.eye(x.shape[1])[:, None].expand(-1, *x.shape)
    else:
        w = torch.randn(4, *x.shape).sign()
    found: dict[str, Callable[[], object]] = {
        "evaluation": torch.no_grad()(lambda: evaluate(x)),
        "jvp, ours": torch.no_grad()(lambda: taylor.jet(evaluate, x, w[:1])),
        "jvp, torch.func": torch.no_grad()(lambda: jvp(evaluate, (x,), (w[0],))),
    }
    for name, route in laplacians(evaluate, x, w):
        found[f"laplacian, {name}"] = torch.no_grad()(route)
        found[f"its gradient, {name}"] = lambda route=route: route().square().mean().backward()
    return found


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


def scalars() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Functions with one number for each sample, and samples."""
    layers = nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    torch.manual_seed(0)
    yield "poisson", nn.Sequential(*layers, nn.Flatten(0)).double(), torch.rand(128, 2).double()
    for n, count in PARTICLES.items():
        yield f"fermions, {3 * n}", Fermions(n).double(), torch.randn(count, 3 * n).double()


def of_scalars(function: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to the Laplacian of such a function."""
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


def compare_scalars(name: str, function: nn.Module, x: Tensor, rounds: int) -> None:
    """Print the times of each way over an evaluation, and its error."""
    found = of_scalars(function, x)
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


def runs(route: Callable[[], object]) -> bool:
    """Whether PyTorch has the derivatives: of SiLU it has no second one in forward mode."""
    try:
        route()
    except RuntimeError:
        return False
    return True


def main() -> None:
    options = parser(__doc__).parse_args()
    for name in NAMES[: 1 if options.smoke else None]:
        make, shape = NETWORKS[name]
        torch.manual_seed(0)
        x = torch.randn(2 if options.smoke else shape[0], *shape[1:])
        with sdpa_kernel(SDPBackend.MATH):
            ways = routes(make(), x)
            known = {way: route for way, route in ways.items() if runs(route)}
            seconds = times(known, 2 if options.smoke else 12)
        for way in ways:
            ratio = ratio_of_medians(seconds[way], seconds["evaluation"]) if way in known else "–"
            print(name, way, ratio)
    for name, function, x in scalars():
        compare_scalars(
            name, function, x[: 2 if options.smoke else None], 2 if options.smoke else 12
        )


if __name__ == "__main__":
    main()
