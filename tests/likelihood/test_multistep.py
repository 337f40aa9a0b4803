"""The fixed grid: its rule, and errors that are what they say, with a companion too."""

import math

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.likelihood.multistep import (
    Node,
    _estimate,
    gregory_weights,
    multistep,
)
from tests.cases import VP

START = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
STATE = START * math.exp(math.sin(2.0))


def solve(steps, companion=False):
    """dy/ds = y cos s over [0, 2], so y = y₀ e^{sin s}; q = y₀ e^{sin s} sin s."""
    h = 2.0 / steps

    def slope(place, y):
        return y * math.cos(place * h / 2)

    def node(place, y):
        s = place * h / 2
        integrand = START[:, 0] * math.exp(math.sin(s)) * math.sin(s)
        # An error δ made at s grows to δ e^{sin 2 − sin s} at the end.
        covector = torch.full_like(y, math.exp(math.sin(2.0) - math.sin(s)))
        return Node(slope(place, y), integrand, 0 * integrand, covector)

    found, other = multistep(slope, node, START, h, steps, companion)
    return (found, other) if companion else found


def exact_integral():
    """∫₀² q ds by many midpoints."""
    s = (torch.arange(200_000) + 0.5) / 100_000
    return 2 * (s.sin().exp() * s.sin()).mean() * START[:, 0]


@pytest.mark.parametrize("steps", range(4, 10))
def test_the_rule_is_exact_for_cubics_and_has_positive_weights(steps):
    weights, nodes = torch.tensor(gregory_weights(steps)), torch.linspace(0, 1, steps + 1)
    for power in range(4):
        assert float((weights * nodes**power).sum() / steps) == pytest.approx(1 / (power + 1))
    assert bool((weights > 0).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_errors_that_cancel_are_claimed_by_the_largest_stretch(sign):
    """Slopes s⁴ give every step one local error, and the covector has two signs."""
    steps, h = 20, 0.1

    def slope(place, y):
        return torch.full_like(y, (h * place / 2) ** 4)

    def node(place, y):
        covector = sign * (1.0 if place < 24 else -1.0)
        return Node(slope(place, y), 0 * y[:, 0], 0 * y[:, 0], 0 * y + covector)

    found, _ = multistep(slope, node, torch.zeros(1, 1), h, steps)
    # Adams-Bashforth of order four is off by 251/720 h⁵ f⁗, f⁗ = 24, in each of 17 steps: over
    # places 8 to 22 eight of them count with one sign, over 24 to 40 nine with the other.
    local = 251 / 720 * h**5 * 24
    torch.testing.assert_close(found.path_error, torch.full((1,), 9 * local))
    torch.testing.assert_close(found.spread, torch.full((1,), 17**0.5 * local))


@pytest.mark.parametrize("steps", [32, 65])
def test_errors_are_estimated_from_the_same_calls(steps):
    solution = solve(steps)
    true = (solution.y - STATE).abs()[:, 0]
    assert bool((solution.path_error > 0.5 * true).all())
    assert bool((solution.path_error < 4 * true).all())
    true = (solution.whole - exact_integral()).abs()
    assert bool((solution.quadrature_error > 0.2 * true).all())
    assert bool((solution.quadrature_error < 5 * true).all())


def test_the_error_of_the_integral_is_richardsons_by_hand():
    """A rule of order four: 1/15 of what half the steps change; q here depends on s alone."""
    whole, half = solve(64), solve(32)
    expected = (whole.whole - half.whole).abs() / 15
    torch.testing.assert_close(whole.quadrature_error, expected)


@pytest.mark.parametrize("steps", [8, 64])
def test_a_companion_is_the_solution_of_half_the_steps(steps):
    found, other = solve(steps, companion=True)
    for solution, alone in ((found, solve(steps)), (other, solve(steps // 2))):
        for name in ("y", "whole", "variance", "path_error", "spread", "coarse"):
            mine, theirs = getattr(solution, name), getattr(alone, name)
            torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=0)


def test_the_estimate_by_hand():
    # Where the path is resolved, by the spread and by the difference; where it is not, by the
    # difference for m = 1 and 2, and by the spread for m = 1 and more; where the companion is
    # lost; where both paths have no error, and the companion alone.
    path = torch.tensor([8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 0.0, 0.0])
    companion = torch.tensor([128.0, 128.0, 256.0, 512.0, 256.0, 1e6, 128.0, 0.0, 1.0])
    difference = torch.tensor([0.0, 40.0, 400.0, 400.0, 0.0, 400.0, math.nan, 5.0, 5.0])
    spread = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0])
    expected = torch.tensor([1.0, 5.0, 50.0, 3.125, 2.0, 2.8, 8.0, 0.625, 0.625])
    torch.testing.assert_close(_estimate(path, spread, companion, difference), expected)


def kicked(x, t):
    """A narrow kick at σ̂ = 1/e that the path stretches later, of which no local error tells."""
    alpha, sigma = VP(t)
    u, alpha = (sigma / alpha).log()[:, None], alpha[:, None]
    scale = (0.25 + u.exp().square()).sqrt()
    ratio = u.exp() / scale
    z = x / alpha / scale
    moved = torch.sigmoid(3 * (u + 0.2)) * z + 0.01 * torch.exp(-(((u + 1) / 0.1) ** 2))
    return ratio * z + moved / ratio


def test_a_kick_that_is_stretched_later_is_covered():
    model = hosm.ScoreModel(kicked, VP)
    x = 1e-4 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    few, many = (
        hosm.ode_nll(model, x, solver=hosm.FixedGrid(n), divergence="exact").nll
        for n in (64, 1024)
    )
    error = (few - many).abs()
    for divergence in ("exact", hosm.Hutchinson()):
        alone, both = (
            hosm.ode_nll(model, x, solver=hosm.FixedGrid(companion=each), divergence=divergence)
            for each in (False, True)
        )
        assert not (error <= 2 * alone.solver_error).any()
        assert (error <= 2 * both.solver_error).all()
