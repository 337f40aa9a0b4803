"""Tables of ᾱ: how they are made and kept. What holds of every schedule is in `test_base`."""

import copy
import pickle

import mpmath
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hosm_losses as hosm

ROW, BETAS = [0.9, 0.5, 0.1], [0.1, 0.5, 0.2]
SCHEDULE = hosm.DiscreteSchedule.linear()


def products(betas):
    """ᾱ of betas in 50 digits."""
    total, table = mpmath.mpf(1), []
    for beta in betas:
        total *= 1 - beta
        table.append(float(total))
    return pytest.approx(table, rel=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", [(), (200, 5e-4, 0.1), (2,), (7, 0.3, 0.3)])
def test_linear_betas(options, scaled):
    steps, start, end = (*options, *(1000, 1e-4, 0.02)[len(options) :])
    power = 2 if scaled else 1
    with mpmath.workdps(50):
        first, last = (mpmath.root(each, power) for each in (start, end))
        betas = [(first + (last - first) * i / (steps - 1)) ** power for i in range(steps)]
        expected = products(betas)
    found = hosm.DiscreteSchedule.linear(*options, scaled=scaled)
    assert found.alphas_cumprod == expected


@pytest.mark.parametrize("options", [(), (200,), (50, 0.0, 0.5), (3, 0.3), (2,)])
def test_cosine_alpha_bars(options):
    steps, offset, largest = (*options, *(1000, 0.008, 0.999)[len(options) :])
    with mpmath.workdps(50):
        s = mpmath.mpf(offset)
        times = [mpmath.mpf(i) / steps for i in range(steps + 1)]
        cosines = [mpmath.cos(mpmath.pi / 2 * (t + s) / (1 + s)) for t in times]
        betas = [1 - (cosines[i + 1] / cosines[i]) ** 2 for i in range(steps)]
        expected = products([min(beta, mpmath.mpf(largest)) for beta in betas])
    assert hosm.DiscreteSchedule.cosine(*options).alphas_cumprod == expected


@pytest.mark.parametrize(
    "kind",
    [
        tuple,
        np.array,
        lambda row: [np.float64(value) for value in row],
        lambda row: [torch.tensor(value) for value in row],
        lambda row: torch.tensor(row, requires_grad=True),
    ],
)
def test_a_table_and_betas_are_taken_in_any_form(kind):
    for make, row, expected in (
        (hosm.DiscreteSchedule, ROW, ROW),
        (hosm.DiscreteSchedule.from_betas, BETAS, (0.9, 0.45, 0.36)),
    ):
        table = make(kind(row)).alphas_cumprod
        assert table == pytest.approx(expected, rel=1e-15)
        assert {type(value) for value in table} == {float}
        # What is short is multiplied in float64.
        short = make(np.array(row, dtype=np.float32)).alphas_cumprod
        assert short == pytest.approx(expected, rel=1e-7)


def test_it_is_a_value_that_prints_its_size_and_keeps_its_copies_to_itself():
    schedule = hosm.DiscreteSchedule(ROW)
    before = len(pickle.dumps(schedule))
    schedule(torch.tensor([1.0]))
    assert len(pickle.dumps(schedule)) == before
    for clone in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert clone == schedule
        assert hash(clone) == hash(schedule)
        assert clone != SCHEDULE
        torch.testing.assert_close(clone(0.5), schedule(0.5))
    assert repr(schedule) == "DiscreteSchedule(3 entries from 0.9 to 0.1)"
    assert repr(schedule) in repr(hosm.ScoreModel(torch.nn.Identity(), schedule))


def test_an_index_is_not_looked_at_on_meta_nor_in_a_transform():
    assert SCHEDULE(torch.full((2,), 1e6, device="meta"))[0].device.type == "meta"
    t = torch.tensor([3.5, 999.0])
    found = torch.stack(torch.func.vmap(SCHEDULE)(t))
    torch.testing.assert_close(found, torch.stack(SCHEDULE(t)))
    rate = torch.func.vmap(torch.func.grad(SCHEDULE.log_sigma_hat))(t)
    expected = SCHEDULE.squared_diffusion(t) / (2 * SCHEDULE.sigma(t) ** 2)
    torch.testing.assert_close(rate, expected)


def test_a_table_that_nothing_was_asked_of_is_compiled_whole():
    """What is found in it at the first call holds no numbers of NumPy."""
    torch._dynamo.reset()
    fresh, t = hosm.DiscreteSchedule(ROW), torch.tensor([0.0, 1.5, 2.0])

    def parts(t):
        return fresh.log_sigma_hat(t), fresh.squared_diffusion(t), *fresh.rates(t), fresh.time(t)

    compiled = torch.compile(parts, backend="eager", fullgraph=True)(t)
    torch.testing.assert_close(compiled, parts(t))


def test_what_a_mode_makes_is_not_kept_for_the_time_after():
    t = torch.tensor([0.5, 1.0])
    expected = hosm.DiscreteSchedule(ROW).log_sigma_hat(t)
    modes = [torch.device("meta"), FakeTensorMode(), torch.inference_mode()]
    for mode in (None, *modes):
        if mode is None:
            schedule = hosm.DiscreteSchedule(ROW)
            torch.func.grad(lambda t, schedule=schedule: schedule.log_sigma_hat(t).sum())(t)
        else:
            with mode:
                schedule = hosm.DiscreteSchedule(ROW)
                schedule.log_sigma_hat(torch.rand(2))
        own = t.clone().requires_grad_()
        found = schedule.log_sigma_hat(own)
        torch.testing.assert_close(found, expected)
        torch.autograd.grad(found.sum(), own)


def test_indices_are_as_precise_as_float_times():
    """Of data in half precision too, in which 999 is 1000."""
    model = hosm.ScoreModel(lambda x, t: 0.5 * x, SCHEDULE, "v")
    index = torch.tensor([0, 501, 999])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x0, noise = torch.randn(2, 3, 2).to(dtype)
        t = index.to(torch.promote_types(dtype, torch.float32))
        losses = [hosm.first_order_dsm(model, x0, t=each, noise=noise) for each in (index, t)]
        torch.testing.assert_close(*losses, rtol=0, atol=0)
