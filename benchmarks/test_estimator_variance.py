"""Which probes estimate a trace, a Frobenius norm or the third order's term with least variance?

python -m pytest benchmarks/test_estimator_variance.py [--full]

On the exact Jacobian of Gaussian mixtures and on networks trained here, at five noise levels; what
is estimated is said in benchmarks.fields, by what in benchmarks.estimators. Variances that are
known in closed form have to come out, to five standard errors.
"""

from typing import NamedTuple

import pytest
import torch
from tests.oracles import anisotropic, mixture_noise, ring
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import estimators, fields, intervals
from benchmarks.trained import trained

TERMS = ("trace", "Frobenius", "third")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
SWEPT = 1.0  # the level at which the number of probes is varied
BUDGETS = (1e9, 4e9, 1e10)  # FLOPs of the products of one number of probes, for one point
STANDARD_ERRORS = 5.0
LOOPED = 200  # Hutch++ has no batch of estimates


class Limits(NamedTuple):
    """How often to estimate: at most `most` times, fewer where that costs more than `flops`."""

    most: int
    flops: float

    def repeats(self, products: int) -> int:
        """For an estimate of so many products, 50 or more."""
        return max(50, min(self.most, int(self.flops / (2 * products))))


def dense_forms(point: fields.Point, term: str) -> Tensor | None:
    """The symmetric forms (m, d, d) of a term, None where they are not built."""
    if term == "third":
        return point.forms
    matrix = point.second.T @ point.second if term == "Frobenius" else point.jacobian
    return fields.symmetric(matrix)[None]


def estimates(point: fields.Point, term: str, probes: Tensor) -> Tensor:
    """What probes (repeats, K, d) estimate, (repeats, m): the mean over K."""
    flat = probes.flatten(0, 1)
    if term == "third":
        found = point.third(flat)
    else:
        product = flat @ (point.jacobian if term == "trace" else point.second).T.float()
        found = (flat * product if term == "trace" else product.square()).sum(1, keepdim=True)
    return found.double().unflatten(0, probes.shape[:2]).mean(1)


def measured(
    points: list[fields.Point], term: str, name: str, count: int, repeats: int
) -> tuple[dict, Tensor]:
    """The variance of an estimator, averaged over points; the estimates (points, repeats, m)."""
    generator = torch.Generator().manual_seed(count)
    shape = points[0].shape
    found = torch.stack(
        [
            estimates(point, term, estimators.draw(name, repeats, count, shape, generator))
            for point in points
        ]
    )
    row = {"variance": intervals.total_variance(found)}
    forms = [dense_forms(point, term) for point in points]
    known = [
        None if form is None else estimators.known_variance(name, form, count, shape)
        for form in forms
    ]
    if None not in known:
        row["known"] = sum(known) / len(known)
        error = intervals.standard_error_of_variance(found)
        row["standard_errors"] = (row["variance"][0] - row["known"]) / max(error, 1e-9)
    return row, found


def at_level(points: list[fields.Point], term: str, repeats: int, bar: tqdm) -> dict:
    """Every sampler with one probe, and its variance over that of Rademacher probes."""
    rows, base = {}, None
    for name in estimators.SAMPLERS[:-1]:  # one orthogonal direction is one on the sphere
        rows[name], found = measured(points, term, name, 1, repeats)
        flat = found.movedim(-1, 1).flatten(0, 1)
        base = flat if base is None else base
        rows[name]["over_rademacher"] = intervals.ratio_of_variances(flat, base)
        bar.update()
    return rows


def exact_size(points: list[fields.Point], term: str) -> float:
    """Root mean square over points of what is estimated."""
    sums = {
        "trace": lambda point: point.jacobian.trace(),
        "Frobenius": lambda point: point.second.square().sum(),
        "third": lambda point: point.third(torch.eye(point.elements)).sum(0).norm(),
    }
    values = torch.stack([sums[term](point).double() for point in points])
    return float(values.square().mean().sqrt())


def swept(points: list[fields.Point], term: str, counts, limits: Limits, bar: tqdm) -> dict:
    """Every sampler with several numbers of probes."""
    rows: dict[str, dict] = {}
    d, square = points[0].elements, points[0].elements ** (3 if term == "third" else 2)
    for name in estimators.SAMPLERS:
        for count in counts:
            if estimators.can_draw(name, count, d):
                row, _ = measured(points, term, name, count, limits.repeats(count * square))
                rows.setdefault(name, {})[str(count)] = row
            bar.update()
    return rows


