"""likelihood_gap against closed forms of Gaussians, and the identities it stands on."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hosm_losses as hosm
from hosm_losses.diagnostics import gap
from tests.oracles import MLP, OfX, default_dtype, mixture_noise, paper_mixture

SCHEDULES = {"vp": hosm.VPSchedule(), "ve": hosm.VESchedule(sigma_max=20.0)}
STD, OTHER = 0.6, 0.9


def gaussian(schedule, std):
    """The score of N(0, std²) data."""

    def noise(x, t):
        alpha, sigma = (part[:, None] for part in schedule(t))
        return sigma * x / (alpha**2 * std**2 + sigma**2)

    return hosm.ScoreModel(noise, schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_curve_of_gaussian_data_is_a_closed_form(name):
    schedule, nodes = SCHEDULES[name], 6
    truth, model = gaussian(schedule, STD), gaussian(schedule, OTHER)
    x0 = STD * torch.randn(40, 2)
    report = hosm.likelihood_gap(
        model,
        x0,
        reference=truth,
        nodes=nodes,
        steps=256,
        generator=torch.Generator().manual_seed(0),
    )
    generator = torch.Generator().manual_seed(0)
    end_alpha, end_sigma = schedule(torch.tensor(schedule.t_max))
    end = end_alpha**2 * OTHER**2 + end_sigma**2
    for row, level in enumerate(report.log_sigma_hat):
        t = schedule.time(torch.tensor(level))
        alpha, sigma = schedule(t)
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
        right, wrong = (alpha**2 * std**2 + sigma**2 for std in (STD, OTHER))
        # What the ODE's density has become of the prior, which is not that of the model at t_max.
        own = schedule.prior_std**2 * wrong / end
        slope = sigma * (1 / right - 1 / wrong)  # of f − f*
        trace = 2 * sigma * slope
        square = x.square().sum(1)
        expected = {
            "first": slope**2 * square,
            "trace": trace.square().expand(40),
            "second": (2 * (sigma * slope) ** 2).expand(40),
            "third": torch.zeros(40),
            "rate": (trace - slope * sigma / right * square).square(),
            "fisher": (sigma / right - sigma / own) ** 2 * square,
            "own score": (sigma / wrong - sigma / own) ** 2 * square,
        }
        for curve, values in expected.items():
            found = report.curves[curve][row]
            assert found.value == pytest.approx(float(values.mean()), abs=1e-6)
            assert found.error == pytest.approx(float(values.std() / math.sqrt(40)), abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_divergence_is_the_integral_over_the_scores_errors(name):
    """KL(q₀‖p₀) − KL(q_T‖p_T) = J_ODE on the paper's mixture, by quadrature in x and u."""
    schedule, mixture = SCHEDULES[name], paper_mixture()
    exact = mixture_noise(mixture, schedule)
    truth = hosm.ScoreModel(exact, schedule)

    def wrong(x, t):  # the score of no diffusion
        alpha, sigma = (part[:, None] for part in schedule(t))
        return 0.97 * exact(x, t) + 0.05 * torch.sin(3 * x / (alpha**2 + 4 * sigma**2).sqrt())

    model = hosm.ScoreModel(wrong, schedule)
    low, high = schedule.log_sigma_hat_range

    places, weights = np.polynomial.legendre.leggauss(16)

    def grid(level):
        t = schedule.time(torch.tensor(level))
        alpha, sigma = schedule(t)
        reach = 2.0 * float(alpha) + 9 * float(sigma)
        x = torch.linspace(-reach, reach, 401)[:, None]
        density = mixture.log_density(x, alpha.expand(401), sigma.expand(401))
        return x, t.expand(401), density, density.exp() * float(x[1] - x[0])

    total = 0.0
    for place, weight in zip(places, weights, strict=True):
        x, t, _, mass = grid(low + (high - low) * (place + 1) / 2)
        score = gap._ode_score(model, x, t, 64, {})
        found = gap.at_node(model, truth, x, t, score, {})
        total += (high - low) / 2 * weight * float((mass * found["ode"]).sum())
    x, _, log_q, mass = grid(low)
    start = float(
        (mass * (log_q + hosm.ode_nll(model, x, divergence="exact", steps=512).nll)).sum()
    )
    x, _, log_q, mass = grid(high)
    prior = torch.distributions.Normal(0.0, schedule.prior_std).log_prob(x[:, 0])
    at_end = float((mass * (log_q - prior)).sum())
    assert total == pytest.approx(start - at_end, abs=1e-4)
    assert abs(total) > 1e-3


