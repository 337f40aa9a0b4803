r"""How noisy is the gradient of each loss term and of each third-order estimator, against σ̂?

python -m benchmarks gradient_variance

What:
    g is the parameter gradient of a term's mean over a minibatch of n samples, at one noise
    level. Each of M minibatches of data and noise is evaluated with two independent probe draws,
    which gives g₁ and g₂.

Formula, with V the trace of the covariance of g:
    probes   n V_probe, V_probe = E‖g₁ − g₂‖²/2 over the draws of one minibatch
    total    n V, V = E‖m − m'‖²/2 + V_probe/2 over two minibatches, m = (g₁ + g₂)/2
    signal   ‖E g‖² = E m·m' over two minibatches

    That of m is half of what the probes add, hence the second half. By the law of total variance
    K probes leave V − V_probe + V_probe/K. The factor n makes it the variance of a single sample.
    Every estimate is unbiased, and a sum over entries of the Gram matrix of the gradients.

Intervals:
    95 %, by a bootstrap of the minibatches, of which the estimators of a level share the draws. A
    minibatch that is drawn twice makes no pair with itself; the factor (M/(M − 1))² makes up for
    it. Near a signal of zero such an interval is too wide, by up to √3.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks.estimator_variance import LEVELS
from benchmarks.experiment import Choose, Row, seeded
from benchmarks.intervals import Array, Estimate, estimate, weights
from benchmarks.trained import HELD_OUT, Problem, trained
from benchmarks.trained import mixture as draw_mixture
from hosm_losses.probes import Distribution

# The size of a minibatch, and the kinds of probes beside signs.
CASES: dict[str, tuple[int, tuple[Distribution, ...]]] = {
    "mixture": (256, ()),
    "digits": (16, ("gaussian",)),
    "images": (2, ("gaussian", "dct")),
    "large images": (2, ("gaussian", "dct")),
}
Term = Callable[..., Tensor]
ByLevel = dict[str, dict[str, Any]]  # estimator → level → what was found


class Moments(NamedTuple):
    """Each (1 + RESAMPLES,): the estimate, then that of every resample."""

    total: Array
    probes: Array
    signal: Array


def term_of(name: str, model: hosm.ScoreModel, x0: Tensor, **options: Any) -> Tensor:
    """A term of `hosm.dsm_terms` by its name, (B,)."""
    return getattr(hosm.dsm_terms(model, x0, **options), name)


def estimators(elements: int, distributions: Sequence[Distribution] = ()) -> dict[str, Term]:
    """Terms and estimators by name, and two with each kind of probe, "second gaussian" say.

    "paired" has two probes, all others one. In one dimension the trace repeats the second, and
    all estimators of the third are the same.
    """
    second = {"order": 2}
    options: dict[str, Row] = {"first": {"order": 1}, "second": second, "third": {}}
    if elements > 1:
        options = {"first": {"order": 1}, "second": second, "trace": second, "third": {}}
        for name in ("second", "trace", "third"):
            options[f"{name} paired"] = options[name] | {"probes": hosm.Paired()}
    for kind, name in product(distributions, ("second", "third")):
        options[f"{name} {kind}"] = options[name] | {"probes": hosm.Hutchinson(1, kind)}
    return {name: partial(term_of, name.split()[0], **given) for name, given in options.items()}


def gradient(value: Tensor, parameters: Sequence[Tensor], retain_graph: bool = False) -> Tensor:
    """The gradient of a number in all parameters, as one vector."""
    parts = torch.autograd.grad(
        value, parameters, materialize_grads=True, retain_graph=retain_graph
    )
    return torch.cat([part.flatten() for part in parts])


def gradients(
    term: Term, model: hosm.ScoreModel, batches: Sequence[tuple[Tensor, Tensor]], t: Tensor
) -> Tensor:
    """Gradients (2, M, P), by two probe draws, of a mean over each batch (x₀, ε) at t (B,)."""
    parameters, found = list(model.parameters()), []
    for draw in range(2):
        # The same probes for every estimator, so that their ratios are less noisy.
        generator = seeded(draw + 1)
        for x0, noise in batches:
            value = term(model, x0, noise=noise, t=t, generator=generator).mean()
            found.append(gradient(value, parameters))
    return torch.stack(found).unflatten(0, (2, -1))


def moments(gradients: Tensor) -> Moments:
    """The three moments of gradients (2, M, P) of minibatches, not yet of a single sample."""
    wide = gradients.detach().double()
    middle = wide.mean(0)
    drawn, factors = weights(wide.shape[1])

    def over_pairs(kernel: Array) -> Array:
        """Mean of a symmetric kernel (M, M) over pairs of two minibatches."""
        np.fill_diagonal(kernel, 0)
        return factors * ((drawn @ kernel) * drawn).sum(1)

    gram = (middle @ middle.T).numpy()
    squares = gram.diagonal().copy()
    probes = drawn @ ((wide[0] - wide[1]).square().sum(1).numpy() / 2)
    between = over_pairs((squares[:, None] + squares) / 2 - gram)
    return Moments(between + probes / 2, probes, over_pairs(gram))


def measure(
    problem: Problem,
    levels: Sequence[float],
    terms: Mapping[str, Term],
    *,
    minibatches: int,
    batch: int,
) -> dict[str, Any]:
    """Moments of the gradient of every term at values of σ̂ over the data's std, for JSON."""
    model, generator = problem.model, seeded(0)
    schedule = model.schedule
    found: dict[str, dict[str, Moments]] = {name: {} for name in terms}
    with tqdm(total=len(levels) * len(terms), desc="gradients", leave=False) as bar:
        for level in levels:
            x0s = [problem.draw(batch, generator) for _ in range(minibatches)]
            log_level = torch.tensor(level * problem.std, dtype=torch.float64).log()
            t = schedule.time(log_level).to(x0s[0].dtype).clamp(schedule.t_min, schedule.t_max)
            batches = [(x0, torch.randn(x0.shape, generator=generator)) for x0 in x0s]
            for name, term in terms.items():
                drawn = gradients(term, model, batches, t.expand(batch))
                total, probes, signal = moments(drawn)
                moment = Moments(batch * total, batch * probes, signal)
                found[name][f"{level:g} std"] = moment
                bar.update()
    return {"batch": batch, "minibatches": minibatches, **summary(found)}


