"""What a prior of the user's own is given, and what it may return."""

import math

import pytest
import torch

import hosm_losses as hosm

SCHEDULE = hosm.VPSchedule()


def poisoned(x, t):
    return torch.where(x[:, :1] > 50, float("nan"), x)


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
@pytest.mark.parametrize("companion", [False, True])
def test_it_is_not_shown_what_is_not_finite(method, companion):
    if companion and method == "adaptive":
        return
    x = torch.tensor([[0.1, 0.2], [1000.0, 0.0], [-0.3, 0.4]])
    law = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))  # which checks
    options = {"method": method, "divergence": "exact", "companion": companion, "steps": 16}
    model = hosm.ScoreModel(poisoned, SCHEDULE)
    result = hosm.ode_nll(model, x, log_prior=law.log_prob, **options)
    assert result.failed.tolist() == result.nll.isnan().tolist() == [False, True, False]
    expected = hosm.ode_nll(model, x, **options)
    torch.testing.assert_close(result.nll, expected.nll, equal_nan=True)
    torch.testing.assert_close(result.solver_error, expected.solver_error, equal_nan=True)


def gaussian(x, t):
    """The exact noise of N(0, ¼), computed in float64."""
    alpha, sigma = (part[:, None].double() for part in SCHEDULE(t))
    return (sigma * x / (0.25 * alpha**2 + sigma**2)).to(x.dtype)


def shrinking(x, t):
    return 0.5 * x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [hosm.ode_nll, hosm.variational_nll])
def test_that_of_a_short_type_is_computed_in_float32(dtype, function):
    """The prior by default, written out, for 3072 elements: bfloat16 has 8 bits."""
    seen = []

    def log_prior(latent):
        seen.append(latent.dtype)
        return torch.distributions.Normal(0.0, 1.0).log_prob(latent).sum(1)

    x = (0.5 * torch.randn(3, 3072, generator=torch.Generator().manual_seed(0))).to(dtype)
    model = hosm.ScoreModel(gaussian, SCHEDULE)
    options = {"samples": 4} if function is hosm.variational_nll else {"steps": 8}
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    result = function(model, x, log_prior=log_prior, generator=generators[0], **options)
    assert set(seen) == {torch.float32}
    if function is hosm.ode_nll:
        expected = function(model, x, generator=generators[1], **options)
        torch.testing.assert_close(result.nll, expected.nll, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("network", "result"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.float64),
    ],
)
def test_any_type_as_wide_as_the_networks_is_taken(network, result):
    model = hosm.ScoreModel(shrinking, SCHEDULE)
    x = torch.ones(2, 3, dtype=network)
    found = hosm.ode_nll(
        model, x, steps=8, log_prior=lambda latent: torch.full((2,), -4.0, dtype=result)
    )
    assert found.nll.dtype == torch.float64
    assert found.nll.isfinite().all()


@pytest.mark.parametrize(
    ("network", "result"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.int64),
    ],
)
def test_a_shorter_one_is_refused(network, result):
    model = hosm.ScoreModel(shrinking, SCHEDULE)
    x = torch.ones(2, 3, dtype=network)
    with pytest.raises(TypeError):
        hosm.ode_nll(model, x, steps=8, log_prior=lambda latent: torch.zeros(2, dtype=result))


def test_gradients_pass_by_a_latent_that_is_not_finite():
    """Of the default, which squares the latent: 0 · NaN would go back along the path."""
    model = hosm.ScoreModel(poisoned, SCHEDULE)
    x = torch.tensor([[0.1, 0.2], [1000.0, 0.0]], requires_grad=True)
    result = hosm.ode_nll(model, x, steps=8, divergence="exact", enable_grad=True)
    assert result.failed.tolist() == [False, True]
    (slope,) = torch.autograd.grad(result.nll[0], x)
    assert slope.isfinite().all()
    assert math.isclose(float(slope[1].abs().sum()), 0.0)
