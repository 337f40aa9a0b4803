r"""A test, based on integration by parts, of whether scores belong to the data's density.

Formula:
    Let g = ∇log p₀, and let v(x) be any vector field tangent to the subspace of the data. If
    v p₀ = 0 at the edge of the support, then E[v·g + div v] = 0. The test uses two such fields,
    whose centres x̄ and ℓ̄ are means over other samples:
        v = x − x̄ in d dimensions: the mean of −(x − x̄)·g is d.
        v_i = −v_j = ½ (ℓ − ℓ̄) r for two particles in D dimensions, with r = x_i − x_j and
            ℓ = log|r|: div v = 1 + D (ℓ − ℓ̄), so the mean of −(ℓ − ℓ̄) (½ r·(g_i − g_j) + D) is 1.

    For molecules, the first mean is noisy, because large forces along bonds are multiplied by
    motions of the whole molecule. For a stiff bond, the second mean has far less noise than the
    first. Neither mean depends on the masses.

Errors:
    Consecutive frames of a simulation are correlated. The samples are therefore split into `RUNS`
    runs of consecutive samples, and standard errors are computed from the means of the runs. The
    centre that is subtracted in a run is the mean over all other runs. Fewer samples than `RUNS`
    are always too few to tell.
"""

import math

import torch
from torch import Tensor

from hosm_losses._checks import warn

RUNS = 32
WRONG = 0.1  # the relative error of the scores that must not go unnoticed
LARGEST = 1024  # number of elements up to which a subspace is looked for


def check_scores(
    x: Tensor, g: Tensor, *, matrix: bool, particles: int | None, rounding: float
) -> None:
    """Warn if scores g (N, d) are not those of the data x, or if N samples are too few to tell.

    `matrix` is True if the information is a matrix. If `matrix` is False and the data lie in a
    subspace that is not parallel to the axes, the targets are biased, and a warning is issued.
    `rounding` is the relative rounding error of x. If `particles` is given, the check of whether N
    is too small uses only the mean over pairs.
    """
    varies, dimension = _extent(x, rounding)
    elements = int(varies.sum())
    if dimension < elements and not matrix:
        warn(
            "TargetScores.information_of: expected matrix=True, or coordinates as from "
            f"OnSubspace.reduce, for data in a subspace of {dimension} dimensions; got data of "
            f"{elements} elements that vary. Numbers per element bias their targets."
        )
    means = torch.stack([each.sum(1).mean() for each in _products(x, g)])
    checks = [("−(x − x̄)·g", dimension, "the dimension", means)]
    if particles is not None:
        kept = varies.reshape(particles, -1).any(1)  # without padding
        positions, forces = (part.reshape(len(x), particles, -1)[:, kept] for part in (x, g))
        means = _means_of_pairs(positions, forces)
        product = "−(ℓ − ℓ̄) (½ (x_i − x_j)·(g_i − g_j) + D), with ℓ = log|x_i − x_j|,"
        checks.append((product, 1, "over stiff pairs", means))
    for product, wanted, note, means in checks:
        mean, error = float(means.mean()), float(means.std()) / math.sqrt(len(means))
        found, other = f"{mean:.3g} ± {error:.2g}", f"{wanted + 5 * error:.3g}"
        few = len(means) < RUNS  # whose standard error is itself too uncertain
        if math.isnan(mean):
            warn(
                "TargetScores.information_of: expected particles at different positions; got some "
                "that coincide, so the scores were not checked on pairs. Check the data."
            )
        elif not few and not abs(mean - wanted) <= 5 * error:
            warn(
                f"TargetScores.information_of: expected scores whose mean of {product} is "
                f"{wanted}, {note}; got {found}. Check the scores' sign, units and temperature, "
                "the edges of the density, and whether the data are constrained."
            )
        elif means is checks[-1][-1] and (few or 5 * error > WRONG * wanted):
            pairs = " or, for positions of particles, particles=..." if particles is None else ""
            warn(
                "TargetScores.information_of: expected enough samples to tell scores that are "
                f"wrong by {WRONG:.0%}; got {len(x)}, whose mean of {product} is {found} and "
                f"cannot tell {wanted}, {note}, from {other}. Pass more samples{pairs}."
            )


def _extent(x: Tensor, rounding: float) -> tuple[Tensor, int]:
    """Return which elements of x (N, d) vary beyond rounding error, and the data's dimension."""
    x = (x - x.mean(0)) / (rounding * x.abs().amax(0))
    varies = x.square().mean(0) > 1
    count = int(varies.sum())
    if len(x) <= count or count > LARGEST:
        return varies, count
    x = x[:, varies]
    return varies, int((torch.linalg.eigvalsh((x.T @ x / len(x)).cpu()) > 1).sum())


def _products(x: Tensor, g: Tensor) -> list[Tensor]:
    """Return −(x − x̄) ∘ g for each run of consecutive rows of x and g (N, m)."""
    runs, total = min(RUNS, len(x)), x.sum(0)
    return [
        ((total - own.sum(0)) / (len(x) - len(own)) - own) * scores
        for own, scores in zip(x.tensor_split(runs), g.tensor_split(runs), strict=True)
    ]


def _means_of_pairs(x: Tensor, g: Tensor) -> Tensor:
    """Return a mean over pairs, near 1 for correct scores, for each run of x and g (N, n, D).

    The weight of a pair is proportional to 1/m², where m is the mean of the pair's squared
    products in the other runs. Stiff pairs therefore dominate the mean. Because the weights are
    smooth functions of the data, the standard errors stay valid.
    """
    means: list[Tensor] = []
    squares: list[Tensor] = []
    for i in range(x.shape[1] - 1):
        r, forces = (part[:, i, None] - part[:, i + 1 :] for part in (x, g))
        products = _products(r.norm(dim=2).log(), (r * forces).sum(2) / 2 + x.shape[2])
        means.append(torch.stack([each.mean(0) for each in products]))
        squares.append(torch.stack([each.square().mean(0) for each in products]))
    of_runs = torch.cat(squares, 1)
    weights = 1 / (of_runs.sum(0) - of_runs).square()
    return (torch.cat(means, 1) * weights).sum(1) / weights.sum(1)
