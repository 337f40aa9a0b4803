"""check_wrapping on networks that are trained, and wrapped right and wrong.

Six small networks, each of a kind that is in use, are given what their makers give them. Each is
then wrapped with five mistakes. A remedy is right if it calls the network with nearly the same x
and time at the same noise level as in training, and reads the output in the same way.
"""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.diagnostics import candidates, wrapping
from hosm_losses.model import bind_model
from tests.cases import PREDICTIONS, SCHEDULES, default_dtype
from tests.oracles import PREDICTIONS_OF_ORACLE

STEPS, BATCH, SAMPLES = 600, 192, 1024
VP, VE, EDM = hosm.VPSchedule(), hosm.VESchedule(), hosm.EDMSchedule()
FLOW, LINEAR = hosm.LinearFlowSchedule(), hosm.DiscreteSchedule.linear()
SCALED = hosm.DiscreteSchedule.linear(1000, 0.00085, 0.012, scaled=True)
COSINE = hosm.DiscreteSchedule.cosine()


def clusters(count):
    """Three small clusters in the square from −1 to 1."""
    centres = torch.tensor([[-0.7, -0.6], [0.8, -0.1], [0.0, 0.7]])
    return centres[torch.randint(3, (count,))] + 0.08 * torch.randn(count, 2)


def bars(count):
    """Dark images of 8 × 8 from −1 to 1 with a bright bar across or down."""
    place, along = torch.randint(7, (count,)), torch.arange(8)
    bright = (
        ((along - place[:, None] - 0.5).abs() < 1).float()[:, None, :, None].expand(-1, 1, 8, 8)
    )
    down = torch.randint(2, (count, 1, 1, 1)) > 0
    image = torch.where(down, bright.transpose(2, 3), bright)
    return 1.4 * image - 0.8 + 0.1 * torch.randn(count, 1, 8, 8)


class Network(nn.Module):
    """Residual layers with features of the time that it is given, and a skip past all of them."""

    def __init__(self, elements, features):
        super().__init__()
        self.features, width = features, 96
        self.time = nn.Linear(features(torch.ones(1)).shape[1], width)
        self.inner = nn.Linear(elements, width)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.outer, self.skip = nn.Linear(width, elements), nn.Linear(width, 1)

    def forward(self, x, t):
        time, silu = self.time(self.features(t)), nn.functional.silu
        hidden = silu(self.inner(x.flatten(1)) + time)
        for layer in self.middle:
            hidden = hidden + silu(layer(hidden) + time)
        return (self.outer(hidden) + self.skip(silu(time)) * x.flatten(1)).view_as(x)


class Preconditioned(Network):
    """EDM's denoiser, which is given σ."""

    def forward(self, x, t):
        sigma, size = t.view(-1, *[1] * (x.ndim - 1)), 0.5
        root = (sigma**2 + size**2).sqrt()
        inner = super().forward(x / root, t.log() / 4)
        return (size / root) ** 2 * x + sigma * size / root * inner


class Divided(Network):
    """score_sde's score under VE, which is given σ and divides by it."""

    def forward(self, x, t):
        sigma = t[:, None]
        return super().forward(x / (1 + sigma**2).sqrt(), t) / sigma


def sines(factor):
    def features(t):
        angles = factor * t.float()[:, None] * 1000.0 ** (-torch.arange(8) / 8)
        return torch.cat([angles.sin(), angles.cos()], 1)

    return features


def polynomial(function):
    def features(t):
        u = function(t)[:, None]
        return torch.cat([u, u * u / 3, (2 * u).sin(), (2 * u).cos()], 1)

    return features


class Trained(NamedTuple):
    """A network, how it was trained, and what is wrong in five other wrappings of it."""

    data: Callable[[int], torch.Tensor]  # in the units of the training
    network: Callable[[], nn.Module]
    right: dict[str, Any]
    wrong: dict[str, Any]
    given: Callable[[torch.Tensor], torch.Tensor]  # data in other units than the training's


def bytes_of(x):
    return 127.5 * (x + 1)


def halved(x):
    return (x + 1) / 2


