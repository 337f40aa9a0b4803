"""Paths by either solver, their divergence against dense Jacobians, and Student's factor."""

import copy

import mpmath
import pytest
import torch

import hosm_losses as hosm
from hosm_losses.likelihood import paths as paths_of
from hosm_losses.likelihood.adaptive import solve_adaptive, student_factor
from hosm_losses.likelihood.multistep import solve_fixed
from hosm_losses.likelihood.paths import Batch, Coordinates, Paths, accumulator, with_divergence
from hosm_losses.model import condition, noise_field
from hosm_losses.probes import draw_probes
from tests.oracles import Largest, dense_derivatives, networks, sign_vectors

SCHEDULE = hosm.VESchedule(sigma_max=2.0)
D = 3


def linear_paths(rates, probes):
    """ε̂ = rate · A x: every form vᵀ ∂ε̂ v is rate · vᵀ A v all along the path."""
    matrix = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0], [3.0, 0.0, 0.5]])
    model = hosm.ScoreModel(lambda x, t, rate: rate[:, None] * x @ matrix.T, SCHEDULE)
    coordinates = Coordinates(SCHEDULE, torch.zeros(1, D), torch.ones(1, D))
    conditions = condition(model, len(rates), {"rate": rates})
    x, generator = torch.zeros(len(rates), D), torch.Generator().manual_seed(0)
    batch = Batch(x, conditions, coordinates, torch.float64, generator=generator)
    return matrix, Paths(batch, probes, "rademacher")


def shrinking():
    """d ∫ σ̂²/(1 + σ̂²) du between the ends."""
    low, high = (torch.tensor(u).exp() for u in SCHEDULE.log_sigma_hat_range)
    return D * 0.5 * torch.log((1 + high**2) / (1 + low**2))


def test_adaptive_probes_follow_their_samples():
    rates = torch.tensor([0.01, 1.0, 0.1, 3.0])
    matrix, paths = linear_paths(rates, probes=4)
    z = torch.randn(4, D)
    solved = solve_adaptive(paths, z, SCHEDULE.log_sigma_hat_range, 1e-7)
    assert len(set(solved.nfe.tolist())) > 1
    v = draw_probes(z, 4, "rademacher", torch.Generator().manual_seed(0))
    forms = rates * torch.einsum("kbi,ij,kbj->kb", v, matrix, v)
    low, high = SCHEDULE(torch.tensor([SCHEDULE.t_min, SCHEDULE.t_max]))[1]
    integrals = forms * (high - low) - shrinking()
    torch.testing.assert_close(solved.integral, integrals.mean(0), rtol=0, atol=1e-5)
    spread = integrals.std(0) / 2 * student_factor(3)
    torch.testing.assert_close(solved.standard_error, spread, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_fixed_grid_goes_back_to_where_it_came_from():
    _, paths = linear_paths(torch.tensor([0.1, 0.4, 0.7]), probes=0)
    z, span = torch.randn(3, D), SCHEDULE.log_sigma_hat_range
    there = solve_fixed(paths, z, span, 256)
    back = solve_fixed(paths, there.z, span[::-1], 256)
    torch.testing.assert_close(back.z, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(back.integral, -there.integral, rtol=0, atol=1e-6)
    assert float((there.z - z).abs().max()) > 0.1


def test_fixed_probes_are_fresh_at_every_node():
    rates = torch.ones(4)
    _, paths = linear_paths(rates, probes=1)
    drawn = []

    class Watched(Paths):
        def draw(self, z):
            drawn.append(super().draw(z))
            return drawn[-1]

    watched = Watched(**vars(paths))
    solve_fixed(watched, torch.randn(4, D), SCHEDULE.log_sigma_hat_range, 6)
    assert len(drawn) == 7
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("freedom", [3, 4, 7, 15, 63])
def test_widened_twice_the_error_covers_what_the_normal_law_says(freedom):
    def density(t):
        return (1 + t**2 / freedom) ** (-(freedom + 1) / 2)

    end = 2 * student_factor(freedom)
    inside, all_of_it = (mpmath.quad(density, [0, 1, bound]) for bound in (end, mpmath.inf))
    assert float(inside / all_of_it) == pytest.approx(float(mpmath.erf(mpmath.sqrt(2))), abs=2e-4)


T = torch.tensor([0.3, 0.6])


def setting(name):
    network, shape = networks()[name]
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return network(x, t)

    return (
        network,
        noise_field(hosm.ScoreModel(counted, hosm.VPSchedule()), T),
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
    monkeypatch.setattr(paths_of, "CHUNK_ELEMENTS", chunk)
    network, field, x, calls = setting(name)
    value, samples = with_divergence(field, x, None)
    assert calls == [2]
    torch.testing.assert_close(samples, traces(network, x)[None], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(value, -network(x, T))


def test_all_signs_average_to_the_trace_in_one_pass():
    network, field, x, calls = setting("mlp")
    probes = sign_vectors(3)[:, None].expand(8, 2, 3)
    value, samples = with_divergence(field, x, probes)
    assert calls == [2]
    assert samples.shape == (8, 2)
    torch.testing.assert_close(samples.mean(0), traces(network, x))
    torch.testing.assert_close(value, -network(x, T))


def test_sums_are_kept_in_double_precision():
    network, shape = networks()["mlp"]
    field = noise_field(hosm.ScoreModel(network.float(), hosm.VPSchedule()), T.float())
    x = torch.randn(2, *shape, dtype=torch.float32)
    assert with_divergence(field, x, None)[1].dtype == torch.float64
    assert with_divergence(field, x, None)[0].dtype == torch.float32
    assert with_divergence(field, x, x[None])[1].dtype == torch.float64
    assert accumulator(x) == torch.float64


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_exact_makes_its_unit_vectors_when_they_are_due(prediction, monkeypatch):
    """Nothing is larger than a chunk; the trace of x² is 2 Σ x."""
    d, chunk = 3000, 4
    monkeypatch.setattr(paths_of, "CHUNK_ELEMENTS", chunk * d)
    model = hosm.ScoreModel(lambda x, t: x**2, hosm.VPSchedule(), prediction)
    x, t = torch.randn(1, d), T[:1]
    with Largest() as largest, torch.no_grad():
        _, samples = with_divergence(noise_field(model, t), x, None)
    assert largest.elements <= chunk * d
    trace = 2 * x.sum(1)
    if prediction == "sample":
        alpha, sigma = hosm.VPSchedule()(t)
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

    model = hosm.ScoreModel(lambda x, t: Broken.apply(x), hosm.VPSchedule())
    with pytest.raises(RuntimeError, match="no backward today"):
        with_divergence(noise_field(model, T), torch.randn(2, 3), None)
