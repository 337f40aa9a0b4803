"""What a prior is given and may return, what counts as failed, and instance norms."""

import math

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.likelihood.result import mark_failed
from tests.cases import VP
from tests.likelihood.problems import gaussian, total
from tests.likelihood.test_result import full

FEW = hosm.FixedGrid(8)


def poisoned(x, t):
    return torch.where(x[:, :1] > 50, float("nan"), x)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": hosm.Adaptive()},
        {"solver": hosm.FixedGrid(16, companion=True)},
        {"enable_grad": True},
    ],
    ids=str,
)
def test_a_prior_is_not_shown_what_is_not_finite(options):
    """Nor does a gradient go back from there: 0 · NaN would, through the square of a latent."""
    x = torch.tensor([[0.1, 0.2], [1000.0, 0.0], [-0.3, 0.4]], requires_grad=True)
    law = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))  # which checks
    model = hosm.ScoreModel(poisoned, VP)
    options = {"divergence": "exact", "solver": hosm.FixedGrid(16), **options}
    own, default = (hosm.ode_nll(model, x, log_prior=p, **options) for p in (law.log_prob, None))
    assert own.failed.tolist() == own.nll.isnan().tolist() == [False, True, False]
    for name in ("nll", "solver_error"):
        mine, theirs = getattr(own, name), getattr(default, name)
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    for each in (own, default) if "enable_grad" in options else ():
        (slope,) = torch.autograd.grad(each.nll[0], x)
        assert slope.isfinite().all()
        assert slope.any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_prior_of_a_short_type_is_computed_in_float32(dtype):
    """That by default, written out, for 3072 elements: bfloat16 has 8 bits."""
    seen = []

    def log_prior(latent):
        seen.append(latent.dtype)
        return total(torch.distributions.Normal(0.0, 1.0).log_prob(latent))

    model, x = gaussian(VP), (0.5 * torch.randn(3, 3072)).to(dtype)
    found, expected = (
        hosm.ode_nll(model, x, solver=FEW, generator=torch.Generator(), log_prior=each).nll
        for each in (log_prior, None)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    hosm.variational_nll(model, x, samples=4, log_prior=log_prior)
    assert set(seen) == {torch.float32}


def test_a_prior_may_return_any_type_as_wide_as_the_networks():
    for network in (torch.bfloat16, torch.float32):
        for kind in (network, torch.float64):
            prior, x = torch.full((2,), -4.0, dtype=kind), torch.ones(2, 3, dtype=network)
            found = hosm.ode_nll(gaussian(VP), x, log_prior=lambda _, p=prior: p, solver=FEW)
            assert found.nll.dtype == torch.float64


@pytest.mark.parametrize(
    ("nll", "error", "dtype", "failed"),
    [
        (1.0, 999.0, torch.float32, False),
        (1.0, 1001.0, torch.float32, True),
        (1.0, math.nan, torch.float32, True),
        (math.nan, 0.0, torch.float32, True),
        (math.inf, 0.0, torch.float64, True),
        (1e38, 0.0, torch.float32, False),
        (-1e39, 0.0, torch.bfloat16, True),
        (1e39, 0.0, torch.float64, False),
        (1e5, 0.0, torch.float16, False),
    ],
)
def test_what_failed_has_nan(nll, error, dtype, failed):
    parts = {
        "nll": torch.tensor([nll, 2.0, 3.0]),
        "solver_error": torch.tensor([error, 0.0, 0.0]),
        "latent": torch.zeros(3, 4, dtype=dtype),
        "failed": torch.tensor([False, False, True]),  # as the solver saw
    }
    marked = mark_failed(full(**parts))
    assert marked.failed.tolist() == marked.nll.isnan().tolist() == [failed, False, True]
    # Of many elements the solver may be off by a tenth of a nat each.
    wide = {"n": 2, "d": 20_000, "solver_error": torch.tensor([1999.0, 2001.0])}
    assert mark_failed(full(**wide)).failed.tolist() == [False, True]


def test_one_sample_in_channels_last_has_the_right_gradient_of_an_instance_norm():
    """PyTorch's own is off by more than its size there, at first order already."""
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 1)
    network = nn.Sequential(*layers).double()
    model = hosm.ScoreModel(network, VP, call=lambda network, x, t: network(x))
    x, found = torch.randn(1, 2, 4, 3), []
    for layout in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=layout)
        generator = torch.Generator().manual_seed(1)
        found.append(hosm.ode_nll(model, x, solver=FEW, generator=generator).nll)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)
