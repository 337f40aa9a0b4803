"""How much longer a gradient through a likelihood takes than with all activations kept.

    python -m benchmarks.likelihood_gradient

Each case has a process of its own, in which both take turns over 8 and over 64 steps. Ratios of
processor time, with their intervals, are printed.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks.experiment import alone, times
from benchmarks.intervals import Estimate, ratio_of_medians
from benchmarks.networks import MLP, Convolutional
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations

ROUNDS, STEPS = 5, (8, 64)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutional, d = 768": (Convolutional, lambda: 0.5 * torch.randn(8, 3, 16, 16)),
    "MLP, d = 2": (lambda: MLP(128), lambda: torch.randn(512, 2)),
}


def measure(name: str, steps: int, rounds: int) -> Estimate:
    """The time of a gradient over that of one whose activations are all kept."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, draw = CASES[name]
    model, x = hosm.ScoreModel(make(), hosm.VPSchedule()), draw()

    def gradient() -> None:
        result = hosm.ode_nll(model, x, solver=hosm.FixedGrid(steps), enable_grad=True)
        result.nll.sum().backward()

    keeping = patch.object(RecomputedEvaluations, "applies", lambda _self: False)
    seconds = times({"ours": gradient, "keeping": keeping(gradient)}, rounds)
    return ratio_of_medians(*seconds.values())


def main() -> None:
    for name in CASES:
        for steps in STEPS:
            print(f"{name}, {steps} steps:", alone(measure, name, steps, ROUNDS), flush=True)


if __name__ == "__main__":
    main()
