"""Derivatives along directions and Laplacians of any function, beside torch.func.

python -m benchmarks.directional [--smoke]

Times over one evaluation of the network, in turns in one process. A Laplacian is that of all axes
for the MLP, and along four directions for images. torch.func has PyTorch's own operators, with the
kernel of attention that it can differentiate: where it has norms, its gradients are wrong.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.experiment import parser, times
from benchmarks.intervals import ratio_of_medians
from benchmarks.steps import NETWORKS
from hosm_losses import taylor

NAMES = ("mlp", "unet", "dit")


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


if __name__ == "__main__":
    main()
