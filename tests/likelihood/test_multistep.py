"""The fixed grid: its rule, and errors that are what they say, with a companion too."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.likelihood import multistep
from hosm_losses.likelihood.multistep import (
    RUNGE_KUTTA,
    WIDTH,
    AdamsSolver,
    NodeValue,
    Rule,
    companion_error,
    gregory_weights,
    least_shares,
    mesh_points,
    velocity_mesh_points,
)
from tests.cases import VP
from tests.likelihood.problems import gaussian, marginals, problem, total
from tests.oracles import ring

START = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
END, SHARE = 1.5, 0.5
SEED = torch.Generator().manual_seed(0)


def growth(s):
    return math.exp(s**5 / 5)


def walk_of(node, y, h, steps, slope=None, order=4, blends=False):
    """The solution from `node`, what is known at a node.

    It starts by the Runge-Kutta method if there is a `slope`. The first node that is predicted is
    evaluated twice.
    """
    first_steps = 0 if slope is None else RUNGE_KUTTA
    solver = AdamsSolver(y, steps, Rule(order, first_steps, blends))
    shares = least_shares(y, steps)

    def value(index, y):
        at = node(index, y)
        variance = None if at.variance is None else h**2 * at.variance
        return NodeValue(h * at.slope, h * at.integrand, variance, at.covector)

    for index in range(steps + 1):
        if index > first_steps:
            solver.predict()
        elif index:
            y, first = solver.y, solver.differences[0]
            second = h * slope(index - 0.5, y + first / 2)
            third = h * slope(index - 0.5, y + second / 2)
            fourth = h * slope(index, y + third)
            solver.y = y + (first + 2 * second + 2 * third + fourth) / 6
        solver.correct(value(index, solver.y), shares[index])
        if index == first_steps + 1:
            solver.correct_again(value(index, solver.y), shares[index])
    return solver


def solve(steps, order):
    """dy/ds = y s⁴ over [0, 1.5], so y = y₀ exp(s⁵/5), and q = y s⁴/2, with integral (y − y₀)/2.

    The slopes of the start, by another method, are next to nothing.
    """
    h = END / steps

    def slope(place, y):
        return y * (place * h) ** 4

    def node(place, y):
        s = place * h
        # An error δ made at s grows to δ e at the end, and adds δ (e − 1)/2 to the integral.
        covector = (1 + SHARE) * growth(END) / growth(s) - SHARE
        integrand = SHARE * slope(place, y)[:, 0]
        return NodeValue(slope(place, y), integrand, None, torch.full_like(y, covector))

    return walk_of(node, START, h, steps, order=order)


def recorded(monkeypatch):
    """The solvers that are made from now on."""
    solvers = []

    class Recorded(AdamsSolver):
        def __init__(self, *given):
            super().__init__(*given)
            solvers.append(self)

    monkeypatch.setattr(multistep, "AdamsSolver", Recorded)
    return solvers


def error(walk):
    """Of y + ∫ q at the end, (B,)."""
    exact = START * growth(END) + SHARE * START * (growth(END) - 1)
    return (walk.y - exact)[:, 0] + walk.quadrature.integral()


def given(integrand, steps, covector=lambda s: 1.0, slope=lambda s: 0.0, **rule):
    """A walk over [0, 1] whose slopes and integrands depend on s alone."""

    def node(place, y):
        s = place / steps
        return NodeValue(0 * y + slope(s), integrand(s) + 0 * y[:, 0], None, 0 * y + covector(s))

    return walk_of(node, torch.zeros_like(START), 1 / steps, steps, **rule)


@pytest.mark.parametrize("steps", range(4, 10))
def test_the_rule_is_exact_for_quintics_and_has_positive_weights(steps):
    weights, nodes = torch.tensor(gregory_weights(steps)), torch.linspace(0, 1, steps + 1)
    for power in range(6):
        assert float((weights * nodes**power).sum() / steps) == pytest.approx(1 / (power + 1))
    assert bool((weights > 0).all())


@pytest.mark.parametrize("span", [(-9.0, 3.0), (3.0, -9.0)])
@pytest.mark.parametrize("centre", [-1.0, -9.0, 3.0])
def test_the_mesh_has_the_density_of_its_two_laws(span, centre):
    s = torch.linspace(0, 1, 41).double()
    u, rates = mesh_points(span, s, centre)

    def law(u):  # the logistic one, by another formula
        return (1 + torch.tanh((torch.as_tensor(u).double() - centre) / (2 * WIDTH))) / 2

    start, end = span
    logistic = (law(u) - law(start)) / (law(end) - law(start))
    torch.testing.assert_close(((u - start) / (end - start) + logistic) / 2, s)
    step = 1e-4
    after, before = (mesh_points(span, s + by, centre)[0] for by in (step, -step))
    inner = slice(1, -1)
    torch.testing.assert_close(
        (after - before)[inner] / (2 * step), rates[inner], rtol=1e-5, atol=0
    )
    back, _ = mesh_points((end, start), s, centre)
    torch.testing.assert_close(back.flip(0), u)


@pytest.mark.parametrize("centre", [0.0, -2.0])
@pytest.mark.parametrize("span", [(-9.0, 7.0), (7.0, -9.0), (-2.0, 3.0)])
def test_the_mesh_for_a_velocity_is_even_in_its_polynomial(span, centre):
    s = torch.linspace(0, 1, 41).double()
    u, rates = velocity_mesh_points(span, s, centre)
    r = (1 - torch.sigmoid(centre - u).sqrt()).sqrt()  # c/(c + σ̂) = (1 − r²)²
    torch.testing.assert_close((r - r[0]) / (r[-1] - r[0]), s)
    assert [u[0], u[-1]] == pytest.approx(span)
    step = 1e-5
    after, before = (velocity_mesh_points(span, s + by, centre)[0] for by in (step, -step))
    inner = slice(1, -1)
    torch.testing.assert_close(
        (after - before)[inner] / (2 * step), rates[inner], rtol=1e-5, atol=0
    )


def test_only_the_velocity_of_a_linear_flow_has_a_mesh_of_its_own():
    """There it errs less than a quarter as much as the mesh in log σ̂."""

    def velocity(x, t):
        return torch.sin(2 * x.roll(1, 1) + t[:, None]) - x

    x = torch.linspace(-1, 1, 10).double().reshape(5, 2)
    for schedule, gains in ((hosm.LinearFlowSchedule(), True), (VP, False)):
        model = hosm.ScoreModel(velocity, schedule, "velocity")
        noise = hosm.ScoreModel(lambda x, t, model=model: model(x, t), schedule)
        found, other, truth = (
            hosm.ode_nll(each, x, solver=hosm.FixedGrid(steps), divergence="exact").nll
            for each, steps in ((model, 38), (noise, 38), (model, 512))
        )
        if gains:
            assert float((found - truth).norm()) < 0.25 * float((other - truth).norm())
        else:
            torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("prediction", "steps", "expected"),
    [
        ("velocity", 34, (4, True)),
        ("velocity", 36, (5, True)),
        ("velocity", 64, (5, False)),
        ("epsilon", 62, (4, True)),
        ("epsilon", 64, (5, False)),
    ],
)
def test_velocities_have_order_five_earlier_and_less_of_it(
    prediction, steps, expected, monkeypatch
):
    solvers = recorded(monkeypatch)
    model = hosm.ScoreModel(lambda x, t: -x, hosm.LinearFlowSchedule(), prediction)
    hosm.ode_nll(model, torch.ones(1, 2).double(), solver=hosm.FixedGrid(steps, companion=True))
    assert [(each.rule.order, each.rule.blends) for each in solvers] == [expected, expected]


def test_data_without_width_have_their_nodes_where_there_is_least_noise():
    """About a centre as far away, the logistic law has no mass left in double precision."""
    model, (start, end) = gaussian(VP, 0.3, 1e-20), marginals(VP, 0.3, 1e-20)
    x, solver = start.sample((3, 2)), hosm.FixedGrid(data_std=1e-20)
    options = {"divergence": "exact", "log_prior": lambda latent: total(end.log_prob(latent))}
    found = hosm.ode_nll(model, x, solver=solver, **options)
    torch.testing.assert_close(found.nll, -total(start.log_prob(x)), rtol=0, atol=1e-4)


def lagrange(nodes, start, end):
    """Weights that integrate polynomials through values at whole numbers from start to end."""
    powers = range(len(nodes))
    integrals = [(end ** (k + 1) - start ** (k + 1)) / (k + 1) for k in powers]
    return np.linalg.solve([[float(node) ** k for node in nodes] for k in powers], integrals)


def through(slopes, first, start, end):
    """The integral of the polynomial through the slopes from node `first` on."""
    nodes = range(max(first, 0), len(slopes))
    return lagrange(nodes, start, end) @ slopes[nodes.start :]


@pytest.mark.parametrize("first_steps", [0, RUNGE_KUTTA])
@pytest.mark.parametrize(
    ("kappa", "rate", "order", "blends"),
    [
        (0.2, 3, 4, False),
        (45.0, 3, 4, False),
        (200.0, 3, 5, False),
        (200.0, -4, 5, False),
        (200.0, 25, 5, True),
    ],
)
def test_the_solution_and_its_error_by_hand(kappa, rate, order, blends, first_steps):
    """dy/ds = (λ y₁, λ y₂/2) and q = κ (y₁ + y₂), and a covector that changes its sign twice.

    Order five is unstable where h λ < −0.09, and the differences change their signs.
    """
    steps, rates = 20, rate * np.array([1.0, 0.5])
    h, y, before, q, f = 1 / steps, np.ones(2), np.ones(2), [], []
    g = [1.0 if s < 0.47 or s > 0.83 else -2.0 for s in (i * h for i in range(steps + 1))]
    g[0], share, effects, weights = 9.0, 1.0, [0.0], [1.0] * (steps + 1)
    for i in range(steps + 1):
        f, q = [*f, rates * y], [*q, kappa * y.sum()]
        if i > first_steps:
            parts = (order, weights[i]), (order - 1, 1.0 - weights[i])
            corrected = before + h * sum(w * through(f, i - k, i - 1, i) for k, w in parts)
            if i == 4:
                corrected = 1.0 + h * through(f, 0, 0, 4)
            change, y = corrected - y, corrected
            effect = (g[i] - g[i - 1]) * change.sum()
            if i == 1:
                true = h * (kappa * change.sum() + g[1] * rates @ change)
                share, effect = min(1.0, 2 * abs(true / effect)), 0.0
                secant = change @ (rates * change) / (change @ change)
            effect *= share if i < 4 else max(min(1.0, 2 * (i - 4) / steps) ** 2, share)
            if i > order:
                for k, w in parts:
                    constant = {3: 0.0, 4: 3 / 160, 5: 863 / 60480}[k]
                    effect += g[i] * w * h * constant * np.diff(f, k + 1, axis=0)[-1].sum()
            effects.append(effect)
            if i == first_steps + 1:
                f[i], q[i] = rates * y, kappa * y.sum()
            elif order == 5 and i <= 4 and not first_steps:
                f[i] = f[i] + secant * change
        before = y
        if i < first_steps:
            y = y * sum((h * rates) ** k / math.factorial(k) for k in range(5))
        elif i < steps:
            if order == 5 and i >= 5:
                pairs = [np.diff(f, k, axis=0)[-2:] for k in (3, 4)]
                weights[i + 1] = float(any(then @ now >= 0 for then, now in pairs))
                if blends:
                    third, fourth = (np.linalg.norm(now) for _, now in pairs)
                    weights[i + 1] /= 1 + (fourth / (0.75 * third)) ** 4
            parts = (order, weights[i + 1]), (order - 1, 1.0 - weights[i + 1])
            y = y + h * sum(w * through(f, i - k + 1, i, i + 1) for k, w in parts)

    each = torch.tensor(rates)

    def node(place, y):
        return NodeValue(each * y, kappa * y.sum(1), None, 0 * y + g[place])

    slope = (lambda _, y: each * y) if first_steps else None
    found = walk_of(node, torch.ones(2, 2).double(), h, steps, slope, order, blends)
    # Little of the second parts, more of them, and all.
    assert first_steps or [share > 0.15, share == 1] == [kappa > 1, kappa > 100]
    assert (0.0 in weights) == (rate < 0)
    assert any(0.0 < weight < 1.0 for weight in weights) == blends
    torch.testing.assert_close(found.y, torch.tensor(y).expand(2, 2))
    torch.testing.assert_close(
        found.quadrature.integral(), torch.full((2,), h * rule_of(q)).double()
    )
    stretches = [
        sum(effects[j:k]) for j in range(len(effects)) for k in range(j, len(effects) + 1)
    ]
    expected = torch.full((2,), float(np.abs(stretches).max())).double()
    torch.testing.assert_close(found.error.largest_sum(), expected)


def rule_of(values):
    return float(np.dot(gregory_weights(len(values) - 1), values))


@pytest.mark.parametrize("order", [4, 5])
@pytest.mark.parametrize(("steps", "apart"), [(65, 0.3), (256, 0.1)])
def test_the_sum_of_the_effects_is_the_error(steps, apart, order):
    """To first order, where the covector is the true one; the error's order is one more."""
    walk = solve(steps, order)
    total = torch.stack(walk.error.effects).sum(0)
    torch.testing.assert_close(total, error(walk), rtol=apart, atol=0)
    assert bool((walk.error.largest_sum() >= total.abs()).all())
    fall = error(walk) / error(solve(2 * steps, order)) / 2 ** (order + 1)
    assert bool(((fall > 0.6) & (fall < 1.25)).all())