def summary(found: Mapping[str, Mapping[str, Moments]]) -> dict[str, ByLevel]:
    """Estimates by quantity, estimator and level.

    Noise is the root of the total, in units of the first order's (root mean square over the
    levels). That unit counts as exact in the intervals. The probes' share is cut to at most 1,
    which an estimate may exceed by chance. The noise scale is the total over the signal, the
    batch whose noise is as large as the mean; None where the signal cannot be told from zero.
    """
    unit = float(np.mean([level.total[0] for level in found["first"].values()])) ** 0.5

    def noise_scale(m: Moments) -> Estimate | None:
        value, low, high = estimate(m.signal)
        return Estimate(*(m.total[0] / each for each in (value, high, low))) if low > 0 else None

    quantities: dict[str, Callable[[Moments], Estimate | None]] = {
        "noise": lambda m: estimate(m.total**0.5 / unit),
        "probe share": lambda m: estimate((m.probes / m.total).clip(max=1)),
        "noise scale": noise_scale,
    }
    result: dict[str, ByLevel] = {
        key: {name: {level: of(m) for level, m in each.items()} for name, each in found.items()}
        for key, of in quantities.items()
    }
    result["ratios"] = {
        f"{name} / {name.split()[0]}": {
            level: estimate(m.total / found[name.split()[0]][level].total)
            for level, m in each.items()
        }
        for name, each in found.items()
        if " " in name
    }
    return result


def mixture(steps: int) -> Problem:
    """The example's network, trained with order three under VP."""
    from docs.examples import mixture_1d as example  # needs matplotlib

    job = example.Job("vp", "3", steps, seed=0)
    model = example.new_model(job)
    list(tqdm(example.training(model, job, 1e-3), "mixture", job.steps, leave=False))
    data = draw_mixture(HELD_OUT, seeded(0))
    return Problem(model, data, example.DATA_STD, draw_mixture)


def answer(name: str, choose: Choose) -> dict:
    """Noise of the gradients on one kind of data."""
    batch, distributions = CASES[name]
    problem = mixture(choose(2, 2000)) if name == "mixture" else trained(name, choose(2, None))
    elements = problem.data[0].numel()
    minibatches = choose(8, 16 if name == "large images" else 48)
    levels, terms = choose(LEVELS[2:3], LEVELS), estimators(elements, distributions)
    found = measure(problem, levels, terms, minibatches=minibatches, batch=batch)
    assert all(share == (0, 0, 0) for share in found["probe share"]["first"].values())
    if elements == 1:
        del found["probe share"]  # of signs, which are exact there
    return {name: {**found, "elements": elements}}
