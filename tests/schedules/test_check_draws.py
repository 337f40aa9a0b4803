"""What a schedule of the user's says of its prior, and the times that it draws."""

import pytest
import torch

import hosm_losses as hosm
from tests.schedules.checks import assert_that_a_sampler_changes_no_mean
from tests.schedules.test_check import build


class Mine(hosm.Schedule):
    t_min, t_max = 0.008, 1.0

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return t


def drawing(function):
    """A schedule that draws its times by a function of the batch and a dtype."""

    class Own(Mine):
        def sample_time(self, batch, generator=None, *, device=None, dtype=None):
            return function(batch, dtype)

    return Own()


@pytest.mark.parametrize("value", [2, 0.5, property(lambda self: 3.0)])
def test_a_prior_is_a_number_or_a_property(value):
    build(type("Own", (Mine,), {"prior_std": value})())


def test_what_the_check_draws_leaves_the_generators_as_they_were():
    before = torch.get_rng_state()
    build(drawing(lambda batch, dtype: 0.01 + 0.9 * torch.rand(batch, dtype=dtype)))
    assert torch.equal(torch.get_rng_state(), before)


class Cubes(Mine):
    """t = s³ for a uniform s in [0.2, 1], with the density 1/(2.4 t^⅔)."""

    def sample_time(self, batch, generator=None, *, device=None, dtype=None):
        unit = torch.rand(batch, generator=generator, device=device, dtype=dtype)
        return self.clip((0.2 + 0.8 * unit) ** 3)


class WithDensity(Cubes):
    def time_density(self, t):
        return 1 / (3 * 0.8 * t ** (2 / 3))


class Inherits(WithDensity):
    pass


class DrawsAgain(WithDensity):
    def sample_time(self, batch, generator=None, *, device=None, dtype=None):
        return torch.full((batch,), 0.5, device=device, dtype=dtype)


class Draws:
    sample_time = Cubes.sample_time


class Mixed(Draws, Mine):
    pass


class EDM(hosm.EDMSchedule):
    sample_time = Cubes.sample_time


NEEDED = [
    {"weighting": "likelihood", "time_sampler": "schedule"},
    {"weighting": "noise", "time_sampler": "log_sigma_hat"},
    {"weighting": torch.exp, "time_sampler": "log_sigma_hat"},
]
X0 = torch.zeros(4, 2)


@pytest.mark.parametrize("options", NEEDED)
@pytest.mark.parametrize("kind", [Cubes, DrawsAgain, Mixed, EDM])
def test_times_of_its_own_without_their_density_are_refused_where_it_is_needed(kind, options):
    model = build(kind())
    with pytest.raises(ValueError):
        hosm.first_order_dsm(model, X0, **options)


@pytest.mark.parametrize("weighting", ["likelihood", ("likelihood", torch.exp)])
def test_the_higher_terms_need_it_under_the_likelihood_weighting(weighting):
    model = build(Cubes())
    hosm.first_order_dsm(model, X0, weighting=weighting)
    for loss in (hosm.second_order_dsm, hosm.third_order_dsm):
        with pytest.raises(ValueError):
            loss(model, X0, weighting=weighting)


@pytest.mark.parametrize(
    "options",
    [{}, {"weighting": "native"}, {"weighting": "likelihood"}, {**NEEDED[0], "t": X0[:, 0] + 0.5}],
)
def test_and_taken_elsewhere(options):
    hosm.first_order_dsm(build(Cubes()), X0, **options)


@pytest.mark.parametrize("kind", [Mine, WithDensity, Inherits])
def test_with_their_density_a_sampler_changes_no_mean(kind):
    for weighting in ("noise", "likelihood"):
        assert_that_a_sampler_changes_no_mean(build(kind()), weighting, 40_000)