NETWORKS = {
    "vp": Trained(
        clusters,
        lambda: Network(2, sines(1000.0)),
        {"schedule": VP, "prediction": "epsilon"},
        {"time": 999.0, "prediction": "score", "family": {"schedule": hosm.CosineSchedule()}},
        halved,
    ),
    "ve": Trained(
        lambda count: halved(clusters(count)),
        lambda: Divided(2, polynomial(torch.log)),
        {"schedule": VE, "prediction": "score", "time": VE.sigma},
        {"time": None, "prediction": "epsilon", "family": {"schedule": VP, "time": VP.sigma}},
        lambda x: 2 * x - 1,
    ),
    "edm": Trained(
        bars,
        lambda: Preconditioned(64, polynomial(lambda t: 2 * t)),
        {"schedule": EDM, "prediction": "x0"},
        {"time": lambda t: t.log() / 4, "prediction": "epsilon", "family": {"schedule": VP}},
        bytes_of,
    ),
    "flow": Trained(
        lambda count: (clusters(count) - 0.03) / 0.6,
        lambda: Network(2, polynomial(lambda t: 4 * t - 2)),
        {"schedule": FLOW, "prediction": "velocity"},
        {"time": 1000.0, "prediction": "epsilon", "family": {"schedule": VP}},
        lambda x: 3 + 0.5 * x,
    ),
    "table": Trained(
        bars,
        lambda: Network(64, sines(1.0)),
        {"schedule": LINEAR, "prediction": "epsilon"},
        {"time": lambda t: t / 1000, "prediction": "v", "family": {"schedule": COSINE}},
        halved,
    ),
    "v": Trained(
        clusters,
        lambda: Network(2, sines(1.0)),
        {"schedule": SCALED, "prediction": "v"},
        {"time": lambda t: t / 1000, "prediction": "epsilon", "family": {"schedule": COSINE}},
        lambda x: x / 0.18215,
    ),
}
FAULTS = ("time", "sign", "prediction", "family", "units")


def train(model, draw, steps, rate, cycle=True):
    """Minimise the loss of order one on batches that are drawn."""
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps) if cycle else None
    for _ in range(steps):
        loss = hosm.first_order_dsm(model, draw())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if cycle:
            rates.step()


@functools.cache
def trained(name):
    """The network, and data in the units of its training."""
    made = NETWORKS[name]
    with torch.random.fork_rng(), default_dtype(torch.float32), torch.enable_grad():
        torch.manual_seed(0)
        network = made.network()
        model = hosm.ScoreModel(network, **made.right)
        train(model, lambda: made.data(BATCH), STEPS, 5e-3)
        return network, made.data(SAMPLES)


def wrapped(name, fault=None):
    """A model, and the data that it is given."""
    made, (network, data) = NETWORKS[name], trained(name)
    options = dict(made.right)
    if fault in ("time", "prediction"):
        options[fault] = made.wrong[fault]
    if fault == "sign":
        options["output"] = torch.neg
    if fault == "family":
        options = {"prediction": options["prediction"], **made.wrong["family"]}
    return hosm.ScoreModel(network, **options), made.given(data) if fault == "units" else data


def check(name, fault=None):
    with default_dtype(torch.float32):
        model, data = wrapped(name, fault)
        return hosm.check_wrapping(model, data, generator=torch.Generator().manual_seed(1))


def given(schedule, time, units, levels):
    """The factor and the shift of clean data, and the time, at levels of log σ̂ of these data."""
    t = schedule.time(levels + math.log(units.scale))
    alpha, _ = schedule(t)
    return torch.stack([alpha * units.scale, alpha * units.shift]), timed(time, t)


def timed(time, t):
    return t if time is None else time(t) if callable(time) else time * t


def is_right(name, fault, best):
    """Whether a remedy gives the network nearly what the training gave it."""
    made, (model, data) = NETWORKS[name], wrapped(name, fault)
    expected = made.right["prediction"], fault == "sign"
    if best is None or (best.prediction, best.negated) != expected:
        return False
    inputs = next(
        each
        for each in candidates.all_inputs(model)
        if (each.schedule_text, each.time_text) == (best.schedule, best.time)
    )
    units = next(
        each
        for each in (candidates.Units(), *candidates.all_units(data))
        if each.text == best.units
    )
    # What was given is scale · x + shift of the data of the training.
    one, zero = (made.given(torch.full((1,), each)) for each in (1.0, 0.0))
    scale, shift = (float(one - zero), float(zero)) if fault == "units" else (1.0, 0.0)
    total = candidates.Units("", units.scale * scale, units.scale * shift + units.shift)
    levels = torch.linspace(-3, 1, 9, dtype=torch.float64)
    found, time = given(inputs.schedule, inputs.time, total, levels)
    expected, true_time = given(
        made.right["schedule"], made.right.get("time"), candidates.Units(), levels
    )
    near = (time - true_time).abs() <= 0.1 * true_time.abs() + 0.02 * true_time.abs().max()
    return bool(near.all()) and bool(((found - expected).abs() < 0.1).all())


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_two_trained_networks_are_told_from_wrong_wrappings(name):
    assert check(name).ok
    for fault in ("time", "sign", "prediction", "units"):
        report = check(name, fault)
        assert not report.ok, fault
        assert is_right(name, fault, report.best), (fault, report.best)


