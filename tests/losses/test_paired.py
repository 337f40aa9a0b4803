"""Paired probes: the mean over all pairs of sign vectors is the exact form, in every engine."""

import itertools

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives import ENGINES
from tests.oracles import (
    MLP,
    Detaches,
    OnceDifferentiable,
    networks,
    randomise,
    sign_vectors,
)

ORDERS = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}
WEIGHTS = (1.0, 0.7, 0.3, 0.9)
D = 3


def setting(prediction="epsilon", network=None):
    """A model, and x0, t and noise of two samples."""
    network = network or MLP(D)
    randomise(network)
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn((2, 2, D), generator=generator).unbind()
    return (
        hosm.ScoreModel(network, hosm.VPSchedule(), prediction=prediction),
        {"x0": x0, "t": torch.tensor([0.2, 0.7]), "noise": noise},
    )


def over_all_pairs(given, pairs):
    """Every sample once for each pair of probes, (K, pairs, d), and the probes."""
    count = pairs.shape[1]
    repeated = {name: part.repeat_interleave(count, 0) for name, part in given.items()}
    return repeated | {"probe": pairs.repeat(1, len(given["x0"]), 1)}


def all_pairs():
    signs = sign_vectors(D)
    chosen = itertools.product(range(len(signs)), repeat=2)
    return torch.stack([signs[list(each)] for each in chosen], 1)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def assert_same_objective(model, loss, expected):
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    pairs = zip(gradients(model, loss), gradients(model, expected), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("order", "options"),
    [
        *[(order, {"derivative": name}) for order in (2, 3) for name in ENGINES[1:]],
        (3, {"derivative": "taylor", "third": "laplacian"}),
    ],
)
def test_the_mean_over_all_pairs_is_the_exact_form(order, options):
    model, given = setting()
    options["weights"] = WEIGHTS
    paired = ORDERS[order](
        model, **over_all_pairs(given, all_pairs()), estimator="paired", **options
    )
    assert_same_objective(model, paired, ORDERS[order](model, **given, probes="exact", **options))


