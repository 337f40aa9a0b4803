"""What ode_nll promises in numbers: accuracy at a count of calls, independence, coverage."""

import dataclasses
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.likelihood.test_ode import problem
from tests.oracles import (
    MLP,
    PREDICTIONS_OF_ORACLE,
    GaussianMixture,
    anisotropic,
    mixture_noise,
    networks,
    paper_mixture,
    ring,
)
from tests.schedules.test_continuous import SCHEDULES

PAGE = (Path(__file__).parents[2] / "docs" / "likelihood.md").read_text(encoding="utf-8")
# Mixture, mean number of evaluations that the default tolerance may take.
MIXTURES = {"1-D": (paper_mixture, 80), "2-D": (ring, 80), "64-D": (anisotropic, 125)}


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_adaptive_at_its_default_tolerance(name, mixture):
    """The numbers are those of docs/likelihood.md."""
    make, most = MIXTURES[mixture]
    model, x, log_density, log_prior = problem(name, make(), points=32)
    result = hosm.ode_nll(model, x, method="adaptive", divergence="exact", log_prior=log_prior)
    error = float((result.nll + log_density).abs().max())
    evaluations = float(result.nfe.double().mean())
    sys.stdout.write(f"{mixture} {name}: {error:.1e} nats at most, {evaluations:.0f} calls\n")
    assert error < 1.5e-3
    assert evaluations <= most
    rows = re.findall(rf"{mixture} \| (\S+) nats, (\d+) \| (\S+) nats, (\d+) ", PAGE)
    (said,) = (row[:2] if name == "vp" else row[2:] for row in rows)
    assert error == pytest.approx(float(said[0]), abs=1e-4)
    assert evaluations == pytest.approx(float(said[1]), abs=1)


def test_the_steps_of_the_fixed_grid_at_default_tolerance():
    """The sentence below the table of docs/likelihood.md."""
    model, x, log_density, log_prior = problem("vp", paper_mixture(), points=32)
    said = r"needs (\d+) steps for an error of (\S+) nats, and has one of (\S+) with (\d+)\."
    ((steps, error, coarse, half),) = re.findall(said, PAGE)
    for count, expected in ((steps, error), (half, coarse)):
        options = {"divergence": "exact", "log_prior": log_prior, "steps": int(count)}
        found = float((hosm.ode_nll(model, x, **options).nll + log_density).abs().max())
        assert found == pytest.approx(float(expected), rel=0.2)


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_an_outlier_changes_nothing_for_its_batch_mates(method):
    model, x, _, log_prior = problem("vp", ring(), points=64)
    options = {"method": method, "divergence": "exact", "log_prior": log_prior}
    before = hosm.ode_nll(model, x, **options)
    far = x.clone()
    far[17] *= 20
    after = hosm.ode_nll(model, far, **options)
    mates = torch.arange(64) != 17
    torch.testing.assert_close(after.nll[mates], before.nll[mates], rtol=0, atol=1e-9)
    assert torch.equal(after.nfe[mates], before.nfe[mates])
    assert not torch.isclose(after.nll[17], before.nll[17])


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_a_batch_equals_its_samples_alone_and_in_chunks(method):
    network, shape = networks()["mlp"]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x = torch.randn(64, *shape)
    options = {"method": method, "divergence": "exact", "steps": 16}
    together = hosm.ode_nll(model, x, **options)
    ones = [hosm.ode_nll(model, row[None], **options) for row in x]
    for other in (hosm.NLLResult.cat(ones), hosm.ode_nll(model, x, batch_size=7, **options)):
        for field in ("nll", "latent", "solver_error"):
            got, expected = getattr(other, field), getattr(together, field)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        assert torch.equal(other.nfe, together.nfe)


def test_chunks_take_their_own_conditions():
    network, shape = networks()["attention"]
    sizes = []

    class Counted(nn.Module):
        def forward(self, x, t, label):
            sizes.append(len(x))
            return network(x, t, label)

    model = hosm.ScoreModel(Counted(), hosm.VPSchedule())
    x, kwargs = torch.randn(5, *shape), {"label": torch.randn(5)}
    options = {"divergence": "exact", "steps": 6, "model_kwargs": kwargs}
    whole = hosm.ode_nll(model, x, **options)
    sizes.clear()
    parts = hosm.ode_nll(model, x, batch_size=2, **options)
    torch.testing.assert_close(parts.nll, whole.nll, rtol=0, atol=1e-9)
    assert sorted(set(sizes)) == [1, 2]
    assert len(sizes) == 3 * 16


@pytest.mark.parametrize("name", ["vp", "ve", "edm", "flow"])
def test_a_float32_network_is_within_a_ten_thousandth_of_a_nat_in_64_dimensions(name):
    torch.manual_seed(0)
    network = MLP(64, 32).double()
    schedule = SCHEDULES[name]
    # As networks are used: what comes in is scaled to unit size.
    model = hosm.ScoreModel(lambda x, t: network(_scaled(x, t, schedule), t / 80), schedule)
    x = (0.5 * torch.randn(16, 64)).float()
    double = hosm.ode_nll(model, x.double(), divergence="exact")
    network.float()
    single = hosm.ode_nll(model, x, divergence="exact")
    assert single.nll.dtype == torch.float64
    torch.testing.assert_close(single.nll, double.nll, rtol=0, atol=1e-4)


