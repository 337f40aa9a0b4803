"""The likelihood by torchdiffeq, as continuous normalising flows use it.

State and log-density go through one call of `odeint` for the whole batch, with dopri5 in t. The
divergence is that of one Rademacher probe kept along the path, or the trace taken one dimension
after the other; value and divergence share a forward pass. Source: the method of FFJORD, arXiv
1810.01367. Needs torchdiffeq.
"""

import torch
from torch import Tensor

from benchmarks.peers.score_sde import flow, log_prior, signs
from benchmarks.trained import Problem


def nll(
    problem: Problem, x: Tensor, tolerance: float, seed: int, *, exact: bool = False
) -> Tensor:
    """−log p(x) in nats, (B,); `exact` is for flat data alone."""
    from torchdiffeq import odeint

    model = problem.model
    units = torch.eye(x.shape[1], dtype=x.dtype)[:, None] if exact else signs(x, seed)[None]

    def right_side(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(state[1])
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            moved = flow(model, point, t.expand(len(x)))
            for probe in units:
                (pulled,) = torch.autograd.grad((moved * probe).sum(), point, retain_graph=True)
                total += (pulled * probe).flatten(1).sum(1)
        return moved.detach(), total

    span = x.new_tensor([model.schedule.t_min, model.schedule.t_max])
    given = {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
    with torch.no_grad():
        states, gains = odeint(right_side, (x, x.new_zeros(len(x))), span, **given)
    return -(log_prior(model, states[-1]) + gains[-1])
