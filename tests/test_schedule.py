"""What follows from α and σ alone: a user's subclass against the closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hosm_losses as hosm
from tests.oracles import networks
from tests.test_schedules import SCHEDULES


def bare(schedule):
    """The same α and σ in a user's own subclass, and nothing else."""

    class Bare(hosm.Schedule):
        t_min, t_max = schedule.t_min, schedule.t_max

        def alpha(self, t):
            return schedule.alpha(t)

        def sigma(self, t):
            return schedule.sigma(t)

    return Bare()


@given(name=st.sampled_from(sorted(SCHEDULES)), place=st.floats(0, 1))
def test_a_subclass_with_alpha_and_sigma_alone_knows_the_rest(name, place):
    schedule = SCHEDULES[name]
    t = torch.tensor([schedule.t_min + place * (schedule.t_max - schedule.t_min)])
    own = bare(schedule)
    torch.testing.assert_close(
        own.log_sigma_hat(t), schedule.log_sigma_hat(t), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(own.drift(t), schedule.drift(t), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        own.squared_diffusion(t), schedule.squared_diffusion(t), rtol=1e-7, atol=0
    )
    for rate, expected in zip(own.rates(t), schedule.rates(t), strict=True):
        torch.testing.assert_close(rate, expected, rtol=1e-7, atol=1e-9)
    found = own.time(schedule.log_sigma_hat(t))
    # α is flat where VP-like schedules end, so t is found as well as log σ̂ allows.
    torch.testing.assert_close(
        own.log_sigma_hat(found), schedule.log_sigma_hat(t), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(found, t, rtol=1e-6, atol=1e-9)


def test_bisection_clips_to_the_ends():
    own = bare(hosm.VPSchedule())
    ends = own.time(torch.tensor([-50.0, 50.0]))
    torch.testing.assert_close(ends, torch.tensor([1e-5, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bisection_finds_the_last_digits(dtype):
    own, closed = bare(hosm.VESchedule()), hosm.VESchedule()
    t = torch.linspace(1e-5, 1, 9, dtype=dtype)
    found = own.time(closed.log_sigma_hat(t))
    assert found.dtype == dtype
    torch.testing.assert_close(found, t, rtol=0, atol=30 * torch.finfo(dtype).eps)


def test_a_subclass_works_in_every_loss_and_in_the_likelihood():
    network, shape = networks()["mlp"]
    x0 = torch.randn(4, *shape)
    own, closed = bare(hosm.VPSchedule()), hosm.VPSchedule()
    for weighting in ("noise", "native", "likelihood"):
        losses = []
        for schedule in (own, closed):
            model = hosm.ScoreModel(network, schedule, "v_prediction")
            generator = torch.Generator().manual_seed(0)
            losses.append(
                hosm.third_order_dsm(model, x0, weighting=weighting, generator=generator)
            )
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    # The prior of a schedule that says nothing is N(0, σ(t_max)²); VP says 1.
    results = [
        hosm.ode_nll(hosm.ScoreModel(network, s), x0, divergence="exact", steps=16)
        for s in (own, closed)
    ]
    torch.testing.assert_close(results[0].nll, results[1].nll, rtol=1e-3, atol=1e-3)
    assert own.prior_std == pytest.approx(float(closed.sigma(torch.tensor(1.0))))


def test_the_base_class_asks_for_alpha_and_sigma():
    for method in ("alpha", "sigma"):
        with pytest.raises(NotImplementedError, match="a schedule defines alpha"):
            getattr(hosm.Schedule(), method)(torch.tensor(0.5))


def test_numbers_and_integers_and_halves_are_times_too():
    schedule = hosm.VPSchedule()
    assert float(schedule(0.5)[0]) == float(schedule(torch.tensor(0.5))[0])
    assert schedule(1)[0].dtype == torch.get_default_dtype()
    assert schedule(torch.tensor(0.5, dtype=torch.bfloat16))[0].dtype == torch.float32