def rule(q, step, count):
    """∫ q ds by so many steps from 0 on."""
    return sum(w * q(i * step) for i, w in enumerate(gregory_weights(count))) * step


JUMP = 0.37


@pytest.mark.parametrize(
    ("steps", "order", "share"), [(15, 4, 30), (16, 4, 30), (35, 4, 30), (35, 5, 45), (35, 5, 20)]
)
@pytest.mark.parametrize("kind", ["smooth", "kink", "jump"])
def test_the_error_of_the_integral_by_hand(steps, order, share, kind):
    def q(s):
        kinds = {"smooth": math.exp(3 * s), "kink": abs(s - JUMP), "jump": float(s > JUMP)}
        return kinds[kind]

    count = steps // 2
    apart = abs(rule(q, 1 / steps, 2 * count) - rule(q, 2 / steps, count))
    rough = np.linalg.norm(np.diff([q(i / steps) for i in range(steps + 1)], 7)) / steps
    expected = max(apart / 15, rough / share) if steps >= 16 else apart
    found = given(q, steps, order=order, blends=share == 20).quadrature_error()
    torch.testing.assert_close(found, torch.full((2,), expected).double())
    exact = {"smooth": (math.exp(3) - 1) / 3, "jump": 1 - JUMP}
    exact["kink"] = (JUMP**2 + (1 - JUMP) ** 2) / 2
    assert abs(rule(q, 1 / steps, steps) - exact[kind]) < 2 * expected


