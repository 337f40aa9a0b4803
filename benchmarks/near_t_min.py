"""What the higher orders of the loss do near t_min, and whether fading them there helps.

    python -m benchmarks.near_t_min [--steps N] [--seeds N] [--schedule vp] [--out DIR]
        [--smoke]

First the 1-D mixture is trained with orders two and three as they are, and faded as σ̂²/(σ̂² + c²);
the KL divergence is an integral over a grid. Then, at fixed σ̂, the terms of each sample and their
gradients (benchmarks.gradients) are measured: on the exact score of the mixture, on the network
just trained without fading, and on a network trained with the first order on the 8×8 digits.
"""

from pathlib import Path

import numpy as np
import torch
from docs.examples import mixture_1d as example
from matplotlib.figure import Figure
from tests.oracles import mixture_noise, paper_mixture
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import experiment, gradients, trained
from benchmarks.trained import Problem

TERMS = tuple(gradients.TERMS)
SECOND, THIRD = 0.5, 0.1  # the example's weights; in one dimension the trace repeats the second
WARM_UP, LEVELS, MINIBATCHES = 100, 12, 32
STYLES = (("o-", "black"), ("s--", "#0072b2"), ("x-.", "#e69f00"), ("^:", "#d55e00"))
# What is faded, and c.
VARIANTS = {
    "order 1 alone": ("", 0.0),
    "no fading": ("higher", 0.0),
    "higher terms, c = 0.02": ("higher", 0.02),
    "higher terms, c = 0.1": ("higher", 0.1),
    "every term, c = 0.1": ("every", 0.1),
}


def loss_of(variant: str, model: hosm.ScoreModel, generator: torch.Generator) -> Tensor:
    """The loss of a minibatch; every variant sees the same data, times and noise."""
    (faded, c), x = VARIANTS[variant], example.draw_data(generator)

    def fade(t: Tensor) -> Tensor:
        square = (2 * model.schedule.log_sigma_hat(t)).exp()
        return square / (square + c**2)

    if not faded:
        return hosm.first_order_dsm(model, x, generator=generator)
    if faded == "every":
        return example.LOSSES[3](model, x, weighting=fade, generator=generator)
    t = model.schedule.sample_time(len(x), generator)
    terms = hosm.dsm_terms(model, x, t=t, probes="exact", generator=generator)
    return (terms.first + fade(t) * (SECOND * terms.second + THIRD * terms.third)).mean()


def train(variant: str, job: example.Job, bar: tqdm) -> tuple[hosm.ScoreModel, list[object]]:
    """Train as the example does; return the model, and a row of KL and gradient norms."""
    model, generator = example.new_model(job), torch.Generator().manual_seed(job.seed)
    parameters, norms = list(model.parameters()), []
    for _ in experiment.training(model, lambda: loss_of(variant, model, generator), job.steps):
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
        bar.update()
    after = np.array(norms[WARM_UP:])
    median, largest = float(np.median(after)), float(after.max())
    row = [variant, job.seed, example.exact_kl(model)[0], median, largest]
    return model, [*row, int((after > 10 * median).sum())]


def measure(problem: Problem, size: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Values of σ̂, and at each the std of every term over samples and that of its gradient.

    The latter is in units of the first order's (root mean square over σ̂), and none for a model
    without parameters.
    """
    model, generator, found = problem.model, torch.Generator().manual_seed(0), []
    count, minibatches, batch = size
    levels = torch.linspace(*model.schedule.log_sigma_hat_range, count, dtype=torch.float64)
    for level in tqdm(levels, "terms", leave=False):
        terms = []
        for _ in range(minibatches):
            x = problem.draw(batch, generator)
            t = gradients.time_of(model.schedule, level, x)
            with torch.no_grad():
                terms.append(torch.stack(hosm.dsm_terms(model, x, t=t, generator=generator), 1))
        found.append(torch.cat(terms).double().std(0))
    columns = levels.exp(), torch.stack(found)
    if not list(model.parameters()):
        return columns
    given = {"minibatches": minibatches, "batch": batch}
    noise = gradients.measure(problem, levels, gradients.TERMS, **given)["noise"]
    return *columns, torch.tensor([[each.value for each in noise[term]] for term in TERMS]).T


def draw_figure(cases: dict[str, tuple[Tensor, ...]], path: Path) -> None:
    """Draw the std of each term, and of its gradient, against σ̂."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    grid = figure.subplots(2, len(cases), sharex="col", sharey="row")
    for column, (title, (levels, *measured)) in enumerate(cases.items()):
        for axes, values in zip(grid[:, column], measured, strict=True):
            for term, each, (style, color) in zip(TERMS, values.T, STYLES, strict=True):
                axes.loglog(levels, each, style, color=color, label=term)
        grid[0, column].set_title(title)
        grid[1, column].set_xlabel("σ̂ = σ/α [unit of the data]")
    grid[0, 0].set_ylabel("std of the term of a sample [1]")
    grid[1, 0].set_ylabel("std of its gradient\n[first order's, r.m.s. over σ̂]")
    figure.suptitle("Near t_min the higher terms stay noisy; their gradients fade by themselves")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, measure, print and draw."""
    parser = experiment.parser(__doc__)
    parser.add_argument("--steps", type=int, default=3000, help="of each training of the mixture")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--schedule", choices=example.SCHEDULES, default="vp", help="of the same")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    count, minibatches, digits_steps = LEVELS, MINIBATCHES, None
    if options.smoke:
        options.steps, options.seeds, count, minibatches, digits_steps = WARM_UP + 1, 1, 2, 8, 5
    jobs = [example.Job(options.schedule, 3, options.steps, seed) for seed in range(options.seeds)]
    with tqdm(total=len(VARIANTS) * len(jobs) * options.steps, desc="training") as bar:
        found = {(job.seed, v): train(v, job, bar) for job in jobs for v in VARIANTS}
    title = f"Gradient norms after {WARM_UP} steps; a spike is a norm over 10 times the median"
    header = ["", "seed", "KL [nats]", "median", "largest", "spikes"]
    experiment.show(title, header, [row for _, row in found.values()])

    schedule, name = example.SCHEDULES[options.schedule], options.schedule.upper()
    mixture, model = paper_mixture(), found[0, "no fading"][0]
    exact = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    data, std = trained.mixture(1, torch.Generator()), example.DATA_STD
    cases = {
        f"1-D mixture, {name}, exact score": (Problem(exact, data, std, mixture.sample), 8192),
        f"1-D mixture, d = 1, {name}": (Problem(model, data, std, trained.mixture), 2048),
        "8×8 digits, d = 64, VE": (trained.trained("digits", digits_steps), 256),
    }
    results = {}
    for title, (problem, batch) in cases.items():
        results[title] = measure(problem, (count, minibatches, batch))
        header = ["σ̂", *(f"std, {term}" for term in TERMS)]
        header += [f"gradient, {term}" for term in TERMS] if len(results[title]) > 2 else []
        levels, *measured = results[title]
        experiment.show(title, header, torch.cat([levels[:, None], *measured], 1).tolist())
    del results[next(iter(cases))]  # the figure is of the networks
    options.out.mkdir(parents=True, exist_ok=True)
    draw_figure(results, options.out / "near_t_min.png")


if __name__ == "__main__":
    main()
