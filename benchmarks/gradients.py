r"""The variance of the gradient of a loss term, in two parts: data with noise, and probes.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks.intervals import Array, Estimate, estimate, weights
from benchmarks.peers import meng
from benchmarks.trained import Problem

PROBE_DRAWS = 2
MENG = "second, Meng et al."
# What is set against what: the gradient's variance of the first over that of the second.
RATIOS = {
    "third laplacian": "third",
    "third sliced": "third",
    MENG: "second",
    "second gaussian": "second",
    "third gaussian": "third",
    "second dct": "second",
    "third dct": "third",
}
Term = Callable[..., Tensor]


class Moments(NamedTuple):
    """Each (1 + RESAMPLES,): the estimate, then that of every resample."""

    total: Array
    probes: Array
    signal: Array


def term_of(name: str, model: hosm.ScoreModel, x0: Tensor, **options: Any) -> Tensor:
    """A term of `hosm.dsm_terms` by its name, (B,)."""
    return getattr(hosm.dsm_terms(model, x0, **options), name)


# In one dimension the trace repeats the second.
TERMS: dict[str, Term] = {
    "first": partial(term_of, "first", order=1),
    "second": partial(term_of, "second", order=2),
    "trace": partial(term_of, "trace", order=2),
    "third": partial(term_of, "third"),
}


def estimators(distributions: Sequence[str] = ()) -> dict[str, Term]:
    """The terms and the estimators of the third by name, and two with each kind of probe."""
    found = TERMS | {
        "third laplacian": partial(TERMS["third"], third="laplacian"),
        "third sliced": partial(TERMS["third"], third="sliced"),
        MENG: meng.second_term,
    }
    for kind in distributions:
        for name in ("second", "third"):
            found[f"{name} {kind}"] = partial(TERMS[name], distribution=kind)
    return found


def gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of a number in all parameters, as one vector."""
    parts = torch.autograd.grad(value, parameters, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def gradients(
    term: Term, model: hosm.ScoreModel, batches: Sequence[tuple[Tensor, Tensor]], t: Tensor
) -> Tensor:
    """Gradients (PROBE_DRAWS, M, P) of a term's mean over each batch (x₀, ε) at t (B,)."""
    parameters, found = list(model.parameters()), []
    for draw in range(PROBE_DRAWS):
        # The same probes for every estimator, so that their ratios are less noisy.
        generator = torch.Generator().manual_seed(draw + 1)
        for x0, noise in batches:
            value = term(model, x0, noise=noise, t=t, generator=generator).mean()
            found.append(gradient(value, parameters))
    return torch.stack(found).unflatten(0, (PROBE_DRAWS, -1))


def moments(gradients: Tensor) -> Moments:
    """The three moments of gradients (2, M, P) of minibatches, not yet of a single sample."""
    wide = gradients.double()
    middle, count = wide.mean(0), wide.shape[1]
    drawn = np.concatenate([np.full((1, count), 1 / count), weights(count)])
    once = count / (count - 1)
    factors = np.where(np.arange(len(drawn)), once**2, once)

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
    log_levels: Tensor,
    terms: Mapping[str, Term],
    *,
    minibatches: int,
    batch: int,
) -> dict[str, Any]:
    """Moments of the gradient of every term at values of log σ̂, for JSON.

    Noise is the root of the total, in units of the first order's (root mean square over the
    levels); signal is in the square of that unit. The unit counts as exact in the intervals. The
    probes' share is cut to at most 1, which an estimate may exceed by chance.
    """
    model, generator = problem.model, torch.Generator().manual_seed(0)
    found: dict[str, list[Moments]] = {name: [] for name in terms}
    with tqdm(total=len(log_levels) * len(terms), desc="gradients", leave=False) as bar:
        for log_level in log_levels:
            x0s = [problem.draw(batch, generator) for _ in range(minibatches)]
            t = time_of(model.schedule, log_level, x0s[0])
            batches = [(x0, torch.randn(x0.shape, generator=generator)) for x0 in x0s]
            for name, term in terms.items():
                total, probes, signal = moments(gradients(term, model, batches, t))
                found[name].append(Moments(batch * total, batch * probes, signal))
                bar.update()
    return {"batch": batch, "minibatches": minibatches, **summary(found)}


def time_of(schedule: hosm.Schedule, log_level: Tensor, x: Tensor) -> Tensor:
    """The time (B,) of a value of log σ̂ for every sample of x (B, *)."""
    t = schedule.time(log_level).to(x.dtype).clamp(schedule.t_min, schedule.t_max)
    return t.expand(len(x))


def estimated(values: Array) -> Estimate:
    """The first of the values, with the interval of the others."""
    return estimate(values[0], values[1:])


def summary(found: Mapping[str, Sequence[Moments]]) -> dict[str, Any]:
    """Estimates by quantity, estimator and level."""
    unit = float(np.mean([level.total[0] for level in found["first"]])) ** 0.5

    def each(quantity: Callable[[Moments], Array]) -> dict[str, list[Estimate]]:
        return {name: [estimated(quantity(m)) for m in levels] for name, levels in found.items()}

    def ratio(above: Moments, below: Moments) -> Estimate:
        return estimated(above.total / below.total)

    return {
        "noise": each(lambda m: m.total**0.5 / unit),
        "probe share": each(lambda m: (m.probes / m.total).clip(max=1)),
        "signal": each(lambda m: m.signal / unit**2),
        "ratios": {
            f"{above} / {below}": list(map(ratio, found[above], found[below]))
            for above, below in RATIOS.items()
            if above in found
        },
    }
