"""The twins in JAX are what they stand for: networks, losses and gradients equal PyTorch's."""

import pytest
import torch
from benchmarks.steps import LOSSES, NETWORKS, TWINS, model_of

import hosm_losses as hosm
from hosm_losses.losses.terms import common, third_target
from hosm_losses.model import noise_field

jax = pytest.importorskip("jax")

from benchmarks.peers.in_jax import training_step  # noqa: E402

BATCH = 3


class Case:
    """A network in float64, and a batch of everything that a loss draws."""

    def __init__(self, name):
        self.model = model_of(name).double()
        drawn = torch.randn(3, BATCH, *NETWORKS[name][1][1:], dtype=torch.float64)
        self.x0, self.noise, self.probe = drawn
        self.t = torch.linspace(0.05, 0.9, BATCH, dtype=torch.float64)

    def loss(self, order):
        probe = {} if order == 1 else {"probe": self.probe}
        return LOSSES[order](self.model)(self.x0, t=self.t, noise=self.noise, **probe)

    def compare(self, loss, order, third="exact"):
        """`loss` is PyTorch's; its gradients are compared relative to the largest."""
        names, parameters = zip(*self.model.network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        with jax.enable_x64(True):
            step = training_step(self.model.network, order, third)
            value, twins = step(
                *(each.numpy() for each in (self.x0, self.t, self.noise, self.probe))
            )
            assert float(value) == pytest.approx(loss.item(), rel=1e-10)
            for name, gradient in zip(names, gradients, strict=True):
                difference = abs(gradient.numpy() - jax.device_get(twins[name])).max()
                assert difference < 1e-9 * gradient.abs().max(), name


@pytest.mark.parametrize("order", LOSSES)
@pytest.mark.parametrize("name", TWINS)
def test_orders(name, order):
    case = Case(name)
    case.compare(case.loss(order), order)


def test_single_precision():
    case = Case("dit")  # whose d³ is no 32-bit integer
    case.model.float()
    x0, t, noise, probe = (draw.float() for draw in (case.x0, case.t, case.noise, case.probe))
    loss = hosm.third_order_dsm(case.model, x0, t=t, noise=noise, probe=probe)
    step = training_step(case.model.network, 3)
    value, _ = step(*(tensor.numpy() for tensor in (x0, t, noise, probe)))
    assert float(value) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", TWINS)
def test_the_laplacian(name):
    case = Case(name)
    alpha, sigma = (c.reshape(-1, *(1,) * (case.x0.ndim - 1)) for c in case.model.schedule(case.t))
    x, w = alpha * case.x0 + sigma * case.noise, sigma * case.probe
    field, probe = noise_field(case.model, case.t), case.probe[None]

    def second(x):
        return torch.func.jvp(field, (x,), (w,))

    (value, directional), (_, twice) = torch.func.jvp(second, (x,), (w,))
    target = third_target(common(value[None] + case.noise, directional[None], probe))[0]
    square = (twice - target).square().sum()
    case.compare(case.loss(2) + square / BATCH / case.x0[0].numel() ** 3, 3, "laplacian")
