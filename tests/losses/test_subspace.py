"""Losses on a subspace are those in its coordinates, with their gradients."""

import math

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.probes import draw_probes
from tests.cases import FUNCTIONS, assert_same, with_gradients
from tests.subspaces import CASES, PARTICLES, centred, masked, pair

KINDS = {
    "one": {"probes": 1},
    "three": {"probes": 3},
    "exact": {"probes": "exact"},
    "paired": {"probes": hosm.Paired(3)},
    "reverse": {"probes": 2, "engine": "reverse"},
    "fraction": {"probes": 2, "fraction": 0.5},
}


def inputs(model, Q, count=4, probes=0, shape=PARTICLES):
    """Inputs off the subspace but for x0, and the same in coordinates."""
    generator = torch.Generator().manual_seed(3)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    schedule = model.schedule
    unit = torch.rand(count, generator=generator, dtype=torch.float64)
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * (0.1 + 0.8 * unit)
    y, noise, v = normal(count, Q.shape[1]), normal(count, *shape), normal(probes, count, *shape)
    whole = {"t": t, "noise": noise} | ({"probe": v} if probes else {})
    coordinates = {"t": t, "noise": noise.flatten(1) @ Q}
    coordinates |= {"probe": v.flatten(2) @ Q} if probes else {}
    return ((y @ Q.T).reshape(count, *shape), whole), (y, coordinates)


def assert_equal(order, models, both, **options):
    results = []
    for model, (x0, given) in zip(models, both, strict=True):
        torch.manual_seed(0)
        results.append(with_gradients(FUNCTIONS[order](model, x0, **given, **options), model))
    assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_losses_are_those_in_coordinates(schedule, prediction, kind):
    on_subspace, small, Q = pair(schedule, prediction)
    options, models = dict(KINDS[kind]), (on_subspace, small)
    count = 0 if options["probes"] == "exact" else getattr(options["probes"], "count", 0)
    count = count or (options["probes"] if isinstance(options["probes"], int) else 0)
    if kind == "one":
        assert_equal(1, models, inputs(small, Q))
    for order in (2, 3):
        given = inputs(small, Q, probes=count)
        assert_equal(order, models, given, weights=(1, 2, 3, 4), **options)


WEIGHTINGS = {
    "likelihood": "likelihood",
    "native": "native",
    "EDM": hosm.EDMWeighting(),
    "callable": lambda t: 1 + t,
}


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_weightings_and_default_weights_count_the_dimensions_of_the_subspace(weighting):
    """Two particles in the plane, of which 2 dimensions of 4 are left: 0.1 d² is below 1."""
    shape = (2, 2)
    *models, Q = pair("flow", "velocity", shape=shape)
    for order, weights in ((1, None), (2, "paper"), (3, "paper-toy"), (3, None)):
        own = {} if order == 1 else {"weights": weights}
        own = {"weights": "paper"} if order > 1 and weighting == "likelihood" else own
        probes = 2 * (order > 1)
        both = inputs(models[1], Q, probes=probes, shape=shape)
        assert_equal(order, models, both, weighting=weighting, **own)
    drawn = [(x0, {"noise": given["noise"]}) for x0, given in inputs(models[1], Q, shape=shape)]
    for sampler in ("schedule", "log_sigma_hat"):
        assert_equal(1, models, drawn, weighting=weighting, time_sampler=sampler)


@pytest.mark.parametrize("probes", [2, hosm.Paired(3, "gaussian"), hosm.Hutchinson(2, "sphere")])
def test_what_is_drawn_is_projected_like_what_is_given(probes):
    model, small, Q = pair()
    (x0, _), _ = inputs(small, Q)
    torch.manual_seed(5)
    drawn = hosm.third_order_dsm(model, x0, probes=probes)
    torch.manual_seed(5)
    t = model.schedule.sample_time(len(x0), dtype=torch.float64)
    noise = centred(torch.randn_like(x0))
    kind = hosm.Hutchinson(probes) if isinstance(probes, int) else probes
    v = draw_probes(x0, kind.count, kind.distribution)
    v = centred(v.flatten(0, 1)).reshape(v.shape)
    count = hosm.Paired(3) if isinstance(probes, hosm.Paired) else 1
    assert_same(hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=v, probes=count), drawn)


def scores_in(Q, project=centred):
    """A score of data on the subspace with a part outside, and the same in coordinates."""

    def score(y):
        return -torch.tanh(y) - 0.5 * y

    def whole(x):
        y = x.flatten(1) @ Q
        junk = torch.exp(x)
        return (score(y) @ Q.T).reshape(x.shape) + junk - project(junk)

    return whole, score


