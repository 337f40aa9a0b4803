"""Results that are not finite: an error on the CPU that says where they come from."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm

VP = hosm.VPSchedule()
FUNCTIONS = {1: hosm.first_order_dsm, 2: hosm.second_order_dsm, 3: hosm.third_order_dsm}
T = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def broken(value, after):
    """A network whose output is not finite from a time on."""

    def network(x, t):
        return torch.where(t[:, None] > after, torch.full_like(x, value), x.sin())

    return hosm.ScoreModel(network, VP)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_returns_nan_is_named_with_the_samples_and_times(value, order, reduction):
    message = r"network: expected finite outputs; got.*for 2 of 4 samples, at t from 0\.3 to 0\.4"
    model, x0 = broken(value, 0.25), torch.randn(4, 3)
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[order](model, x0, t=T, noise=torch.randn(4, 3), reduction=reduction)
    with pytest.raises(ValueError, match=message):
        hosm.dsm_terms(model, x0, order=order, t=T)


class Holed(hosm.VPSchedule):
    """Not finite where no check looks when a model is built."""

    def sigma(self, t):
        return torch.where((t > 0.535) & (t < 0.54), float("nan"), super().sigma(t))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_schedule_and_a_short_type_are_told_from_the_network(order):
    t, message = torch.tensor([0.1, 0.537, 0.9, 0.538]), r"schedule: expected a finite x = α.*"
    with pytest.raises(ValueError, match=rf"{message}for 2 of 4.*from 0\.537 to 0\.538\. Look"):
        FUNCTIONS[order](hosm.ScoreModel(lambda x, t: x.sin(), Holed()), torch.randn(4, 3), t=t)
    wide = hosm.ScoreModel(lambda x, t: x.sin(), hosm.VESchedule(sigma_max=1e6))
    with pytest.raises(ValueError, match=rf"{message}at t from 1 to 1.*range of torch\.float16"):
        FUNCTIONS[order](wide, torch.zeros(4, 3).half(), t=torch.ones(4).float())


@pytest.mark.parametrize("options", [{"fraction": 0.5}, {"weighting": "native"}])
def test_with_every_option(options):
    class Network(nn.Module):
        def forward(self, x, t):
            return torch.where(t[:, None] > 0.35, x / 0, x.sin())

    model = hosm.ScoreModel(Network(), VP)
    with pytest.raises(ValueError, match=r"for 1 of 4 samples, at t from 0\.4 to 0\.4"):
        hosm.third_order_dsm(model, torch.randn(4, 3), t=T, **options)


@pytest.mark.parametrize("engine", ["auto", "taylor", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
def test_derivatives_that_are_not_finite_are_told_from_outputs(order, engine):
    model = hosm.ScoreModel(lambda x, t: x.abs().sqrt(), VP)
    x0 = torch.zeros(2, 3)
    terms = "second, trace" if order == 2 else "second, trace, third"
    with pytest.raises(
        hosm.DerivativeError, match=f"outputs are finite, but not the terms {terms}"
    ):
        FUNCTIONS[order](model, x0, t=T[:2], noise=x0, derivative=engine)
    assert float(hosm.first_order_dsm(model, x0, t=T[:2], noise=x0)) == 0


def test_weights_that_overflow_are_told_from_both():
    model = hosm.ScoreModel(lambda x, t: x.sin(), VP)
    x0 = torch.full((2, 3), 9.0, dtype=torch.float32)
    with pytest.raises(ValueError, match="loss: expected a finite one; its terms are finite"):
        hosm.second_order_dsm(model, x0, weights=(3e38, 3e38, 3e38))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_nothing_is_looked_at_on_another_device(order):
    network = nn.Linear(3, 3, device="meta")
    model = hosm.ScoreModel(lambda x, t: network(x) / 0, VP)
    loss = FUNCTIONS[order](model, torch.randn(4, 3, device="meta"))
    assert loss.device.type == "meta"
