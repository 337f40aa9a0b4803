"""Ways to a divergence: by the dimension, forward, a user's own; and gradients through it."""

import weakref

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations
from tests.cases import MLP, SCHEDULES, VP, gradients
from tests.likelihood.problems import gaussian

FEW = hosm.FixedGrid(8)


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("shape", "exact"), [((4, 4), True), ((17,), False)])
@pytest.mark.parametrize("solver", [FEW, hosm.Adaptive(1.0)])
def test_the_default_is_exact_up_to_sixteen_elements(shape, exact, solver):
    model, x = gaussian(VP), torch.randn(3, *shape)
    given = {"solver": solver}
    found = hosm.ode_nll(model, x, generator=seeded(), **given)
    divergence = "exact" if exact else hosm.Hutchinson()
    expected = hosm.ode_nll(model, x, generator=seeded(), divergence=divergence, **given)
    assert torch.equal(found.nll, expected.nll)
    assert (found.standard_error is not None) is (exact or solver is FEW)
    assert torch.equal(found.products, found.nfe * (16 if exact else 1))


@pytest.mark.parametrize("prediction", ["epsilon", "score", "x0", "v", "velocity"])
@pytest.mark.parametrize("solver", [FEW, hosm.Adaptive(1e-3)])
def test_a_divergence_of_the_users_own(prediction, solver):
    """Of a linear prediction a(t) x, where it is d a(t); t and x are what the network gets."""
    schedule = SCHEDULES["flow"]
    linear = gaussian(schedule, prediction=prediction).network

    def network(x, t, gain):
        return linear(x, t / 100, gain)

    def own(x, t, gain):
        return network(x, t, gain), 4 * network(torch.ones_like(x), t, gain)[:, 0]

    model = hosm.ScoreModel(network, schedule, prediction, time=100)
    x, gain = torch.randn(3, 4), torch.tensor([0.5, 1.0, 2.0])
    given = {"solver": solver, "model_kwargs": {"gain": gain}}
    found = hosm.ode_nll(model, x, divergence=own, **given)
    exact = hosm.ode_nll(model, x, divergence="exact", **given)
    for field in ("nll", "solver_error", "standard_error", "latent"):
        torch.testing.assert_close(getattr(found, field), getattr(exact, field))
    assert found.products.tolist() == [0] * 3
    with pytest.raises(TypeError, match=r"divergence\(x, t\)"):
        hosm.ode_nll(model, x, divergence=network, **given)
    with pytest.raises(ValueError, match=r"divergence\(x, t\)\[1\]"):
        hosm.ode_nll(model, x, divergence=lambda x, t, gain: (x, t[:, None]), **given)


class Remembers(nn.Module):
    """A network that counts its activations that are alive."""

    def __init__(self):
        super().__init__()
        self.inner, self.time, self.outer = nn.Linear(3, 8), nn.Linear(1, 8), nn.Linear(8, 3)
        self.seen = weakref.WeakSet()

    def forward(self, x, t):
        hidden, times = self.inner(x).tanh(), self.time(t[:, None]).tanh()
        self.seen.add(times.untyped_storage())  # on no way back to x
        return self.outer(hidden * times)


@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson(2), None])
@pytest.mark.parametrize("solver", [FEW, hosm.Adaptive(1e-2)])
def test_a_gradient_keeps_no_activations_and_is_the_same(divergence, solver, monkeypatch):
    """Also that of a sample, and a second gradient."""

    def found():
        torch.manual_seed(0)
        network, x = MLP(3), torch.randn(4, 3, requires_grad=True)
        call = hosm.ode_nll if divergence is not None else hosm.ode_sample
        options = {"solver": solver, "divergence": divergence, "generator": seeded()}
        result = call(hosm.ScoreModel(network, VP), x, enable_grad=True, **options)
        value = (result.nll if divergence is not None else result.x.square()).sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return [value, first, *gradients(first.square().sum(), [x, *network.parameters()])]

    checkpointed = found()
    monkeypatch.setattr(RecomputedEvaluations, "applies", lambda _: False)
    torch.testing.assert_close(checkpointed, found(), rtol=1e-12, atol=1e-14)


def test_memory_of_a_gradient_does_not_grow_with_the_evaluations():
    alive = []
    for steps in (4, 16):
        network, x = Remembers(), torch.randn(4, 3, requires_grad=True)
        result = hosm.ode_nll(
            hosm.ScoreModel(network, VP), x, solver=hosm.FixedGrid(steps), enable_grad=True
        )
        alive.append(len(network.seen))
        torch.autograd.grad(result.nll.sum(), x, retain_graph=True)
        alive.append(len(network.seen))
    assert alive == [0, alive[1], 0, alive[1]]
    assert alive[1] <= 1
