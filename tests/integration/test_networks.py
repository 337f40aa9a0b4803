"""Networks of other packages: terms and parameter gradients of both orders, in every engine."""

import itertools

import pytest
import torch

import hosm_losses as hosm
from tests.integration.measure import (
    ENGINES,
    ORDERS,
    TOLERANCE,
    arguments,
    gradient,
    outcome,
    reference_of,
)
from tests.integration.networks import NETWORKS
from tests.integration.reference import relative_error

# That another engine runs is one of the verdicts.
pytestmark = pytest.mark.filterwarnings("ignore:derivative='auto'")


@pytest.fixture(params=list(NETWORKS))
def name(request, need):
    need(NETWORKS[request.param].module)
    return request.param


def takes(name, engine, order):
    return (engine, order) not in NETWORKS[name].refused


def taken(engines=ENGINES, orders=ORDERS):
    """(name, engine, order) of what is not refused."""
    every = itertools.product(NETWORKS, engines, orders)
    return pytest.mark.parametrize(
        ("name", "engine", "order"), [case for case in every if takes(*case)]
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_parameter_gradients_are_right_or_refused(name, engine, order):
    found = outcome(name, engine, order)
    if takes(name, engine, order):
        assert found.raised is None, found.raised
        assert found.error < TOLERANCE[NETWORKS[name].dtype]
    else:
        kind, words = NETWORKS[name].refused[engine, order]
        with pytest.raises(kind, match=words):
            raise found.raised or AssertionError(f"not refused; error {found.error}")


@taken(engines=["auto"])
def test_float32_is_near(need, name, engine, order):
    """As it is used: in float32, with the casts of the package."""
    need(NETWORKS[name].module)
    found = outcome(name, engine, order, dtype=torch.float32)
    assert found.raised is None, found.raised
    assert found.error < TOLERANCE[torch.float32]


@taken()
def test_terms_are_right(need, name, engine, order):
    need(NETWORKS[name].module)
    dtype = NETWORKS[name].dtype
    model = NETWORKS[name].score_model()
    given = arguments(name, dtype)
    terms = hosm.dsm_terms(model, order=order, derivative=engine, **given)
    for got, expected in zip(terms[: order + 1], reference_of(name).terms, strict=False):
        assert relative_error(got, expected) < TOLERANCE[dtype]
    assert (terms.third is None) == (order == 2)


@taken(orders=[3])
def test_several_probes_are_the_mean_of_single_ones(need, name, engine, order):
    """With conditions that follow their samples."""
    need(NETWORKS[name].module)
    model = NETWORKS[name].score_model()
    weights = reference_of(name).weights
    given = arguments(name, torch.float64, probes=3)
    together = gradient(model, given, order, engine, weights)
    singly = [
        gradient(model, {**given, "probe": probe}, order, engine, weights)
        for probe in given["probe"]
    ]
    assert relative_error(together, torch.stack(singly).mean(0)) < 1e-9
