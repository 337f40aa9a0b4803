"""Samples of the digits, by the ODE of every loss of benchmarks.worth, and their distance to data.

    python -m benchmarks.worth_samples [--out DIR] [--smoke]

--out is where benchmarks.worth left the networks. The distance is the unbiased squared maximum
mean discrepancy for the kernel (1 + a·b/32)³, as in KID (Bińkowski et al., arXiv 1801.01401), of
32 features of a classifier that is trained on the spot. Two random halves of the data give its
floor.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import experiment, results
from benchmarks.worth import FILE, SEEDS, Budget, Campaign
from benchmarks.worth_problems import PROBLEMS

NAME, FEATURES, COUNT = "digits, d = 64", 32, 1437  # samples of each network


def classifier_features(data: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """The last hidden layer of a classifier that is trained now, at unit variance in the mean."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, FEATURES), nn.LayerNorm(FEATURES)
    )
    model = nn.Sequential(body, nn.Linear(FEATURES, 10))
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        rows = torch.randint(len(data), (256,), generator=generator)
        noisy = data[rows] + 0.1 * torch.randn(256, 64, generator=generator)
        return nn.functional.cross_entropy(model(noisy), labels[rows])

    list(experiment.training(model, loss, steps, 2e-3))
    return body


def discrepancy(a: Tensor, b: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy of features (n, FEATURES)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (1 + a @ b.T / FEATURES) ** 3

    def within(a: Tensor) -> Tensor:
        square = kernel(a, a)
        return (square.sum() - square.trace()) / (len(a) * (len(a) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def draw(shown: dict[str, Tensor], path: Path) -> None:
    """Draw a row of digits for each loss, the same noise in a column."""
    figure = Figure(figsize=(9, 0.62 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1)
    for each, (name, rows) in zip(axes, shown.items(), strict=True):
        each.imshow(
            rows.reshape(-1, 8, 8).permute(1, 0, 2).reshape(8, -1), "gray", vmin=-1, vmax=1
        )
        each.set_yticks([3.5], [name])
        each.set_xticks([])
    figure.savefig(path, dpi=150)


def main() -> None:
    from sklearn.datasets import load_digits

    parser = experiment.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("worth_out"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem, campaign = PROBLEMS[NAME](), Campaign(options.out, Budget())
    everything = torch.cat([problem.test, problem.train])
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    labels = torch.as_tensor(load_digits().target)[order]
    features = classifier_features(everything, labels, 2 if options.smoke else 2000)
    # Every member from the same noise.
    count, model = 16 if options.smoke else COUNT, problem.model(SEEDS)
    noise = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
    latent = model.schedule.prior_std * noise.repeat_interleave(SEEDS, 0)
    with torch.no_grad():
        real = features(everything).double()
        floor = []
        for seed in range(SEEDS):
            mixed = real[torch.randperm(1797, generator=torch.Generator().manual_seed(seed))]
            floor.append(discrepancy(mixed[:898], mixed[898:]))
        found, shown = {"two halves of the data": floor}, {"data": problem.test[:24]}
        for loss in tqdm(campaign.report[NAME]):
            model.load_state_dict(campaign.kept(NAME, loss)["weights"])
            samples = hosm.ode_sample(model, latent, divergence=None).x.reshape(count, SEEDS, 64)
            shown[loss] = samples[:24, 0]
            of_members = (features(each).double() for each in samples.unbind(1))
            found[loss] = [discrepancy(each, real) for each in of_members]
    results.show("distance, by seed", found)
    if not options.smoke:
        results.keep(FILE, {"samples": found})
        draw(shown, results.ROOT / "docs/images/worth_digits.png")


if __name__ == "__main__":
    main()