@pytest.mark.slow
def test_six_trained_networks_and_thirty_mistakes():
    accused = [name for name in NETWORKS if not check(name).ok]
    reports = {(name, fault): check(name, fault) for name in NETWORKS for fault in FAULTS}
    reported = [case for case, report in reports.items() if not report.ok]
    right = [case for case in reported if is_right(*case, reports[case].best)]
    assert not accused
    assert len(reported) >= 28, reported
    assert len(right) >= 28, right
    assert max(report.calls for report in reports.values()) <= 182


@pytest.mark.slow
def test_a_network_of_the_quick_start_that_ddpm_trained():
    """README's line `ScoreModel(network, VPSchedule())` for a network that wants indices."""
    with default_dtype(torch.float32):
        network, data = trained("table")
        report = hosm.check_wrapping(hosm.ScoreModel(network, VP), data)
    assert (report.best.schedule, report.best.time) in {
        ("your schedule", "999"),
        ("your schedule", "1000"),
        ("DiscreteSchedule.linear(1000)", ""),
    }
    assert report.best.prediction == "epsilon"
    assert report.best.own_loss > 2 * report.best.loss


class Exact(nn.Module):
    """The best ε̂ for data of ±0.7 under VP; it counts its calls, and may do more."""

    def __init__(self, *more):
        super().__init__()
        self.more, self.calls = nn.ModuleList(more), 0

    def forward(self, x, t, sign=1.0):
        self.calls += 1
        for module in self.more:
            module(x)
        alpha, sigma = (each[:, None].to(x.dtype) for each in VP(t))
        alpha = 0.7 * alpha
        return sign * (x - alpha * torch.tanh(alpha * x / sigma**2)) / sigma


ATOMS = torch.tensor([[-0.7], [0.7]], dtype=torch.float64).repeat(240, 1)


def seeded():
    return torch.Generator().manual_seed(0)


def test_the_best_network_is_as_good_as_it_can_be():
    report = hosm.check_wrapping(hosm.ScoreModel(Exact(), VP), ATOMS, generator=seeded())
    assert report.ok
    assert report.best is None
    assert not any(report.is_worse)
    assert report.calls <= 182
    # For data of variance 0.49 the linear predictor has the loss 0.49/(0.49 + σ̂²).
    expected = [0.49 / (0.49 + math.exp(2 * level)) for level in report.log_sigma_hat]
    assert abs(sum(report.linear) - sum(expected)) < 0.1 * sum(expected)
    assert 0.02 < min(expected) < 0.025
    assert 0.985 < max(expected) < 0.99
    pairs = zip(report.losses, report.linear, strict=True)
    assert all(loss < 1.1 * linear for loss, linear in pairs)
    assert str(report).splitlines()[0].split() == ["log", "σ/α", "yours", "linear"]
    low, high = report.log_sigma_hat[0], report.log_sigma_hat[-1]
    assert str(report).splitlines()[-1] == (
        f"ok: no candidate fits better; one better by {100 * report.detectable_gain:.2g} %, "
        f"averaged over log σ/α from {low:.2g} to {high:.2g}, would have been seen; worse than a "
        "linear predictor by over 10 % and two standard errors at 0 of 12 noise levels"
    )