def _scaled(x, t, schedule):
    alpha, sigma = (part[:, None] for part in schedule(t))
    return x / (alpha**2 * 0.25 + sigma**2).sqrt()


def test_two_standard_errors_cover_what_they_should():
    """4000 repeats of one sample: its rows have probes of their own."""
    torch.manual_seed(0)
    model = hosm.ScoreModel(MLP(64, 32).double(), hosm.VPSchedule())
    x = 0.5 * torch.randn(1, 64)
    exact = hosm.ode_nll(model, x, divergence="exact").nll
    result = hosm.ode_nll(
        model, x.expand(4000, -1), probes=2, generator=torch.Generator().manual_seed(0)
    )
    inside = ((result.nll - exact).abs() < 2 * result.standard_error).double().mean()
    assert 0.93 < float(inside) < 0.97


@pytest.mark.parametrize("probes", [4, 8])
def test_probes_along_a_path_cover_as_much_by_students_law(probes):
    torch.manual_seed(0)
    model = hosm.ScoreModel(MLP(64, 32).double(), hosm.VPSchedule())
    x = 0.5 * torch.randn(1, 64)
    options = {"method": "adaptive", "tolerance": 1e-2}
    exact = hosm.ode_nll(model, x, divergence="exact", **options).nll
    result = hosm.ode_nll(
        model,
        x.expand(1000, -1),
        probes=probes,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    inside = ((result.nll - exact).abs() < 2 * result.standard_error).double().mean()
    assert abs(float(inside) - 0.9545) < 5 * math.sqrt(0.9545 * 0.0455 / 1000)


LOW, HIGH = 0.02, 20.0


def common_interval():
    """Every schedule, cut to the same range of σ̂."""
    ends = torch.tensor([LOW, HIGH], dtype=torch.float64).log()
    found = {}
    for name, schedule in SCHEDULES.items():
        low, high = schedule.time(ends).tolist()
        found[name] = dataclasses.replace(schedule, t_min=low, t_max=high)
    table = torch.logspace(math.log10(LOW), math.log10(HIGH), 50, dtype=torch.float64)
    found["discrete"] = hosm.DiscreteSchedule(1 / (1 + table**2))
    return found


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS_OF_ORACLE))
@pytest.mark.parametrize("name", sorted(common_interval()))
def test_every_schedule_and_prediction_of_one_score_is_one_density_of_x_over_alpha(
    name, prediction
):
    mixture = ring(3, 0.3)
    y = mixture.sample(6, torch.Generator().manual_seed(0))
    width = math.hypot(HIGH, 0.7)
    prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), width)

    def density(schedule, prediction):
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
        alpha = schedule(ends)[0]
        exact = mixture_noise(mixture, schedule)

        def network(x, t):
            a, s = (part[:, None] for part in schedule(t))
            rates = [part[:, None] for part in schedule.rates(t)]
            return PREDICTIONS_OF_ORACLE[prediction](exact(x, t), x, a, s, rates)

        model = hosm.ScoreModel(network, schedule, prediction)
        result = hosm.ode_nll(
            model,
            alpha[0] * y,
            divergence="exact",
            log_prior=lambda x: prior.log_prob(x / alpha[1]).sum(1) - 2 * alpha[1].log(),
        )
        return result.nll - 2 * alpha[0].log(), result.latent / alpha[1]

    schedules = common_interval()
    expected, got = density(schedules["edm"], "epsilon"), density(schedules[name], prediction)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_a_direction_with_far_more_variance_than_data_std_says_stays_stable(name):
    """As the brightness of images: dz/du has the eigenvalue −1 over most of the grid.

    A predictor-corrector pair, ten times as accurate elsewhere for the same calls, breaks here.
    """
    covariance = torch.diag_embed(torch.tensor([[2500.0, 0.01]], dtype=torch.float64))
    mixture = GaussianMixture([[0.0, 0.0]], covariance, [1.0])
    model, x, log_density, log_prior = problem(name, mixture, points=50)
    result = hosm.ode_nll(model, x, divergence="exact", data_std=0.01, log_prior=log_prior)
    assert float((result.nll + log_density).abs().max()) < 0.05


def test_autocast_is_for_the_network_alone():
    """States, sums, schedule and probes are what they are without it."""
    network, shape = networks()["mlp"]
    network.float()
    x = torch.randn(4, *shape, dtype=torch.float32)

    class Cast(nn.Module):
        def forward(self, x, t):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return network(x, t)

    options = {"probes": 2, "distribution": "dct", "steps": 12}
    schedule = hosm.VPSchedule()
    inner = hosm.ode_nll(
        hosm.ScoreModel(Cast(), schedule),
        x,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outer = hosm.ode_nll(
            hosm.ScoreModel(network, schedule),
            x,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
    for field in dataclasses.fields(inner):
        expected, got = getattr(inner, field.name), getattr(outer, field.name)
        assert torch.equal(expected, got) if isinstance(got, torch.Tensor) else expected == got
    full = hosm.ode_nll(
        hosm.ScoreModel(network, schedule),
        x,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    assert not torch.equal(outer.nll, full.nll)
