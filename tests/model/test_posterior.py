"""The denoising posterior against closed forms: mean and covariance of x₀ given x_t."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import PREDICTIONS, SCHEDULES, VP, CountFlops, OfX, networks
from tests.oracles import (
    PREDICTIONS_OF_ORACLE,
    GaussianMixture,
    anisotropic,
    mixture_noise,
)

MIXTURE = anisotropic(3, count=2)


def oracle(schedule, prediction, mixture=MIXTURE):
    """A model of the exact score, by any prediction."""

    def network(x, t):
        alpha, sigma = (each[:, None] for each in schedule(t))
        rates = [each[:, None] for each in schedule.rates(t)]
        noise = mixture_noise(mixture, schedule)(x, t)
        return PREDICTIONS_OF_ORACLE[prediction](noise, x, alpha, sigma, rates)

    return hosm.ScoreModel(network, schedule, prediction)


def exact_posterior(mixture, x, alpha, sigma):
    """Mean and covariance of x₀, from those of each component by conditioning."""
    d = mixture.means.shape[1]
    eye = torch.eye(d)
    means, covariances = [], []
    for row in range(len(x)):
        a, s = alpha[row], sigma[row]
        gain = a * mixture.covariances @ torch.linalg.inv(a**2 * mixture.covariances + s**2 * eye)
        centres = mixture.means + torch.einsum("kij,kj->ki", gain, x[row] - a * mixture.means)
        within = mixture.covariances - a * gain @ mixture.covariances
        w = mixture._parts(x[row : row + 1], alpha[row : row + 1], sigma[row : row + 1])[2]
        w = w.softmax(1)[0]
        mean = w @ centres
        apart = centres - mean
        covariance = torch.einsum("k,kij->ij", w, within)
        covariance = covariance + torch.einsum("k,ki,kj->ij", w, apart, apart)
        means.append(mean)
        covariances.append(covariance)
    return torch.stack(means), torch.stack(covariances)


def points(schedule, d=3):
    low, high = schedule.log_sigma_hat_range
    u = torch.linspace(max(low, -2.0), min(high, 1.0), 4)
    t = schedule.time(u)
    alpha, sigma = schedule(t)
    return alpha[:, None] * torch.randn(4, d) + sigma[:, None] * torch.randn(4, d), t


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_posterior_of_a_mixture_is_exact(prediction, schedule):
    x, t = points(schedule)
    model = oracle(schedule, prediction)
    posterior = hosm.denoising_posterior(model, x, t)
    mean, covariance = exact_posterior(MIXTURE, x, *schedule(t))
    found = posterior.covariance
    torch.testing.assert_close(posterior.mean, mean)
    torch.testing.assert_close(model.denoise(x, t), mean)
    torch.testing.assert_close(found.dense(), covariance)
    torch.testing.assert_close(found.diagonal(), covariance.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(found.trace(), covariance.diagonal(dim1=1, dim2=2).sum(1))
    v = torch.randn(5, *x.shape)
    products = torch.einsum("bij,kbj->kbi", covariance, v)
    torch.testing.assert_close(found @ v, products)
    torch.testing.assert_close(found @ v[0], products[0])


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_a_network_that_is_no_gradient_has_the_covariance_of_its_jacobian(prediction):
    network, shape = networks()["mlp"]
    x, t = torch.randn(2, *shape), torch.tensor([0.2, 0.7])
    model = hosm.ScoreModel(network, VP, prediction)
    covariance = hosm.denoising_posterior(model, x, t).covariance
    alpha, sigma = VP(t)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda p, t: model.denoise(p[None], t[None])[0]))(
        x, t
    ).reshape(2, x[0].numel(), -1)
    whole = (sigma.square() / alpha)[:, None, None] * jacobian
    symmetric = (whole + whole.mT) / 2
    assert (whole - whole.mT).abs().max() > 1e-3 * whole.abs().max()
    v = torch.randn(3, *x.shape)
    flat = v.reshape(3, 2, -1)
    for matrix, kind in ((symmetric, True), (whole.mT, False)):
        expected = torch.einsum("bij,kbj->kbi", matrix, flat).reshape(v.shape)
        torch.testing.assert_close(covariance.product(v, symmetric=kind), expected)
    torch.testing.assert_close(covariance.dense(), symmetric)
    torch.testing.assert_close(covariance.trace(), whole.diagonal(dim1=1, dim2=2).sum(1))


def test_random_probes_have_the_mean_of_the_exact_numbers():
    x, t = points(VP)
    covariance = hosm.denoising_posterior(oracle(VP, "epsilon"), x, t).covariance
    probes, generator = hosm.Hutchinson(2000), torch.Generator().manual_seed(0)
    dense = covariance.dense()
    off = dense - torch.diag_embed(dense.diagonal(dim1=1, dim2=2))
    bound = 5 * off.square().sum(2).sqrt() / 2000**0.5
    error = covariance.diagonal(probes, generator) - covariance.diagonal()
    assert bool((error.abs() <= bound).all())
    bound = 5 * (2 * off.square().sum((1, 2))).sqrt() / 2000**0.5
    assert bool(((covariance.trace(probes, generator) - covariance.trace()).abs() <= bound).all())
    again = [covariance.trace(hosm.Hutchinson(2), torch.Generator().manual_seed(1)) for _ in "ab"]
    assert torch.equal(*again)


@pytest.mark.parametrize(("count", "one_side"), [(1, 2), (4, 5), (16, 17)])
def test_products_share_one_forward_pass(count, one_side):
    """In FLOPs of the network: one, and K passes back; for the symmetric part 1 + K more."""
    layers = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
    network = OfX(nn.Sequential(layers, nn.Linear(32, 8)))
    x, t, calls = torch.randn(2, 8), torch.tensor([0.2, 0.7]), []
    network.register_forward_hook(lambda *_: calls.append(1))
    covariance = hosm.denoising_posterior(hosm.ScoreModel(network, VP), x, t).covariance
    v, once = torch.randn(count, 2, 8), 2 * 2 * (8 * 32 + 32 * 32 + 32 * 8)
    calls.clear()
    for product, passes, expected in (
        (lambda: covariance.product(v, symmetric=False), one_side, 1),
        (lambda: covariance @ v, 2 * one_side, 2),
        (lambda: covariance.dense(), 1 + 8, 1),
        (lambda: covariance.diagonal(hosm.Hutchinson(count)), one_side, 1),
    ):
        with CountFlops() as flops:
            product()
        assert flops.total == passes * once
        assert len(calls) == expected
        calls.clear()


def test_the_matrix_is_that_of_its_chunks(monkeypatch):
    monkeypatch.setattr("hosm_losses.probes.CHUNK_ELEMENTS", 12)
    network, shape = networks()["mlp"]
    x, t = torch.randn(2, *shape), torch.tensor([0.2, 0.7])
    covariance = hosm.denoising_posterior(hosm.ScoreModel(network, VP), x, t).covariance
    units = torch.eye(x[0].numel()).reshape(-1, 1, *shape).expand(-1, *x.shape)
    columns = (covariance @ units).flatten(2).movedim(0, 2)
    torch.testing.assert_close(covariance.dense(), columns)


def test_a_denoiser_keeps_its_digits_at_large_noise():
    """σ̂ = 999 in float32: the Jacobian of x̂₀ is the covariance over σ², a difference is not."""
    schedule = hosm.EDMSchedule(t_max=1000.0)
    gaussian = GaussianMixture([[0.3, -0.2]], [[[0.5, 0.2], [0.2, 0.4]]], [1.0])
    exact, t = torch.tensor([[[0.5, 0.2], [0.2, 0.4]]]), torch.tensor([999.0]).float()
    gain = (exact[0] @ torch.linalg.inv(exact[0] + 999.0**2 * torch.eye(2))).float()
    mean = gaussian.means[0].float()
    errors = {}
    for prediction in ("x0", "epsilon"):

        def network(x, t, prediction=prediction):
            denoised = mean + (x - mean) @ gain.T
            return denoised if prediction == "x0" else (x - denoised) / t[:, None]

        model = hosm.ScoreModel(network, schedule, prediction)
        found = hosm.denoising_posterior(model, torch.randn(1, 2).float() * 999, t)
        errors[prediction] = float((found.covariance.dense() - exact).abs().max())
    assert errors["x0"] < 1e-5 < 1e-3 < errors["epsilon"]


def test_conditions_go_with_their_samples_and_nothing_has_a_graph():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t, scale, table):
            assert table.shape == (2,)
            return self.factor * scale[:, None] * x + table.sum()

    model = hosm.ScoreModel(Scaled(), VP, "x0")
    x, t, scale = torch.randn(2, 3, requires_grad=True), torch.tensor([0.3, 0.6]), torch.rand(2)
    kwargs = {"scale": scale, "table": hosm.Shared(torch.ones(2))}
    posterior = hosm.denoising_posterior(model, x, t, model_kwargs=kwargs)
    alpha, sigma = VP(t)
    expected = (0.5 * scale * sigma.square() / alpha)[:, None].expand(2, 3)
    for found in (
        posterior.covariance.diagonal(),
        posterior.covariance @ torch.ones(2, 3),
        (posterior.covariance @ torch.ones(4, 2, 3))[3],
    ):
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
    assert not posterior.mean.requires_grad
    noise = hosm.denoising_posterior(hosm.ScoreModel(Scaled(), VP), x, t, model_kwargs=kwargs)
    assert not (noise.covariance @ torch.ones(2, 3, requires_grad=True)).requires_grad
    with torch.inference_mode():
        inside = hosm.denoising_posterior(
            model, x.detach().clone(), t, model_kwargs=kwargs
        ).covariance
        torch.testing.assert_close(inside @ torch.ones(2, 3), expected)
        torch.testing.assert_close(inside.diagonal(), expected)
        torch.testing.assert_close(inside.dense(), torch.diag_embed(expected))


def test_what_it_cannot_take_is_an_error():
    model = hosm.ScoreModel(lambda x, t: x, VP)
    x, t = torch.randn(2, 3), torch.full((2,), 0.5)
    covariance = hosm.denoising_posterior(model, x, t).covariance
    with pytest.raises(ValueError, match=r"v: .*\(2, 3\)"):
        covariance @ torch.ones(3, 3)
    with pytest.raises(TypeError, match="bare network"):
        hosm.denoising_posterior(hosm.ScoreModel(nn.DataParallel(nn.Identity()), VP), x, t)
