"""Sampling an energy with known Z: many wells in 8 and 16 dimensions, with importance weights.

Order one is trained on samples of the energy; then it goes on, as docs/worth.md recommends in so
many dimensions, or order three takes over, for the same processor time. KL is from the energy's
distribution to the density of the ODE.

    python docs/examples/many_well.py [--seconds 10] [--samples 500]
"""

import argparse
import copy
import math

import checkerboard
import torch
from torch import Tensor

import hosm_losses as hosm

AXIS = torch.linspace(-4, 4, 4001, dtype=torch.float64)
WELL = 6 * AXIS**2 + AXIS / 2 - AXIS**4  # log-density of every second coordinate, up to log Z
LOG_Z = float(WELL.logsumexp(0) + (AXIS[1] - AXIS[0]).log()) + math.log(2 * math.pi) / 2
LOSSES = {"order one": hosm.FirstOrderDSM, "then order three": hosm.ThirdOrderDSM}


def log_target(x: Tensor) -> Tensor:
    """Minus the energy Σ a⁴ − 6a² − a/2 + b²/2 of pairs (a, b)."""
    a, b = x[:, ::2].double(), x[:, 1::2].double()
    return (6 * a**2 + a / 2 - a**4 - b**2 / 2).sum(1)


def draw(count: int, pairs: int) -> Tensor:
    """Exact samples (count, 2 · pairs)."""
    rows = torch.multinomial(WELL.softmax(0), count * pairs, replacement=True)
    return torch.stack([AXIS[rows].float(), torch.randn(len(rows))], 1).reshape(count, -1)


def train(kind: type, model: hosm.ScoreModel, seconds: float, rate: float) -> str:
    """Train with a loss and averaged targets, and say what it took."""
    objective, pairs = kind(model, targets=hosm.AveragedTargets()), len(model.network.mean) // 2
    return checkerboard.train(
        model, lambda: objective(draw(256, pairs)), seconds=seconds, rate=rate
    )


def judge(model: hosm.ScoreModel, data: Tensor, samples: int) -> str:
    """Say in a line of numbers how good a model is."""
    options = {"solver": hosm.FixedGrid(data_mean=data.mean(0), data_std=data.std(0))}
    options |= {"divergence": "exact"}
    drawn = hosm.ode_sample(model, (samples, data.shape[1]), **options)
    weights = hosm.importance_weights(drawn, log_target)
    points, log_z = data[:samples], LOG_Z * data.shape[1] / 2
    bounds = weights.sandwich(points, hosm.ode_nll(model, points, **options))
    share, kl = weights.effective_sample_size / samples, bounds.upper - log_z
    line = f"KL {kl:.3f} ± {bounds.upper_error:.3f}, effective sample size {share:.0%}"
    return line + f", log Z {weights.log_z:.3f} ± {weights.log_z_error:.3f}, exactly {log_z:.3f}"


def main() -> None:
    """Train in both dimensions and print what the samples are worth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="of the second training")
    parser.add_argument("--samples", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dimension in (8, 16):
        torch.manual_seed(0)
        data = draw(4096, dimension // 2)
        model = hosm.ScoreModel(checkerboard.Network(data), checkerboard.SCHEDULE)
        train(hosm.FirstOrderDSM, model, 2 * options.seconds, rate=2e-3)
        for name, kind in LOSSES.items():
            trained = copy.deepcopy(model)
            cost = train(kind, trained, options.seconds, rate=3e-4)
            line = judge(trained, data, options.samples)
            print(f"{name} at d = {dimension}, {cost}: {line}", flush=True)


if __name__ == "__main__":
    main()
