"""Under a table a sampler draws indices, and changes no mean: finite sums over all of them."""

import numpy as np
import pytest
import torch

import hosm_losses as hosm
from hosm_losses.losses.weighting import draw_time, time_factors
from tests.cases import FUNCTIONS, MLP, with_gradients

TABLES = {
    "two": hosm.DiscreteSchedule([0.9, 0.2]),
    "ten": hosm.DiscreteSchedule.linear(10, 1e-2, 0.5),
    "uneven": hosm.DiscreteSchedule([0.99, 0.98, 0.5, 0.45, 0.1, 0.001]),
    "thousand": hosm.DiscreteSchedule.linear(),
}
WEIGHTINGS = {
    "noise": "noise",
    "native": "native",
    "callable": lambda t: t.double() + 1,
    "likelihood": "likelihood",
}


def widths(schedule):
    """What of log σ̂ is nearest to each entry, (N,)."""
    bars = np.array(schedule.alphas_cumprod)
    u = 0.5 * (np.log1p(-bars) - np.log(bars))
    edges = np.concatenate([u[:1], (u[1:] + u[:-1]) / 2, u[-1:]])
    return torch.tensor(np.diff(edges))


def built(schedule):
    return hosm.ScoreModel(MLP(3), schedule, "v", time=1e-3)


@pytest.mark.parametrize("weighting", ["likelihood", "noise"])
@pytest.mark.parametrize("name", TABLES)
def test_an_index_is_drawn_with_the_probability_of_its_width(name, weighting, monkeypatch):
    schedule, count = TABLES[name], 100_000
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    monkeypatch.setattr(torch, "rand", lambda shape, **options: middle)
    t, _ = draw_time(built(schedule), torch.zeros(count, 3), weighting, None, "log_sigma_hat")
    assert t.dtype == torch.int64
    expected = widths(schedule) / widths(schedule).sum()
    shares = t.bincount(minlength=len(expected)) / count
    torch.testing.assert_close(shares, expected, rtol=0, atol=2 / count)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("name", TABLES)
def test_the_mean_is_one_by_either_sampler_and_for_given_indices(name, weighting):
    schedule, model = TABLES[name], built(TABLES[name])
    width = widths(schedule)
    count = len(width)
    t, x0 = torch.arange(count), torch.zeros(count, 3)
    value = 0.3 + schedule.sigma(t)  # of some loss

    def means(probability, *spread, drawn=True):
        factors = time_factors(model, x0, t, weighting, *spread, from_schedule=drawn)
        return [
            float(((1 if each is None else each) * value * probability).sum()) for each in factors
        ]

    even = torch.full_like(width, 1 / count)
    by_index = means(even)
    for other in (
        means(width / width.sum(), width.sum()),
        means(even, drawn=False),
    ):
        assert other == pytest.approx(by_index, rel=1e-10)
    if weighting == "noise":
        assert by_index == pytest.approx([float(value.mean())] * 2, rel=1e-12)
    if weighting == "likelihood":
        # By the trapezoidal rule, ∫ value d log σ̂ times the dimension.
        u = schedule.log_sigma_hat(t.double())
        assert by_index[0] == pytest.approx(3 * float(torch.trapezoid(value, u)), rel=1e-9)


@pytest.mark.parametrize(
    ("order", "probes", "prediction"),
    [
        (1, None, "x0"),
        (2, 1, "v"),
        (3, 1, "velocity"),
        (2, hosm.Paired(), "x0"),
        (3, hosm.Paired(), "v"),
    ],
)
def test_native_keeps_its_digits_where_alpha_is_near_0(prediction, probes, order):
    """At α = 2e-9 ε̂ − ε is that of the rounding of ε̂ ~ 1, if it is taken as a difference."""
    schedule = hosm.DiscreteSchedule.linear(4000)
    none = torch.tensor(0.0)  # which has its term, as the number 0 has not
    options = {} if order == 1 else {"probes": probes, "weights": (1, *[none] * order)}
    x0, noise, network, found = torch.randn(8, 3), torch.randn(8, 3), MLP(3), []
    for dtype in (torch.float32, torch.float64):
        model = hosm.ScoreModel(network.to(dtype), schedule, prediction, time=1e-3)
        t = torch.linspace(0, 3999, 8).round().to(dtype)
        inputs = {"t": t, "noise": noise.to(dtype), "weighting": "native"}
        loss = FUNCTIONS[order](model, x0.to(dtype), **inputs, **options)
        parts = with_gradients(loss, network)
        found.append(torch.cat([each.flatten() for each in parts]).double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
