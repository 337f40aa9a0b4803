"""The reference itself: against closed forms, a difference in the parameters, and its own step."""

import pytest
import torch

import hosm_losses as hosm
from tests.integration.measure import gradient, reference_of
from tests.integration.networks import NETWORKS
from tests.integration.reference import STEP, first_difference, reference, relative_error
from tests.oracles import dense_derivatives, dense_terms, networks

SIGMA = torch.tensor([0.6, 0.9], dtype=torch.float64)


def small(name):
    """A network of which PyTorch's derivatives are right at every order, and a batch."""
    network, shape = networks()[name]
    network.by_hand = True
    torch.manual_seed(3)
    x, noise, probe = torch.randn(3, 2, *shape)
    return network, x, noise, probe


def field(network):
    return lambda x: -network(x, torch.tensor([0.3, 0.6])[: len(x)])


def dense(network, x, noise, probe, frozen=None):
    """Terms per sample from whole Jacobians, and what is held fixed in them."""
    rows, held = [], []
    for i in range(len(x)):

        def one(point, i=i):
            return -network(point[None], torch.tensor([0.3, 0.6])[i : i + 1])[0]

        f, jacobian, second = dense_derivatives(one, x[i])
        held.append(((f + noise[i].flatten()).detach(), jacobian.detach()))
        fixed = held[i] if frozen is None else frozen[i]
        terms = dense_terms(
            f, jacobian, second, SIGMA[i], noise[i], probe[i : i + 1], frozen=fixed
        )
        rows.append(torch.stack(terms))
    return torch.stack(rows, 1), held


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_terms_and_gradients_are_those_of_whole_jacobians(name):
    network, x, noise, probe = small(name)
    found = reference(field(network), list(network.parameters()), x, noise, probe, SIGMA)
    terms, _ = dense(network, x, noise, probe)
    assert relative_error(found.terms, terms.detach()) < 1e-10
    for row, got in zip(terms, found.gradients, strict=True):
        exact = torch.autograd.grad(row.mean(), list(network.parameters()), retain_graph=True)
        assert relative_error(got, torch.cat([part.flatten() for part in exact])) < 1e-8


def test_gradients_are_slopes_of_a_loss_whose_fixed_parts_are_fixed():
    """In the parameters, along a random direction; and not those of the loss's own value."""
    network, x, noise, probe = small("conv")
    found = reference(field(network), list(network.parameters()), x, noise, probe, SIGMA)
    _, frozen = dense(network, x, noise, probe)
    start = [parameter.detach().clone() for parameter in network.parameters()]
    way = [torch.randn_like(parameter) for parameter in start]

    def moved(step, held):
        with torch.no_grad():
            for parameter, origin, along in zip(network.parameters(), start, way, strict=True):
                parameter.copy_(origin + step * along)
        return dense(network, x, noise, probe, held)[0].detach().mean(1)

    slopes = found.gradients @ torch.cat([along.flatten() for along in way])
    held = first_difference(lambda step: moved(step, frozen), STEP)
    let_through = first_difference(lambda step: moved(step, None), STEP)
    torch.testing.assert_close(slopes, held, rtol=1e-7, atol=0)
    assert ((slopes - let_through).abs() > 1e-2 * slopes.abs())[1:].all()


def test_a_silently_wrong_gradient_is_seen():
    """Layer norm without its primitive."""
    network, x, noise, probe = small("attention")
    network.by_hand = False
    t = torch.tensor([0.3, 0.6])
    model = hosm.ScoreModel(network, hosm.VPSchedule(), primitives=False)
    alpha, sigma = (part.reshape(-1, 1, 1) for part in model.schedule(t))
    found = reference(
        lambda x: -model.noise(x, t),
        list(network.parameters()),
        alpha * x + sigma * noise,
        noise,
        probe,
        sigma.flatten(),
    )
    given = {"x0": x, "t": t, "noise": noise, "probe": probe}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wrong = gradient(model, given, 3, "reverse", found.weights)
    assert relative_error(wrong, found.gradient(3, found.weights)) > 1e-2
    model.primitives = True
    right = gradient(model, given, 3, "reverse", found.weights)
    assert relative_error(right, found.gradient(3, found.weights)) < 1e-7


@pytest.mark.parametrize("name", [name for name in NETWORKS if not NETWORKS[name].plain])
def test_another_step_finds_the_same(name, need):
    need(NETWORKS[name].module)
    half, whole = reference_of(name), reference_of(name, 2 * STEP)
    assert relative_error(half.terms, whole.terms) < 1e-9
    for finer, coarser in zip(half.gradients, whole.gradients, strict=True):
        assert relative_error(finer, coarser) < 2e-7
