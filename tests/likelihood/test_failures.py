"""Why a sample failed: its own cause, in every likelihood that can meet it, and no other's."""

import math

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.likelihood import adaptive
from hosm_losses.likelihood.result import REASONS, Cause
from tests.cases import VP

X = torch.tensor([[0.3, -0.5], [-1.0, 0.4], [0.2, 0.1]])  # the second is the one to fail
NONE = [0, 0, 0]
GRID, ADAPTIVE = hosm.FixedGrid(16), hosm.Adaptive(1e-2)
SOLVERS = [GRID, hosm.FixedGrid(16, companion=True), ADAPTIVE]


def second(cause):
    return [0, cause, 0]


def nan_output(x, t):
    return torch.where(x[:, :1] > 0, x, math.nan)


def nan_later(x, t):
    return torch.where((x[:, :1] > 0) | (t[:, None] < 0.5), x, math.nan)


def nan_hidden(x, t):
    """It hides that its point is not finite any more."""
    return torch.where(x.isnan(), 0.0, nan_later(x, t))


def nan_divergence(x, t):
    """Of a square root that `where` takes no value of, but the derivative, which is 0 · NaN."""
    first = x[:, :1]
    return x + torch.where(first > 0, 0 * first.sqrt(), 0 * first)


def nothing(x, t):
    return x.clamp(-1, 1) * 0


def positive(latent):
    return torch.where(latent[:, 0] > 0, 0.0, -math.inf)


def likelihood(network, x=X, solver=GRID, **options):
    return hosm.ode_nll(hosm.ScoreModel(network, VP), x, solver=solver, **options)


def check(result, causes):
    assert result.cause.tolist() == causes
    assert result.failed.tolist() == [cause > 0 for cause in causes]
    for row, text in result.failures().items():
        assert text.startswith(REASONS[causes[row]].split("{")[0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("network", [nan_output, nan_later, nan_hidden])
def test_an_output_that_is_not_finite(network, solver):
    check(likelihood(network, solver=solver), second(Cause.OUTPUT))
    check(likelihood(network, solver=solver, clean=network is nan_output), second(Cause.OUTPUT))
    for divergence in ("exact", None):
        drawn = hosm.ode_sample(
            hosm.ScoreModel(network, VP), X, solver=solver, divergence=divergence
        )
        check(drawn, second(Cause.OUTPUT))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson(2)])
def test_a_divergence_that_is_not_finite(solver, divergence):
    options = {"solver": solver, "divergence": divergence}
    check(likelihood(nan_divergence, **options), second(Cause.DIVERGENCE))
    # With a graph the network is kept from the sample, and both are NaN.
    found = likelihood(nan_divergence, enable_grad=True, **options)
    if solver is ADAPTIVE:  # whose first solution has no graph
        check(found, second(Cause.DIVERGENCE))
        return
    check(found, second(Cause.OUTPUT))
    assert "enable_grad" in found.failures()[1]


def test_values_that_are_not_finite_at_the_start(monkeypatch):
    """They get as far where reading a value would make the host wait."""
    monkeypatch.setattr("hosm_losses._checks.can_read_values", lambda _: False)
    x = X.index_fill(0, torch.tensor([1]), math.inf)
    for network in (nothing, lambda x, t: x):
        for solver in SOLVERS:
            check(likelihood(network, x, solver), second(Cause.START))
        model = hosm.ScoreModel(network, VP)
        check(hosm.variational_nll(model, x, samples=4), second(Cause.START))
        check(hosm.ode_sample(model, x, solver=GRID), second(Cause.START))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_prior_that_is_zero(solver):
    check(likelihood(nothing, solver=solver, log_prior=positive), second(Cause.PRIOR))


def test_the_bound():
    model = hosm.ScoreModel(nothing, VP)
    apart = hosm.variational_nll(model, 9e3 * X, samples=4, log_prior=positive)
    check(apart, second(Cause.PRIOR))
    model = hosm.ScoreModel(lambda x, t: torch.where(x[:, :1] > -1e3, x, math.nan), VP)
    x = X.index_fill(0, torch.tensor([1]), -1e6)
    check(hosm.variational_nll(model, x, samples=4), second(Cause.OUTPUT))


def test_an_nll_beyond_the_dtype():
    x = X.index_fill(0, torch.tensor([1]), 1e25)
    check(likelihood(nothing, x), second(Cause.RANGE))
    check(likelihood(nothing, x.double()), NONE)