def test_the_variance_of_one_probe_is_that_of_its_neighbours():
    """Of noise on a line of slope 5, over many walks."""
    noise = torch.randn(9, 20_000, generator=torch.Generator().manual_seed(0)).double()
    y = torch.zeros(20_000, 1).double()

    def node(place, y):
        return NodeValue(0 * y, 10.0 * place + noise[place], None, y)

    walk = walk_of(node, y, 0.125, 8)
    expected = sum((0.125 * weight) ** 2 for weight in gregory_weights(8))
    assert float(walk.quadrature.integral().var()) == pytest.approx(expected, rel=0.05)
    assert float(walk.quadrature.variance().mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("steps", [8, 64])
def test_a_companion_is_the_solution_of_half_the_steps(steps, monkeypatch):
    model, x, *_ = problem(VP, ring(), 5)
    solutions = recorded(monkeypatch)
    for count, companion in ((steps, True), (steps, False), (steps // 2, False)):
        if count < steps:  # a companion has the solution's order
            monkeypatch.setattr(multistep, "ORDER_FIVE", multistep.ORDER_FIVE / 2)
        solver = hosm.FixedGrid(count, companion=companion)
        hosm.ode_nll(model, x, solver=solver, divergence="exact")
    fine, coarse, *alone = solutions
    for solution, other in zip((fine, coarse), alone, strict=True):
        mine, theirs = (
            torch.cat([each.y.flatten(), each.error.largest_sum(), each.quadrature_error()])
            for each in (solution, other)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-15)
        mine, theirs = (each.quadrature.integral() for each in (solution, other))
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_a_companion_raises_an_estimate_to_a_fifth_of_the_difference():
    """Where that is a number."""
    plain, difference = torch.tensor(
        [[1.0, 1.0, 1.0, 1.0], [8.0, -40.0, 160.0, math.nan]]
    ).double()
    parts = {
        "quadrature": SimpleNamespace(integral=lambda *_: 0.0),
        "error": SimpleNamespace(largest_sum=lambda: plain),
    }
    found, other = (SimpleNamespace(y=y, steps=8, **parts) for y in (difference, 0.0))
    there = SimpleNamespace(to_x=lambda y, _: y, ends=lambda span: span)
    paths = SimpleNamespace(coordinates=there, log_prior_at=lambda x: x)
    assert companion_error(paths, found, other, (0, 1)).tolist() == [1.6, 8.0, 32.0, 1.0]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize(
    "solver", [hosm.FixedGrid(), hosm.FixedGrid(companion=True), hosm.Adaptive()], ids=str
)
def test_a_claim_does_not_depend_on_its_batch(solver, activation):
    """A sample alone, and among others with kinks or without."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 32), activation(), nn.Linear(32, 2)).double()
    model, x = hosm.ScoreModel(lambda x, t: network(x), VP), ring().sample(12, SEED)
    together, *alone = (
        hosm.ode_nll(model, rows, solver=solver).solver_error for rows in (x, x[:1], x[1:3])
    )
    torch.testing.assert_close(torch.cat(alone), together[:3], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("solver", [hosm.FixedGrid(data_std=0.5), hosm.Adaptive()], ids=str)
def test_a_claim_of_single_precision_is_no_smaller_than_its_rounding(solver):
    """On a short path, where both solutions agree to 1e-7 nats."""
    model, x = gaussian(hosm.VESchedule(sigma_min=20.0)), torch.randn(4, 2)
    single, double = (hosm.ode_nll(model, rows, solver=solver) for rows in (x.float(), x.double()))
    assert single.solver_error.tolist() == pytest.approx([1e-6] * 4)
    assert bool((double.solver_error < 1e-7).all())
    assert not bool((single.failed | double.failed).any())


def kicked(x, t, size=0.01, width=0.07):
    """A narrow kick at σ̂ = 1/e that the path stretches later, of which no local error tells."""
    alpha, sigma = VP(t)
    u, alpha = (sigma / alpha).log()[:, None], alpha[:, None]
    scale = (0.25 + u.exp().square()).sqrt()
    ratio = u.exp() / scale
    z = x / alpha / scale
    moved = torch.sigmoid(3 * (u + 0.2)) * z + size * torch.exp(-(((u + 1) / width) ** 2))
    return ratio * z + moved / ratio


@pytest.mark.parametrize("width", [0.06, 0.07])
def test_a_kick_that_is_stretched_later_is_covered(width):
    model = hosm.ScoreModel(partial(kicked, width=width), VP)
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