@given(seed=st.integers(0, 1000))
def test_the_bound_holds(seed):
    torch.manual_seed(seed)
    schedule = SCHEDULES["vp"]
    truth, network = gaussian(schedule, STD), MLP(2)
    report = hosm.likelihood_gap(
        hosm.ScoreModel(network, schedule), torch.randn(4, 2), reference=truth, nodes=2, steps=8
    )
    sm, ode, fisher = (report.numbers[name].value for name in ("j_sm", "j_ode", "j_fisher"))
    assert ode <= math.sqrt(sm * fisher) * (1 + 1e-9)


def test_atoms_are_a_truth():
    schedule = SCHEDULES["ve"]
    atoms = torch.tensor([[-0.5, 0.2], [0.4, 0.1], [0.3, -0.6]])
    x0 = atoms.repeat(4, 1)
    model = gaussian(schedule, STD)
    options = {"nodes": 3, "ode_score": False}
    report = hosm.likelihood_gap(
        model, x0, reference=atoms, generator=torch.Generator().manual_seed(0), **options
    )
    generator = torch.Generator().manual_seed(0)
    for row, level in enumerate(report.log_sigma_hat):
        sigma = math.exp(level)
        x = x0 + sigma * torch.randn(x0.shape, generator=generator)
        shares = (-((x[:, None] - atoms) ** 2).sum(2) / (2 * sigma**2)).softmax(1)
        true = (shares @ atoms - x) / sigma
        wrong = -sigma * x / (STD**2 + sigma**2) - true
        expected = float(wrong.square().sum(1).mean())
        assert report.curves["first"][row].value == pytest.approx(expected, rel=1e-9)
    assert report.curves["fisher"] is None
    assert report.missing["fisher"] == report.missing["own score"] == gap.NOT_ASKED


def report_without_a_truth():
    model = hosm.ScoreModel(MLP(2), SCHEDULES["vp"])
    return hosm.likelihood_gap(model, torch.randn(6, 2), nodes=2, steps=8)


def test_without_a_truth_it_says_what_cannot_be_had():
    report = report_without_a_truth()
    assert [name for name, curve in report.curves.items() if curve] == ["own score"]
    assert set(report.missing.values()) == {gap.NEEDS_REFERENCE}
    assert set(report.missing) == {*gap.CURVES, *gap.INTEGRALS} - {"own score"}
    text = str(report)
    assert "sde bound less ode nll:" in text
    assert "j_sm: needs a reference" in text
    assert json.loads(json.dumps(report.to_dict()))["numbers"]["j_sm"] is None


def test_the_plot_has_the_curves_there_are():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    report_without_a_truth().plot(axes)
    assert axes.get_legend_handles_labels()[1] == ["own score"]


def test_a_better_model_stands_for_the_truth_and_conditions_are_passed():
    class Conditioned(MLP):
        def forward(self, x, t, shift):
            return super().forward(x, t) + shift

    schedule = SCHEDULES["vp"]
    one, other = Conditioned(2), Conditioned(2)
    other.load_state_dict(one.state_dict())
    report = hosm.likelihood_gap(
        hosm.ScoreModel(one, schedule),
        torch.randn(4, 2),
        reference=hosm.ScoreModel(other, schedule),
        nodes=2,
        steps=8,
        model_kwargs={"shift": torch.randn(4, 2)},
    )
    for name in ("first", "trace", "second", "third", "rate"):
        assert all(each.value == 0 for each in report.curves[name])
    assert all(parameter.grad is None for parameter in one.parameters())


def test_a_sample_that_failed_is_left_out_and_counted():
    schedule = SCHEDULES["vp"]
    exact = gaussian(schedule, 1.0)

    def network(x, t):
        late = (t[:, None] > 0.9) & (x[:, :1] > 0)
        return torch.where(late, float("nan"), exact(x, t))

    x0 = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [-2.0, 1.0]])
    model = hosm.ScoreModel(network, schedule)
    report = hosm.likelihood_gap(
        model, x0, nodes=2, steps=16, generator=torch.Generator().manual_seed(0)
    )
    counted = [each.samples for each in report.curves["own score"]]
    assert all(0 < samples < 3 for samples in counted)
    assert report.numbers["ode nll"].samples == report.numbers["sde bound"].samples < 3
    assert "; failed and left out: " in str(report)


