"""likelihood_gap against closed forms of Gaussians and of their mixtures."""

import json

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.diagnostics import gap
from tests.cases import MLP, VP, OfX, default_dtype
from tests.oracles import GaussianMixture, mixture_noise

# They end early: a model's prior is then another density than its data have come to be.
EARLY = {"vp": hosm.VPSchedule(beta_max=2.0), "ve": hosm.VESchedule(sigma_max=1.5)}
ends_early = pytest.mark.filterwarnings("ignore:schedule. expected one that ends in its prior")
# Means and standard deviations by dimension, of the data and of what the model takes them for.
DATA = torch.tensor([[0.3, -0.2], [0.6, 0.8]], dtype=torch.float64)
TAKEN = torch.tensor([[0.1, 0.2], [0.9, 0.5]], dtype=torch.float64)
ATOMS = torch.tensor([[-0.5, 0.2], [0.4, 0.1], [0.3, -0.6]], dtype=torch.float64)


def seeded():
    return torch.Generator().manual_seed(0)


def moments(schedule, t, data):
    """The mean and the variance at t of data N(m, s²)."""
    alpha, sigma = schedule(t)
    return alpha * data[0], (alpha * data[1]) ** 2 + sigma**2


def moments_of_ode(schedule, t, data):
    """Those of the ODE of this score, which starts at the prior: (x − αm)/std stays as it is."""
    mean, variance = moments(schedule, t, data)
    mean_at_end, variance_at_end = moments(schedule, schedule.t_max, data)
    share = variance / variance_at_end
    return mean - share.sqrt() * mean_at_end, schedule.prior_std**2 * share


def gaussian(schedule, data):
    """The model that is right for data N(m, s²)."""

    def noise(x, t):
        mean, variance = moments(schedule, t[:, None], data)
        return schedule.sigma(t)[:, None] * (x - mean) / variance

    return hosm.ScoreModel(noise, schedule)


def divergence(one, other):
    """KL of two Gaussians, of which the means and variances are given."""
    (mean, variance), (other_mean, other_variance) = one, other
    ratio = variance / other_variance
    shift = (mean - other_mean).square() / other_variance
    return float(0.5 * (ratio + shift - 1 - ratio.log()).sum())


@ends_early
@pytest.mark.parametrize("name", EARLY)
def test_the_integrals_of_gaussians_are_closed_forms(name):
    schedule = EARLY[name]
    report = hosm.likelihood_gap(
        gaussian(schedule, TAKEN),
        DATA[0] + DATA[1] * torch.randn(2000, 2),
        reference=gaussian(schedule, DATA),
        nodes=8,
        steps=16,
    )
    u = torch.linspace(*schedule.log_sigma_hat_range, 4001)
    t = schedule.time(u)[:, None]
    mean, variance = moments(schedule, t, DATA)

    def scores(mean_of_score, variance_of_score):
        """σ times a linear score at x = mean + std·z: the factor of z, and the rest."""
        parts = torch.stack([variance.sqrt(), mean - mean_of_score])
        return -schedule.sigma(t) * parts / variance_of_score

    true = scores(mean, variance)
    wrong = scores(*moments(schedule, t, TAKEN)) - true
    own = scores(*moments_of_ode(schedule, t, TAKEN)) - true
    start, end = (
        divergence(moments(schedule, t, DATA), moments_of_ode(schedule, t, TAKEN))
        for t in (schedule.t_min, schedule.t_max)
    )
    j_sm, j_fisher = (
        float(torch.trapezoid(each.square().sum((0, 2)), u)) for each in (wrong, own)
    )
    expected = {"j_sm": j_sm, "j_ode": start - end, "j_fisher": j_fisher}
    expected["sde bound less ode nll"] = j_sm - (start - end)
    for name, value in expected.items():
        found = report.numbers[name]
        assert abs(found.value - value) < 4 * found.error < 0.2 * j_sm, name


