"""Networks and data in half precision: rounding is in the claims, and sums are in float32."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives import quadratic_forms
from hosm_losses.model import bind_model
from tests.cases import VP


class Fitted(nn.Module):
    """A velocity for two Gaussians: random features, fitted by least squares."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 192), nn.Linear(192, 2)
        nn.init.normal_(self.inner.weight, std=0.7)
        x0, noise, t = two_gaussians(20_000), torch.randn(20_000, 2), torch.rand(20_000, 1)
        with torch.no_grad():
            hidden = self.hidden((1 - t) * x0 + t * noise, t[:, 0])
            A = torch.cat([hidden, torch.ones_like(t)], 1)
            best = torch.linalg.solve(A.T @ A + 0.1 * torch.eye(193), A.T @ (noise - x0))
            self.outer.weight.copy_(best[:-1].T)
            self.outer.bias.copy_(best[-1])

    def hidden(self, x, t):
        t = t[:, None].to(self.inner.weight)
        waves = (3 * t).sin(), (6 * t).cos(), (12 * t).sin()
        return torch.tanh(self.inner(torch.cat([x.to(t), t, *waves], 1)))

    def forward(self, x, t):
        return self.outer(self.hidden(x, t))


def two_gaussians(count):
    centres = torch.tensor([[-1.0, -0.5], [1.0, 0.5]])
    return centres[torch.randint(2, (count,))] + 0.3 * torch.randn(count, 2)


@pytest.mark.parametrize("solver", [hosm.FixedGrid(), hosm.Adaptive(0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_claims_cover_the_rounding_of_a_network(dtype, solver):
    """The network answers in bfloat16, whatever the dtype of x; the truth has the same weights."""
    network, schedule = Fitted().bfloat16(), hosm.LinearFlowSchedule()
    x = two_gaussians(400).bfloat16()
    found = hosm.ode_nll(
        hosm.ScoreModel(network, schedule, "velocity"),
        x.to(dtype),
        divergence="exact",
        solver=solver,
    )
    model = hosm.ScoreModel(network.double(), schedule, "velocity")
    true = hosm.ode_nll(model, x.double(), divergence="exact").nll
    error = (found.nll.double() - true).abs()
    assert float((error > 2 * found.solver_error).double().mean()) <= 0.05
    assert float(found.solver_error.median()) < 10 * float(error.median())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_divergence_of_half_precision_is_summed_in_float32(dtype):
    """Its sum is 3072 times a number, which half precision rounds by a nat or more."""
    t = torch.full((1,), 0.5)
    bound = bind_model(hosm.ScoreModel(lambda x, t: 1.001 * x, VP), 1, t=t)
    x = torch.randn(1, 3072).to(dtype)
    _, forms = quadratic_forms(bound, x, [torch.ones_like(x)[None]])
    assert forms.dtype == torch.float32
    expected = 3072 * float(torch.tensor(1.001, dtype=dtype))
    assert forms.item() == pytest.approx(expected, rel=1e-6)
