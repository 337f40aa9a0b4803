"""What a schedule of the user's says of its prior, and the times that it draws."""

import pytest
import torch

import hosm_losses as hosm
from tests.schedules.checks import assert_that_a_sampler_changes_no_mean, own
from tests.schedules.test_check import build


class Mine(hosm.Schedule):
    t_min, t_max = 0.008, 1.0

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return t


class Method(Mine):
    def prior_std(self):
        return 1.0


def drawing(function):
    """A schedule that draws its times by a function of the batch and a dtype."""

    class Own(Mine):
        def sample_time(self, batch, generator=None, *, device=None, dtype=None):
            return function(batch, dtype)

    return Own()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), True, "1", None])
def test_a_prior_that_is_no_positive_number_is_refused(value):
    schedule = type("Own", (Mine,), {"prior_std": value})()
    message = r"schedule: expected prior_std of Own to be a positive and finite number; got "
    with pytest.raises(ValueError, match=message):
        build(schedule)


def test_so_is_a_method():
    with pytest.raises(ValueError, match=r"prior_std of Method.*type method\. Write prior_std = "):
        build(Method())


@pytest.mark.parametrize("value", [2, 0.5, property(lambda self: 3.0)])
def test_a_prior_is_a_number_or_a_property(value):
    build(type("Own", (Mine,), {"prior_std": value})())


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda batch, dtype: 5 * torch.rand(batch, dtype=dtype),
            ValueError,
            r"to draw times in \[0\.008, 1\], from t_min to t_max; got [1-4]\.\d+\. Return self",
        ),
        (lambda batch, dtype: torch.zeros(batch), ValueError, r"to draw times in.*; got 0\. "),
        (lambda batch, dtype: torch.full((batch,), float("nan")), ValueError, r"; got nan\. "),
        (
            lambda batch, dtype: torch.rand(batch, 1, dtype=dtype),
            TypeError,
            r"to return a floating-point tensor of shape \(1000,\).*got a .* shape \(1000, 1\)",
        ),
        (lambda batch, dtype: torch.ones(batch, dtype=int), TypeError, r"got a torch\.int64"),
        (lambda batch, dtype: 0.5, TypeError, r"got 0\.5\. Return times \(batch,\)"),
        (lambda batch, dtype: torch.rand(batch, device="meta"), TypeError, r"on meta\. Return"),
    ],
)
def test_times_of_its_own_are_a_batch_in_the_range(function, error, message):
    with pytest.raises(error, match="schedule: expected sample_time of Own" + ".*" + message):
        build(drawing(function))


def test_a_sample_time_that_losses_cannot_call_is_refused():
    schedule = own(sample_time=lambda batch: torch.rand(batch))
    with pytest.raises(TypeError, match=r"sample_time of Own to take \(batch, generator, \*, dev"):
        build(schedule)


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
    message = rf"schedule: expected {kind.__name__} to have the density of its own sample_time"
    with pytest.raises(ValueError, match=message + ".*Write time_density"):
        hosm.first_order_dsm(model, X0, **options)


@pytest.mark.parametrize("weighting", ["likelihood", ("likelihood", torch.exp)])
def test_the_higher_terms_need_it_under_the_likelihood_weighting(weighting):
    model = build(Cubes())
    hosm.first_order_dsm(model, X0, weighting=weighting)
    for loss in (hosm.second_order_dsm, hosm.third_order_dsm):
        with pytest.raises(ValueError, match="Write time_density"):
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
