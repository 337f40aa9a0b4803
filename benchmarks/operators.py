"""How many operators a step dispatches outside of the network's own forward pass.

python -m benchmarks.operators [--name NAME] [--dirty | --smoke]

Small networks wait for operators and not for FLOPs. Beside ours is a plain double pass back:
torch.autograd.grad twice with create_graph=True, and a loss of what comes out. PyTorch gets that
of norms wrong and has none of attention, so it has the engines' primitives in place of them.
Times are of steps in turns in one process. Into results/operators.json under a name, in minutes.
"""

from collections.abc import Callable
from functools import partial

import torch
from tests.cases import CountCalls
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import Row, alone, begin, keep, parser, times
from benchmarks.intervals import ratio_of_medians
from benchmarks.repositories import PolicyUNet
from benchmarks.steps import LOSSES, NETWORKS
from hosm_losses.taylor import safe_primitives

FILE = results.DIRECTORY / "operators.json"
PLAIN = "plain"
CHOSEN = {name: NETWORKS[name] for name in ("mlp, small", "dit, small", "edm", "guided")}
CHOSEN["diffusion policy"] = PolicyUNet, (64, 2, 16)


def count(work: Callable[[], object]) -> int:
    with CountCalls() as found:
        work()
    return found.number


def plain(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """A loss of f, of the form w·∂f/∂x w and of its gradient in x."""
    point, w = x.clone().requires_grad_(), torch.randn_like(x).sign()
    with safe_primitives():
        value = network(point, t)
    (vjp,) = torch.autograd.grad(value, point, w, create_graph=True)
    form = (w * vjp).flatten(1).sum(1)
    (third,) = torch.autograd.grad(form.sum(), point, create_graph=True)
    return sum((part.square().mean() for part in (value, form, third)), torch.zeros(()))


def measure(name: str, rounds: int) -> Row:
    """Operators of a step of each kind, and the time of order three over a plain step."""
    torch.manual_seed(0)
    make, shape = CHOSEN[name]
    network, x, t = make(), torch.randn(shape), torch.full(shape[:1], 0.5)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    losses: dict[str, Callable[[], Tensor]] = {
        f"order {order}": partial(make_loss(model), x) for order, make_loss in LOSSES.items()
    }
    losses[PLAIN] = lambda: plain(network, x, t)

    def step(key: str) -> None:
        losses[key]().backward()
        network.zero_grad()

    own = count(lambda: network(x, t))
    counts = {key: count(lambda key=key: step(key)) - own for key in losses}
    seconds = times({key: lambda key=key: step(key) for key in ("order 3", PLAIN)}, rounds)
    return {
        "operators": counts,
        "over_plain": counts["order 3"] / counts[PLAIN],
        "time_over_plain": ratio_of_medians(seconds["order 3"], seconds[PLAIN]),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--name", default="after", help="of these results")
    options, where = begin(arguments)
    rounds = {name: 401 if name == "mlp, small" else 21 for name in CHOSEN}  # of milliseconds
    if options.smoke:
        rounds = {"mlp, small": 1}
    found = {name: alone(measure, name, several) for name, several in rounds.items()}
    results.show(options.name, found)
    keep(options, FILE, {options.name: {"environment": where, "networks": found}})


if __name__ == "__main__":
    main()
