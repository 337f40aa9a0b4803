"""Tables of ᾱ: exact at their entries, linear in log σ̂ between them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hosm_losses as hosm
from hosm_losses.schedules.discrete import Table

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


ROW = [0.9, 0.5, 0.1]


@pytest.mark.parametrize(
    "table",
    [
        np.array(ROW),
        np.array(ROW, dtype=np.float32).astype(np.float64),
        tuple(ROW),
        [np.float64(value) for value in ROW],
        [torch.tensor(value) for value in ROW],
        torch.tensor(ROW, requires_grad=True),
        torch.tensor(ROW, dtype=torch.bfloat16),
    ],
    ids=["array", "rounded", "tuple", "NumPy numbers", "list of tensors", "gradients", "bfloat16"],
)
def test_a_table_is_taken_in_any_form(table):
    schedule = hosm.DiscreteSchedule(table)
    assert schedule.alphas_cumprod == pytest.approx(ROW, rel=1e-2)
    assert {type(value) for value in schedule.alphas_cumprod} == {float}


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_a_table_of_more_dimensions_is_refused(kind):
    with pytest.raises(ValueError, match=r"one dimension, \(N,\); got one of shape \(2, 2\)"):
        hosm.DiscreteSchedule(kind([[0.9, 0.5], [0.4, 0.1]]))
    with pytest.raises(ValueError, match=r"got one of shape \(\)\. Give one"):
        hosm.DiscreteSchedule(0.5)


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([0.9j, 0.5]),
        ["a", "b"],
        object(),
        torch.ones(3, device="meta"),
        [[0.9], 0.5],
    ],
)
def test_a_table_of_no_numbers_is_refused(table):
    with pytest.raises(TypeError, match=r"alphas_cumprod: expected real numbers, in a list"):
        hosm.DiscreteSchedule(table)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_table_with_nan_or_infinity_is_refused(place, bad):
    table = list(ROW)
    table[place] = bad
    with pytest.raises(ValueError, match=r"expected two entries or more that fall"):
        hosm.DiscreteSchedule(table)


def test_a_table_that_rises_is_told_to_be_reversed():
    with pytest.raises(ValueError, match=r"got 3 entries from 0\.1 to 0\.9\..*reverse it"):
        hosm.DiscreteSchedule(ROW[::-1])


@pytest.mark.parametrize("values", [(), (1.0,)])
def test_a_table_has_two_entries_at_least(values):
    with pytest.raises(ValueError, match=rf"expected two entries or more; got {len(values)}\."):
        Table(values)


@pytest.mark.parametrize(
    "t",
    [
        *(-1, 1000, 999.5, -1e-3, float("nan")),
        torch.tensor([0, 1000]),
        torch.tensor([-1.0, 5.0]),
        np.array([3.0, 2e3]),
    ],
)
@pytest.mark.parametrize("method", ["alpha", "sigma", "log_sigma_hat", "__call__"])
def test_an_index_outside_the_table_is_refused_where_looking_is_free(method, t):
    with pytest.raises(
        ValueError, match=r"t: expected values in \[0, 999\], the range of the sch"
    ):
        getattr(SCHEDULE, method)(t)


def test_an_index_is_not_looked_at_on_meta_nor_in_a_transform():
    assert SCHEDULE(torch.full((2,), 1e6, device="meta"))[0].device.type == "meta"
    t = torch.tensor([3.5, 999.0])
    expected = torch.stack(SCHEDULE(t))
    torch.testing.assert_close(torch.stack(torch.func.vmap(SCHEDULE)(t), 0), expected)
    rate = torch.func.vmap(torch.func.grad(SCHEDULE.log_sigma_hat))(t[:1])
    torch.testing.assert_close(
        rate, SCHEDULE.squared_diffusion(t[:1]) / (2 * SCHEDULE.sigma(t[:1]) ** 2)
    )
    compiled = torch.compile(SCHEDULE.log_sigma_hat, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(t), SCHEDULE.log_sigma_hat(t))


def test_what_a_mode_makes_is_not_kept_for_the_time_after():
    t = torch.tensor([0.5, 1.0])
    expected = hosm.DiscreteSchedule(ROW).log_sigma_hat(t)

    def under_grad(schedule):
        torch.func.grad(lambda t: schedule.log_sigma_hat(t).sum())(t)

    def under_fakes(schedule):
        with FakeTensorMode():
            schedule.log_sigma_hat(torch.rand(2))

    def under_inference(schedule):
        with torch.inference_mode():
            schedule.log_sigma_hat(t)

    for use in (under_grad, under_fakes, under_inference):
        schedule = hosm.DiscreteSchedule(ROW)
        use(schedule)
        own = t.clone().requires_grad_()
        found = schedule.log_sigma_hat(own)
        torch.testing.assert_close(found, expected)
        torch.autograd.grad(found.sum(), own)


def test_it_is_built_under_any_mode():
    for mode in (torch.device("meta"), FakeTensorMode(), torch.inference_mode()):
        with mode:
            schedule = hosm.DiscreteSchedule(ROW)
        assert schedule == hosm.DiscreteSchedule(ROW)
        assert float(schedule.alpha(0)) == pytest.approx(0.9**0.5)


def test_it_prints_its_size_and_not_its_table():
    assert repr(SCHEDULE) == "DiscreteSchedule(1000 entries from 0.9999 to 4.03583e-05)"
