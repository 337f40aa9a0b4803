"""torch.func: the gradient of every sample's loss, and an ensemble trained in one call.

python docs/examples/torch_func.py [--steps 300]
"""

import argparse

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, stack_module_state, vmap

from hosm_losses import ScoreModel, SecondOrderDSM, VPSchedule, ode_nll

Parameters = dict[str, Tensor]


class Network(nn.Module):
    """A network that predicts the noise in points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return ε̂(x, t)."""
        return self.layers(torch.cat([x, t[:, None]], 1))


def draw(count: int) -> Tensor:
    """Draw points near a ring."""
    angle = 6.2832 * torch.rand(count)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(count, 2)


def main() -> None:
    """Print the spread of per-sample gradients, then each ensemble member's −log p in nats."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    members = [SecondOrderDSM(ScoreModel(Network(), VPSchedule())) for _ in range(4)]

    def loss(parameters: Parameters, x: Tensor) -> Tensor:
        return functional_call(members[0], parameters, (x,))

    def loss_of_one(parameters: Parameters, x: Tensor) -> Tensor:
        return loss(parameters, x[None])

    # Each sample has its own time, noise and probe.
    own = {name: p.detach() for name, p in members[0].named_parameters()}
    each = vmap(grad(loss_of_one), in_dims=(None, 0), randomness="different")(own, draw(256))
    rows = torch.cat([g.flatten(1) for g in each.values()], 1)
    norms = rows.norm(dim=1)
    print(f"{len(rows)} gradients, norms {norms.min():.3f} to {norms.max():.3f}", end="")
    print(f", of their mean {rows.mean(0).norm():.3f}")

    # Every member sees the same data, times, noise and probes.
    stacked, _ = stack_module_state(members)
    optimizer = torch.optim.Adam(stacked.values(), 1e-2)
    step = vmap(grad_and_value(loss), in_dims=(0, None), randomness="same")
    for _ in range(steps):
        detached = {name: p.detach() for name, p in stacked.items()}
        gradients, _losses = step(detached, draw(256))
        for name, p in stacked.items():
            p.grad = gradients[name]
        optimizer.step()
    held_out = draw(256)
    for place, member in enumerate(members):
        before = ode_nll(member.model, held_out, divergence="exact").nll.mean()
        member.load_state_dict({name: p[place] for name, p in stacked.items()})
        after = ode_nll(member.model, held_out, divergence="exact").nll.mean()
        print(f"member {place}: {before:.3f} nats before, {after:.3f} after")


if __name__ == "__main__":
    main()
