"""The twins in JAX are what they stand for: networks, losses and gradients equal PyTorch's.

python -m pytest benchmarks/checks/test_jax_losses.py
"""

import pytest
import torch

import hosm_losses as hosm
from benchmarks.likelihood_problems import ring
from benchmarks.networks import NETWORKS
from benchmarks.steps import LOSSES, NAMES, model_of
from benchmarks.trained import Convolutional, Dense
from hosm_losses.losses.terms import third_residual
from hosm_losses.model import noise_field

jax = pytest.importorskip("jax")

from benchmarks.peers.jax_losses import training_step  # noqa: E402
from benchmarks.peers.jax_networks import parameters_of, twin_of  # noqa: E402

BATCH = 3
SCHEDULE = hosm.VESchedule(sigma_max=20.0)
OF_LIKELIHOODS = {
    "convolutional": (Convolutional(SCHEDULE, 0.3, width=8), (3, 8, 8)),
    "dense": (Dense(SCHEDULE, 0.7, width=16), (64,)),
    "ring": (ring().model.network, (2,)),
}


@pytest.mark.parametrize("name", OF_LIKELIHOODS)
def test_networks_of_the_likelihood(name):
    network, shape = OF_LIKELIHOODS[name]
    network = network.double()
    x, t = torch.randn(3, *shape, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9]).double()
    with torch.no_grad():
        expected = network(x, t)
    with jax.enable_x64(True):
        found = twin_of(network)(parameters_of(network), x.numpy(), t.numpy())
        found = torch.tensor(jax.device_get(found))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Case:
    """A network in float64, and a batch of everything that a loss draws."""

    def __init__(self, name):
        self.model = model_of(name).double()
        self.drawn = torch.randn(4, BATCH, *NETWORKS[name][1][1:], dtype=torch.float64)
        self.x0, self.noise, self.probe, self.other = self.drawn
        self.t = torch.linspace(0.05, 0.9, BATCH, dtype=torch.float64)
        self.given = {"t": self.t, "noise": self.noise}

    def loss(self, order):
        probe = {} if order == 1 else {"probe": self.probe}
        return LOSSES[order](self.model)(self.x0, **self.given, **probe)

    def compare(self, loss, order, third="exact"):
        """`loss` is PyTorch's; its gradients are compared relative to the largest."""
        network = self.model.network
        names, parameters = zip(*network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        probes = (self.probe, self.other) if third == "sliced" else (self.probe,)
        with jax.enable_x64(True):
            drawn = (self.x0, self.t, self.noise, *probes)
            step = training_step(network, order, third)
            value, twins = step(*(tensor.numpy() for tensor in drawn))
            assert float(value) == pytest.approx(loss.item(), rel=1e-10)
            for name, gradient in zip(names, gradients, strict=True):
                difference = abs(gradient.numpy() - jax.device_get(twins[name])).max()
                assert difference < 1e-9 * gradient.abs().max(), name


@pytest.mark.parametrize("order", LOSSES)
@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("third", ["laplacian", "sliced"])
@pytest.mark.parametrize("name", NAMES)
def test_other_thirds(name, third):
    case = Case(name)
    alpha, sigma = (c.reshape(-1, *(1,) * (case.x0.ndim - 1)) for c in case.model.schedule(case.t))
    x, w = alpha * case.x0 + sigma * case.noise, sigma * case.probe
    field, probe = noise_field(case.model, case.t), case.probe[None]

    def second(x):
        return torch.func.jvp(field, (x,), (w,))

    along = w if third == "laplacian" else case.other
    parts, (_, mixed) = torch.func.jvp(second, (x,), (along,))
    given = [part[None] for part in parts]
    if third == "laplacian":
        square = third_residual(*given, mixed[None], case.noise, probe).square().sum()
    else:
        target = third_residual(*given, torch.zeros_like(probe), case.noise, probe)[0]
        square = (w * mixed + case.other * target).flatten(1).sum(1).square().sum()
    case.compare(case.loss(2) + square / BATCH / case.x0[0].numel() ** 3, 3, third)
