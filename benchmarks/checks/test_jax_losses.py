"""The twins in JAX are what they stand for: loss and gradients equal PyTorch's, in float64.

python -m pytest benchmarks/checks/test_jax_losses.py
"""

import pytest
import torch

import hosm_losses as hosm
from benchmarks.networks import NETWORKS
from hosm_losses.losses.terms import third_residual
from hosm_losses.model import noise_field

jax = pytest.importorskip("jax")

from benchmarks.peers.jax_losses import TWINS, parameters_of, training_step  # noqa: E402

BATCH = 3
ORDERS = {1: hosm.first_order_dsm, 2: hosm.second_order_dsm, 3: hosm.third_order_dsm}


class Case:
    """A network in float64, and a batch of everything that a loss draws."""

    def __init__(self, name):
        torch.manual_seed(0)
        make, shape = NETWORKS[name]
        self.name, self.network = name, make().double()
        draws = torch.randn(4, BATCH, *shape[1:], dtype=torch.float64)
        self.x0, self.noise, self.probe, self.other = draws
        self.t = torch.linspace(0.05, 0.9, BATCH, dtype=torch.float64)
        self.model = hosm.ScoreModel(self.network, hosm.VPSchedule())

    def compare(self, loss, order, third="exact"):
        """`loss` is PyTorch's; its gradients are compared relative to the largest."""
        names, parameters = zip(*self.network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        other = (self.other,) if third == "sliced" else ()
        with jax.enable_x64(True):
            step = training_step(self.name, parameters_of(self.network), order, third)
            drawn = (self.x0, self.t, self.noise, self.probe, *other)
            value, twins = step(*(tensor.numpy() for tensor in drawn))
            assert float(value) == pytest.approx(loss.item(), rel=1e-10)
            for name, gradient in zip(names, gradients, strict=True):
                difference = abs(gradient.numpy() - jax.device_get(twins[name])).max()
                assert difference < 1e-9 * gradient.abs().max(), name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", TWINS)
def test_orders(name, order):
    case = Case(name)
    probe = {} if order == 1 else {"probe": case.probe}
    loss = ORDERS[order](case.model, case.x0, t=case.t, noise=case.noise, **probe)
    case.compare(loss, order)


def test_single_precision():
    case = Case("dit")  # whose d³ is no 32-bit integer
    case.network.float()
    drawn = [draw.float() for draw in (case.x0, case.t, case.noise, case.probe)]
    x0, t, noise, probe = drawn
    loss = hosm.third_order_dsm(case.model, x0, t=t, noise=noise, probe=probe)
    step = training_step("dit", parameters_of(case.network), 3)
    value, _ = step(*(tensor.numpy() for tensor in drawn))
    assert float(value) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("third", ["laplacian", "sliced"])
@pytest.mark.parametrize("name", TWINS)
def test_other_thirds(name, third):
    case = Case(name)
    alpha, sigma = (c.reshape(-1, *(1,) * (case.x0.ndim - 1)) for c in case.model.schedule(case.t))
    x, w, field = (
        alpha * case.x0 + sigma * case.noise,
        sigma * case.probe,
        noise_field(case.model, case.t),
    )
    along = w if third == "laplacian" else case.other

    def second(x):
        return torch.func.jvp(field, (x,), (w,))

    (value, directional), (_, mixed) = torch.func.jvp(second, (x,), (along,))
    parts = [part[None] for part in (value, directional)]
    probe = case.probe[None]
    if third == "laplacian":
        square = third_residual(*parts, mixed[None], case.noise, probe).square().sum()
    else:
        target = third_residual(*parts, torch.zeros_like(probe), case.noise, probe)[0]
        sums = (w * mixed + case.other * target).flatten(1).sum(1)
        square = sums.square().sum()
    lower = hosm.second_order_dsm(
        case.model, case.x0, t=case.t, noise=case.noise, probe=case.probe
    )
    case.compare(lower + square / BATCH / case.x0[0].numel() ** 3, 3, third)