@pytest.mark.parametrize("truth", ["atoms", "model"])
def test_data_of_shape_b_is_data_of_one_element(truth):
    schedule = SCHEDULES["vp"]

    def network(x, t):
        return 0.9 * x / (1 + x.square())

    model, x0 = hosm.ScoreModel(network, schedule), torch.tensor([0.3, -0.2, 1.1])
    exact = hosm.ScoreModel(lambda x, t: x.sin(), schedule)
    reports = [
        hosm.likelihood_gap(
            model,
            data,
            reference=data[:2] if truth == "atoms" else exact,
            nodes=2,
            steps=8,
            generator=torch.Generator().manual_seed(0),
        )
        for data in (x0, x0[:, None])
    ]
    found, expected = (
        torch.tensor([[each.value for each in curve] for curve in report.curves.values()])
        for report in reports
    )
    torch.testing.assert_close(found, expected)
    for name, number in reports[0].numbers.items():
        assert number.value == pytest.approx(reports[1].numbers[name].value)


def test_a_network_that_writes_to_its_conditions_writes_to_copies():
    exact = gaussian(SCHEDULES["vp"], STD)

    def network(x, t, y):
        y.mul_(0.5)
        return exact(x, t)

    model, y = hosm.ScoreModel(network, SCHEDULES["vp"]), torch.ones(4)
    x0 = torch.randn(4, 2)
    hosm.likelihood_gap(model, x0, nodes=2, steps=8, model_kwargs={"y": y})
    assert torch.equal(y, torch.ones(4))


class ByAutograd(hosm.Schedule):
    t_min, t_max, prior_std = 0.01, 1.0, 1.0

    def alpha(self, t):
        return 1 - 0.9 * t**2

    def sigma(self, t):
        return t


class ByHand(ByAutograd):
    """The same, which autograd cannot follow, with derivatives of its own."""

    def alpha(self, t):
        return super().alpha(t.detach())

    def sigma(self, t):
        return t.detach()

    def rates(self, t):
        return -1.8 * t, torch.ones_like(t)

    def drift(self, t):
        return -1.8 * t / self.alpha(t)

    def squared_diffusion(self, t):
        return 2 * t - 2 * t**2 * self.drift(t)


def test_the_derivatives_of_a_schedule_are_its_own():
    """The score of the ODE of a flow needs α′ and σ′."""
    torch.manual_seed(0)
    network, x0 = MLP(2), torch.randn(4, 2)
    found = [
        hosm.likelihood_gap(
            hosm.ScoreModel(network, schedule, "flow_prediction"),
            x0,
            nodes=2,
            steps=16,
            generator=torch.Generator().manual_seed(0),
        )
        for schedule in (ByHand(), ByAutograd())
    ]
    own, expected = (report.curves["own score"] for report in found)
    assert [each.value for each in own] == pytest.approx([each.value for each in expected])
    # Derivatives at two nodes, three solutions, the draw of clean=True, and the bound.
    assert found[0].evaluations == 2 * (2 + 2 * 2) + 3 * (16 + 10) + 1 + 72


def test_the_schedule_of_a_truth_is_compared_under_any_default_dtype():
    with default_dtype(torch.bfloat16):
        truth = hosm.ScoreModel(torch.nn.Identity(), hosm.DiscreteSchedule.linear(1000))
        assert gap._reference(truth, truth.schedule, torch.zeros(1, 2)) is truth


@pytest.mark.filterwarnings("ignore:schedule. expected one that ends in its prior")
@pytest.mark.filterwarnings("ignore:network. expected evaluation mode")
@pytest.mark.parametrize("kind", ["discrete", "half", "inference", "module"])
def test_odd_models_and_modes(kind):
    class Module(nn.Module, hosm.VPSchedule):
        def __init__(self):
            nn.Module.__init__(self)
            hosm.VPSchedule.__init__(self)

    schedule = {"discrete": hosm.DiscreteSchedule.linear(100)}.get(kind, SCHEDULES["vp"])
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    network = OfX(network.bfloat16() if kind == "half" else network)
    x0 = torch.randn(4, 2, dtype=torch.bfloat16 if kind == "half" else torch.float64)
    with torch.inference_mode(kind == "inference"):
        report = hosm.likelihood_gap(
            hosm.ScoreModel(network, schedule),
            x0 + 0,
            nodes=3,
            steps=8,
            ode_score=kind != "half",
        )
    assert report.numbers["ode nll"].samples == 4
    assert int(network.get_buffer("network.0.num_batches_tracked")) == 0
