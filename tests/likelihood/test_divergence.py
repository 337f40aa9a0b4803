"""Exact and estimated divergence against dense Jacobians, with one forward pass."""

import copy

import pytest
import torch

import hosm_losses.likelihood.divergence
from hosm_losses import ScoreModel, VPSchedule
from hosm_losses.likelihood.divergence import accumulator, exact_divergence, hutchinson_divergence
from hosm_losses.model import noise_field
from tests.oracles import Largest, dense_derivatives, networks, sign_vectors

T = torch.tensor([0.3, 0.6])


def setting(name):
    network, shape = networks()[name]
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return network(x, t)

    return (
        network,
        noise_field(ScoreModel(counted, VPSchedule()), T),
        torch.randn(2, *shape),
        calls,
    )


def traces(network, x):
    """In its own words the network has operators that vmap need not know."""
    network = copy.deepcopy(network)
    network.by_hand = True
    return torch.stack(
        [
            dense_derivatives(lambda p, r=row: -network(p[None], T[r : r + 1])[0], x[row])[
                1
            ].trace()
            for row in range(len(x))
        ]
    )


@pytest.mark.parametrize("chunk", [1, 30, 2**22])
@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_exact_is_the_trace_in_chunks_of_any_size(name, chunk, monkeypatch):
    monkeypatch.setattr(hosm_losses.likelihood.divergence, "CHUNK_ELEMENTS", chunk)
    network, field, x, calls = setting(name)
    value, samples = exact_divergence(field, x)
    assert calls == [2]
    torch.testing.assert_close(samples, traces(network, x)[None], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(value, -network(x, T))


def test_all_signs_average_to_the_trace_in_one_pass():
    network, field, x, calls = setting("mlp")
    probes = sign_vectors(3)[:, None].expand(8, 2, 3)
    value, samples = hutchinson_divergence(field, x, probes)
    assert calls == [2]
    assert samples.shape == (8, 2)
    torch.testing.assert_close(samples.mean(0), traces(network, x))
    torch.testing.assert_close(value, -network(x, T))


def test_sums_are_kept_in_double_precision():
    network, shape = networks()["mlp"]
    field = noise_field(ScoreModel(network.float(), VPSchedule()), T.float())
    x = torch.randn(2, *shape, dtype=torch.float32)
    assert exact_divergence(field, x).samples.dtype == torch.float64
    assert exact_divergence(field, x).value.dtype == torch.float32
    assert hutchinson_divergence(field, x, x[None]).samples.dtype == torch.float64
    assert accumulator(x) == torch.float64


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_exact_makes_its_unit_vectors_when_they_are_due(prediction, monkeypatch):
    """Nothing is larger than a chunk; the trace of x² is 2 Σ x."""
    d, chunk = 3000, 4
    monkeypatch.setattr(hosm_losses.likelihood.divergence, "CHUNK_ELEMENTS", chunk * d)
    model = ScoreModel(lambda x, t: x**2, VPSchedule(), prediction)
    x, t = torch.randn(1, d), T[:1]
    with Largest() as largest, torch.no_grad():
        _, samples = exact_divergence(noise_field(model, t), x)
    assert largest.elements <= chunk * d
    trace = 2 * x.sum(1)
    if prediction == "sample":
        alpha, sigma = VPSchedule()(t)
        trace = (d - alpha * trace) / sigma
    torch.testing.assert_close(samples, -trace[None])


def test_what_fails_without_vmap_as_well_is_raised():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no backward today")

    model = ScoreModel(lambda x, t: Broken.apply(x), VPSchedule())
    with pytest.raises(RuntimeError, match="no backward today"):
        exact_divergence(noise_field(model, T), torch.randn(2, 3))
