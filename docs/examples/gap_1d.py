"""Where the ODE's score goes wrong at orders one and three, on the mixture of mixture_1d.py.

One network is trained with each order. `likelihood_gap` compares the network's score, and the
score of the ODE's own density, with the true score, as in Lu et al. (ICML 2022, 2206.08265).

    python docs/examples/gap_1d.py [--schedule ve] [--steps 2000] [--nodes 24]
"""

import argparse

import mixture_1d as mixture
import torch
from torch import Tensor

import hosm_losses as hosm


def truth(schedule: hosm.Schedule) -> hosm.ScoreModel:
    """Return a model with the mixture's true score at every noise level, in closed form."""

    def noise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (part[:, None] for part in schedule(t))
        variances = alpha**2 * mixture.VARIANCES + sigma**2
        offsets = x - alpha * mixture.MEANS
        logits = mixture.FRACTIONS.log() - 0.5 * (offsets**2 / variances + variances.log())
        return sigma * (logits.softmax(1) * offsets / variances).sum(1, keepdim=True)

    return hosm.ScoreModel(noise, schedule)


def main() -> None:
    """Train with both orders and print both reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedule", choices=mixture.SCHEDULES, default="ve")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--nodes", type=int, default=24, help="noise levels of each curve")
    options = parser.parse_args()
    torch.set_num_threads(1)
    schedule = mixture.SCHEDULES[options.schedule]
    x0 = mixture.draw_data(torch.Generator().manual_seed(1))[:128].double()
    for order in (1, 3):
        job = mixture.Job(options.schedule, str(order), options.steps, seed=0)
        model = mixture.new_model(job)
        for _ in mixture.training(model, job, 1e-3):
            pass
        model.double()
        given = {"reference": truth(schedule), "generator": torch.Generator().manual_seed(2)}
        report = hosm.likelihood_gap(model, x0, nodes=options.nodes, progress=True, **given)
        print(f"\norder {order}\n{report}")


if __name__ == "__main__":
    main()