def targets_for(Q, reference):
    """Pairs of targets on the subspace and in coordinates."""
    (whole, score), r = scores_in(Q), Q.shape[1]
    factor = torch.randn(r, r, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    information = factor @ factor.T
    large = (reference @ Q.T).reshape(-1, *PARTICLES)
    averaged = hosm.AveragedTargets(large + 0.3), hosm.AveragedTargets(reference)
    yield hosm.AveragedTargets(), hosm.AveragedTargets()
    yield averaged
    for own in ((None, None), averaged):
        for number in (0.8, math.inf):
            yield tuple(
                hosm.TargetScores(each, number, target)
                for each, target in zip((whole, score), own, strict=True)
            )
        yield (
            hosm.TargetScores(whole, Q @ information @ Q.T, own[0]),
            hosm.TargetScores(score, information, own[1]),
        )


@pytest.mark.parametrize("probes", [2, "exact", hosm.Paired()])
def test_averages_and_scores_of_the_data_are_those_in_coordinates(probes):
    *models, Q = pair("vp", "v")
    generator = torch.Generator().manual_seed(2)
    reference = torch.randn(9, Q.shape[1], generator=generator, dtype=torch.float64)
    for targets in targets_for(Q, reference):
        given = inputs(models[1], Q, probes=0 if probes == "exact" else 2)
        given = [
            (x0, own | {"targets": target})
            for (x0, own), target in zip(given, targets, strict=True)
        ]
        assert_equal(3, models, given, probes=probes)


@pytest.mark.parametrize("information", [None, "numbers"])
def test_information_by_element_is_that_in_coordinates_of_padded_data(information):
    """The coordinates of a mask are elements themselves."""
    model, small, Q = pair("flow", "x0", project=masked)
    whole, score = scores_in(Q, masked)
    values = None
    if information is not None:
        values = torch.linspace(0.5, 2, 6, dtype=torch.float64).reshape(3, 2)
    own = None if values is None else (values.reshape(6) @ Q.square())
    targets = hosm.TargetScores(whole, values), hosm.TargetScores(score, own)
    given = [
        (x0, tensors | {"targets": target})
        for (x0, tensors), target in zip(inputs(small, Q, probes=2), targets, strict=True)
    ]
    assert_equal(3, (model, small), given, probes=2)


@pytest.mark.parametrize("information", [None, "numbers"])
def test_information_by_element_leaves_the_conditional_means_on_the_subspace(information):
    """C = P (I + σ̂² F)⁻¹ P, which is a matrix in coordinates."""
    model, small, Q = pair()
    (x0, given), (y, coordinates) = inputs(small, Q, probes=2)
    whole, score = scores_in(Q)
    values = torch.linspace(0.5, 2, 6, dtype=torch.float64).reshape(3, 2)
    targets = hosm.TargetScores(whole, values if information else None)
    alpha, sigma = model.schedule(given["t"])
    eps = centred(given["noise"])
    moments = targets.posterior(x0, eps, alpha, sigma, {}, model.project)
    g = score(y)
    squares = (g @ Q.T).square() if information is None else values.reshape(1, 6)
    F = (squares.sum(0) - squares) / 3 if information is None else squares.expand(4, 6)
    sigma_hat = (sigma / alpha)[:, None]
    C = torch.einsum("ir,bi,is->brs", Q, 1 / (1 + sigma_hat.square() * F), Q)
    z = coordinates["noise"] + sigma_hat * g
    c = torch.einsum("brs,bs->br", C, z)
    assert_same(moments.mean, -(c @ Q.T))
    v = given["probe"].flatten(2) @ Q
    C2v, _ = moments.along(v @ Q.T, (0 * v) @ Q.T, third=False)
    assert_same(C2v, torch.einsum("brs,kbs->kbr", C, v) @ Q.T)


def test_a_tensor_of_targets_and_the_terms_of_modules():
    *models, Q = pair("ve", "x0")
    teacher = torch.randn(4, *PARTICLES, dtype=torch.float64)
    both = inputs(models[1], Q)
    for (_, given), target in zip(both, (teacher, teacher.flatten(1) @ Q), strict=True):
        given["targets"] = target
    assert_equal(1, models, both)
    both = inputs(models[1], Q, probes=2)
    terms = [
        hosm.ThirdOrderDSM(model, weights="paper-toy")(x0, **given, return_terms=True)
        for model, (x0, given) in zip(models, both, strict=True)
    ]
    assert_same(terms[0][0], terms[1][0])
    assert_same(tuple(terms[0][1]), tuple(terms[1][1]))


def test_data_off_the_subspace_are_an_error_with_the_remedy():
    model, _, _ = pair()
    x0 = torch.randn(4, *PARTICLES, dtype=torch.float64)
    for loss in FUNCTIONS.values():
        with pytest.raises(ValueError, match=r"x0: expected samples on .* Pass model.project\(x0"):
            loss(model, x0)
    assert hosm.third_order_dsm(model, model.project(x0)).isfinite()
    rounded = centred(1000 + x0.float()) - 0  # of positions far from the origin
    rounded = rounded.double()
    assert hosm.first_order_dsm(model, rounded).isfinite()
