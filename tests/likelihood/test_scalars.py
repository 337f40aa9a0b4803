"""Data of shape (B,), one number a sample, gives what data of shape (B, 1) does."""

import pytest
import torch

import hosm_losses as hosm
from hosm_losses._checks import expand_right

SCHEDULE = hosm.VPSchedule()


def network(x, t):
    alpha, sigma = (expand_right(part, x) for part in SCHEDULE(t))
    return sigma * x / (0.3 * alpha**2 + sigma**2) + 0.1 * x.sin()


MODEL = hosm.ScoreModel(network, SCHEDULE)
X = torch.tensor([0.3, -0.2, 1.1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"companion": True},
        {"divergence": "exact", "companion": True},
        {"method": "adaptive"},
        {"clean": True},
        {"enable_grad": True},
    ],
    ids=str,
)
def test_a_likelihood(options):
    one, other = (
        hosm.ode_nll(MODEL, x, generator=torch.Generator().manual_seed(0), **options)
        for x in (X, X[:, None])
    )
    torch.testing.assert_close(one.nll, other.nll)
    torch.testing.assert_close(one.solver_error, other.solver_error)
    assert one.latent.shape == (3,)


def test_samples_of_a_shape():
    one, other = (
        hosm.ode_sample(MODEL, shape, generator=torch.Generator().manual_seed(0))
        for shape in ((4,), (4, 1))
    )
    torch.testing.assert_close(one.x, other.x[:, 0])
    torch.testing.assert_close(one.nll, other.nll)