@pytest.mark.parametrize(
    ("options", "changes", "units", "told"),
    [
        ({"prediction": "score"}, {}, None, "your schedule, prediction='epsilon'"),
        ({"output": torch.neg}, {"negated": True}, None, "'epsilon', the output times -1"),
        ({"time": 999.0}, {"time": ""}, None, "your schedule, prediction='epsilon'"),
        ({}, {"units": "2 * x0 - 1"}, halved, "epsilon', the data as 2 * x0 - 1"),
        ({}, {"units": "x0 / 127.5 - 1"}, bytes_of, "epsilon', the data as x0 / 127.5 - 1"),
        ({"schedule": LINEAR}, {"schedule": "VPSchedule()"}, None, "VPSchedule(), predic"),
        ({"schedule": FLOW}, {"schedule": "VPSchedule()"}, None, "VPSchedule(), prediction='eps"),
    ],
)
def test_a_mistake_with_the_best_network_is_named(options, changes, units, told):
    model = hosm.ScoreModel(Exact(), **{"schedule": VP} | options)
    data = units(ATOMS) if units else ATOMS
    report = hosm.check_wrapping(model, data, generator=seeded())
    assert not report.ok
    expected = {"schedule": "your schedule", "prediction": "epsilon", "time": ""}
    expected |= {"negated": False, "units": "x0"} | changes
    assert {name: getattr(report.best, name) for name in expected} == expected
    assert told in str(report.best)
    last = str(report).splitlines()[-1]
    assert last.startswith(f"fits best as {report.best}: {report.best.loss:.2g} where you have")
    assert report.best.loss < 0.9 * report.best.own_loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("size", [0.0, 0.1])
def test_a_network_without_training_fits_nowhere(prediction, size):
    """Zeros read as v or as a velocity are a linear predictor, and no candidate is better."""
    torch.manual_seed(0)
    layer = nn.Linear(1, 1)
    model = hosm.ScoreModel(lambda x, t: size * layer(x).sin(), VP, prediction)
    report = hosm.check_wrapping(model, ATOMS, generator=seeded())
    assert report.best is None
    worse = sum(report.is_worse)
    assert report.ok is (worse < 3)
    # The table marks the levels that the verdict counts.
    assert str(report).count("  worse\n") == worse
    assert str(report).endswith(f"two standard errors at {worse} of 12 noise levels")
    assert report.ok is (prediction in ("v", "velocity"))
    assert ("not trained, or no candidate fits" in str(report)) is not report.ok


CENTRES = torch.stack(
    [f(math.pi / 12 * torch.arange(24).double()) for f in (torch.cos, torch.sin)]
)


def ring(schedule):
    """The best ε̂ of a ring of 24 small clusters under a schedule."""

    def network(x, t):
        alpha, sigma = (each[:, None].to(x.dtype) for each in schedule(t))
        variance = (0.05 * alpha).square() + sigma.square()
        squares = (x[:, None] - alpha[..., None] * CENTRES.T).square().sum(-1)
        mean = (-squares / (2 * variance)).softmax(1) @ CENTRES.T
        return sigma / variance * (x - alpha * mean)

    return network


def check_ring(trained, samples=256, seed=0, network=None, **wrapped):
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(24, (samples,), generator=generator)
    noise = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    model = hosm.ScoreModel(network or ring(trained), **wrapped)
    return hosm.check_wrapping(model, CENTRES.T[place] + 0.05 * noise, generator=generator)


@pytest.mark.parametrize(
    ("schedule", "trained", "name"),
    [
        (hosm.CosineSchedule(), VP, "VPSchedule()"),
        (hosm.VPSchedule(beta_max=10.0), VP, "VPSchedule()"),
        (hosm.VPSchedule(beta_max=10.0), hosm.CosineSchedule(), "CosineSchedule()"),
        (hosm.SubVPSchedule(), VP, "VPSchedule()"),
    ],
)
def test_a_schedule_that_changes_the_loss_by_a_few_per_cent_is_undecided(schedule, trained, name):
    """Likelihoods of such networks are off by nats, and one draw of noise does not show it."""
    report = check_ring(trained, schedule=schedule)
    assert report.undecided
    assert not report.ok
    assert (report.best.schedule, report.best.prediction) == (name, "epsilon")
    assert 0.01 < report.gain < 0.12
    last = str(report).splitlines()[-1]
    assert last == f"undecided: {report.best} fits better, by {100 * report.gain:.2g} %"
    means = torch.tensor([report.losses, report.linear, report.best_losses])
    assert (means[0] / means[1]).mean() > (means[2] / means[1]).mean()


@pytest.mark.parametrize(
    ("trained", "options"),
    [
        (VP, {"schedule": VP}),
        (hosm.CosineSchedule(), {"schedule": COSINE, "time": lambda t: t / 1000}),
        (VP, {"schedule": VP, "time": 1.12, "samples": 2048}),
    ],
)
def test_less_than_half_a_per_cent_is_ok(trained, options):
    """The last loses 0.4 % by more than four standard errors, as a table does for its formula."""
    report = check_ring(trained, **options)
    assert report.ok
    assert report.best is None
    assert not report.undecided


