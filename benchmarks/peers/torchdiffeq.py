"""The likelihood by torchdiffeq, as continuous normalising flows use it.

State and log-density go through one call of `odeint` for the whole batch, with dopri5 in t. The
divergence is that of one Rademacher probe kept along the path, or the trace taken one dimension
after the other; value and divergence share a forward pass. Source: the method of FFJORD, arXiv
1810.01367. Needs torchdiffeq.
"""

import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks.peers.score_sde import flow, log_prior, signs


def nll(
    model: hosm.ScoreModel, x: Tensor, seed: int, tolerance: float, *, exact: bool = False
) -> Tensor:
    """−log p(x) in nats, (B,); `exact` is for flat data alone."""
    from torchdiffeq import odeint

    probe = signs(x, seed)

    def trace(moved: Tensor, point: Tensor) -> Tensor:
        if not exact:
            (pulled,) = torch.autograd.grad((moved * probe).sum(), point)
            return (pulled * probe).flatten(1).sum(1)
        total = torch.zeros_like(moved[:, 0])
        for i in range(moved.shape[1]):
            (row,) = torch.autograd.grad(moved[:, i].sum(), point, retain_graph=True)
            total += row[:, i]
        return total

    def right_side(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            moved = flow(model, point, t.expand(len(x)))
            divergence = trace(moved, point)
        return moved.detach(), divergence

    span = x.new_tensor([model.schedule.t_min, model.schedule.t_max])
    start = (x, x.new_zeros(len(x)))
    with torch.no_grad():
        states, gains = odeint(
            right_side, start, span, rtol=tolerance, atol=tolerance, method="dopri5"
        )
    return -(log_prior(model, states[-1]) + gains[-1])
