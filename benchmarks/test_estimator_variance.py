"""Which probes estimate a trace, a Frobenius norm or the third order's term with least variance?

python -m pytest benchmarks/test_estimator_variance.py [--full]

On the exact Jacobian of Gaussian mixtures and on networks trained here, at five noise levels; what
is estimated is said in benchmarks.fields, by what in benchmarks.estimators. Variances that are
known in closed form have to come out, to five standard errors.
"""

import pytest
import torch
from tests.oracles import anisotropic, mixture_noise, ring
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import estimators, fields, intervals
from benchmarks.fields import Point
from benchmarks.trained import trained

TERMS = ("trace", "Frobenius", "third")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
SWEPT = 1.0  # the level at which the number of probes is varied
STANDARD_ERRORS = 5.0
LOOPED = 200  # Hutch++ has no batch of estimates
MIXTURES = {"ring": ring, "mixture": anisotropic}


def measured(
    points: list[Point], term: str, name: str, count: int, repeats: int
) -> tuple[dict, Tensor]:
    """The variance of an estimator, averaged over points; the estimates (points, repeats, m)."""
    generator, shape = torch.Generator().manual_seed(count), points[0].shape
    found, known = [], []
    for point in points:
        probes = estimators.draw(name, repeats, count, shape, generator)
        found.append(point.estimates(term, probes))
        forms = point.forms(term)
        if forms is not None:
            known.append(estimators.known_variance(name, forms, count, shape))
    found = torch.stack(found)
    row = {"variance": intervals.total_variance(found)}
    if known and None not in known:
        row["known"] = sum(known) / len(known)
        error = max(intervals.standard_error_of_variance(found), 1e-9)
        row["standard_errors"] = (row["variance"][0] - row["known"]) / error
        assert abs(row["standard_errors"]) < STANDARD_ERRORS, (term, name, count, row)
    return row, found


def at_level(points: list[Point], term: str, repeats: int) -> dict:
    """Every sampler with one probe, and its variance over that of Rademacher probes."""
    rows, base = {}, None
    for name in estimators.SAMPLERS[:-1]:  # one orthogonal direction is one on the sphere
        rows[name], found = measured(points, term, name, 1, repeats)
        flat = found.movedim(-1, 1).flatten(0, 1)
        base = flat if base is None else base
        rows[name]["over_rademacher"] = intervals.ratio_of_variances(flat, base)
    return rows


def swept(points: list[Point], term: str, repeats: dict[int, int]) -> dict:
    """Every sampler with several numbers of probes."""
    d = len(points[0].jacobian)
    rows = {
        name: {
            str(count): measured(points, term, name, count, times)[0]
            for count, times in repeats.items()
            if estimators.can_draw(name, count, d)
        }
        for name in tqdm(estimators.SAMPLERS, f"probes, {term}", leave=False)
    }
    return rows | (hutchpp(points, repeats) if term == "trace" else {})


def hutchpp(points: list[Point], repeats: dict[int, int]) -> dict:
    """Hutch++ of curvlinops, with the number of products rounded down to a multiple of three."""
    try:
        from curvlinops import hutchpp_trace
    except ImportError:
        return {}
    rows = {}
    for count, times in repeats.items():
        products = count - count % 3
        if not 3 <= products < len(points[0].jacobian):
            continue
        torch.manual_seed(count)
        found = [
            [hutchpp_trace(point.jacobian.float(), products) for _ in range(min(LOOPED, times))]
            for point in points
        ]
        rows[str(products)] = {"variance": intervals.mean_variance(found)}
    return {"Hutch++": rows} if rows else {}


@pytest.mark.parametrize("name", ["ring", "mixture", "digits", "images", "large images"])
def test_estimator_variance(benchmark, choose, name):
    if name == "large images" and not choose(False, False, True):
        pytest.skip("with --full")
    large = "images" in name
    count = choose(1, *(1, 2) if large else (4, 4))
    repeats = choose(400, 500 if large else 1000, 1000 if large else 2000)
    of_term = dict.fromkeys(TERMS, repeats) | {"third": choose(16, 32, 256) if large else repeats}
    counts = COUNTS[:: choose(3, 2, 2 if name == "large images" else 1)]
    flops = choose(1e9, 4e9, 1e10)  # of the products of one number of probes, for one point
    generator = torch.Generator().manual_seed(0)

    def measure() -> dict:
        if name in MIXTURES:
            mixture = MIXTURES[name]()
            std = float(mixture.sample(4096, generator).std())
        else:
            problem = trained(name, choose(5, 300 if name == "images" else None, None))
            mixture, std = None, problem.std
        found: dict = {"points": count, "levels": [], "probes": {}}
        for level in tqdm(fields.LEVELS[:: choose(2, 1, 1)], name, leave=False):
            if mixture is None:
                given = level * std, generator
                rows = problem.data[:count]
                points = [fields.network_point(problem.model, row, *given) for row in rows]
            else:
                points = fields.mixture_points(mixture, level * std, count, generator)
            d = found["elements"] = len(points[0].jacobian)
            samplers = {
                term: {"samplers": at_level(points, term, of_term[term])} for term in TERMS
            }
            found["levels"].append({"level": level, "sigma_hat": level * std, **samplers})
            for term in TERMS[: 2 if large else 3] if level == SWEPT else ():
                products = 2 * d ** (3 if term == "third" else 2)
                least = {k: max(50, min(repeats, int(flops / (k * products)))) for k in counts}
                found["probes"][term] = swept(points, term, least)
        return found

    benchmark.extra_info.update(benchmark.pedantic(measure, rounds=1))


def test_a_network_and_a_closed_form_give_the_same_point():
    mixture, schedule = ring(), hosm.VESchedule(sigma_max=20.0)
    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    (closed,) = fields.mixture_points(mixture, 0.7, 1, generators[0])
    (row,) = mixture.sample(1, generators[1])
    network = fields.network_point(model, row, 0.7, generators[1])
    v = torch.randn(5, 2, dtype=torch.float64)
    for ours, expected in (
        (network.jacobian, closed.jacobian),
        (network.second, closed.second),
        (network.third(v), closed.third(v)),
        (network.thirds, closed.thirds),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
