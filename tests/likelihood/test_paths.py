"""Probes kept along a path belong to their sample, however its batch mates come and go."""

import torch

import hosm_losses as hosm
from hosm_losses.likelihood.coordinates import Coordinates
from hosm_losses.likelihood.paths import Paths, solve_adaptive, solve_fixed
from hosm_losses.likelihood.student import student_factor
from hosm_losses.model import condition
from hosm_losses.probes import draw_probes

SCHEDULE = hosm.VESchedule(sigma_max=2.0)
D = 3


def linear_paths(rates, probes):
    """ε̂ = rate · A x: every form vᵀ ∂ε̂ v is rate · vᵀ A v all along the path."""
    matrix = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0], [3.0, 0.0, 0.5]])
    model = hosm.ScoreModel(lambda x, t, rate: rate[:, None] * x @ matrix.T, SCHEDULE)
    coordinates = Coordinates(SCHEDULE, torch.zeros(1, D), torch.ones(1, D))
    field = condition(model, len(rates), {"rate": rates})
    generator = torch.Generator().manual_seed(0)
    paths = Paths(
        field, coordinates, torch.float64, probes, "rademacher", generator, lambda _: None
    )
    return matrix, paths


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