class OfThePage(nn.Module):
    """The network of `docs/start.md`."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 64), nn.LayerNorm(64), nn.Linear(64, 2)

    def forward(self, x, t):
        hidden = self.first(torch.cat([x, t[:, None]], 1))
        return self.last(nn.functional.silu(self.norm(hidden)))


@pytest.mark.parametrize(("seed", "steps"), [(0, 3), (3, 3), (6, 3), (5, 30), (0, 50), (7, 50)])
def test_a_network_that_is_hardly_trained_is_advised_to_train(seed, steps):
    """Read as v, with the data rescaled, it has a smaller part in ε̂ and fits better."""
    torch.manual_seed(seed)
    with default_dtype(torch.float32):
        model = hosm.ScoreModel(OfThePage(), VP)
        train(model, lambda: torch.randn(32, 2), steps, 1e-3, cycle=False)
        report = hosm.check_wrapping(model, torch.randn(256, 2), generator=seeded())
    assert report.best is None
    assert sum(report.is_worse) >= 3
    assert "not trained, or no candidate fits: worse than a linear predictor by" in str(report)


def linear(schedule):
    """The best ε̂ of standard normal data: no network is better than a linear predictor."""
    return lambda x, t: schedule.sigma(t)[:, None].to(x.dtype) * x


def check_normal(network, schedule, prediction="epsilon", samples=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    return hosm.check_wrapping(
        hosm.ScoreModel(network, schedule, prediction), x0, generator=generator
    )


def with_error(size):
    """A network whose loss is by size²/2 of itself larger than that of `linear`, at all levels."""

    def network(x, t):
        assert t.max() <= 1  # at later times, the error would vanish
        return linear(VP)(x, t) + size * VP.alpha(t)[:, None] * torch.cos(9 * x)

    return network


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("schedule", "prediction", "found"),
    [
        (hosm.CosineSchedule(), "epsilon", "VPSchedule(), prediction='epsilon'"),
        (VP, "velocity", "your schedule, prediction='epsilon'"),
        (VP, "score", "your schedule, prediction='epsilon'"),
    ],
)
def test_a_network_that_is_only_as_good_as_linear_is_told_from_wrong_wrappings(
    schedule, prediction, found, seed
):
    report = check_normal(linear(VP), schedule, prediction, seed=seed)
    assert not report.ok
    assert str(report.best) == found
    assert check_normal(linear(VP), VP, seed=seed).ok


def test_no_advice_is_given_where_a_candidate_is_linear_without_the_output():
    """Zeros are the best v for normal data, and any prediction of a network without training."""
    report = check_normal(lambda x, t: 0 * x, VP)
    assert not report.ok
    assert report.best is None


def test_no_advice_is_given_where_the_best_candidate_is_worse_than_linear():
    """VP makes the network's times earlier, and thus its output smaller, which is too large."""
    schedule = hosm.CosineSchedule()
    report = check_normal(lambda x, t: 1.3 * linear(schedule)(x, t), schedule)
    assert not report.ok
    assert report.best is None


def test_a_network_that_is_worse_than_linear_on_average_is_not_ok():
    """It is some 20 % worse at all levels, but clearly at few of them."""
    report = check_normal(with_error(0.58), VP, samples=96)
    assert sum(report.is_worse) < 3
    assert not report.ok
    assert report.best is None
    assert str(report).endswith("by over 10 % and two standard errors on average")


def rings(count, generator=None):
    """Two rings, which noise soon makes nearly normal."""
    options = {"generator": generator, "dtype": torch.float32}
    angle, radius = (
        2 * math.pi * torch.rand(count, **options),
        0.5 + 0.6 * (torch.rand(count, **options) < 0.5),
    )
    radius = radius + 0.05 * torch.randn(count, **options)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def test_a_cosine_network_is_told_from_vp_by_256_samples():
    """Its NLL is 0.2 nats off under VP, and its loss 4 %; it is hardly better than linear."""
    with torch.random.fork_rng(), default_dtype(torch.float32):
        torch.manual_seed(0)
        layers = [nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)]
        network = nn.Sequential(*layers)
        options = {"call": lambda net, x, t: net(torch.cat([x, t[:, None]], 1))}
        model = hosm.ScoreModel(network, hosm.CosineSchedule(), **options)
        train(model, lambda: rings(256), 1000, 1e-2)
        generator, wrong = seeded(), hosm.ScoreModel(network, VP, **options)
        x0 = rings(256, generator)
        assert hosm.check_wrapping(model, x0, generator=generator).ok
        report = hosm.check_wrapping(wrong, x0, generator=generator)
    assert report.undecided
    assert str(report.best) == "CosineSchedule(), prediction='epsilon'"
    assert 0.02 < report.gain < 0.08


