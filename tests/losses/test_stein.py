"""stein_dsm: its mean gradient, over finite data and all pairs of sign vectors."""

import itertools

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import assert_same, gradients
from tests.oracles import MLP, atoms_posterior, randomise, sign_vectors

D, WEIGHT = 2, 0.7
ATOMS = torch.tensor([[0.3, -1.0], [1.1, 0.4], [-0.8, 0.2]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SCHEDULES = {
    "vp": hosm.VPSchedule(),
    "ve": hosm.VESchedule(sigma_max=5.0),
    "edm": hosm.EDMSchedule(),
    "flow": hosm.LinearFlowSchedule(),
    "cosine": hosm.CosineSchedule(),
}
CASES = [
    ("vp", "epsilon"),
    ("ve", "score"),
    ("edm", "sample"),
    ("cosine", "v_prediction"),
    ("flow", "flow_prediction"),
    ("flow", "epsilon"),
]


class Perturbed(nn.Module):
    """The exact prediction for the atoms, plus `size` times what a small network adds."""

    def __init__(self, schedule, prediction, size):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.size = nn.Parameter(torch.tensor(float(size)))
        self.network = MLP(D)
        randomise(self.network)

    def forward(self, x, t):
        alpha, sigma = (part[:, None] for part in self.schedule(t))
        noise = (x[:, None] - alpha[:, None] * ATOMS) / sigma[:, None]
        p = (SHARES.log() - 0.5 * noise.square().sum(-1)).softmax(1)
        eps = (p[..., None] * noise).sum(1) + self.size * self.network(x, t)
        data = (x - sigma * eps) / alpha
        if self.prediction == "flow_prediction":
            return eps - data
        return {
            "epsilon": eps,
            "score": -eps / sigma,
            "sample": data,
            "v_prediction": alpha * eps - sigma * data,
        }[self.prediction]


def posterior_rows(schedule, t, x):
    """Every atom and every pair of sign vectors as a row, with the row's probability given x."""
    alpha, sigma = (float(part) for part in schedule(torch.tensor(t)))
    noise, p = atoms_posterior(ATOMS, SHARES, x[None], alpha, sigma)
    signs = sign_vectors(D)
    pairs = list(itertools.product(range(len(signs)), repeat=2))
    count = len(pairs)
    given = {
        "x0": ATOMS.repeat_interleave(count, 0),
        "noise": noise[0].repeat_interleave(count, 0),
        "t": torch.full((len(ATOMS) * count,), t),
        "probe": torch.stack([signs[list(each)] for each in pairs], 1).repeat(1, len(ATOMS), 1),
    }
    return given, p[0].repeat_interleave(count) / count


def nats(schedule, t):
    """The factor of a given t, which counts as uniform: (t_max − t_min) du/dt."""
    at = torch.tensor(t)
    rate = torch.func.grad(lambda t: schedule.log_sigma_hat(t[None])[0])(at)
    return (schedule.t_max - schedule.t_min) * rate


def gradient_given(x, name, prediction, size):
    """The network, and the mean of the loss over what may have led to x."""
    schedule = SCHEDULES[name]
    t = 0.4 * schedule.t_min + 0.6 * schedule.t_max if schedule.t_max <= 1 else 0.7
    network = Perturbed(schedule, prediction, size)
    model = hosm.ScoreModel(network, schedule, prediction=prediction)
    given, p = posterior_rows(schedule, t, x)
    return model, t, hosm.stein_dsm(model, **given, weight=WEIGHT, reduction="none") @ p


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_the_true_score_is_stationary(name, prediction):
    """The mean gradient given x is zero where the field is right, whatever may be added to it."""
    model, t, loss = gradient_given(torch.tensor([0.4, -0.2]), name, prediction, 0.0)
    (gradient,) = torch.autograd.grad(loss, model.network.size)
    assert abs(float(gradient)) < 1e-10 * float(nats(model.schedule, t))


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_the_mean_gradient_is_that_of_the_objective(name, prediction):
    """‖δf‖² + weight · a² with f in the place of f* in the gradient, and its value."""
    x = torch.tensor([0.4, -0.2])
    model, t, loss = gradient_given(x, name, prediction, 0.3)
    alpha, sigma = (float(part) for part in model.schedule(torch.tensor(t)))
    noise, q = atoms_posterior(ATOMS, SHARES, x[None], alpha, sigma)
    noise, q = noise[0], q[0]
    mean = q @ noise
    covariance = torch.einsum("k,ki,kj->ij", q, noise - mean, noise - mean)

    def field(point):
        return -model(point[None], torch.tensor([t]))[0]

    f, trace = field(x), sigma * torch.func.jacrev(field)(x).trace()
    wrong = (trace - (covariance.trace() - D)).detach() + (f - -mean).detach() @ -mean
    moved = trace + f.detach() @ f
    factor = nats(model.schedule, t)
    objective = factor * ((f + mean).square().sum() + WEIGHT * 2 * wrong * moved)
    assert_same(gradients(loss, model), gradients(objective, model), least=float(factor))
    # Both factors of a row have one ε, so the variance of ε·(ε + f) is in the mean of the product.
    spread = q @ ((noise * (noise + f)).sum(1) - q @ (noise * (noise + f)).sum(1)).square()
    value = (f + mean).square().sum() + covariance.trace() + WEIGHT * (wrong**2 + spread)
    torch.testing.assert_close(loss, factor * value)


def setting():
    network = MLP(D)
    randomise(network)
    x0, noise, probe = torch.randn(6, D), torch.randn(6, D), torch.randn(2, 6, D)
    given = {"x0": x0, "t": torch.linspace(0.1, 0.9, 6), "noise": noise, "probe": probe}
    return hosm.ScoreModel(network, hosm.VPSchedule()), given


def test_the_first_part_is_the_likelihood_weighted_loss():
    model, given = setting()
    without = hosm.stein_dsm(model, **given, weight=0)
    del given["probe"]
    torch.testing.assert_close(
        without, hosm.first_order_dsm(model, **given, weighting="likelihood")
    )
    _, terms = hosm.SteinDSM(model, weight=0, fraction=0.5)(**given, return_terms=True)
    assert terms.rate is None
    assert terms.first.shape == (6,)


def test_its_own_times_are_uniform_in_log_sigma_hat():
    model, given = setting()
    loss = hosm.SteinDSM(model, weight=0.5)
    value, terms = loss(given["x0"], generator=torch.Generator().manual_seed(0), return_terms=True)
    low, high = model.schedule.log_sigma_hat(
        torch.tensor([model.schedule.t_min, model.schedule.t_max])
    )
    torch.testing.assert_close(value, (high - low) * (terms.first + 0.5 * terms.rate).mean())
    unit = torch.rand(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.schedule.log_sigma_hat(terms.t), low + (high - low) * unit)
