"""ode_nll on mixtures, its gradients, its dtypes, and the samples that fail."""

import pytest
import torch
from torch.distributions import Normal

import hosm_losses as hosm
from tests.cases import MLP, SCHEDULES, VP, gradients, networks
from tests.likelihood.problems import gaussian, marginals, problem, total
from tests.oracles import paper_mixture, ring


@pytest.mark.parametrize(("name", "mixture"), [("vp", ring), ("ve", paper_mixture)])
def test_both_methods_meet_the_density_of_a_mixture(name, mixture):
    model, x, log_density, log_prior = problem(SCHEDULES[name], mixture())
    options, errors = {"divergence": "exact", "log_prior": log_prior}, []
    for steps in (320, 640):
        result = hosm.ode_nll(model, x, solver=hosm.FixedGrid(steps), **options)
        error = (result.nll + log_density).abs()
        errors.append(float(error.max()))
        # The estimate covers the error, and is not larger by more than local errors cancel.
        assert float((error <= 2 * result.solver_error).double().mean()) >= 0.95
        assert float(result.solver_error.max() / error.max()) < 50
    assert errors[0] < 1e-3
    assert 20 < errors[0] / errors[1] < 60
    tight = hosm.ode_nll(model, x, solver=hosm.Adaptive(1e-7), **options)
    assert float((tight.nll + log_density).abs().max()) < 2e-6


@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson()])
def test_gradients_through_the_likelihood_are_central_differences(divergence):
    network, shape = networks()["attention"]
    model, x = hosm.ScoreModel(network, VP), torch.randn(2, *shape)
    weights = [parameter.detach().clone() for parameter in network.parameters()]
    directions = [torch.randn_like(weight) for weight in weights]

    def nll(step):
        with torch.no_grad():
            for parameter, weight, way in zip(
                network.parameters(), weights, directions, strict=True
            ):
                parameter.copy_(weight + step * way)
        options = {"generator": torch.Generator().manual_seed(0), "enable_grad": True}
        options |= {"solver": hosm.FixedGrid(6), "divergence": divergence}
        return hosm.ode_nll(model, x, **options).nll.sum()

    slopes = gradients(nll(0.0), network)
    along = sum(float((g * w).sum()) for g, w in zip(slopes, directions, strict=True))
    assert along == pytest.approx((nll(1e-5).item() - nll(-1e-5).item()) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_a_float32_network_keeps_float64_sums(name):
    network, schedule = MLP(16, 32), SCHEDULES[name]

    def scaled(x, t):  # as networks are used: what comes in has unit size
        alpha, sigma = (part[:, None] for part in schedule(t))
        return network(x / (alpha**2 * 0.25 + sigma**2).sqrt(), t / 80)

    model, x = hosm.ScoreModel(scaled, schedule), (0.5 * torch.randn(8, 16)).float()
    double = hosm.ode_nll(model, x.double(), divergence="exact")
    network.float()
    single = hosm.ode_nll(model, x, divergence="exact")
    assert (single.nll.dtype, single.latent.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.nll, double.nll, rtol=0, atol=1e-4)


def test_autocast_is_for_the_network_alone():
    """States, sums, schedule and probes are what they are without it."""
    network, x = MLP(3).float(), torch.randn(4, 3).float()

    def cast(x, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return network(x, t)

    def nll(network):
        options = {"divergence": hosm.Hutchinson(2), "solver": hosm.FixedGrid(12)}
        options["generator"] = torch.Generator().manual_seed(0)
        return hosm.ode_nll(hosm.ScoreModel(network, VP), x, **options).nll

    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = nll(network)
    assert torch.equal(around, nll(cast))
    assert not torch.equal(around, nll(network))


def test_finite_data_beyond_reason_fails():
    largest = torch.finfo(torch.float32).max
    network, x = MLP(2).float(), torch.tensor([[3e38, 0.5], [-largest, 0.5], [0.1, 0.5]]).float()
    for function in (network, lambda x, t: 0 * x, lambda x, t: network(x, t).tanh()):
        model = hosm.ScoreModel(function, SCHEDULES["ve"])
        exact = hosm.ode_nll(model, x, solver=hosm.Adaptive(), divergence="exact")
        for result in (exact, hosm.ode_nll(model, x), hosm.variational_nll(model, x, samples=4)):
            assert result.failed.tolist() == result.nll.isnan().tolist() == [True, True, False]


@pytest.mark.filterwarnings("ignore:schedule. expected one that ends")
@pytest.mark.parametrize("solver", [hosm.FixedGrid, hosm.Adaptive])
def test_the_error_of_the_prior_is_exact_for_gaussian_data(solver):
    """Data of mean 3 under a prior of σ = 30, of which the mean error is much smaller."""
    schedule, std = hosm.VESchedule(sigma_max=30.0), 0.5
    model, (start, _) = gaussian(schedule, 3.0, std), marginals(schedule, 3.0, std)
    x = start.sample((400, 2))
    found = hosm.ode_nll(model, x, solver=solver(data_mean=3.0, data_std=std))
    torch.testing.assert_close(
        found.prior_error - found.nll, total(start.log_prob(x)), rtol=0, atol=1e-5
    )
    assert float(found.prior_error.abs().mean()) == pytest.approx(0.116, abs=0.01)
    assert float(found.prior_error.mean()) == pytest.approx(0.010, abs=0.035)
    assert "the prior is off by " in str(found)
    for options in ({"data_mean": 3.0}, {"data_std": std}):
        assert hosm.ode_nll(model, x[:1], solver=solver(**options)).prior_error is None
    known = solver(data_mean=3.0, data_std=std)
    own = hosm.ode_nll(model, x[:1], solver=known, log_prior=lambda z: total(-z.abs()))
    assert own.prior_error is None
    assert hosm.ode_sample(model, x[:1], solver=known).prior_error is None


@pytest.mark.filterwarnings("ignore:schedule. expected one that ends")
def test_the_error_of_the_prior_over_several_draws_is_that_of_the_mean_density():
    schedule, levels = hosm.VESchedule(sigma_max=3.0), torch.full((2, 3), 200, dtype=torch.uint8)
    solver = hosm.FixedGrid(24, data_mean=0.5, data_std=0.3)
    alpha, sigma = schedule(torch.tensor(schedule.t_max))
    law = Normal(alpha * 0.5, ((alpha * 0.3) ** 2 + sigma**2).sqrt())
    options = {"dequantization": hosm.Uniform(4), "solver": solver, "divergence": "exact"}
    plain, corrected = (
        hosm.ode_nll(
            gaussian(schedule, 0.5, 0.3),
            levels,
            generator=torch.Generator().manual_seed(0),
            log_prior=prior,
            **options,
        )
        for prior in (None, lambda z: total(law.log_prob(z)))
    )
    torch.testing.assert_close(plain.nll - plain.prior_error, corrected.nll, rtol=0, atol=1e-6)