def huge(x, t):
    return torch.where(x[:, :1] > -0.5, x, 1e200)


@pytest.mark.parametrize("solver", SOLVERS[:2])
def test_a_prior_that_was_not_passed_is_not_blamed(solver):
    check(likelihood(huge, X.double(), solver), second(Cause.RANGE))
    x = X.double().index_fill(0, torch.tensor([1]), 2e154)  # whose square is beyond float64
    model = hosm.ScoreModel(nothing, hosm.VESchedule(sigma_max=1e6))
    bound = hosm.variational_nll(model, x, samples=4, data_std=1e3)
    check(bound, second(Cause.RANGE))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_end_of_a_path_is_finite_in_its_own_dtype(solver):
    """The state is in float64, and this network does not see that its point is infinite."""

    def far(x, t):
        slope = torch.tensor([0, 1e3], dtype=x.dtype)
        return torch.where(x[:, :1] > 0, 0.0, slope) + 0 * x.clamp(-1, 1)

    model = hosm.ScoreModel(far, hosm.VESchedule(sigma_max=100.0))
    for divergence in ("exact", None):
        drawn = hosm.ode_sample(model, X.half(), solver=solver, divergence=divergence)
        assert drawn.x.isfinite().all(1).tolist() == [True, False, True]
        if divergence is None or solver is ADAPTIVE:  # the way back crosses the jump
            check(drawn, second(Cause.RANGE))
    if solver is ADAPTIVE:  # on a coarse grid paths cross the jump
        found = hosm.ode_nll(model, X.half(), solver=solver, divergence="exact")
        check(found, second(Cause.RANGE))
        assert found.nll.isfinite().tolist() == [True, False, True]


def test_an_error_that_was_not_kept_is_no_zero():
    """Of samples without a density."""
    model = hosm.ScoreModel(lambda x, t: x, VP)
    drawn = hosm.ode_sample(model, 1e9 * X, solver=GRID, divergence=None)
    assert "solver_error of nan nats" in drawn.failures()[1]


def test_a_latent_beyond_the_dtype_is_not_blamed_on_the_prior():
    def far(x, t):
        return torch.where(x[:, :1] > 0, 0.0, 3e38) + 0 * x.clamp(-1, 1)

    model = hosm.ScoreModel(far, hosm.VESchedule(sigma_max=100.0))
    grid = hosm.FixedGrid(32, companion=False)  # on a coarser one paths cross the jump
    found = hosm.ode_nll(model, X, solver=grid, log_prior=lambda latent: latent[:, 0] * 0)
    check(found, second(Cause.RANGE))


def test_a_solver_error_above_the_limit():
    for size in (1e9, 1e17):  # of which rounding alone is beyond the limit
        x = X.index_fill(0, torch.tensor([1]), size)
        found = likelihood(lambda x, t: x.tanh() * x, x.double())
        check(found, second(Cause.SOLVER))
        assert "look at x or the latent, which may be too large; otherwise" in found.failures()[1]


def test_a_path_that_takes_too_many_evaluations(monkeypatch):
    monkeypatch.setattr(adaptive, "MAX_EVALUATIONS", 14)
    found = likelihood(lambda x, t: x.tanh(), solver=ADAPTIVE)
    check(found, [Cause.ARRIVAL] * 3)
    assert bool((found.nll.isnan() & found.bits_per_dim().isnan()).all())
    assert found.latent.isfinite().all()


def test_a_path_whose_steps_vanish_at_a_jump():
    def slope(s, y, rows):
        return torch.where(s[:, None] > 0.5, 1e30, 1.0) + 0 * y, y, (rows * 0).byte()

    def judge(error, _):
        return error.abs().amax(1), error.abs().amax(1)

    solution = adaptive.adaptive(slope, torch.zeros(1, 1), (0.0, 1.0), judge, 10_000)
    assert solution.cause.tolist() == [Cause.ARRIVAL]
    assert int(solution.evaluations) < 1000


def test_the_draws_of_a_level_share_the_cause():
    levels = torch.tensor([[255, 0], [0, 0]], dtype=torch.uint8)
    model = hosm.ScoreModel(nan_output, VP)
    options = {"dequantization": hosm.Uniform(2), "divergence": "exact", "batch_size": 1}
    found = hosm.ode_nll(model, levels, solver=GRID, **options)
    check(found, [0, Cause.OUTPUT])
