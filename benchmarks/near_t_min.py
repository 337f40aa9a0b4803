"""What the higher orders of the loss do near t_min, and whether fading them there helps.

    python -m benchmarks.near_t_min [--steps N] [--seeds N] [--schedule vp] [--out DIR]
        [--smoke]

First the 1-D mixture is trained with orders two and three as they are, and faded as σ̂²/(σ̂² + c²);
the KL divergence is an integral over a grid. Then, at fixed σ̂, the terms of each sample and their
gradients are measured: on the exact score of the mixture, on the network just trained without
fading, and on a network trained with the first order on the 8×8 digits.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from docs.examples import mixture_1d as example
from matplotlib.figure import Figure
from tests.oracles import mixture_noise, paper_mixture
from torch import Tensor
from torch.autograd import grad
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks.trained import digits, trained

TERMS = hosm.DSMTerms._fields
WARM_UP = 100
SECOND, THIRD = 0.5, 0.1  # the example's weights; in one dimension the trace repeats the second
Draw = Callable[[torch.Generator], Tensor]
STYLES = (("o-", "black"), ("s--", "#0072b2"), ("x-.", "#e69f00"), ("^:", "#d55e00"))
# What is faded, and c.
VARIANTS = {
    "order 1 alone": ("", 0.0),
    "no fading": ("higher", 0.0),
    "higher terms, c = 0.02": ("higher", 0.02),
    "higher terms, c = 0.1": ("higher", 0.1),
    "every term, c = 0.1": ("every", 0.1),
}


class Size(NamedTuple):
    """How much to measure: values of σ̂, and minibatches at each."""

    levels: int = 12
    minibatches: int = 32


class Measured(NamedTuple):
    """Arrays (levels, 4): mean and std of the terms of a sample, and the gradient's noise."""

    levels: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    noise: np.ndarray | None