def test_an_ok_says_what_it_would_have_seen():
    """β(1) = 8 instead of the training's 20 makes the loss 4 % larger, and 16 makes it 0.3 %."""
    seen, unseen = (
        [check_ring(VP, seed=seed, schedule=hosm.VPSchedule(beta_max=beta)) for seed in range(4)]
        for beta in (8.0, 16.0)
    )
    assert not any(report.ok for report in seen)
    assert all(report.ok for report in unseen)
    large = check_ring(VP, 2048, schedule=hosm.VPSchedule(beta_max=8.0))
    assert all(0.015 < report.detectable_gain < large.gain for report in unseen)
    # The limit falls with the number of samples.
    large = check_ring(hosm.CosineSchedule(), 1024, schedule=hosm.CosineSchedule())
    assert large.ok
    assert 0.005 < large.detectable_gain < 0.01
    # For normal data, a candidate that fits better has to make good what is worse than linear.
    report = check_normal(with_error(0.3), VP, samples=1024)
    assert report.ok
    ratios = torch.tensor(report.losses) / torch.tensor(report.linear)
    assert report.detectable_gain > 1 - 1 / float(ratios.mean()) > 0.03


def test_half_of_the_draws_are_where_the_candidates_differ():
    model = hosm.ScoreModel(ring(hosm.CosineSchedule()), VP)
    x0 = CENTRES.T.repeat(10, 1)
    with torch.no_grad():
        search = wrapping._Search(bind_model(model, len(x0)), x0, seeded(), float)
    counts, even = search.place.flatten().bincount(), wrapping.DRAWS * len(x0) / 12
    pair = search.losses[search.own], search.losses[search.first[0]]
    losses, first = (search._by_level(search._multiples(each)) for each in pair)
    assert 0.5 * even <= counts.min() < 0.85 * even
    assert counts[(losses - first).abs().argmax()] > 1.1 * even
    assert (search.place.diff(dim=0) >= 0).all()  # every sample has draws at all levels of noise
    assert (search.place[0] < 3).all()
    assert (search.place[-1] > 8).all()
    # Means still give every level the same weight.
    assert search._excess(*pair)[0] == pytest.approx(1 - float(first.mean() / losses.mean()))


@pytest.mark.parametrize("steps", [100, 1000])
def test_losses_at_an_entry_of_a_table_are_those_of_the_level(steps):
    """The nearest entry may be far off; for normal data, zeros as v are the linear predictor."""
    x0 = torch.randn(256, 2, generator=seeded(), dtype=torch.float64)
    x0 = (x0 - x0.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x0.T.cov(correction=0))).T
    schedule = hosm.DiscreteSchedule.cosine(steps)
    report = hosm.check_wrapping(hosm.ScoreModel(lambda x, t: 0 * x, schedule, "v"), x0)
    ratios = torch.tensor(report.losses) / torch.tensor(report.linear)
    assert (ratios - 1).abs().max() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_right_wrappings_are_ok(name, prediction):
    """The network has learnt less than all of the structure, as if it were trained."""
    schedule = SCHEDULES[name]

    def network(x, t):
        parts = (each[:, None].to(x.dtype) for each in (*schedule(t), *schedule.rates(t)))
        alpha, sigma, *rates = parts
        noise = 0.8 * ring(schedule)(x, t)
        noise = noise + 0.2 * sigma * x / (0.5 * alpha.square() + sigma.square())
        return PREDICTIONS_OF_ORACLE[prediction](noise, x, alpha, sigma, rates)

    for samples in (64, 256):
        model = {"schedule": schedule, "prediction": prediction}
        report = check_ring(None, samples, network=network, **model)
        assert report.ok, report


