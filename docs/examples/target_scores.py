"""Order one with targets of less noise: the energy of many_well.py, whose forces are known.

The same network on the same batches for as many steps, with four kinds of targets. KL is from the
energy's distribution to the density of the ODE.

    python docs/examples/target_scores.py [--steps 4000] [--samples 500]
"""

import argparse
import math

import checkerboard
import many_well
import torch
from torch import Tensor

import hosm_losses as hosm

DIMENSION = 8


def score(x: Tensor) -> Tensor:
    """∇log p₀, minus the gradient of the energy of `many_well.log_target`."""
    a, b = x[:, ::2], x[:, 1::2]
    return torch.stack([12 * a + 0.5 - 4 * a**3, -b], 2).reshape(x.shape)


def kl(model: hosm.ScoreModel, data: Tensor) -> tuple[float, float]:
    """The KL divergence in nats and its standard error over the data."""
    solver = hosm.FixedGrid(data_mean=data.mean(0), data_std=data.std(0))
    nll = hosm.ode_nll(model, data, solver=solver, divergence="exact").nll
    each = nll + many_well.log_target(data) - many_well.LOG_Z * DIMENSION / 2
    return float(each.mean()), float(each.std()) / math.sqrt(len(each))


def main() -> None:
    """Train with each kind of targets, and print the KL divergence."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, held_out = (many_well.draw(count, DIMENSION // 2) for count in (20_000, options.samples))
    information = hosm.TargetScores.information_of(data, score(data))
    averaged = hosm.AveragedTargets()
    for name, targets in {
        "the drawn noise": None,
        "averaged over the batch": averaged,
        "with scores": hosm.TargetScores(score, information),
        "with scores and averaged": hosm.TargetScores(score, information, averaged),
    }.items():
        torch.manual_seed(0)
        model = hosm.ScoreModel(checkerboard.Network(data), checkerboard.SCHEDULE)
        objective = hosm.FirstOrderDSM(model, targets=targets)
        cost = checkerboard.train(
            model, lambda f=objective: f(many_well.draw(256, DIMENSION // 2)), options.steps
        )
        value, error = kl(model, held_out)
        print(f"{name}: KL {value:.4f} ± {error:.4f} nats ({cost})", flush=True)


if __name__ == "__main__":
    main()
