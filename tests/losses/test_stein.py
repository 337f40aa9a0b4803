"""stein_dsm: its mean gradient, over finite data and all pairs of sign vectors."""

import itertools

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import MLP, SCHEDULES, VP, assert_same, gradients, randomise
from tests.oracles import PREDICTIONS_OF_ORACLE, atoms_posterior, sign_vectors

D, WEIGHT = 2, 0.7
ATOMS = torch.tensor([[0.3, -1.0], [1.1, 0.4], [-0.8, 0.2]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
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
        self.size, self.network = nn.Parameter(torch.tensor(size)), MLP(D)
        randomise(self.network)

    def forward(self, x, t):
        alpha, sigma = (part[:, None] for part in self.schedule(t))
        noise = (x[:, None] - alpha[:, None] * ATOMS) / sigma[:, None]
        p = (SHARES.log() - 0.5 * noise.square().sum(-1)).softmax(1)
        eps = (p[..., None] * noise).sum(1) + self.size * self.network(x, t)
        rates = [part[:, None] for part in self.schedule.rates(t)]
        return PREDICTIONS_OF_ORACLE[self.prediction](eps, x, alpha, sigma, rates)


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


@pytest.mark.parametrize("size", [0.0, 0.3])
@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_the_mean_gradient_is_that_of_the_objective(name, prediction, size):
    """‖δf‖² + weight · a² with f in the place of f* in the gradient, and its value.

    At the true score it is zero, whatever is added to it.
    """
    x, schedule = torch.tensor([0.4, -0.2]), SCHEDULES[name]
    t = 0.4 * schedule.t_min + 0.6 * schedule.t_max if schedule.t_max <= 1 else 0.7
    model = hosm.ScoreModel(Perturbed(schedule, prediction, size), schedule, prediction)
    given, p = posterior_rows(schedule, t, x)
    loss = hosm.stein_dsm(model, **given, weight=WEIGHT, reduction="none") @ p
    alpha, sigma = (float(part) for part in schedule(torch.tensor(t)))
    noise, q = atoms_posterior(ATOMS, SHARES, x[None], alpha, sigma)
    noise, q = noise[0], q[0]
    mean = q @ noise
    covariance = torch.einsum("k,ki,kj->ij", q, noise - mean, noise - mean)

    def field(point):
        return -model(point[None], torch.tensor([t]))[0]

    f, trace = field(x), sigma * torch.func.jacrev(field)(x).trace()
    wrong = (trace - (covariance.trace() - D)).detach() + (f - -mean).detach() @ -mean
    moved = trace + f.detach() @ f
    factor = nats(schedule, t)
    objective = factor * ((f + mean).square().sum() + WEIGHT * 2 * wrong * moved)
    expected = gradients(objective, model)
    assert_same(gradients(loss, model), expected, least=float(factor))
    assert size or max(float(each.abs().max()) for each in expected) < 1e-10 * float(factor)
    # Both factors of a row have one ε, so the variance of ε·(ε + f) is in the mean of the product.
    spread = q @ ((noise * (noise + f)).sum(1) - q @ (noise * (noise + f)).sum(1)).square()
    value = (f + mean).square().sum() + covariance.trace() + WEIGHT * (wrong**2 + spread)
    torch.testing.assert_close(loss, factor * value)


def test_its_own_times_are_uniform_in_log_sigma_hat():
    loss, x0 = hosm.SteinDSM(hosm.ScoreModel(MLP(D), VP), weight=0.5), torch.randn(6, D)
    value, terms = loss(x0, generator=torch.Generator().manual_seed(0), return_terms=True)
    low, high = VP.log_sigma_hat_range
    torch.testing.assert_close(value, (high - low) * (terms.first + 0.5 * terms.rate).mean())
    unit = torch.rand(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(VP.log_sigma_hat(terms.t), low + (high - low) * unit)
