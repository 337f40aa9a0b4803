"""ode_nll against the closed forms of Gaussians and mixtures, and everything it promises."""

import math

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.likelihood import adaptive as adaptive_of
from hosm_losses.likelihood.adaptive import student_factor
from tests.oracles import (
    MLP,
    PREDICTIONS_OF_ORACLE,
    GaussianMixture,
    mixture_noise,
    networks,
    paper_mixture,
    ring,
)
from tests.schedules.test_continuous import SCHEDULES

POINTS = 400
NAMES = ("vp", "ve")
MIXTURES = {"1-D": paper_mixture, "2-D": ring}


def problem(name, mixture, points=POINTS):
    """A model with the exact score, points at t_min, their log-densities and the exact prior."""
    schedule = SCHEDULES[name]
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    alpha, sigma = schedule(ends)
    x = alpha[0] * mixture.sample(points, generator)
    x = x + sigma[0] * torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def log_density(x, end):
        return mixture.log_density(x, alpha[end].expand(len(x)), sigma[end].expand(len(x)))

    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    return model, x, log_density(x, 0), lambda latent: log_density(latent, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_fixed_is_within_a_thousandth_of_a_nat_and_of_order_four(name, mixture):
    model, x, log_density, log_prior = problem(name, MIXTURES[mixture]())
    errors = {}
    for steps in (256, 512):
        result = hosm.ode_nll(model, x, divergence="exact", steps=steps, log_prior=log_prior)
        error = (result.nll + log_density).abs()
        errors[steps] = float(error.max())
        assert set(result.nfe.tolist()) == {steps + 10}
        assert not bool(result.failed.any())
        # The estimate covers the error, and is not larger by more than local errors cancel.
        assert float((error <= 2 * result.solver_error).double().mean()) >= 0.95
        assert float(result.solver_error.max() / error.max()) < 50
    assert errors[256] < 1e-3
    assert 6 < errors[256] / errors[512] < 30


@pytest.mark.parametrize("name", NAMES)
def test_clean_data_has_the_start_of_the_variational_bound(name):
    """By hand for the noise that is drawn, and in the mean beside the bound of the same model."""
    mixture = ring()
    model, _, _, log_prior = problem(name, mixture, 1)
    x = mixture.sample(300, torch.Generator().manual_seed(1))
    options = {"log_prior": log_prior, "divergence": "exact", "steps": 256, "batch_size": 200}
    result = hosm.ode_nll(
        model, x, clean=True, generator=torch.Generator().manual_seed(2), **options
    )
    alpha, sigma = model.schedule(torch.tensor(model.schedule.t_min))
    generator = torch.Generator().manual_seed(2)
    noise = torch.cat([torch.randn((count, 2), generator=generator) for count in (200, 100)])
    points = alpha * x + sigma * noise
    there = hosm.ode_nll(model, points, **options)
    error = model(points, torch.full((300,), model.schedule.t_min)) - noise
    expected = there.nll + (error.square() - noise.square()).sum(1) / 2 - 2 * alpha.log()
    torch.testing.assert_close(result.nll, expected)
    assert torch.equal(result.nfe, there.nfe + 1)
    bound = hosm.variational_nll(
        model, x, samples=256, log_prior=log_prior, generator=torch.Generator().manual_seed(3)
    )
    # The exact score has one likelihood, of the ODE and of the SDE.
    difference = result.nll - bound.nll
    assert abs(float(difference.mean())) < 5 * float(difference.std()) / 300**0.5 + 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_adaptive_is_within_its_default_tolerance(name, mixture):
    model, x, log_density, log_prior = problem(name, MIXTURES[mixture]())
    result = hosm.ode_nll(model, x, divergence="exact", method="adaptive", log_prior=log_prior)
    assert float((result.nll + log_density).abs().max()) < 1.5e-3
    assert float(result.nfe.double().mean()) < 80
    assert not bool(result.failed.any())
    tight = hosm.ode_nll(
        model, x, divergence="exact", method="adaptive", log_prior=log_prior, tolerance=1e-7
    )
    assert float((tight.nll + log_density).abs().max()) < 2e-6


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_gaussian_has_its_closed_form_on_every_schedule(name, method):
    covariance = torch.tensor([[[0.5, 0.3], [0.3, 0.4]]])
    gaussian = GaussianMixture([[0.2, -0.4]], covariance, [1.0])
    model, x, log_density, log_prior = problem(name, gaussian, points=20)
    result = hosm.ode_nll(
        model,
        x,
        method=method,
        divergence="exact",
        steps=256,
        log_prior=log_prior,
        tolerance=1e-6,
    )
    assert float((result.nll + log_density).abs().max()) < 1e-5


def test_data_moments_change_the_coordinates_and_not_the_answer():
    covariance = torch.diag_embed(torch.tensor([[0.25, 4.0]]))
    gaussian = GaussianMixture([[0.3, -2.0]], covariance, [1.0])
    model, x, log_density, log_prior = problem("vp", gaussian, points=20)
    moments = {"data_mean": torch.tensor([0.3, -2.0]), "data_std": torch.tensor([0.5, 2.0])}
    options = {"divergence": "exact", "log_prior": log_prior}
    # In the coordinates of its own moments Gaussian data does not move: four steps are enough.
    result = hosm.ode_nll(model, x, steps=4, **moments, **options)
    torch.testing.assert_close(result.nll, -log_density, rtol=0, atol=1e-9)
    other = hosm.ode_nll(model, x, steps=256, data_mean=1.0, data_std=3.0, **options)
    torch.testing.assert_close(other.nll, -log_density, rtol=0, atol=1e-5)


def test_the_default_prior_is_the_schedules_gaussian_in_the_latents_coordinates():
    schedule = hosm.VESchedule()
    model = hosm.ScoreModel(lambda x, t: 0 * x, schedule)
    x = torch.randn(3, 2)
    result = hosm.ode_nll(model, x, steps=256)
    # Without a score nothing moves: the density of x is that of the prior.
    torch.testing.assert_close(result.latent, x)
    expected = -torch.distributions.Normal(0.0, 50.0).log_prob(x).sum(1)
    torch.testing.assert_close(result.nll, expected)
    torch.testing.assert_close(result.bits_per_dim(), expected / (2 * math.log(2)))


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_latent_is_the_image_at_t_max_in_the_coordinates_of_x(name, method):
    gaussian = GaussianMixture([[0.5]], [[[0.09]]], [1.0])
    model, x, _, log_prior = problem(name, gaussian, points=5)
    schedule = model.schedule
    ends = torch.tensor([schedule.t_min, schedule.t_max])
    alpha, sigma = schedule(ends)
    scale = (alpha**2 * 0.09 + sigma**2).sqrt()
    expected = alpha[1] * 0.5 + scale[1] / scale[0] * (x - alpha[0] * 0.5)
    result = hosm.ode_nll(
        model, x, method=method, divergence="exact", steps=400, tolerance=1e-7, log_prior=log_prior
    )
    torch.testing.assert_close(result.latent, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS_OF_ORACLE))
