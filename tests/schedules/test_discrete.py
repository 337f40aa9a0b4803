"""Tables of ᾱ: exact at their entries, linear in log σ̂ between them."""

import copy
import pickle

import mpmath
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


@pytest.mark.parametrize("steps", [2, 1000, 4000])
def test_derivatives_keep_the_digits_of_float32(steps):
    schedule = hosm.DiscreteSchedule.linear(steps)
    index = torch.arange(steps, dtype=torch.float64)
    entries = np.asarray(schedule.alphas_cumprod)
    u = 0.5 * (np.log1p(-entries) - np.log(entries))
    slope = torch.from_numpy(np.append(np.diff(u), u[-1] - u[-2]))
    alpha, sigma = torch.from_numpy(entries).sqrt(), torch.from_numpy(1 - entries).sqrt()
    expected = {
        "drift": -sigma.square() * slope,
        "squared_diffusion": 2 * sigma.square() * slope,
        "rates": torch.stack([-alpha * sigma.square() * slope, sigma * alpha.square() * slope]),
    }
    for name, wanted in expected.items():
        for dtype, bound in ((torch.float32, 4e-6), (torch.float64, 1e-12)):
            found = getattr(schedule, name)(index.to(dtype))
            found = torch.stack(found) if isinstance(found, tuple) else found
            assert found.dtype == dtype
            assert float((found.double() / wanted - 1).abs().max()) < bound, name


def test_draws_are_indices():
    t = SCHEDULE.sample_time(20_000, torch.Generator().manual_seed(0))
    assert t.dtype == SCHEDULE.sample_time(2, dtype=torch.float32).dtype == torch.int64
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


@pytest.mark.parametrize("part", ["log_sigma_hat", "squared_diffusion", "rates", "time"])
def test_a_table_that_nothing_was_asked_of_is_compiled_whole(part):
    """What is found in it at the first call holds no numbers of NumPy."""
    torch._dynamo.reset()
    function = getattr(hosm.DiscreteSchedule(TABLE.tolist()), part)
    t = torch.tensor([0.0, 1.5, 3.0])
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(t), getattr(SCHEDULE, part)(t))


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
    text = "DiscreteSchedule(1000 entries from 0.9999 to 4.03583e-05)"
    assert repr(SCHEDULE) == text
    model = hosm.ScoreModel(torch.nn.Identity(), SCHEDULE)
    assert f"schedule={text}, prediction='epsilon'" in repr(model)
    assert len(repr(hosm.ThirdOrderDSM(model))) < 400


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda row: torch.tensor(row, requires_grad=True),
        lambda row: [np.float64(value) for value in row],
    ],
)
def test_betas_are_taken_in_any_form(kind):
    schedule = hosm.DiscreteSchedule.from_betas(kind([0.1, 0.5, 0.2]))
    assert schedule.alphas_cumprod == pytest.approx((0.9, 0.45, 0.36), rel=1e-15)
    single = hosm.DiscreteSchedule.from_betas(np.array([0.1, 0.5, 0.2], dtype=np.float32))
    assert single.alphas_cumprod == pytest.approx((0.9, 0.45, 0.36), rel=1e-7)


def products(betas):
    """ᾱ in 50 digits."""
    total, table = mpmath.mpf(1), []
    for beta in betas:
        total *= 1 - beta
        table.append(float(total))
    return pytest.approx(table, rel=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", [(), (200, 5e-4, 0.1), (2,), (7, 0.3, 0.3)])
def test_linear_betas(options, scaled):
    steps, start, end = (*options, *(1000, 1e-4, 0.02)[len(options) :])
    with mpmath.workdps(50):
        first, last = mpmath.mpf(start), mpmath.mpf(end)
        if scaled:
            first, last = mpmath.sqrt(first), mpmath.sqrt(last)
        betas = [first + (last - first) * i / (steps - 1) for i in range(steps)]
        expected = products([beta**2 for beta in betas] if scaled else betas)
    schedule = hosm.DiscreteSchedule.linear(*options, scaled=scaled)
    assert schedule.alphas_cumprod == expected
    if not options and not scaled:
        torch.testing.assert_close(
            torch.tensor(schedule.alphas_cumprod), TABLE, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("options", [(), (200,), (50, 0.0, 0.5), (3, 0.3), (2,)])
def test_cosine_alpha_bars(options):
    steps, offset, largest = (*options, *(1000, 0.008, 0.999)[len(options) :])
    with mpmath.workdps(50):
        s = mpmath.mpf(offset)
        cosines = [
            mpmath.cos(mpmath.pi / 2 * (mpmath.mpf(i) / steps + s) / (1 + s))
            for i in range(steps + 1)
        ]
        betas = [1 - (cosines[i + 1] / cosines[i]) ** 2 for i in range(steps)]
        expected = products([min(beta, mpmath.mpf(largest)) for beta in betas])
        closed = [float((cosines[i + 1] / cosines[0]) ** 2) for i in range(steps)]
    found = hosm.DiscreteSchedule.cosine(*options).alphas_cumprod
    assert found == expected
    unclipped = [beta < largest for beta in betas].index(False)
    assert found[:unclipped] == pytest.approx(closed[:unclipped], rel=1e-12)