@ends_early
@pytest.mark.filterwarnings("ignore:engine='auto'")
@pytest.mark.parametrize(("truth", "name"), [("model", "vp"), ("atoms", "ve")])
def test_every_curve_of_a_mixture_is_a_closed_form(truth, name):
    schedule, turned = EARLY[name], torch.tensor([[0.3, 0.1], [0.1, 0.2]])
    covariances = torch.stack([turned, turned @ turned, turned])
    mixture = GaussianMixture(ATOMS, covariances, [0.5, 0.3, 0.2])
    exact = mixture_noise(mixture, schedule)

    def in_reverse_mode(x, t):
        return torch.fft.ifft(torch.fft.fft(exact(x, t))).real

    reference = hosm.ScoreModel(in_reverse_mode, schedule)
    if truth == "atoms":
        mixture, reference = GaussianMixture(ATOMS, 0 * covariances, torch.ones(3) / 3), ATOMS
    x0, generator = ATOMS.repeat(4, 1), seeded()
    report = hosm.likelihood_gap(
        gaussian(schedule, TAKEN), x0, reference=reference, nodes=4, steps=64, generator=seeded()
    )
    for row, level in enumerate(report.log_sigma_hat):
        t = schedule.time(torch.tensor(level)).expand(12)
        alpha, sigma = schedule(t)
        s = sigma[:, None]
        x = alpha[:, None] * x0 + s * torch.randn(x0.shape, generator=generator)
        mean, variance = moments(schedule, t[:, None], TAKEN)
        mean_of_ode, variance_of_ode = moments_of_ode(schedule, t[:, None], TAKEN)
        wrong, own = -s * (x - mean) / variance, -s * (x - mean_of_ode) / variance_of_ode
        true = s * mixture.score(x, alpha, sigma)
        slopes = torch.diag_embed(-(s**2) / variance)
        slopes = slopes - s[..., None] ** 2 * mixture.hessian(x, alpha, sigma)
        trace = slopes.diagonal(dim1=1, dim2=2).sum(1)
        third = s**3 * torch.einsum("biij->bj", mixture.third(x, alpha, sigma))
        expected = {
            "first": (wrong - true).square().sum(1),
            "trace": trace.square(),
            "second": slopes.square().sum((1, 2)),
            "third": third.square().sum(1),
            "rate": (trace + ((wrong - true) * true).sum(1)).square(),
            "fisher": (own - true).square().sum(1),
            "own score": (own - wrong).square().sum(1),
        }
        for curve, values in expected.items():
            found = report.curves[curve][row]
            assert found.value == pytest.approx(float(values.mean()), rel=1e-6, abs=1e-6)
            error = float(values.std()) / 12**0.5
            assert found.error == pytest.approx(error, rel=1e-6, abs=1e-6)


def small(model, x0, nodes=2, steps=8, **options):
    return hosm.likelihood_gap(model, x0, nodes=nodes, steps=steps, generator=seeded(), **options)


def test_it_prints_what_it_has():
    report = small(hosm.ScoreModel(MLP(2), VP), torch.randn(6, 2))
    assert list(report.curves) == ["own score"]
    assert report.numbers.keys().isdisjoint(gap.INTEGRALS)
    assert "sde bound less ode nll:" in str(report)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    report = small(hosm.ScoreModel(MLP(2), VP), ATOMS, reference=ATOMS, ode_score=False)
    assert list(report.curves) == ["first", "trace", "second", "third", "rate"]
    assert report.numbers.keys() & gap.INTEGRALS.keys() == {"j_sm"}


def test_both_networks_get_copies_of_the_conditions():
    exact = gaussian(VP, DATA)

    def network(x, t, y):
        y.mul_(0.5)
        return exact(x, t) + y[:, None]

    one, other = (hosm.ScoreModel(network, VP) for _ in range(2))
    y = torch.arange(4.0)
    report = small(one, torch.randn(4, 2), reference=other, model_kwargs={"y": y})
    assert torch.equal(y, torch.arange(4.0))
    assert all(each.value == 0 for each in report.curves["first"])