def test_every_prediction_of_one_field_has_one_likelihood(name, prediction):
    schedule = SCHEDULES[name]
    mixture = ring(3, 0.3)
    exact = mixture_noise(mixture, schedule)
    say = PREDICTIONS_OF_ORACLE[prediction]

    def same(x, t):
        alpha, sigma = (part[:, None] for part in schedule(t))
        rates = [part[:, None] for part in schedule.rates(t)]
        return say(exact(x, t), x, alpha, sigma, rates)

    x = mixture.sample(5, torch.Generator().manual_seed(0))
    results = [
        hosm.ode_nll(model, x, divergence="exact", steps=32)
        for model in (
            hosm.ScoreModel(exact, schedule),
            hosm.ScoreModel(same, schedule, prediction),
        )
    ]
    torch.testing.assert_close(results[1].nll, results[0].nll, rtol=0, atol=1e-6)


def test_fresh_probes_are_unbiased_and_their_standard_error_is_honest():
    """One sample repeated: every row has probes of its own, and an exact answer to meet."""
    network, shape = networks()["mlp"]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    repeats = 2000
    x = torch.randn(1, *shape).expand(repeats, -1)
    exact = hosm.ode_nll(model, x[:1], divergence="exact", steps=16)
    assert exact.standard_error.tolist() == [0.0]
    result = hosm.ode_nll(model, x, steps=16, probes=2, generator=torch.Generator().manual_seed(0))
    error = result.nll - exact.nll
    spread = float(error.std())
    assert spread > 1e-3
    assert abs(float(error.mean())) < 5 * spread / repeats**0.5
    # The mean of the estimated variances is the variance, to five standard errors of both.
    variance = result.standard_error**2
    squares = error**2
    noise = float(variance.std() + squares.std()) / repeats**0.5
    assert abs(float(variance.mean() - squares.mean())) < 5 * noise
    # The path does not depend on the probes.
    assert float((result.latent - result.latent[:1]).abs().max()) < 1e-12
    assert hosm.ode_nll(model, x[:2], steps=16).standard_error is None


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere", "dct"])
def test_probes_kept_along_an_adaptive_path_are_unbiased(distribution):
    network, shape = networks()["mlp"]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    repeats = 1000
    x = torch.randn(1, *shape).expand(repeats, -1)
    options = {"method": "adaptive", "tolerance": 1e-4}
    exact = hosm.ode_nll(model, x[:1], divergence="exact", **options)
    result = hosm.ode_nll(
        model,
        x,
        probes=4,
        distribution=distribution,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    error = result.nll - exact.nll
    assert abs(float(error.mean())) < 5 * float(error.std()) / repeats**0.5
    variance, squares = (result.standard_error / student_factor(3)) ** 2, error**2
    noise = float(variance.std() + squares.std()) / repeats**0.5
    assert abs(float(variance.mean() - squares.mean())) < 5 * noise
    few = hosm.ode_nll(model, x[:2], probes=3, **options)
    assert few.standard_error is None


@pytest.mark.parametrize("name", ["conv", "attention"])
@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_any_shape_and_a_batch_equals_its_rows(method, name):
    network, shape = networks()[name]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x = torch.randn(3, *shape)
    options = {"method": method, "divergence": "exact", "steps": 8, "tolerance": 1e-3}
    kwargs = {"label": torch.randn(3)} if name == "attention" else {}
    together = hosm.ode_nll(model, x, model_kwargs=kwargs, **options)
    assert together.latent.shape == x.shape
    for row in range(3):
        own = {key: value[row : row + 1] for key, value in kwargs.items()}
        alone = hosm.ode_nll(model, x[row : row + 1], model_kwargs=own, **options)
        torch.testing.assert_close(alone.nll[0], together.nll[row], rtol=0, atol=1e-9)
        assert alone.nfe[0] == together.nfe[row]


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_the_network_is_called_as_often_as_said_and_never_outside_the_schedule(method):
    network, shape = networks()["mlp"]
    schedule = hosm.VPSchedule()
    seen = []

    def counted(x, t):
        seen.append(t)
        return network(x, t)

    x = torch.randn(4, *shape)
    result = hosm.ode_nll(hosm.ScoreModel(counted, schedule), x, method=method, steps=20)
    assert sum(len(t) for t in seen) == int(result.nfe.sum())
    times = torch.cat(seen)
    assert float(times.min()) == pytest.approx(schedule.t_min, rel=1e-9)
    assert float(times.min()) >= schedule.t_min
    assert float(times.max()) == pytest.approx(schedule.t_max, rel=1e-9)
    assert float(times.max()) <= schedule.t_max
    if method == "fixed":
        assert len(seen) == 30


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_graph_unless_asked_for_and_the_same_value_in_every_mode(mode, method):
    network, shape = networks()["attention"]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x, label = torch.randn(2, *shape), torch.randn(2)
    options = {"method": method, "steps": 8, "divergence": "exact", "tolerance": 1e-3}
    expected = hosm.ode_nll(model, x, enable_grad=True, model_kwargs={"label": label}, **options)
    assert expected.nll.requires_grad
    with mode():
        result = hosm.ode_nll(model, x * 1, model_kwargs={"label": label * 1}, **options)
    assert not result.nll.requires_grad
    torch.testing.assert_close(result.nll, expected.nll.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_gradients_through_the_likelihood_are_central_differences(divergence):
    network, shape = networks()["attention"]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x = torch.randn(2, *shape)
    weights = [parameter.detach().clone() for parameter in network.parameters()]
    directions = [torch.randn_like(weight) for weight in weights]

    def nll(step):
        with torch.no_grad():
            for parameter, weight, way in zip(
                network.parameters(), weights, directions, strict=True
            ):
                parameter.copy_(weight + step * way)
        return hosm.ode_nll(
            model,
            x,
            steps=6,
            divergence=divergence,
            enable_grad=True,
            generator=torch.Generator().manual_seed(0),
        ).nll.sum()

    gradients = torch.autograd.grad(nll(0.0), list(network.parameters()))
    along = sum(float((g * w).sum()) for g, w in zip(gradients, directions, strict=True))
    difference = (nll(1e-5).item() - nll(-1e-5).item()) / 2e-5
    assert along == pytest.approx(difference, rel=1e-6)


def test_a_float32_network_keeps_float64_sums():
    network, shape = networks()["mlp"]
    x = torch.randn(4, *shape)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    double = hosm.ode_nll(model, x, divergence="exact")
    network.float()
    single = hosm.ode_nll(model, x.float(), divergence="exact")
    assert single.nll.dtype == torch.float64
    assert single.latent.dtype == torch.float32
    torch.testing.assert_close(single.nll, double.nll, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_a_sample_that_fails_is_flagged_and_spares_its_batch_mates(method):
    inner = MLP(2)

    class Poisoned(nn.Module):
        def forward(self, x, t, bad):
            return torch.where(bad[:, None], torch.full_like(x, math.nan), inner(x, t))

    model = hosm.ScoreModel(Poisoned(), hosm.VPSchedule())
    x = torch.randn(3, 2)
    options = {"method": method, "divergence": "exact", "steps": 16, "tolerance": 1e-3}
    result = hosm.ode_nll(
        model, x, model_kwargs={"bad": torch.tensor([False, True, False])}, **options
    )
    assert result.failed.tolist() == [False, True, False]
    assert result.nll.isnan().tolist() == [False, True, False]
    good = hosm.ode_nll(
        model, x, model_kwargs={"bad": torch.tensor([False, False, False])}, **options
    )
    torch.testing.assert_close(result.nll[[0, 2]], good.nll[[0, 2]], rtol=0, atol=1e-9)


def test_the_generator_decides_and_the_global_one_is_left_alone():
    network, shape = networks()["mlp"]
    model, x = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(2, *shape)
    before = torch.get_rng_state()
    results = [
        hosm.ode_nll(model, x, steps=8, generator=torch.Generator().manual_seed(1)).nll
        for _ in range(2)
    ]
    assert torch.equal(*results)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("method", "evaluations"), [("fixed", 18), ("adaptive", 1)])
def test_a_network_that_returns_nan_fails_at_once(method, evaluations):
    model = hosm.ScoreModel(lambda x, t: x * math.nan, hosm.VPSchedule())
    result = hosm.ode_nll(model, torch.randn(3, 2), method=method, steps=8)
    assert result.failed.all()
    assert result.nll.isnan().all()
    assert result.nfe.tolist() == [evaluations] * 3


def test_a_path_that_does_not_arrive_has_no_number(monkeypatch):
    monkeypatch.setattr(adaptive_of, "MAX_EVALUATIONS", 30)
    model = hosm.ScoreModel(MLP(2), hosm.VPSchedule())
    result = hosm.ode_nll(model, torch.randn(3, 2), method="adaptive", divergence="exact")
    assert result.failed.all()
    assert result.nll.isnan().all()
    assert result.bits_per_dim().isnan().all()
    assert result.latent.isfinite().all()


def test_a_solver_error_of_thousands_of_nats_fails():
    """ε̂ = 30 x is stiff: four steps of the fixed grid cannot follow it."""
    model = hosm.ScoreModel(lambda x, t: 30 * x, hosm.VESchedule())
    result = hosm.ode_nll(model, torch.ones(2, 3), steps=4, divergence="exact")
    assert bool((result.solver_error > 1000).all())
    assert result.failed.all()
    assert result.nll.isnan().all()


@pytest.mark.parametrize("options", [{}, {"method": "adaptive", "divergence": "exact"}], ids=str)
@pytest.mark.parametrize("value", [3e38, -torch.finfo(torch.float32).max])
def test_finite_data_beyond_reason_fails(value, options):
    network = MLP(2).float()
    x = torch.tensor([[value, 0.5], [0.1, 0.5]], dtype=torch.float32)
    for function in (network, lambda x, t: 0 * x, lambda x, t: network(x, t).tanh()):
        model = hosm.ScoreModel(function, hosm.VESchedule())
        result = hosm.ode_nll(model, x, **options)
        assert result.failed.tolist() == [True, False]
        assert result.nll.isnan().tolist() == [True, False]
        bound = hosm.variational_nll(model, x, samples=4)
        assert bound.failed.tolist() == [True, False]
