"""score_sde: stand-ins with its attributes, and the losses and labels that it documents."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.interop import from_score_sde
from tests.interop.checks import check_all_from_one_line, noised
from tests.interop.test_stand_ins import Net, batch


class VPSDE:
    """arXiv 2011.13456, appendix B and C: the factor of x_0 and the deviation of x_t."""

    def __init__(self):
        self.beta_0, self.beta_1, self.N = 0.2, 15.0, 1000
        self.discrete_betas = torch.linspace(0.2 / 1000, 15.0 / 1000, 1000)

    def marginal(self, t):
        log_mean = -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return log_mean.exp(), torch.sqrt(1 - torch.exp(2 * log_mean))

    def diffusion(self, t):
        return torch.sqrt(self.beta_0 + t * (self.beta_1 - self.beta_0))


class SubVPSDE:
    def __init__(self):
        self.beta_0, self.beta_1, self.N = 0.1, 20.0, 1000

    def marginal(self, t):
        log_mean = -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return log_mean.exp(), 1 - torch.exp(2 * log_mean)

    def diffusion(self, t):
        beta = self.beta_0 + t * (self.beta_1 - self.beta_0)
        exponent = -2 * self.beta_0 * t - (self.beta_1 - self.beta_0) * t**2
        return torch.sqrt(beta * (1 - torch.exp(exponent)))


class VESDE:
    def __init__(self):
        self.sigma_min, self.sigma_max, self.N = 0.02, 40.0, 1000

    def marginal(self, t):
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def diffusion(self, t):
        return self.marginal(t)[1] * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))


@pytest.mark.parametrize("kind", [VPSDE, SubVPSDE, VESDE])
def test_score_sde(kind):
    sde, net = kind(), Net().double()
    model = from_score_sde(net, sde)
    x0, noise = batch()
    t = torch.tensor([1e-3, 0.3, 0.6, 1.0])
    alpha, sigma = (part[:, None, None, None] for part in sde.marginal(t))
    x_t = alpha * x0 + sigma * noise
    torch.testing.assert_close(noised(model, x0, t, noise), x_t)
    if kind is VESDE:
        labels = sigma.flatten()
        score = net(x_t, labels)
    else:
        labels = 999 * t
        score = -net(x_t, labels) / sigma
    torch.testing.assert_close(model.score(x_t, t), score)
    torch.testing.assert_close(net.seen, labels)
    check_all_from_one_line(model, x0)


@pytest.mark.parametrize("reduce_mean", [False, True])
@pytest.mark.parametrize("kind", [VPSDE, SubVPSDE, VESDE])
def test_the_projects_losses_are_ours_times_a_known_factor(kind, reduce_mean):
    """Its reduction of the elements is a mean, or half the sum: reduce_mean."""
    sde, net = kind(), Net().double()
    model = from_score_sde(net, sde)
    x0, noise = batch()
    t = torch.tensor([1e-3, 0.3, 0.6, 1.0])
    alpha, sigma = (part[:, None, None, None] for part in sde.marginal(t))
    score = model.score(alpha * x0 + sigma * noise, t)

    def reduced(squares):
        flat = squares.flatten(1)
        return flat.mean(1) if reduce_mean else 0.5 * flat.sum(1)

    d = x0[0].numel()
    own = reduced((sigma * score + noise) ** 2).mean()
    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise)
    torch.testing.assert_close(own, ours if reduce_mean else ours * d / 2)
    own = (reduced((score + noise / sigma) ** 2) * sde.diffusion(t) ** 2).mean()
    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting="likelihood")
    # Ours counts the length of its times, 1 - 1e-5.
    ours = ours / (1 - 1e-5)
    torch.testing.assert_close(ours, own * d / 2 if reduce_mean else own)


@pytest.mark.parametrize("kind", [VPSDE, SubVPSDE, VESDE])
def test_score_sde_takes_what_create_model_returns(kind):
    """A DataParallel, as it is for order one and the likelihood, and its module above."""
    net = Net().double()
    wrapped = from_score_sde(nn.DataParallel(net), kind())
    bare = from_score_sde(net, kind())
    x0, noise = batch()
    options = {"t": torch.rand(4), "noise": noise}
    losses = [hosm.first_order_dsm(model, x0, **options) for model in (wrapped, bare)]
    assert torch.equal(*losses)
    likelihoods = [
        hosm.ode_nll(model, x0, steps=8, generator=torch.Generator().manual_seed(0))
        for model in (wrapped, bare)
    ]
    assert torch.equal(*(each.latent for each in likelihoods))
    options["probe"] = torch.ones_like(x0)
    for loss in (hosm.second_order_dsm, hosm.third_order_dsm):
        inside = from_score_sde(wrapped.network.module, kind())
        assert torch.equal(loss(inside, x0, **options), loss(bare, x0, **options))


def test_score_sde_refuses_networks_of_discrete_steps():
    """What it says to write is the project's own reading of such networks."""
    net, x0 = Net().double(), batch()[0]
    steps = torch.tensor([0, 3, 500, 999])
    with pytest.raises(ValueError):
        from_score_sde(net, VPSDE(), continuous=False)
    sde = VPSDE()
    alphas_cumprod = torch.cumprod(1 - sde.discrete_betas, 0)
    model = hosm.ScoreModel(net, hosm.DiscreteSchedule(alphas_cumprod))
    expected = -net(x0, steps) / (1 - alphas_cumprod[steps]).sqrt()[:, None, None, None]
    torch.testing.assert_close(model.score(x0, steps), expected)
    assert torch.equal(net.seen, steps)

    sde = VESDE()
    with pytest.raises(ValueError):
        from_score_sde(net, sde, continuous=False)
    sigmas = torch.exp(torch.linspace(math.log(sde.sigma_min), math.log(sde.sigma_max), sde.N))
    model = hosm.ScoreModel(
        net,
        hosm.VESchedule(sigma_min=sde.sigma_min, sigma_max=sde.sigma_max),
        "score",
        time=lambda t: ((1 - t) * (sde.N - 1)).round().long(),
    )
    t = steps / (sde.N - 1)
    labels = sde.N - 1 - steps  # of the levels in falling order
    torch.testing.assert_close(model.schedule.sigma(t), sigmas.flip(0)[labels])
    torch.testing.assert_close(model.score(x0, t), net(x0, labels))
    assert torch.equal(net.seen, labels)
    # Networks trained so are not what from_score_sde would have made of them.
    assert not torch.allclose(from_score_sde(net, sde).score(x0, t), net(x0, labels))


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel])
@pytest.mark.parametrize("sde", [VPSDE(), VESDE()])
def test_score_sde_asks_the_configuration_that_a_network_keeps(sde, wrap):
    """The argument is easily forgotten, and nothing else tells such a network apart."""
    net = Net()
    net.config = SimpleNamespace(training=SimpleNamespace(continuous=False))
    with pytest.raises(ValueError):
        from_score_sde(wrap(net), sde)
    net.config.training.continuous = True
    assert from_score_sde(wrap(net), sde).prediction in ("epsilon", "score")


def test_a_network_under_sub_vp_is_given_999_t_whatever_the_flag():
    model, sde = from_score_sde(Net(), SubVPSDE(), continuous=False), SubVPSDE()
    assert (model.schedule, model.time) == (from_score_sde(Net(), sde).schedule, 999.0)
