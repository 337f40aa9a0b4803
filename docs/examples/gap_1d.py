"""Show where the ODE's score is wrong at orders one and three, on the mixture of mixture_1d.py.

One network is trained with each order. Its score, and the score of the density p of its ODE, are
compared with the true score at each noise level. With f = σ s for the network, f* for the truth
and u = log σ̂, the integrals of Lu et al. (ICML 2022, 2206.08265, theorems 3.1 and 3.2) are

    J_SM = ∫ E‖f − f*‖² du          J_Fisher = ∫ E‖σ ∇log p − f*‖² du
    J_ODE = ∫ E (f − f*)·(σ ∇log p − f*) du ≤ √(J_SM J_Fisher)

J_ODE is the KL divergence from the data to the ODE's density, minus the KL divergence from the
noisy data to the ODE's prior. For the SDE, this difference is at most J_SM. ∇log p is
computed as minus the gradient of `ode_nll`, which is solved from each noise level to the prior.

    python docs/examples/gap_1d.py [--schedule ve] [--steps 2000] [--nodes 24]
"""

import argparse
import copy
from collections.abc import Iterator

import mixture_1d as mixture
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm

NAMES = ("j_sm", "j_ode", "j_fisher")


def truth(schedule: hosm.Schedule) -> hosm.ScoreModel:
    """Return a model with the mixture's true score at every noise level, in closed form."""

    def noise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (part[:, None] for part in schedule(t))
        variances = alpha**2 * mixture.VARIANCES + sigma**2
        offsets = x - alpha * mixture.MEANS
        logits = mixture.FRACTIONS.log() - 0.5 * (offsets**2 / variances + variances.log())
        return sigma * (logits.softmax(1) * offsets / variances).sum(1, keepdim=True)

    return hosm.ScoreModel(noise, schedule)


def ode_score(model: hosm.ScoreModel, x: Tensor, t: float) -> Tensor:
    """Return ∇log p at x (B, *) for the density p of the model's ODE at time t."""
    later = copy.copy(model.schedule)
    for name, value in (("t_min", t), ("_starts_at_data", False)):
        object.__setattr__(later, name, value)  # a schedule is frozen
    model, point = hosm.ScoreModel(model.network, later), x.detach().requires_grad_()
    result = hosm.ode_nll(model, point, divergence="exact", enable_grad=True)
    (slope,) = torch.autograd.grad(result.nll.sum(), point)
    return -slope.masked_fill(result.failed[:, None], torch.nan)


def errors(
    model: hosm.ScoreModel, true: hosm.ScoreModel, x0: Tensor, nodes: int
) -> Iterator[tuple[float, float, dict[str, Tensor]]]:
    """Yield each node u of a Gauss rule, its weight, and the integrands (B,) by name."""
    schedule, generator = model.schedule, torch.Generator().manual_seed(2)
    low, high = schedule.log_sigma_hat_range
    for place, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        u = low + (high - low) * (place + 1) / 2
        t = schedule.clip(schedule.time(torch.full((len(x0),), u, dtype=x0.dtype)))
        alpha, sigma = (part[:, None] for part in schedule(t))
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        with torch.no_grad():
            f, best = -model.noise(x, t), -true.noise(x, t)
        own = sigma * ode_score(model, x, float(t[0]))
        pairs = (f - best, f - best), (f - best, own - best), (own - best, own - best)
        integrands = dict(zip(NAMES, ((a * b).sum(1) for a, b in pairs), strict=True))
        yield u, weight * (high - low) / 2, integrands


def main() -> None:
    """Train with both orders, and print the integrands at every level and their integrals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedule", choices=mixture.SCHEDULES, default="ve")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--nodes", type=int, default=24, help="noise levels of each curve")
    options = parser.parse_args()
    torch.set_num_threads(1)
    true = truth(mixture.SCHEDULES[options.schedule])
    x0 = mixture.draw_data(torch.Generator().manual_seed(1))[:128].double()
    for order in (1, 3):
        job = mixture.Job(options.schedule, str(order), options.steps, seed=0)
        model = mixture.new_model(job)
        for _ in mixture.training(model, job, 1e-3):
            pass
        model.double()
        levels = list(tqdm(errors(model, true, x0, options.nodes), total=options.nodes))
        print(f"\norder {order}")
        print("".join(f"{name:>12}" for name in ("log σ̂", *NAMES)))
        for u, _, integrands in levels:
            means = (integrands[name].nanmean() for name in NAMES)
            print("".join(f"{each:12.4g}" for each in (u, *means)))
        for name in NAMES:
            total = sum(weight * integrands[name] for _, weight, integrands in levels)
            total = total[total.isfinite()]  # without paths that failed
            error = float(total.std()) / len(total) ** 0.5
            print(f"{name}: {float(total.mean()):.4f} ± {error:.4f} nats")


if __name__ == "__main__":
    main()
