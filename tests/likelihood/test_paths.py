"""The divergence against dense Jacobians, and Student's factor."""

import copy

import mpmath
import pytest
import torch

import hosm_losses as hosm
from hosm_losses import probes as probes_of
from hosm_losses.likelihood.adaptive import student_factor
from hosm_losses.likelihood.divergence import resolve_divergence
from hosm_losses.model import bind_model
from tests.cases import VP, Largest, networks
from tests.oracles import dense_derivatives, sign_vectors


@pytest.mark.parametrize("freedom", [3, 4, 7, 15, 63])
def test_widened_twice_the_error_covers_what_the_normal_law_says(freedom):
    def density(t):
        return (1 + t**2 / freedom) ** (-(freedom + 1) / 2)

    end = 2 * student_factor(freedom)
    inside, all_of_it = (mpmath.quad(density, [0, 1, bound]) for bound in (end, mpmath.inf))
    assert float(inside / all_of_it) == pytest.approx(float(mpmath.erf(mpmath.sqrt(2))), abs=2e-4)


T = torch.tensor([0.3, 0.6], dtype=torch.float64)


def traces(network, x):
    """In its own words the network has operators that vmap need not know."""
    network = copy.deepcopy(network)
    network.by_hand = True

    def trace(row):
        return dense_derivatives(lambda p: -network(p[None], T[row : row + 1])[0], x[row])[
            1
        ].trace()

    return torch.stack([trace(row) for row in range(len(x))])


@pytest.mark.parametrize(("name", "chunk"), [("conv", 1), ("attention", 30), ("mlp", 2**22)])
def test_the_divergence_is_the_trace_in_one_call(name, chunk, monkeypatch):
    """By unit vectors in chunks of any size, and in the mean over all vectors of signs."""
    monkeypatch.setattr(probes_of, "CHUNK_ELEMENTS", chunk)
    (network, shape), calls = networks()[name], []

    def counted(x, t):
        calls.append(len(x))
        return network(x, t)

    bound, x = bind_model(hosm.ScoreModel(counted, VP), 2, t=T), torch.randn(2, *shape)
    value, samples = resolve_divergence("exact", x).estimate(bound, x, None)
    torch.testing.assert_close(samples, traces(network, x)[None], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(value, -network(x, T))
    if name == "mlp":
        signs = sign_vectors(3)[:, None].expand(8, 2, 3)
        value, samples = resolve_divergence(hosm.Hutchinson(8), x).estimate(bound, x, signs)
        torch.testing.assert_close(samples.mean(0), traces(network, x))
        torch.testing.assert_close(value, -network(x, T))
        calls.pop()
    assert calls == [2]


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_each_probe_has_its_quadratic_form(prediction):
    """Of f and not of the prediction alone: x has a part in both, which goes with ‖v‖²."""
    model = hosm.ScoreModel(networks()["mlp"][0], VP, prediction)
    bound, x, v = bind_model(model, 2, t=T), torch.randn(2, 3), torch.randn(5, 2, 3)
    estimator = resolve_divergence(hosm.Hutchinson(5, "gaussian"), x)
    jacobian = torch.autograd.functional.jacobian(lambda points: bound.f(points).sum(0), x)
    _, samples = estimator.estimate(bound, x, v)
    torch.testing.assert_close(samples, torch.einsum("kbi,ibj,kbj->kb", v, jacobian, v))


def test_sums_are_kept_in_double_precision():
    network = networks()["mlp"][0].float()
    bound, x = bind_model(hosm.ScoreModel(network, VP), 2, t=T.float()), torch.randn(2, 3).float()
    for divergence, probes in (("exact", None), (hosm.Hutchinson(), x[None])):
        value, samples = resolve_divergence(divergence, x).estimate(bound, x, probes)
        assert (value.dtype, samples.dtype) == (torch.float32, torch.float64)


def test_exact_makes_its_unit_vectors_when_they_are_due(monkeypatch):
    """Nothing is larger than a chunk; with x² for x₀ the trace of σ ε̂ is d − 2 α Σ x."""
    d, chunk = 1000, 4
    monkeypatch.setattr(probes_of, "CHUNK_ELEMENTS", chunk * d)
    model, x, t = hosm.ScoreModel(lambda x, t: x**2, VP, "x0"), torch.randn(1, d), T[:1]
    with Largest() as largest, torch.no_grad():
        bound = bind_model(model, 1, t=t)
        _, samples = resolve_divergence("exact", x).estimate(bound, x, None)
    assert largest.elements <= chunk * d
    alpha, sigma = VP(t)
    torch.testing.assert_close(samples, ((2 * alpha * x.sum(1) - d) / sigma)[None])
