"""Paired probes: the mean over all pairs of sign vectors is the exact form, in every engine."""

import itertools

import pytest
import torch

import hosm_losses as hosm
from tests.cases import (
    FUNCTIONS,
    MLP,
    VP,
    Detaches,
    OfX,
    OnceDifferentiable,
    assert_same,
    gradients,
    randomise,
)
from tests.oracles import sign_vectors

WEIGHTS = (1.0, 0.7, 0.3, 0.9)
D = 3


def setting(network=None):
    """A model, and x0, t and noise of two samples."""
    network = network or MLP(D)
    randomise(network)
    x0, noise = torch.randn(2, 2, D)
    given = {"x0": x0, "t": torch.tensor([0.2, 0.7]), "noise": noise}
    return hosm.ScoreModel(network, VP), given


def over_all_pairs(given):
    """Every sample once for each pair of sign vectors."""
    signs = sign_vectors(D)
    chosen = itertools.product(range(len(signs)), repeat=2)
    pairs = torch.stack([signs[list(each)] for each in chosen], 1)
    repeated = {name: part.repeat_interleave(pairs.shape[1], 0) for name, part in given.items()}
    return repeated | {"probe": pairs.repeat(1, len(given["x0"]), 1)}


AVERAGED = hosm.AveragedTargets(torch.randn(4, D).double())
INFORMATION = torch.tensor([[2.5, -1.0, 0.3], [-1.0, 4.0, 0.0], [0.3, 0.0, 1.0]]).double()
TARGETS = [None, AVERAGED]
TARGETS += [hosm.TargetScores(torch.sin, INFORMATION, each) for each in TARGETS]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("engine", ["taylor", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_mean_over_all_pairs_is_the_exact_form(order, engine, targets):
    model, given = setting()
    given["t"].requires_grad_()  # as a learned schedule: what is held fixed is so whole, with σ
    loss, options = FUNCTIONS[order], {"engine": engine, "targets": targets, "weights": WEIGHTS}
    paired = loss(model, **over_all_pairs(given), probes=hosm.Paired(), **options)
    exact = loss(model, **given, probes="exact", **options)
    assert_same(paired, exact, 1e-12)
    leaves = [*model.parameters(), given["t"]]
    assert_same(gradients(paired, leaves), gradients(exact, leaves), 1e-10)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_float32_keeps_the_digits_of_small_terms_at_the_noisy_end(distribution):
    # There D tends to −v, and the squares of order two are 4e-6 of what they are made of.
    network, schedule = MLP(D), hosm.LinearFlowSchedule()
    randomise(network)
    x0, noise, *probe = torch.randn((4, 4, D)).float().unbind()
    probe = torch.stack(probe) if distribution == "gaussian" else torch.stack(probe).sign()
    found = []
    for dtype in (torch.float32, torch.float64):
        model = hosm.ScoreModel(network.to(dtype), schedule, "velocity")
        t = torch.full((4,), 1 - 2**-9, dtype=dtype)
        given = {"t": t, "noise": noise.to(dtype), "probe": probe.to(dtype)}
        found.append(hosm.dsm_terms(model, x0.to(dtype), **given, probes=hosm.Paired()))
    for single, double in zip(*found, strict=True):
        error = (single - double).norm() / double.norm()
        assert float(error.detach()) < 2e-3


@pytest.mark.parametrize("order", [2, 3])
def test_the_network_is_called_once(order):
    """As batch norm sees, and dropout would."""
    norm = torch.nn.BatchNorm1d(D)
    model, given = setting(OfX(torch.nn.Sequential(norm, torch.nn.Linear(D, D), torch.nn.Tanh())))
    FUNCTIONS[order](model, **given, probes=hosm.Paired()).backward()
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.filterwarnings("ignore:engine='auto'")
@pytest.mark.parametrize("function", [Detaches, OnceDifferentiable])
@pytest.mark.parametrize("order", [2, 3])
def test_a_graph_that_is_dropped_is_an_error(function, order):
    function = type("Followed", (function,), {"generate_vmap_rule": True})
    layer = torch.nn.Linear(D, D)
    model = hosm.ScoreModel(lambda x, t: layer(function.apply(x)), VP)
    with pytest.raises(hosm.DerivativeError):
        FUNCTIONS[order](model, torch.randn(2, D), probes=hosm.Paired()).backward()


def test_what_has_no_weight_is_not_taken():
    """Without the second term no pass back is taken at order two, and the terms say so."""
    model, given = setting()
    module = hosm.SecondOrderDSM(model, probes=hosm.Paired(), weights=(1, 0, 0.3))
    _, terms = module(**given, return_terms=True)
    assert terms.second is None
    assert len(terms.trace) == 2