def test_a_sample_that_failed_is_left_out_and_counted():
    exact = gaussian(VP, DATA)

    def network(x, t):
        late = (t[:, None] > 0.9) & (x[:, :1] > 0)
        return torch.where(late, float("nan"), exact.network(x, t))

    x0 = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [-2.0, 1.0]])
    report = small(hosm.ScoreModel(network, VP), x0, steps=16)
    assert all(0 < each.samples < 3 for each in report.curves["own score"])
    assert report.numbers["ode nll"].samples == report.numbers["sde bound"].samples < 3
    assert "; failed and left out: " in str(report)


@pytest.mark.parametrize("truth", ["atoms", "model"])
def test_data_of_shape_b_is_data_of_one_element(truth):
    model = hosm.ScoreModel(lambda x, t: 0.9 * x / (1 + x.square()), VP)
    exact, x0 = hosm.ScoreModel(lambda x, t: x.sin(), VP), torch.tensor([0.3, -0.2, 1.1])
    found, expected = (
        small(model, data, reference=data[:2] if truth == "atoms" else exact)
        for data in (x0, x0[:, None])
    )
    for name, curve in found.curves.items():
        for one, other in zip(curve, expected.curves[name], strict=True):
            assert one.value == pytest.approx(other.value)
    for name, number in found.numbers.items():
        assert number.value == pytest.approx(expected.numbers[name].value)


class ByHand(hosm.LinearFlowSchedule):
    """One that autograd cannot follow, with derivatives of its own."""

    def alpha(self, t):
        return super().alpha(t).detach()

    def sigma(self, t):
        return super().sigma(t).detach()


def test_the_derivatives_of_a_schedule_are_its_own():
    """The score of the ODE of a flow needs α′ and σ′."""
    network, x0 = MLP(2), torch.randn(4, 2)
    found, expected = (
        small(hosm.ScoreModel(network, schedule, "velocity"), x0, steps=16)
        for schedule in (ByHand(), hosm.LinearFlowSchedule())
    )
    for one, other in zip(*(each.curves["own score"] for each in (found, expected)), strict=True):
        assert one.value == pytest.approx(other.value)
    # Derivatives at two nodes, three solutions, the draw of clean=True, and the bound.
    assert found.evaluations == 2 * (2 + 2 * 2) + 3 * (16 + 2) + 1 + 72


class Line(hosm.Schedule):
    """A user's, by which two that are the same do not compare equal."""

    t_min, t_max = 0.01, 30.0

    def __init__(self, slope=1.0):
        self.slope = slope

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return self.slope * t


def test_schedules_are_the_same_where_their_alpha_and_sigma_are():
    network, x0 = MLP(2), torch.randn(4, 2)
    model = hosm.ScoreModel(network, Line())
    options = {"nodes": 2, "steps": 4, "ode_score": False}
    report = hosm.likelihood_gap(
        model, x0, reference=hosm.ScoreModel(network, Line()), generator=seeded(), **options
    )
    assert report.numbers["j_sm"].value == 0
    longer = Line()
    longer.t_max = 31.0
    for other in (Line(1.001), longer, VP):
        with pytest.raises(ValueError, match=r"reference: .*Line\(t_min=0\.01, ") as refused:
            hosm.likelihood_gap(model, x0, reference=hosm.ScoreModel(network, other), **options)
        assert " at 0x" not in str(refused.value)


@ends_early
@pytest.mark.filterwarnings("ignore:network. expected evaluation mode")
@pytest.mark.parametrize("kind", ["discrete", "half", "inference", "default"])
def test_odd_models_and_modes(kind):
    schedule = hosm.DiscreteSchedule.linear() if kind in ("discrete", "default") else VP
    dtype = torch.bfloat16 if kind == "half" else torch.float64
    network = OfX(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).to(dtype))
    model = hosm.ScoreModel(network, schedule)
    x0 = torch.randn(4, 2, dtype=dtype)
    default = torch.bfloat16 if kind == "default" else torch.float64
    with torch.inference_mode(kind == "inference"), default_dtype(default):
        report = small(model, x0 + 0, reference=model, ode_score=kind != "half")
    assert report.numbers["ode nll"].samples == 4
    assert int(network.get_buffer("network.0.num_batches_tracked")) == 0