@pytest.mark.parametrize("third", ["exact", "laplacian"])
def test_times_have_the_gradient_of_the_exact_form(third):
    """As a learned schedule has, through σ: what is held fixed is so whole."""
    model, given = setting()
    given["t"].requires_grad_()
    options = {"third": third, "weights": WEIGHTS}
    paired = hosm.third_order_dsm(
        model, **over_all_pairs(given, all_pairs()), estimator="paired", **options
    )
    exact = hosm.third_order_dsm(model, **given, probes="exact", **options)
    found, wanted = (torch.autograd.grad(loss, given["t"])[0] for loss in (paired, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction", ["score", "sample", "v_prediction", "flow_prediction"])
def test_every_prediction(prediction):
    model, given = setting(prediction)
    if prediction == "flow_prediction":
        model = hosm.ScoreModel(model.network, hosm.LinearFlowSchedule(), prediction=prediction)
    paired = hosm.third_order_dsm(model, **over_all_pairs(given, all_pairs()), estimator="paired")
    assert_same_objective(model, paired, hosm.third_order_dsm(model, **given, probes="exact"))


@pytest.mark.parametrize("count", [3, 4, 5])
def test_more_probes_are_two_halves(count):
    """Each term is bilinear in the estimates, so halves are the mean over the pairs across."""
    model, given = setting()
    probe = torch.randn(count, 2, D)
    terms = hosm.dsm_terms(model, **given, probe=probe, estimator="paired")
    across = [
        hosm.dsm_terms(model, **given, probe=probe[[one, other]], estimator="paired")
        for one in range(count // 2)
        for other in range(count // 2, count)
    ]
    for name in ("trace", "third"):
        mean = torch.stack([getattr(each, name) for each in across]).mean(0)
        torch.testing.assert_close(getattr(terms, name), mean)
    assert terms.second.shape == (2,)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_float32_keeps_the_digits_of_small_terms_at_the_noisy_end(distribution):
    # There D tends to −v, and the squares of order two are 4e-6 of what they are made of.
    network, schedule = MLP(D), hosm.LinearFlowSchedule()
    randomise(network)
    x0, noise, *probe = torch.randn((4, 4, D)).float().unbind()
    probe = torch.stack(probe) if distribution == "gaussian" else torch.stack(probe).sign()
    found = []
    for dtype in (torch.float32, torch.float64):
        model = hosm.ScoreModel(network.to(dtype), schedule, "flow_prediction")
        t = torch.full((4,), 1 - 2**-9, dtype=dtype)
        given = {"t": t, "noise": noise.to(dtype), "probe": probe.to(dtype)}
        found.append(hosm.dsm_terms(model, x0.to(dtype), **given, estimator="paired"))
    for single, double in zip(*found, strict=True):
        error = (single - double).norm() / double.norm()
        assert float(error.detach()) < 2e-3


def test_the_forms_with_the_parts_of_dense_arrays():
    """Values along two given probes, term by term, from a dense Jacobian and its derivative."""
    model, given = setting()
    probe = torch.randn(2, 2, D)
    terms = hosm.dsm_terms(model, **given, probe=probe, estimator="paired")
    alpha, sigma = model.schedule(given["t"])
    x = alpha[:, None] * given["x0"] + sigma[:, None] * given["noise"]
    for row in range(2):

        def field(point, row=row):
            return -model(point[None], given["t"][row : row + 1])[0]

        f, a = field(x[row]), sigma[row] * torch.func.jacrev(field)(x[row])
        second = sigma[row] ** 2 * torch.func.hessian(field)(x[row])
        ell = f + given["noise"][row]
        square = ell @ ell
        traces, vectors, seconds = [], [], []
        for v in probe[:, row]:
            traces.append(v @ a @ v + D - square)
            gradient = torch.einsum("ijk,i,j->k", second, v, v)
            vectors.append(gradient + (square - v @ a @ v - D) * ell - 2 * (a @ ell + ell))
            seconds.append((a @ v).square().sum() + 2 * v @ a @ v)
        of_second = sum(seconds) / 2 - 2 * ell @ a @ ell + D - 2 * square + square**2
        torch.testing.assert_close(terms.second[row], of_second / D**2)
        torch.testing.assert_close(terms.trace[row], traces[0] * traces[1] / D**2)
        torch.testing.assert_close(terms.third[row], vectors[0] @ vectors[1] / D**3)


class Counting(nn.Module):
    """Counts its calls; dropout and batch norm would see x as often."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x, t):
        self.calls += 1
        return self.network(self.norm(x), t)


@pytest.mark.parametrize("order", [2, 3])
def test_the_network_is_called_once(order):
    network = Counting(MLP(D))
    model, given = setting(network=network)
    ORDERS[order](model, **given, estimator="paired").backward()
    assert network.calls == 1
    assert int(network.norm.num_batches_tracked) == 1


@pytest.mark.parametrize("name", networks())
def test_every_kind_of_network_and_no_grad(name):
    """Taylor and reverse mode agree in values and gradients; without gradients values stay."""
    network, shape = networks()[name]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x0, probe = torch.randn(2, *shape), torch.randn(2, 2, *shape)
    given = {"t": torch.tensor([0.3, 0.6]), "noise": torch.randn(2, *shape), "probe": probe}
    losses = [
        hosm.third_order_dsm(model, x0, **given, estimator="paired", derivative=engine)
        for engine in ("taylor", "reverse")
    ]
    assert_same_objective(model, *losses)
    with torch.no_grad():
        without = hosm.third_order_dsm(model, x0, **given, estimator="paired")
    assert not without.requires_grad
    torch.testing.assert_close(without, losses[0].detach())


@pytest.mark.parametrize("order", [2, 3])
def test_fractions_and_transforms(order):
    model, given = setting()
    rows = {name: part.repeat_interleave(3, 0) for name, part in given.items()}
    rows |= {"probe": torch.randn(2, 6, D), "estimator": "paired"}
    whole = ORDERS[order](model, **rows)
    quarter = ORDERS[order](
        model, **rows, fraction=0.5, generator=torch.Generator().manual_seed(0)
    )
    chosen = torch.randperm(6, generator=torch.Generator().manual_seed(0))[:3]
    terms = hosm.dsm_terms(model, **rows, order=order)
    expected = terms.first.mean() + sum(term[chosen].mean() for term in terms[1 : order + 1])
    torch.testing.assert_close(quarter, expected)
    parameters = dict(model.named_parameters())

    def function(parameters):
        return torch.func.functional_call(_Loss(model, order), _named(parameters), kwargs=rows)

    found = torch.func.grad(function)(parameters)
    for name, wanted in zip(parameters, gradients(model, whole), strict=True):
        torch.testing.assert_close(found[name], wanted)


class _Loss(nn.Module):
    def __init__(self, model, order):
        super().__init__()
        self.model, self.order = model, order

    def forward(self, **given):
        return ORDERS[self.order](self.model, **given)


def _named(parameters):
    return {f"model.{name}": value for name, value in parameters.items()}


@pytest.mark.filterwarnings("ignore:derivative='auto'")
@pytest.mark.parametrize("function", [Detaches, OnceDifferentiable])
@pytest.mark.parametrize("order", [2, 3])
def test_a_graph_that_is_dropped_is_an_error(function, order):

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = MLP(D)

        def forward(self, x, t):
            return self.network(function.apply(x), t)

    function = type("Followed", (function,), {"generate_vmap_rule": True})
    model, given = setting(network=Network())
    with pytest.raises(hosm.DerivativeError):
        ORDERS[order](model, **given, estimator="paired").backward()


def test_what_has_no_weight_is_not_taken():
    """Without the second term no pass back is taken at order two, and the terms say so."""
    model, given = setting()
    module = hosm.SecondOrderDSM(model, estimator="paired", weights=(1, 0, 0.3))
    loss, terms = module(**given, probe=(probe := torch.randn(2, 2, D)), return_terms=True)
    assert terms.second is None
    whole = hosm.dsm_terms(model, **given, probe=probe, order=2, estimator="paired")
    torch.testing.assert_close(loss, whole.first.mean() + 0.3 * whole.trace.mean())


def test_two_probes_are_the_default():
    model, given = setting()
    drawn = hosm.dsm_terms(
        model, **given, estimator="paired", generator=torch.Generator().manual_seed(3)
    )
    probe = hosm.probes.draw_probes(given["x0"], 2, generator=torch.Generator().manual_seed(3))
    again = hosm.dsm_terms(model, **given, estimator="paired", probe=probe)
    torch.testing.assert_close(drawn.third, again.third)
