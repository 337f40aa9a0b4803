"""The fixed grid: order of convergence, count of calls, and errors that are what they say."""

import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.likelihood.multistep import EXTRA_EVALUATIONS, Node, gregory_weights, multistep


def solve(steps, count_calls=None, answer=None, companion=False):
    """dy/ds = y cos s from y = 1 and y = 2, so y = y₀ e^{sin s}; q = y₀ e^{sin s} sin s."""
    calls = []
    start, h = torch.tensor([[1.0], [2.0]]), 2.0 / steps

    def slope(place, y):
        calls.append(place * h / 2)
        return y * math.cos(place * h / 2)

    def node(place, y):
        s, zero = place * h / 2, torch.zeros(len(y))
        covector = torch.ones_like(y) if answer is None else answer(s, y)
        integrand = start[:, 0] * math.exp(math.sin(s)) * math.sin(s)
        return Node(slope(place, y), integrand, zero + 0.25, covector)

    solution = multistep(slope, node, start, h, steps, companion)
    if count_calls is not None:
        count_calls.extend(calls)
    return solution


def exact_state():
    return torch.tensor([[1.0], [2.0]]) * math.exp(math.sin(2.0))


def exact_integral():
    """∫₀² e^{sin s} sin s ds by many midpoints."""
    s = (torch.arange(200_000) + 0.5) / 100_000
    return 2 * (s.sin().exp() * s.sin()).mean() * torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("quantity", ["state", "integral"])
def test_both_are_of_order_four(quantity):
    errors = []
    for steps in (20, 40, 80):
        solution = solve(steps)
        if quantity == "state":
            errors.append(float((solution.state - exact_state()).abs().max()))
        else:
            errors.append(float((solution.integral - exact_integral()).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert 12 < coarse / fine < 40


@pytest.mark.parametrize("steps", [4, 5, 6, 7, 20, 21])
def test_the_number_of_calls_is_known_in_advance(steps):
    calls = []
    solve(steps, calls)
    assert len(calls) == steps + EXTRA_EVALUATIONS
    assert min(calls) == 0.0
    assert max(calls) == pytest.approx(2.0, rel=1e-15)


def test_the_documentation_says_the_number_of_calls():
    said = f"steps + {EXTRA_EVALUATIONS}"
    page = Path(__file__).parents[2] / "docs" / "likelihood.md"
    assert f"`{said}`" in page.read_text(encoding="utf-8")
    assert f"{said} evaluations" in hosm.ode_nll.__doc__
    # The default, which the example of the docstring runs.
    steps = inspect.signature(hosm.ode_nll).parameters["steps"].default
    assert f"{steps + EXTRA_EVALUATIONS} evaluations" in hosm.ode_nll.__doc__


@pytest.mark.parametrize("steps", [4, 5, 9])
def test_places_are_nodes_and_the_midpoints_of_the_start(steps):
    nodes, inner = [], []

    def slope(place, y):
        inner.append(place)
        return y

    def node(place, y):
        nodes.append(place)
        return Node(y, y[:, 0], 0 * y[:, 0], y)

    multistep(slope, node, torch.ones(1, 1), 0.1, steps)
    assert nodes == list(range(0, 2 * steps + 1, 2))
    assert inner == [1, 1, 2, 3, 3, 4, 5, 5, 6]


@pytest.mark.parametrize("steps", range(4, 12))
def test_the_rule_is_exact_for_cubics_and_has_positive_weights(steps):
    weights = torch.tensor(gregory_weights(steps))
    nodes = torch.linspace(0, 1, steps + 1)
    for power in range(4):
        assert float((weights * nodes**power).sum() / steps) == pytest.approx(1 / (power + 1))
    assert bool((weights > 0).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_errors_that_cancel_are_claimed_by_the_largest_stretch(sign):
    """Slopes s⁴ give every step one local error, and the covector has two signs."""
    steps, h = 20, 0.1
    covectors = [sign * (1.0 if place < 24 else -1.0) for place in range(0, 2 * steps + 1, 2)]

    def slope(place, y):
        return torch.full_like(y, (h * place / 2) ** 4)

    def node(place, y):
        return Node(slope(place, y), 0 * y[:, 0], 0 * y[:, 0], 0 * y + covectors[place // 2])

    found = multistep(slope, node, torch.zeros(1, 1), h, steps).path_error
    # Adams-Bashforth of order four is off by 251/720 h⁵ f⁗, f⁗ = 24, in each of 17 steps: over
    # places 8 to 22 eight of them count with one sign, over 24 to 40 nine with the other.
    torch.testing.assert_close(found, torch.full((1,), 9 * 251 / 720 * h**5 * 24))


@pytest.mark.parametrize("steps", [32, 33, 64, 65])
def test_errors_are_estimated_from_the_same_calls(steps):
    # An error δ made at s grows to δ e^{sin 2 − sin s} at the end: that is its covector here.
    solution = solve(
        steps, answer=lambda s, y: torch.full_like(y, math.exp(math.sin(2.0) - math.sin(s)))
    )
    true = (solution.state - exact_state()).abs()[:, 0]
    assert bool((solution.path_error > 0.5 * true).all())
    assert bool((solution.path_error < 4 * true).all())
    true = (solution.integral - exact_integral()).abs()
    assert bool((solution.quadrature_error > 0.2 * true).all())
    assert bool((solution.quadrature_error < 5 * true).all())


def test_the_variance_is_that_of_the_weighted_sum():
    steps = 10
    expected = sum((0.2 * w) ** 2 * 0.25 for w in gregory_weights(steps))
    torch.testing.assert_close(solve(steps).variance, torch.full((2,), expected))


@pytest.mark.parametrize("steps", [8, 10, 64])
def test_a_companion_is_the_solution_of_half_the_steps(steps):
    calls = []
    found = solve(steps, calls, companion=True)
    for mine, alone in zip(found.companion[:-1], solve(steps // 2)[:-1], strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-13, atol=0)
    assert len(calls) == steps + steps // 2 + 2 * EXTRA_EVALUATIONS
    for mine, alone in zip(found[:-1], solve(steps)[:-1], strict=True):
        torch.testing.assert_close(mine, alone, rtol=0, atol=0)
