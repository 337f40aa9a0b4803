"""scikit-learn's 8×8 digits: bits per dimension of what was held out, and samples of the ODE.

Order one and orders one and two train the same network for the same processor time.

    python docs/examples/digits.py [--seconds 60] [--out DIR]
"""

import argparse
from pathlib import Path

import checkerboard
import mixture_1d as mixture
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import hosm_losses as hosm

LEVELS, HELD_OUT, SHOWN = 17, 360, 24


def dequantized(levels: Tensor) -> Tensor:
    """Integers 0 to 16 as numbers in [−1, 1), uniform within their level."""
    return 2 * (levels + torch.rand(levels.shape)) / LEVELS - 1


def draw(rows: dict[str, Tensor], verdict: str, path: Path) -> None:
    """Draw rows of images, (SHOWN, 64) each."""
    figure, panels = mixture.panels(len(rows), height=2.1)
    for axes, (name, row) in zip(panels, rows.items(), strict=True):
        axes.imshow(row.reshape(-1, 8, 8).permute(1, 0, 2).reshape(8, -1), "gray", vmin=-1, vmax=1)
        axes.axis("off")
        axes.text(-3, 3.5, name, ha="right", va="center")
    mixture.save(figure, verdict, path)


def main() -> None:
    """Train with both losses, print their bits per dimension and draw the samples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of training, for each loss")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="how many are evaluated")
    parser.add_argument("--out", type=Path, default=Path("digits_out"))
    options = parser.parse_args()
    if not 1 < options.held_out <= HELD_OUT or options.seconds <= 0:
        parser.error(f"expected --held-out from 2 to {HELD_OUT} and --seconds above 0")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.as_tensor(load_digits().data, dtype=torch.float32)[torch.randperm(1797)]
    held_out, levels = dequantized(images[:HELD_OUT]), images[HELD_OUT:]
    data, latent = dequantized(levels), checkerboard.SCHEDULE.prior_std * torch.randn(SHOWN, 64)
    solver = hosm.FixedGrid(data_mean=data.mean(0), data_std=data.std(0))
    rows, bits = {"held out": held_out[:SHOWN]}, []
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
        drawn = hosm.ode_sample(model, latent, solver=solver, divergence=None)
        rows[f"{name}\n{bits[-1].mean():.2f} bits/dim"] = drawn.x
    more = bits[1] - bits[0]
    mean, error = float(more.mean()), float(more.std()) / len(more) ** 0.5
    print(f"order two − order one: {mean:.4f} ± {error:.4f} bits/dim")
    verdict = f"{abs(mean):.2f} ± {error:.2f} bits/dim {'more' if mean > 0 else 'less'}"
    verdict = f"After {options.seconds:g} s each, order two takes {verdict} than order one"
    draw(rows, verdict, options.out / "digits_samples.png")


if __name__ == "__main__":
    main()
