"""Bits per dimension of held-out images from scikit-learn's 8×8 digits.

The same network is trained twice for the same processor time: once with order one, and once with
orders one and two.

    python docs/examples/digits.py [--seconds 60]
"""

import argparse

import checkerboard
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import hosm_losses as hosm

LEVELS, HELD_OUT = 17, 360


def dequantized(levels: Tensor) -> Tensor:
    """Map integers from 0 to 16 to [−1, 1), with uniform noise within each level."""
    return 2 * (levels + torch.rand(levels.shape)) / LEVELS - 1


def main() -> None:
    """Train with both losses and print their bits per dimension."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of training, for each loss")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="how many are evaluated")
    options = parser.parse_args()
    if not 1 < options.held_out <= HELD_OUT or options.seconds <= 0:
        parser.error(f"expected --held-out from 2 to {HELD_OUT} and --seconds above 0")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.as_tensor(load_digits().data, dtype=torch.float32)[torch.randperm(1797)]
    held_out, levels = dequantized(images[:HELD_OUT]), images[HELD_OUT:]
    data = dequantized(levels)
    solver = hosm.FixedGrid(data_mean=data.mean(0), data_std=data.std(0))
    bits = []
    for name in ("order one", "order two"):
        torch.manual_seed(1)
        model = hosm.ScoreModel(checkerboard.Network(data, 0, 128), checkerboard.SCHEDULE)
        objective = hosm.FirstOrderDSM(model)
        if name == "order two":
            objective = hosm.SecondOrderDSM(model, probes=hosm.Paired())

        def loss(objective: torch.nn.Module = objective) -> Tensor:
            return objective(dequantized(levels[torch.randint(len(levels), (128,))]))

        cost = checkerboard.train(model, loss, seconds=options.seconds)
        x = held_out[: options.held_out]
        result = hosm.ode_nll(model, x, solver=solver, divergence="exact", batch_size=60)
        print(f"{name}, {cost}: {result.summary(LEVELS)}", flush=True)
        bits.append(result.bits_per_dim(LEVELS))
    more = bits[1] - bits[0]
    mean, error = float(more.mean()), float(more.std()) / len(more) ** 0.5
    print(f"order two − order one: {mean:.4f} ± {error:.4f} bits/dim")


if __name__ == "__main__":
    main()