def loss_of(variant: str, model: hosm.ScoreModel, x: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of a minibatch; every variant sees the same times and noise."""
    faded, c = VARIANTS[variant]

    def fade(t: Tensor) -> Tensor:
        square = (2 * model.schedule.log_sigma_hat(t)).exp()
        return square / (square + c**2)

    if not faded:
        return hosm.first_order_dsm(model, x, generator=generator)
    if faded == "every":
        whole = partial(hosm.third_order_dsm, weights=(1, SECOND, 0, THIRD), probes="exact")
        return whole(model, x, weighting=fade, generator=generator)
    t = model.schedule.sample_time(len(x), generator)
    terms = hosm.dsm_terms(model, x, t=t, probes="exact", generator=generator)
    return (terms.first + fade(t) * (SECOND * terms.second + THIRD * terms.third)).mean()


def train(variant: str, job: example.Job, bar: tqdm) -> tuple[hosm.ScoreModel, float, np.ndarray]:
    """Train as the example does; return the model, its KL in nats and the gradient norms."""
    model, generator = example.new_model(job), torch.Generator().manual_seed(job.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    norms = []
    for _ in range(job.steps):
        loss = loss_of(variant, model, example.draw_data(generator), generator)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
        optimizer.step()
        decay.step()
        bar.update()
    return model, example.exact_kl(model)[0], np.array(norms)


def measure(model: hosm.ScoreModel, draw: Draw, size: Size, bar: tqdm) -> Measured:
    """Mean and std of the terms of a sample, and the std of the gradient, at values of σ̂.

    The gradient's noise is the norm of its standard deviation over minibatches, times the root of
    their size so that it is that of one sample, over the first order's, root mean square over σ̂.
    """
    generator, schedule = torch.Generator().manual_seed(0), model.schedule
    parameters = list(model.parameters())
    logs = torch.linspace(*schedule.log_sigma_hat_range, size.levels, dtype=torch.float64)
    moments, noises = [], []
    for level in logs:
        time = schedule.time(level)
        values, gradients = [], [[] for _ in TERMS]
        for _ in range(size.minibatches):
            x = draw(generator)
            t = time.to(x.dtype).clamp(schedule.t_min, schedule.t_max).expand(len(x))
            terms = hosm.dsm_terms(model, x, t=t, generator=generator)
            values.append(torch.stack([term.detach() for term in terms], 1))
            for term, kept in zip(terms, gradients, strict=True) if parameters else ():
                mean = term.mean()
                parts = grad(mean, parameters, retain_graph=True, materialize_grads=True)
                kept.append(torch.cat([part.flatten() for part in parts]))
        every = torch.cat(values).double()
        moments.append(torch.stack([every.mean(0), every.std(0)]))
        if parameters:
            root = len(values[0]) ** 0.5
            noises.append([root * float(torch.stack(g).std(0).norm()) for g in gradients])
        bar.update()
    noise = np.array(noises) / np.sqrt(np.square(noises).mean(0)[0]) if noises else None
    return Measured(logs.exp().numpy(), *torch.stack(moments, 1).numpy(), noise)


def tabulate(title: str, measured: Measured) -> None:
    """Print what was measured."""
    print(f"\n{title}\nsigma_hat " + "".join(f"{name:>20}" for name in TERMS), end="")
    print("   gradient noise: " + "".join(f"{name:>9}" for name in TERMS))
    for row, level in enumerate(measured.levels):
        cells = zip(measured.mean[row], measured.std[row], strict=True)
        noise = [] if measured.noise is None else measured.noise[row]
        print(f"{level:9.4g} " + "".join(f"{f'{m:.3g} ± {s:.3g}':>20}" for m, s in cells), end="")
        print(" " * 19 + "".join(f"{value:9.2g}" for value in noise))


def draw_figure(cases: dict[str, Measured], path: Path) -> None:
    """Draw the std of each term, and of its gradient, against σ̂."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    grid = figure.subplots(2, len(cases), sharex="col", sharey="row")
    for column, (title, measured) in enumerate(cases.items()):
        upper, lower = grid[:, column]
        for i, (style, color) in enumerate(STYLES):
            upper.loglog(measured.levels, measured.std[:, i], style, color=color, label=TERMS[i])
            lower.loglog(measured.levels, measured.noise[:, i], style, color=color)
        upper.set_title(title)
        lower.set_xlabel("σ̂ = σ/α [unit of the data]")
    grid[0, 0].set_ylabel("std of the term of a sample [1]")
    grid[1, 0].set_ylabel("std of its gradient\n[first order's, r.m.s. over σ̂]")
    figure.suptitle("Near t_min the higher terms stay noisy; their gradients fade by themselves")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="of each training of the mixture")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--schedule", choices=example.SCHEDULES, default="vp", help="of the same")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--smoke", action="store_true", help="a moment of everything")
    options = parser.parse_args()
    size, digits_steps = Size(), None
    if options.smoke:
        options.steps, options.seeds, size, digits_steps = WARM_UP + 1, 1, Size(2, 2), 5
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [example.Job(options.schedule, 3, options.steps, seed) for seed in range(options.seeds)]
    lines, model = [], None
    with tqdm(total=len(VARIANTS) * len(jobs) * options.steps, desc="training") as bar:
        for job in jobs:
            for variant in VARIANTS:
                new, kl, norms = train(variant, job, bar)
                model = new if model is None and variant == "no fading" else model
                median, after = np.median(norms[WARM_UP:]), norms[WARM_UP:]
                line = f"{variant:24}{job.seed:4}{kl:11.5f}{median:9.4f}{after.max():10.3f}"
                lines.append(f"{line}{(after > 10 * median).sum():8}")
    print(f"\nGradient norms after {WARM_UP} steps. A spike is a norm over 10 times the median.")
    print(f"{'':24}seed  KL [nats]   median   largest  spikes")
    print("\n".join(lines))
    mixture = paper_mixture()
    exact = hosm.ScoreModel(mixture_noise(mixture, model.schedule), model.schedule)
    data = digits(torch.Generator().manual_seed(0))[:-64]  # what its network was trained on
    rows = partial(torch.randint, len(data), (256,))
    with tqdm(total=3 * size.levels, desc="measuring") as bar:
        of_exact = measure(exact, lambda g: mixture.sample(8192, g), size, bar)
        of_mixture = measure(model, lambda g: mixture.sample(2048, g).float(), size, bar)
        network = trained("digits", digits_steps).model
        of_digits = measure(network, lambda g: data[rows(generator=g)], size, bar)
    name = options.schedule.upper()
    tabulate(f"1-D mixture, {name}, exact score", of_exact)
    tabulate(f"1-D mixture, {name}, trained network", of_mixture)
    tabulate("8×8 digits, VE, trained network", of_digits)
    cases = {f"1-D mixture, d = 1, {name}": of_mixture, "8×8 digits, d = 64, VE": of_digits}
    draw_figure(cases, options.out / "near_t_min.png")


if __name__ == "__main__":
    main()
