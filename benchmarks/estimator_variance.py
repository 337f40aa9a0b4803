"""Which probes estimate a trace, a Frobenius norm or the third order's term with least variance?

python -m benchmarks estimator_variance [--full]

On the exact Jacobian of Gaussian mixtures and on networks trained here, at five noise levels; what
is estimated and by what is said in benchmarks.fields. Variances that are known in closed form have
to come out, to five standard errors.
"""

import numpy as np
import torch
from tests.oracles import anisotropic, ring
from tqdm import tqdm

from benchmarks import fields
from benchmarks.experiment import Choose
from benchmarks.fields import Point
from benchmarks.intervals import Array, Estimate, mean_variance, ratio_of_variances
from benchmarks.trained import trained

CASES = ("ring", "mixture", "digits", "images", "large images")
TERMS = ("trace", "Frobenius", "third")
STANDARD_ERRORS, IN_INTERVAL = 5.0, 2 * 1.96
MIXTURES = {"ring": ring, "mixture": anisotropic}


class Measured:
    """Estimates by probes of a kind, at several points, and their variance.

    Attributes:
        rows: the estimates, (points · m, repeats).
        variance: summed over the m elements of an estimate, averaged over points.
        known: whether the variance in closed form lies in the interval; None where there is none.
    """

    def __init__(self, points: list[Point], term: str, name: str, repeats: int):
        generator, shape = torch.Generator().manual_seed(1), points[0].shape
        found, known = [], []
        for point in points:
            probes = fields.draw(name, repeats, shape, generator)
            found.append(point.estimates(term, probes).T)
            forms = point.forms(term)
            if forms is not None:
                known.append(fields.known_variance(name, forms, shape))
        self.rows: Array = torch.cat(found).numpy()
        self.variance = Estimate(*(len(found[0]) * each for each in mean_variance(self.rows)))
        self.known: bool | None = None
        if any(known):
            expected, (value, low, high) = float(np.mean(known)), self.variance
            error = max((high - low) / IN_INTERVAL, 1e-9)
            assert abs(value - expected) < STANDARD_ERRORS * error, (term, name, expected)
            self.known = low <= expected <= high


def over_signs(levels: dict[str, dict[str, Measured]], name: str) -> dict[str, object]:
    """Variances of a sampler over those of signs, by level and in sum."""
    rows = {level: (each[name], each["rademacher"]) for level, each in levels.items()}
    sums = [sum(pair[k].variance.value for pair in rows.values()) for k in range(2)]
    ratios = {level: ratio_of_variances(a.rows, b.rows) for level, (a, b) in rows.items()}
    return {**ratios, "sum": sums[0] / sums[1]}


def answer(name: str, choose: Choose) -> dict:
    """Variances on one kind of data, over those of signs."""
    large = "images" in name
    count = choose(1, *(1, 2) if large else (4, 4))
    repeats = choose(400, 500 if large else 1000, 1000 if large else 2000)
    of_term = dict.fromkeys(TERMS, repeats) | {"third": choose(16, 32, 256) if large else repeats}
    generator = torch.Generator().manual_seed(0)
    if name in MIXTURES:
        mixture = MIXTURES[name]()
        std = float(mixture.sample(4096, generator).std())
    else:
        problem = trained(name, choose(5, 300 if name == "images" else None, None))
        mixture, std = None, problem.std
    levels: dict[str, dict[str, dict[str, Measured]]] = {term: {} for term in TERMS}
    d = 0
    for level in tqdm(fields.LEVELS[:: choose(2, 1, 1)], name, leave=False):
        if mixture is None:
            given = level * std, generator
            rows = problem.data[:count]
            points = [fields.network_point(problem.model, row, *given) for row in rows]
        else:
            points = fields.mixture_points(mixture, level * std, count, generator)
        d = len(points[0].jacobian)
        for term, times in of_term.items():
            levels[term][f"{level:g} std"] = {
                sampler: Measured(points, term, sampler, times) for sampler in fields.SAMPLERS
            }
    every = [row for each in levels.values() for rows in each.values() for row in rows.values()]
    known = [row.known for row in every if row.known is not None]
    signs = {
        term: {level: rows["rademacher"].variance.value for level, rows in each.items()}
        for term, each in levels.items()
    }
    over = {
        sampler: {term: over_signs(levels[term], sampler) for term in TERMS}
        for sampler in fields.SAMPLERS
    }
    return {
        name: {
            "elements": d,
            "known": {"inside": sum(known), "all": len(known)},
            "over signs": {"rademacher, absolute": signs, **over},
        }
    }
