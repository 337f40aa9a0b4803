"""What the check of a schedule takes, and where the density of its own draws is needed.

What it refuses is in `tests/test_errors.py`.
"""

import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hosm_losses as hosm
from tests.cases import SCHEDULES
from tests.schedules.checks import own
from tests.versions import makes_modules


def build(schedule):
    return hosm.ScoreModel(lambda x, t: x.sin(), schedule)


ENTRIES = 0.01 + np.cumsum(np.tile([0.5e-3, 1.5e-3], 501))


def between(t):
    """A table of 1001 entries, at each of which the slope changes."""
    table, left = torch.from_numpy(ENTRIES), (1000 * t).long().clamp(0, 999)
    return table[left] + (1000 * t - left) * (table[left + 1] - table[left])


HELD = own(alpha=None, sigma=None)
HELD.alpha, HELD.sigma = torch.ones_like, torch.clone  # functions of the instance

RIGHT = {
    **SCHEDULES,
    "own": own(),
    "NumPy numbers": own(ends=(np.float32(0.01), np.int64(2))),
    "kinks": own(sigma=between, ends=(0.0, 1.0)),
    "kinks in a table": hosm.DiscreteSchedule.from_betas(0.2 * torch.rand(11) + 1e-3),
    "single precision": own(sigma=lambda t: (100 + t.float()).to(t.dtype)),
    "rounding": own(lambda t: (7 * t).exp() * (-7 * t).exp()),
    "held": HELD,
    "own derivatives": own(
        lambda t: 1 - t,
        torch.detach,
        (1e-3, 0.99),
        drift=lambda t: -1 / (1 - t),
        squared_diffusion=lambda t: 2 * t / (1 - t),
        rates=lambda t: (-torch.ones_like(t), torch.ones_like(t)),
    ),
    **{
        f"prior {name}": type("Own", (type(own()),), {"prior_std": value})()
        for name, value in (
            ("whole", 2),
            ("of NumPy", np.float32(0.5)),
            ("property", property(lambda self: 3.0)),
        )
    },
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_taken_anywhere(name):
    modes = torch.device("meta"), FakeTensorMode(), torch.inference_mode(), torch.no_grad()
    for mode in modes:
        with mode:
            build(RIGHT[name])

    def loss(x):
        t = torch.full((len(x),), float(RIGHT[name].t_max))
        return hosm.first_order_dsm(build(RIGHT[name]), x, t=t, noise=torch.ones_like(x))

    x = torch.randn(3, 2, requires_grad=True)
    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


def test_a_schedule_may_learn():
    scale = torch.nn.Parameter(torch.tensor(2.0))
    model = build(own(sigma=lambda t: scale * t))
    hosm.first_order_dsm(model, torch.zeros(2, 2)).backward()
    assert float(scale.grad) != 0


def test_a_warning_that_a_filter_makes_an_error_is_no_fault_of_the_schedule():
    def alpha(t):
        warnings.warn("old", FutureWarning, stacklevel=1)
        return torch.ones_like(t)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning):
            build(own(alpha))


@makes_modules
def test_it_is_looked_at_only_outside_of_compilation():
    def make(x):
        return build(hosm.LinearFlowSchedule(t_max=1.0)).predict(x, x)

    compiled = torch.compile(make, backend="eager", fullgraph=True)
    assert float(compiled(torch.zeros(()))) == 0.0


class Cubes(type(own())):
    """t = s³ for a uniform s in [0.2, 1], with the density 1/(2.4 t^⅔)."""

    t_min = 0.008

    def sample_time(self, batch, generator=None, *, device=None, dtype=None):
        unit = torch.rand(batch, generator=generator, device=device, dtype=dtype)
        return self.clip((0.2 + 0.8 * unit) ** 3)


class WithDensity(Cubes):
    def time_density(self, t):
        return 1 / (3 * 0.8 * t ** (2 / 3))


class Inherits(WithDensity):
    pass


class Draws:
    sample_time = Cubes.sample_time


class Mixed(Draws, type(own())):
    pass


class EDM(hosm.EDMSchedule):
    sample_time = Cubes.sample_time


BY_U = {"time_sampler": "log_sigma_hat"}
NEEDED = [{"weighting": "likelihood", "time_sampler": "schedule"}, BY_U]
NEEDED.append({**BY_U, "weighting": torch.exp})
T = torch.full((4,), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("kind", [Cubes, Mixed, EDM])
def test_times_of_its_own_without_their_density_are_refused_where_it_is_needed(kind):
    model, x0 = build(kind()), torch.zeros(4, 2)
    for options in NEEDED:
        with pytest.raises(ValueError):
            hosm.first_order_dsm(model, x0, **options)
    for options in (
        {},
        {"weighting": "native"},
        {"weighting": "likelihood"},
        {**NEEDED[0], "t": T},
    ):
        hosm.first_order_dsm(model, x0, **options)
    # The higher terms need it under this weighting.
    with pytest.raises(ValueError, match="densit"):
        hosm.second_order_dsm(model, x0, weighting="likelihood", weights="paper")


@pytest.mark.parametrize("kind", [lambda: own(ends=(0.008, 1.0)), WithDensity, Inherits])
def test_with_their_density_a_sampler_changes_no_mean(kind):
    model, count = build(kind()), 40_000
    x0 = torch.zeros(count, 1)
    for weighting in ("noise", "likelihood"):
        losses = [
            hosm.first_order_dsm(
                model,
                x0,
                weighting=weighting,
                time_sampler=sampler,
                reduction="none",
                generator=torch.Generator().manual_seed(0),
            )
            for sampler in ("schedule", "log_sigma_hat")
        ]
        error = sum(loss.var() / count for loss in losses) ** 0.5
        assert abs(losses[0].mean() - losses[1].mean()) < 5 * error
