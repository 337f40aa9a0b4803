"""Ways to a divergence: by the dimension, forward, a user's own; and gradients through it."""

import weakref

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations
from tests.cases import MLP, VP, gradients
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


class ForwardMode:
    """An estimator from outside the package: Gaussian probes by Jacobian-vector products."""

    products, is_random = 3, True

    def draw(self, x, generator):
        return torch.randn((3, *x.shape), generator=generator, dtype=x.dtype)

    def estimate(self, model, x, probes):
        f = model.f(x)
        products = torch.stack([torch.func.jvp(model.f, (x,), (v,))[1] for v in probes])
        return f, (probes * products).flatten(2).sum(2)


@pytest.mark.parametrize("solver", [FEW, hosm.FixedGrid(8, companion=True), hosm.Adaptive(1e-2)])
def test_an_estimator_of_the_users_own(solver):
    """It sees what `Hutchinson` sees, and its result is the same."""
    model, x = hosm.ScoreModel(MLP(2), VP, "v"), torch.randn(3, 2)
    own, ours = (
        hosm.ode_nll(model, x, divergence=each, solver=solver, generator=seeded())
        for each in (ForwardMode(), hosm.Hutchinson(3, "gaussian"))
    )
    for field in ("nll", "latent", "solver_error", "standard_error", "products"):
        torch.testing.assert_close(getattr(own, field), getattr(ours, field))
    own = hosm.ODEDistribution(model, (2,), divergence=ForwardMode(), solver=FEW)
    assert own.log_prob(x).shape == (3,)


def test_the_shape_of_an_estimate_is_checked():
    class Flat(ForwardMode):
        def estimate(self, model, x, probes):
            return model.f(x), torch.zeros(len(x))

    class Nothing(ForwardMode):
        def estimate(self, model, x, probes):
            return model.f(x), None

    for estimator in (Flat(), Nothing()):
        with pytest.raises(ValueError, match=r"expected n estimates \(n, 3\) for 3 samples"):
            hosm.ode_nll(gaussian(VP), torch.randn(3, 2), divergence=estimator)
    with pytest.raises(ValueError, match=r"divergence\(x, t\)\[1\]"):
        hosm.ode_nll(gaussian(VP), torch.randn(3, 2), divergence=lambda x, t: (x, x))
    with pytest.raises(TypeError, match="divergence: expected 'auto'"):
        hosm.ode_nll(gaussian(VP), torch.randn(3, 2), divergence=ForwardMode)


def test_a_function_that_draws_says_so():
    """Its noise is a standard error, which is that of one probe, and no error of the solver."""
    model, x = hosm.ScoreModel(MLP(3), VP), torch.randn(64, 3)

    def drawing(x, t):
        v = torch.randn_like(x)
        value, product = torch.func.jvp(lambda points: model.network(points, t), (x,), (v,))
        return value, (v * product).sum(1)

    own = hosm.DivergenceFunction(drawing, is_random=True)
    found = hosm.ode_nll(model, x, divergence=own, solver=hosm.FixedGrid(32))
    probes = hosm.Hutchinson(1, "gaussian")
    expected = hosm.ode_nll(model, x, divergence=probes, solver=hosm.FixedGrid(32))
    torch.testing.assert_close(found.solver_error, expected.solver_error, rtol=0, atol=2e-3)
    ratio = found.standard_error.square().mean() / expected.standard_error.square().mean()
    assert 0.5 < float(ratio.sqrt()) < 2
    with pytest.warns(UserWarning, match=r"DivergenceFunction\(function, is_random=True\)"):
        hosm.ode_nll(model, x, divergence=drawing, solver=FEW)
    with pytest.raises(ValueError, match=r"expected FixedGrid\(steps\) with a divergence that"):
        hosm.ode_nll(model, x, divergence=own, solver=hosm.Adaptive(1e-2))