def swept_hutchpp(points: list[fields.Point], counts, limits: Limits, bar: tqdm) -> dict:
    """Hutch++, with the number of products rounded down to a multiple of three."""
    trace, rows = estimators.hutchpp(), {}
    for count in counts:
        products = count - count % 3
        if trace is None or not 3 <= products < points[0].elements:
            continue
        repeats = min(LOOPED, limits.repeats(count * points[0].elements ** 2))
        with torch.random.fork_rng():
            torch.manual_seed(count)
            found = torch.stack(
                [
                    torch.stack([trace(point.jacobian.float(), products) for _ in range(repeats)])
                    for point in points
                ]
            )
        rows[str(products)] = {"variance": intervals.total_variance(found[..., None])}
        bar.update()
    return {estimators.HUTCHPP: rows} if rows else {}


class Problem:
    """Points at a noise level."""

    def __init__(self, name: str, choose) -> None:
        self.name, self.generator = name, torch.Generator().manual_seed(0)
        self.count = choose(1, *(1, 2) if "images" in name else (4, 4))
        self.mixture = {"ring": ring, "mixture": anisotropic}.get(name, lambda: None)()
        if self.mixture is None:
            self.trained = trained(name, *choose((5,), (300,) if name == "images" else (), ()))
            self.std = self.trained.std
        else:
            self.std = float(self.mixture.sample(4096, self.generator).std())

    def points(self, level: float) -> list[fields.Point]:
        sigma_hat = level * self.std
        if self.mixture is None:
            rows = self.trained.data[: self.count]
            return fields.network_points(
                self.trained.model.eval(), rows, sigma_hat, self.generator
            )
        return fields.mixture_points(self.mixture, sigma_hat, self.count, self.generator)


@pytest.mark.parametrize("name", ["ring", "mixture", "digits", "images", "large images"])
def test_estimator_variance(benchmark, choose, name):
    if name == "large images" and not choose(False, False, True):
        pytest.skip("with --full")
    large = "images" in name
    repeats = choose(400, 500 if large else 1000, 1000 if large else 2000)
    limits = Limits(repeats, choose(*BUDGETS))
    thirds = choose(16, 32, 256) if large else repeats
    counts = COUNTS[:: choose(3, 2, 2 if name == "large images" else 1)]

    def measure() -> dict:
        problem = Problem(name, choose)
        levels, bar = fields.LEVELS[:: choose(2, 1, 1)], tqdm(desc=name, leave=False)
        found: dict = {"elements": 0, "points": problem.count, "levels": [], "probes": {}}
        for level in levels:
            points = problem.points(level)
            found["elements"] = points[0].elements
            row: dict = {"level": level, "sigma_hat": level * problem.std}
            for term in TERMS:
                size = None if term == "third" and large else exact_size(points, term)
                rows = at_level(points, term, thirds if term == "third" else repeats, bar)
                row[term] = {"size": size, "samplers": rows}
            found["levels"].append(row)
            if level == SWEPT:
                for term in TERMS[: 2 if large else 3]:
                    found["probes"][term] = swept(points, term, counts, limits, bar)
                found["probes"]["trace"] |= swept_hutchpp(points, counts, limits, bar)
        bar.close()
        return found

    found = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(found)
    scores = [score for _, score in standard_errors(found)]
    assert scores
    assert max(map(abs, scores)) < STANDARD_ERRORS


def standard_errors(found: dict) -> list[tuple[dict, float]]:
    """Every row whose variance is known, with how many standard errors it is off."""
    rows = [
        row
        for level in found["levels"]
        for term in TERMS
        for row in level[term]["samplers"].values()
    ]
    rows += [
        row
        for samplers in found["probes"].values()
        for each in samplers.values()
        for row in each.values()
    ]
    return [(row, row["standard_errors"]) for row in rows if "known" in row]


def test_a_network_and_a_closed_form_give_the_same_point():
    mixture, schedule = ring(), hosm.VESchedule(sigma_max=20.0)
    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    (closed,) = fields.mixture_points(mixture, 0.7, 1, generators[0])
    data = mixture.sample(1, generators[1])
    (network,) = fields.network_points(model, data, 0.7, generators[1])
    v = torch.randn(5, 2, dtype=torch.float64)
    for ours, expected in (
        (network.jacobian, closed.jacobian),
        (network.second, closed.second),
        (network.third(v), closed.third(v)),
        (network.forms, closed.forms),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
