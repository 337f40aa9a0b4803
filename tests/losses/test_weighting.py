"""Weightings: native errors, the likelihood bound's integral, unbiased importance draws."""

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.losses.weighting import draw_time, time_factors
from tests.cases import FUNCTIONS, MLP, SCHEDULES, assert_same, with_gradients

CONTINUOUS = [name for name in SCHEDULES if name != "discrete"]


def towards_the_ends(schedule, count):
    """Midpoints t and their share of the interval, log-spaced from both ends to the middle."""
    span = schedule.t_max - schedule.t_min
    place = (torch.arange(count // 2) + 0.5) / (count // 2)
    distance, shares = [], []
    for offset in (schedule.t_min, 1e-3 * span):
        ratio = (offset + span / 2) / offset
        away = offset * ratio**place
        distance.append(away - offset)
        shares.append(away * torch.log(torch.tensor(ratio)) / span)
    t = torch.cat([schedule.t_min + distance[0], schedule.t_max - distance[1]])
    return t, 2 * torch.cat(shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_likelihood_draws_log_sigma_hat_uniformly(name, dtype):
    schedule, count = SCHEDULES[name], 20_000
    model = hosm.ScoreModel(lambda x, t: x, schedule)
    x0 = torch.zeros(count, 1, dtype=dtype)
    t, _ = draw_time(model, x0, "likelihood", torch.Generator().manual_seed(0))
    assert t.dtype == torch.promote_types(dtype, torch.float32)
    assert bool(((t >= schedule.t_min) & (t <= schedule.t_max)).all())
    low, high = schedule.log_sigma_hat_range
    unit = (schedule.log_sigma_hat(t.double()) - low) / (high - low)
    for power in (1, 2, 3):
        moment = unit**power
        assert abs(moment.mean() - 1 / (power + 1)) < 5 * moment.std() / count**0.5 + 1e-3


@pytest.mark.parametrize("weighting", ["noise", "native", "likelihood", torch.exp])
def test_the_function_draws_and_weights_with_one_time(weighting):
    model = hosm.ScoreModel(MLP(3), hosm.VPSchedule(), "v")
    x0 = torch.randn(6, 3)
    got = hosm.third_order_dsm(
        model,
        x0,
        weights="paper",
        weighting=weighting,
        generator=torch.Generator().manual_seed(2),
    )
    generator = torch.Generator().manual_seed(2)
    t, spread = draw_time(model, x0, weighting, generator)
    noise = torch.randn(x0.shape, generator=generator)
    probe = hosm.Hutchinson().draw(x0, generator)
    terms = hosm.dsm_terms(model, x0, t=t, noise=noise, probe=probe)
    factors = time_factors(model, x0, t, weighting, spread)
    first, higher = (1.0 if factor is None else factor for factor in factors)
    expected = (first * terms.first + higher * sum(terms[1:])).mean()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("weighting", ["noise", "native", "likelihood", torch.exp])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_sampler_changes_the_mean_of_no_term(name, weighting):
    """Midpoint sums over u and over t, of the factors times a function of t.

    With "likelihood" that of the first term is ½ ∫ g²/σ² · dt = ∫ · du over the elements, which
    times that are given as uniform have, too.
    """
    schedule = SCHEDULES[name]
    model = hosm.ScoreModel(MLP(3), schedule, "v")
    count = 40_000
    low, high = schedule.log_sigma_hat_range
    middle = (torch.arange(count) + 0.5) / count
    in_u = schedule.time(low + (high - low) * middle).clamp(schedule.t_min, schedule.t_max)
    in_t, spacing = towards_the_ends(schedule, count)
    own = schedule.time_density(in_t) * (schedule.t_max - schedule.t_min) * spacing

    def shape(t):
        return schedule.sigma(t) / (1 + schedule.sigma(t).square()) + 0.3

    def means(t, spread, shares, own=False):
        x0 = torch.zeros(count, 3)
        factors = time_factors(model, x0, t, weighting, spread, from_schedule=own)
        return [((1 if each is None else each) * shape(t) * shares).mean() for each in factors]

    by_u = means(in_u, torch.tensor(high - low), 1.0)
    by_t = means(in_t, None, own, own=True)
    torch.testing.assert_close(by_u, by_t, rtol=2e-3, atol=0)
    if weighting == "likelihood":
        integral = 3 * (high - low) * shape(in_u).mean()
        given = means(in_t, None, spacing)
        torch.testing.assert_close(by_u[0], integral, rtol=1e-9, atol=0)
        torch.testing.assert_close(given[0], integral, rtol=1e-4, atol=0)


def test_the_default_sampler_is_that_of_the_weighting():
    model, x0 = hosm.ScoreModel(MLP(3), hosm.VPSchedule()), torch.zeros(6, 3)

    def drawn(weighting, sampler=None):
        return draw_time(model, x0, weighting, torch.Generator().manual_seed(0), sampler)[0]

    by_schedule, by_u = drawn("noise"), drawn("noise", "log_sigma_hat")
    assert not torch.equal(by_schedule, by_u)
    for weighting in ("native", torch.exp, hosm.EDMWeighting()):
        assert torch.equal(drawn(weighting), by_schedule)
    assert torch.equal(drawn("likelihood"), by_u)
    assert torch.equal(drawn("likelihood", "schedule"), by_schedule)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_edm_weighting_is_the_loss_of_edms_trainer(dtype, tolerance):
    """Its training script: weight * (D_yn - y) ** 2, averaged over elements."""
    torch.manual_seed(0)
    denoiser, y = MLP(6).to(dtype), 0.5 * torch.randn(64, 6, dtype=dtype)
    sigma = (1.2 * torch.randn(64, dtype=dtype) - 1.2).exp().clamp(0.002, 80)
    n = torch.randn(64, 6, dtype=dtype)
    weight = (sigma**2 + 0.3**2) / (sigma * 0.3) ** 2
    squares = (denoiser(y + n * sigma[:, None], sigma) - y) ** 2
    expected = with_gradients((weight[:, None] * squares).mean(), denoiser)
    model = hosm.ScoreModel(denoiser, hosm.EDMSchedule(), "x0")
    given = {"t": sigma, "noise": n, "weighting": hosm.EDMWeighting(0.3)}
    for order in (1, 3):
        options = {} if order == 1 else {"weights": (1, *[torch.tensor(0.0)] * 3)}
        found = with_gradients(FUNCTIONS[order](model, y, **given, **options), denoiser)
        assert_same(found, expected, tolerance)
