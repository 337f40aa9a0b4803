"""ode_sample: the paths of ode_nll backwards, with the density of what comes out."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.likelihood.test_ode import MIXTURES, NAMES, problem
from tests.oracles import MLP, CountFlops


def model_of(network, schedule=None):
    return hosm.ScoreModel(network, schedule or hosm.VPSchedule())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_x_to_latent_to_x(name, mixture):
    """And the density on the way back is that on the way there, both that of the mixture."""
    model, x, log_density, log_prior = problem(name, MIXTURES[mixture](), points=50)
    options = {"method": "adaptive", "tolerance": 1e-7, "divergence": "exact"}
    there = hosm.ode_nll(model, x, log_prior=log_prior, **options)
    back = hosm.ode_sample(model, there.latent, log_prior=log_prior, **options)
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(back.nll, -log_density, rtol=0, atol=1e-4)
    assert not bool(back.failed.any())
    assert torch.equal(back.latent, there.latent)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_density_of_a_sample_is_that_of_the_mixture(name, mixture):
    """On the fixed grid, within what both solvers say they are off."""
    model, x, _, log_prior = problem(name, MIXTURES[mixture](), points=50)
    latent = hosm.ode_nll(model, x, divergence="exact", steps=512, log_prior=log_prior).latent
    drawn = hosm.ode_sample(
        model, latent, divergence="exact", steps=256, log_prior=log_prior, batch_size=20
    )
    checked = hosm.ode_nll(
        model, drawn.x, divergence="exact", method="adaptive", tolerance=1e-6, log_prior=log_prior
    )
    claimed = drawn.solver_error + checked.solver_error
    assert float(((drawn.nll - checked.nll).abs() / (claimed + 1e-5)).median()) < 2
    assert float((drawn.nll - checked.nll).abs().max()) < 2e-3
    assert set(drawn.nfe.tolist()) == {266}


def test_samples_have_the_density_they_say():
    """The mean of p_other/p over samples of p, in a region, is what p_other gives the region."""
    model = problem("ve", MIXTURES["2-D"](), points=1)[0]
    generator = torch.Generator().manual_seed(0)
    latent = model.schedule.prior_std * torch.randn((2000, 2), generator=generator)
    drawn = hosm.ode_sample(model, latent, divergence="exact", steps=128)

    def inside(points):  # where p is not almost zero, so that the ratio has a finite spread
        return (points.norm(dim=1) - 1).abs() < 0.15

    std = 0.7
    ratio = (torch.distributions.Normal(0.0, std).log_prob(drawn.x).sum(1) + drawn.nll).exp()
    ratio = torch.where(inside(drawn.x), ratio, 0.0)
    expected = inside(std * torch.randn((200_000, 2), generator=generator)).double()
    error = (ratio.var() / len(ratio) + expected.var() / len(expected)).sqrt()
    assert abs(float(ratio.mean() - expected.mean())) < 5 * float(error)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_random_and_exact_divergence_agree(divergence):
    network = MLP(3)
    latent = torch.randn(4, 3)
    options = {"divergence": divergence, "generator": torch.Generator().manual_seed(0)}
    if divergence == "hutchinson":
        options["probes"] = 256
    drawn = hosm.ode_sample(model_of(network), latent, **options)
    exact = hosm.ode_sample(model_of(network), latent, divergence="exact")
    torch.testing.assert_close(drawn.x, exact.x)
    error = drawn.standard_error + 1e-9
    assert bool(((drawn.nll - exact.nll).abs() < 5 * error).all())


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_without_a_divergence_nothing_is_differentiated(method):
    network, latent = MLP(3), torch.randn(4, 3)
    model = model_of(network)
    with torch.no_grad(), CountFlops() as one:
        network(latent, torch.ones(4))
    with CountFlops() as count:
        drawn = hosm.ode_sample(model, latent, divergence=None, method=method)
    assert drawn.nll is None
    assert drawn.standard_error is drawn.solver_error is None
    if method == "fixed":
        assert count.total == 74 * one.total
        same = hosm.ode_sample(model, latent, divergence="exact")
        torch.testing.assert_close(drawn.x, same.x)
    else:
        exact = hosm.ode_sample(model, latent, divergence="exact", steps=1024)
        torch.testing.assert_close(drawn.x, exact.x, rtol=0, atol=1e-2)


def test_a_shape_draws_latents_of_the_prior():
    schedule = hosm.VESchedule(sigma_max=20.0)
    model = model_of(MLP(3), schedule)
    drawn = hosm.ode_sample(model, (5, 3), generator=torch.Generator().manual_seed(0))
    noise = torch.randn((5, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.latent, schedule.prior_std * noise)
    assert drawn.x.shape == (5, 3)
    single = model_of(MLP(3).float(), schedule)
    assert hosm.ode_sample(single, torch.Size((5, 3))).x.dtype == torch.float32


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = MLP(3)

    def forward(self, x, t, shift):
        return self.network(x, t) + shift


def test_conditions_follow_their_samples():
    model, latent = model_of(Conditioned()), torch.randn(5, 3)
    shift = torch.randn(5, 3)
    options = {"divergence": "exact", "model_kwargs": {"shift": shift}}
    whole = hosm.ode_sample(model, latent, **options)
    parts = hosm.ode_sample(model, latent, batch_size=2, **options)
    torch.testing.assert_close(whole.x, parts.x)
    torch.testing.assert_close(whole.nll, parts.nll)


def test_a_graph_on_request():
    network, latent = MLP(3), torch.randn(2, 3)
    drawn = hosm.ode_sample(model_of(network), latent, divergence=None, enable_grad=True, steps=4)
    drawn.x.square().sum().backward()
    assert network.get_parameter("inner.weight").grad is not None
    assert not hosm.ode_sample(model_of(network), latent, steps=4).x.requires_grad


def test_its_options_are_those_of_ode_nll_but_for_four():
    """Which docs/likelihood.md names."""
    names = [set(inspect.signature(each).parameters) for each in (hosm.ode_nll, hosm.ode_sample)]
    lacking = {"clean", "companion", "dequantization", "dequantization_draws"}
    assert names[0] - names[1] == {"x", *lacking}
    assert names[1] - names[0] == {"latent"}
    page = (Path(__file__).parents[2] / "docs" / "likelihood.md").read_text()
    said = page.split("## Samples with their density")[1].split("```")[0]
    assert set(re.findall(r"`(\w+)`", said)) == {"ode_nll", *lacking}


class Breaks(nn.Module):
    def forward(self, x, t):
        return torch.where(x[:, :1] > 0, x, float("nan"))


@pytest.mark.parametrize("divergence", ["exact", None])
def test_a_failed_sample_is_marked_and_says_why(divergence):
    latent = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    drawn = hosm.ode_sample(model_of(Breaks()), latent, divergence=divergence)
    assert drawn.failed.tolist() == [False, True]
    if divergence is not None:
        assert torch.isnan(drawn.nll).tolist() == [False, True]
    (reason,) = drawn.failures().items()
    assert reason[0] == 1
    assert "a value on its path is not finite" in reason[1]