def test_four_wrappings_are_measured_again(monkeypatch):
    network = Exact()
    model = hosm.ScoreModel(network, VP)
    report = hosm.check_wrapping(model, ATOMS, samples=480, generator=seeded())
    monkeypatch.setattr(wrapping, "DRAWS", 1)
    once = hosm.check_wrapping(hosm.ScoreModel(Exact(), VP), ATOMS, generator=seeded())
    assert network.calls == report.calls == once.calls + 4 * 7


def test_nothing_is_changed_and_the_generator_decides():
    network = Exact(nn.BatchNorm1d(1), nn.Dropout(0.5))
    model = hosm.ScoreModel(network, VP)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    torch.manual_seed(1)
    state, keys, attributes = torch.get_rng_state(), set(vars(model)), dict(model._modules)
    one, two = (hosm.check_wrapping(model, ATOMS, generator=seeded()) for _ in range(2))
    assert one == two
    assert network.calls == one.calls + two.calls + 4  # two were timed each
    assert hosm.check_wrapping(model, ATOMS) != one
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
    assert network.training
    assert (set(vars(model)), dict(model._modules)) == (keys, attributes)
    assert (model.schedule, model.prediction, model.time) == (VP, "epsilon", None)


@pytest.mark.parametrize(
    ("seconds", "used", "timed"), [(1.0, 16, 2), (3e-3, 64, 6), (1e-3, 256, 6), (5e-4, 480, 4)]
)
@pytest.mark.parametrize("x0", [ATOMS, ATOMS.sort(0).values])
def test_where_calls_are_slow_fewer_samples_are_used(x0, seconds, used, timed, monkeypatch):
    """Calls take this time for each sample and another 12 samples, and the first takes more."""
    network, told = Exact(nn.Dropout(0.5)), []

    def slow(x, t):
        told.append(told[-1] + seconds * (len(x) + 12) if told else 1e4)
        return network(x, t)

    monkeypatch.setattr(wrapping, "time", SimpleNamespace(perf_counter=lambda: sum(told[-1:])))
    model = hosm.ScoreModel(slow, VP)
    torch.manual_seed(0)
    report = hosm.check_wrapping(model, x0)
    assert report.ok
    assert (report.samples, report.batch_size) == (used, 480)
    assert network.calls == report.calls + timed
    assert (f"\n{used} of 480 samples; samples=480 uses all\n" in str(report)) is (used < 480)
    torch.manual_seed(0)
    assert hosm.check_wrapping(model, x0, samples=used) == report
    assert network.calls == 2 * report.calls + timed


def test_conditions_go_to_every_call_and_what_fails_is_left_out():
    signs = torch.ones(480, 1, dtype=torch.float64)
    network = Exact()

    def looked_up(x, t, sign):
        assert t.dtype == torch.int64  # as an embedding wants it
        return network(x + 0 * signs, t / 1000, sign)  # of no other batch size

    model = hosm.ScoreModel(looked_up, LINEAR)
    with torch.inference_mode():
        report = hosm.check_wrapping(model, ATOMS, model_kwargs={"sign": signs})
    assert report.ok
    assert report.samples == 480
    with pytest.raises(AssertionError):  # its own wrapping has to work
        hosm.check_wrapping(hosm.ScoreModel(looked_up, VP), ATOMS, model_kwargs={"sign": signs})


def test_a_tensor_that_all_samples_share_and_is_as_long_as_the_batch_is_named():
    """It would be split with the samples in silence."""
    table = torch.randn(len(ATOMS), 4)

    def network(x, t, table, own):
        return x + own[:, None] + table.mean(dim=(0, 1))

    model, own = hosm.ScoreModel(network, VP), torch.randn(len(ATOMS))
    shared = {"table": hosm.Shared(table), "own": own}
    for samples in (None, 64):
        options = {"samples": samples, "model_kwargs": {"table": table, "own": own}}
        hosm.check_wrapping(model, ATOMS, **options | {"model_kwargs": shared})
        with pytest.raises(hosm.DerivativeError, match=r"_kwargs\['table'\]: .* 480;.*Shared"):
            hosm.check_wrapping(model, ATOMS, **options)


def test_few_samples_of_many_elements_are_compared_with_independent_elements():
    x0 = torch.randn(16, 40, dtype=torch.float64)
    model = hosm.ScoreModel(lambda x, t: VP.sigma(t)[:, None] * x, VP)  # best for such data
    report = hosm.check_wrapping(model, x0, generator=torch.Generator().manual_seed(1))
    assert report.ok
    assert len(report.linear) == 8
    assert wrapping.LEAST_SAMPLES == 16
