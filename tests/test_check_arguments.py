"""check_derivatives: what it is given stays as it was."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives.select import _CHOICES
from tests.oracles import MLP, OnceDifferentiable, Spectral

VP = hosm.VPSchedule()
TABLE = hosm.DiscreteSchedule([0.9, 0.5, 0.1])
X0 = torch.randn(2, 3, dtype=torch.float64)
T = torch.full((2,), 0.5, dtype=torch.float64)


def model(schedule=VP):
    return hosm.ScoreModel(MLP(3).double(), schedule)


def test_indices_of_a_table_and_numbers_of_numpy_are_taken():
    hosm.check_derivatives(model(TABLE), X0, t=torch.tensor([0, 2]))
    hosm.check_derivatives(model(), X0, np.int64(2), t=T)


def test_a_network_that_cannot_be_copied_is_an_error_that_says_so():
    network = MLP(3).double()
    network.kept = network.inner.weight * 2
    with pytest.raises(TypeError):
        hosm.check_derivatives(hosm.ScoreModel(network, VP), X0)


def test_what_the_network_writes_to_is_its_own():
    class Writing(MLP):
        def __init__(self):
            super().__init__(3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, t, y):
            self.calls += 1
            return super().forward(x + y.mul_(1), t.mul_(1))

    own, given = hosm.ScoreModel(Writing(), VP), {"y": X0.clone()}
    state, generator = copy.deepcopy(own.state_dict()), torch.get_rng_state()
    times, x0 = T.clone(), X0.clone()
    versions = [each._version for each in (times, x0, given["y"])]
    hosm.check_derivatives(own, x0, t=times, model_kwargs=given, derivative="reverse")
    assert versions == [each._version for each in (times, x0, given["y"])]
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in own.state_dict().items():
        assert torch.equal(value, state[name])


def test_nothing_is_said_of_engines_and_nothing_remembered():
    """It is differentiated in reverse mode, of which a training step would warn."""
    network = Spectral().double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hosm.check_derivatives(hosm.ScoreModel(network, VP), X0)
    assert not [each for each in said if "derivative='auto'" in str(each.message)]
    assert network not in set(_CHOICES)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_may_be_off_around_it(mode):
    with mode():
        given = {"y": torch.ones(2, 3, dtype=torch.float64)}
        x0 = torch.randn(2, 3, dtype=torch.float64)
        network = MLP(3).double()

        class Conditioned(nn.Module):
            def __init__(self):
                super().__init__()
                self.network = network

            def forward(self, x, t, y):
                return self.network(x + y, t)

        hosm.check_derivatives(hosm.ScoreModel(Conditioned(), VP), x0, model_kwargs=given)


def test_nothing_is_remembered_of_a_function():
    layer = nn.Linear(3, 3).double()

    def network(x, t):
        return Spectral.forward(inner, layer(x), t)

    inner = Spectral().double()
    hosm.check_derivatives(hosm.ScoreModel(network, VP), X0)
    assert network not in set(_CHOICES)


@pytest.mark.parametrize("order", [2, 3])
def test_it_never_advises_to_call_itself(order):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x, t):
            return OnceDifferentiable.apply(self.layer(x))

    with pytest.raises(hosm.DerivativeError, match="by any engine") as caught:
        hosm.check_derivatives(hosm.ScoreModel(Network(), VP), X0, order)
    assert "check_derivatives" not in str(caught.value)
