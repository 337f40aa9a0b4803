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
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks.fields import LEVELS
from benchmarks.intervals import RESAMPLES, TAILS, Array, Estimate
from benchmarks.peers import meng

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
Draw = Callable[[int, torch.Generator], Tensor]


class Moments(NamedTuple):
    """Each (1 + RESAMPLES,): the estimate, then that of every resample."""

    total: Array
    probes: Array
    signal: Array


def library_term(name: str, **options: Any) -> Term:
    """A term of `hosm.dsm_terms` by its name, (B,)."""

    def term(model: hosm.ScoreModel, x0: Tensor, **given: Any) -> Tensor:
        return getattr(hosm.dsm_terms(model, x0, **options, **given), name)

    return term


def estimators(distributions: Sequence[str] = ()) -> dict[str, Term]:
    """The terms and the estimators of the third by name, and two with each kind of probe."""
    found = {
        "first": library_term("first", order=1),
        "second": library_term("second", order=2),
        "trace": library_term("trace", order=2),
        "third": library_term("third"),
        "third laplacian": library_term("third", third="laplacian"),
        "third sliced": library_term("third", third="sliced"),
        MENG: meng.second_term,
    }
    for kind in distributions:
        found[f"second {kind}"] = library_term("second", order=2, distribution=kind)
        found[f"third {kind}"] = library_term("third", distribution=kind)
    return found


def gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of a number in all parameters, as one vector."""
    parts = torch.autograd.grad(value, parameters, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def gradients(
    term: Term, model: hosm.ScoreModel, batches: Sequence[tuple[Tensor, Tensor]], t: Tensor
) -> Tensor:
    """Gradients (PROBE_DRAWS, M, P) of a term's mean over each batch (x₀, ε) at t (B,)."""
    parameters = list(model.parameters())
    draws = []
    for draw in range(PROBE_DRAWS):
        # The same probes for every estimator, so that their ratios are less noisy.
        generator = torch.Generator().manual_seed(draw + 1)
        given = {"t": t, "generator": generator}
        draws.append(
            torch.stack(
                [
                    gradient(term(model, x0, noise=noise, **given).mean(), parameters)
                    for x0, noise in batches
                ]
            )
        )
    return torch.stack(draws)


def moments(gradients: Tensor) -> Moments:
    """The three moments of gradients (2, M, P) of minibatches, not yet of a single sample."""
    wide = gradients.double()
    middle = wide.mean(0)
    gram = (middle @ middle.T).numpy()
    squares = gram.diagonal().copy()
    half_distances = (squares[:, None] + squares[None]) / 2 - gram
    np.fill_diagonal(half_distances, 0)
    np.fill_diagonal(gram, 0)
    weights, _ = _weights(len(gram))
    probes = weights @ ((wide[0] - wide[1]).square().sum(1).numpy() / 2)
    return Moments(_over_pairs(half_distances) + probes / 2, probes, _over_pairs(gram))


def measure(
    model: hosm.ScoreModel,
    draw: Draw,
    std: float,
    *,
    minibatches: int,
    batch: int,
    levels: Sequence[float] = LEVELS,
    distributions: Sequence[str] = (),
) -> dict[str, Any]:
    """Moments of the gradient of every estimator at σ̂ = `levels` times `std`, for JSON.

    Noise is the root of the total, in units of the first order's (root mean square over the
    levels); signal is in the square of that unit. The unit counts as exact in the intervals. The
    probes' share is cut to at most 1, which an estimate may exceed by chance.
    """
    terms, schedule = estimators(distributions), model.schedule
    low, high = schedule.log_sigma_hat_range
    logs = (torch.tensor(levels, dtype=torch.float64) * std).log().clamp(low, high)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Moments]] = {name: [] for name in terms}
    with tqdm(total=len(logs) * len(terms), desc="gradients", leave=False) as bar:
        for log in logs:
            t = schedule.time(log).float().clamp(schedule.t_min, schedule.t_max).expand(batch)
            x0s = [draw(batch, generator) for _ in range(minibatches)]
            batches = [(x0, torch.randn(x0.shape, generator=generator)) for x0 in x0s]
            for name, term in terms.items():
                of_batch = moments(gradients(term, model, batches, t))
                total, probes = batch * of_batch.total, batch * of_batch.probes
                found[name].append(Moments(total, probes, of_batch.signal))
                bar.update()
    return {
        "std": std,
        "batch": batch,
        "minibatches": minibatches,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "levels": list(levels),
        "sigma hat": logs.exp().tolist(),
        **summary(found),
    }


def summary(found: Mapping[str, Sequence[Moments]]) -> dict[str, Any]:
    """Estimates by quantity, estimator and level."""
    unit = float(np.mean([level.total[0] for level in found["first"]])) ** 0.5

    def each(quantity: Callable[[Moments], Array]) -> dict[str, list[Estimate]]:
        return {name: [estimate(quantity(m)) for m in levels] for name, levels in found.items()}

    return {
        "unit": unit,
        "noise": each(lambda m: m.total**0.5 / unit),
        "probe share": each(lambda m: (m.probes / m.total).clip(max=1)),
        "signal": each(lambda m: m.signal / unit**2),
        "ratios": {
            f"{above} / {below}": [
                estimate(top.total / bottom.total)
                for top, bottom in zip(found[above], found[below], strict=True)
            ]
            for above, below in RATIOS.items()
            if above in found
        },
    }


def estimate(values: Array) -> Estimate:
    """The first of the values, with the interval of the others."""
    low, high = np.quantile(values[1:], TAILS)
    return Estimate(float(values[0]), float(low), float(high))


@lru_cache
def _weights(count: int) -> tuple[Array, Array]:
    """Weights of the minibatches (1 + RESAMPLES, M), even ones first, and factors of pairs."""
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weights = np.concatenate([np.ones((1, count)), drawn]) / count
    once = count / (count - 1)
    return weights, np.array([once] + [once**2] * RESAMPLES)


def _over_pairs(kernel: Array) -> Array:
    """Mean of a symmetric kernel (M, M) with a zero diagonal over pairs."""
    weights, factors = _weights(len(kernel))
    return factors * ((weights @ kernel) * weights).sum(1)
