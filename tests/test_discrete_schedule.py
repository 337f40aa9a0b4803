"""Tables of ᾱ: exact at their entries, linear in log σ̂ between them."""

import copy
import pickle

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.discrete_schedule import Table

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULE = hosm.DiscreteSchedule(TABLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_are_those_of_the_table(dtype):
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    index = torch.arange(1000)
    for t in (index.to(dtype), index):
        alpha, sigma = SCHEDULE(t)
        if t.dtype == dtype:
            assert alpha.dtype == dtype
            assert float((alpha / TABLE.sqrt() - 1).abs().max()) < bound
            assert float((sigma / (1 - TABLE).sqrt() - 1).abs().max()) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_between_entries_log_sigma_hat_is_linear(dtype):
    t = torch.tensor([0.25, 500.5, 998.75], dtype=dtype)
    alpha, sigma = SCHEDULE(t)
    entries = 0.5 * ((1 - TABLE) / TABLE).log()
    left = t.long()
    part = (t - left).double()
    expected = (1 - part) * entries[left] + part * entries[left + 1]
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close((sigma / alpha).log().double(), expected, rtol=0, atol=10 * bound)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3, dtype=dtype))
    exact = torch.sigmoid(2 * expected).sqrt()
    assert float((sigma / exact - 1).abs().max()) < bound


def test_time_inverts_it_to_the_ends():
    t = torch.tensor([0.0, 0.3, 17.0, 998.2, 999.0])
    torch.testing.assert_close(SCHEDULE.time(SCHEDULE.log_sigma_hat(t)), t)
    assert (SCHEDULE.t_min, SCHEDULE.t_max, SCHEDULE.prior_std) == (0.0, 999.0, 1.0)


def test_derivatives_are_slopes_of_the_pieces():
    t = torch.tensor([10.5])
    h = 1e-6
    slope = (SCHEDULE.log_sigma_hat(t + h) - SCHEDULE.log_sigma_hat(t - h)) / (2 * h)
    g2 = 2 * SCHEDULE.sigma(t) ** 2 * slope
    torch.testing.assert_close(SCHEDULE.squared_diffusion(t), g2, rtol=1e-6, atol=0)
    drift = (SCHEDULE.alpha(t + h).log() - SCHEDULE.alpha(t - h).log()) / (2 * h)
    torch.testing.assert_close(SCHEDULE.drift(t), drift, rtol=1e-6, atol=0)


def test_draws_are_indices():
    t = SCHEDULE.sample_time(20_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    assert int(t.min()) >= 0
    assert int(t.max()) <= 999
    mean, error = t.double().mean(), t.double().std() / 20_000**0.5
    assert abs(mean - 499.5) < 5 * error


def test_a_table_is_copied_to_a_device_once():
    table = Table((1.0, 3.0, 4.0))
    t = torch.tensor([0.0, 0.5, 2.0])
    torch.testing.assert_close(table(t), torch.tensor([1.0, 2.0, 4.0]))
    assert table.beside(t) is table.beside(2 * t)
    assert table.beside(t.float()).dtype == torch.float32


def test_it_is_a_value_without_the_copies_it_keeps():
    SCHEDULE(torch.tensor([3.0]))
    assert hosm.DiscreteSchedule(TABLE.tolist()) == SCHEDULE
    for clone in (pickle.loads(pickle.dumps(SCHEDULE)), copy.deepcopy(SCHEDULE)):
        assert clone == SCHEDULE
        assert hash(clone) == hash(SCHEDULE)
        assert clone._log_sigma_hat._copies == {}
        torch.testing.assert_close(clone(3.0)[0], SCHEDULE(3.0)[0])


@pytest.mark.parametrize("table", [[], [0.9], [0.5, 0.6], [1.0, 0.5], [0.9, 0.0], [0.9, 0.9]])
def test_a_table_that_does_not_fall_inside_0_and_1_is_refused(table):
    with pytest.raises(ValueError, match=r"fall from below 1 to above 0.*zero terminal SNR"):
        hosm.DiscreteSchedule(table)


def test_integer_and_float_times_give_one_loss():
    model = hosm.ScoreModel(lambda x, t: x * t[:, None], SCHEDULE, time=0.001)
    x0, noise = torch.randn(3, 2), torch.randn(3, 2)
    index = torch.tensor([0, 500, 999])
    losses = [hosm.first_order_dsm(model, x0, t=t, noise=noise) for t in (index, index.double())]
    torch.testing.assert_close(losses[0], losses[1])
