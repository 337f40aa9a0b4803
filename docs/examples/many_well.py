"""Sample an energy with known Z and known forces: many wells in 8 and 16 dimensions.

Networks are trained with order one on samples of the energy, with four kinds of targets, for the
same number of steps. The printed KL divergence is from the energy's distribution to the density of
the ODE; log Z and the effective sample size are computed from importance weights.

    python docs/examples/many_well.py [--steps 2500] [--samples 500]
"""

import argparse
import math
from functools import partial

import checkerboard
import torch
from torch import Tensor

import hosm_losses as hosm

AXIS = torch.linspace(-4, 4, 4001, dtype=torch.float64)
WELL = 6 * AXIS**2 + AXIS / 2 - AXIS**4  # log-density of every second coordinate, up to log Z
LOG_Z = float(WELL.logsumexp(0) + (AXIS[1] - AXIS[0]).log()) + math.log(2 * math.pi) / 2


def log_target(x: Tensor) -> Tensor:
    """Return minus the energy Σ a⁴ − 6a² − a/2 + b²/2 of pairs (a, b)."""
    a, b = x[:, ::2].double(), x[:, 1::2].double()
    return (6 * a**2 + a / 2 - a**4 - b**2 / 2).sum(1)


def score(x: Tensor) -> Tensor:
    """Return the gradient of `log_target`, which is ∇log p₀: the forces divided by kT."""
    a, b = x[:, ::2], x[:, 1::2]
    return torch.stack([12 * a + 0.5 - 4 * a**3, -b], 2).reshape(x.shape)


def draw(count: int, pairs: int) -> Tensor:
    """Draw exact samples (count, 2 · pairs)."""
    rows = torch.multinomial(WELL.softmax(0), count * pairs, replacement=True)
    return torch.stack([AXIS[rows].float(), torch.randn(len(rows))], 1).reshape(count, -1)


def kinds_of_targets(data: Tensor) -> dict[str, hosm.AveragedTargets | hosm.TargetScores | None]:
    """Return the four kinds of targets by name; None means the drawn noise."""
    information = hosm.TargetScores.information_of(data, score(data))  # also checks signs, units
    averaged = hosm.AveragedTargets()
    return {
        "drawn noise": None,
        "averaged over the batch": averaged,
        "with scores": hosm.TargetScores(score, information),
        "with scores and averaged": hosm.TargetScores(score, information, averaged),
    }


def fresh_loss(objective: torch.nn.Module, pairs: int) -> Tensor:
    """Return the loss on 256 new samples."""
    return objective(draw(256, pairs))


def judge(model: hosm.ScoreModel, data: Tensor, points: Tensor) -> str:
    """Return a line of quality metrics for a model; `points` were not used in training."""
    options = {"solver": hosm.FixedGrid(data_mean=data.mean(0), data_std=data.std(0))}
    options |= {"divergence": "exact"}
    drawn = hosm.ode_sample(model, points.shape, **options)
    weights = hosm.importance_weights(drawn, log_target)
    bounds = weights.sandwich(points, hosm.ode_nll(model, points, **options))
    log_z = LOG_Z * data.shape[1] / 2
    share, kl = weights.effective_sample_size / len(points), bounds.upper - log_z
    line = f"KL {kl:.3f} ± {bounds.upper_error:.3f}, effective sample size {share:.0%}"
    return line + f", log Z {weights.log_z:.3f} ± {weights.log_z_error:.3f}, exactly {log_z:.3f}"


def main() -> None:
    """Train with each kind of targets in both dimensions, and print metrics of each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--samples", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dimension in (8, 16):
        torch.manual_seed(0)
        data, held_out = (draw(count, dimension // 2) for count in (20_000, options.samples))
        for name, targets in kinds_of_targets(data).items():
            torch.manual_seed(0)
            model = hosm.ScoreModel(checkerboard.Network(data), checkerboard.SCHEDULE)
            loss = partial(fresh_loss, hosm.FirstOrderDSM(model, targets=targets), dimension // 2)
            cost = checkerboard.train(model, loss, options.steps)
            torch.manual_seed(0)
            line = judge(model, data, held_out)
            print(f"{name} at d = {dimension}, {cost}: {line}", flush=True)


if __name__ == "__main__":
    main()
