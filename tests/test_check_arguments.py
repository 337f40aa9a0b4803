"""check_derivatives: what it is given stays as it was."""

import copy
import warnings

import numpy as np
import pytest
import torch

import hosm_losses as hosm
from tests.cases import MLP, VP, Spectral

X0 = torch.randn(2, 3, dtype=torch.float64)
T = torch.full((2,), 0.5, dtype=torch.float64)


class Writing(MLP):
    """It writes to its input, its condition, its times and a buffer, and draws."""

    def __init__(self):
        super().__init__(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, y):
        self.calls += 1
        torch.rand(1)
        return super().forward(x.mul_(2) + y.mul_(2), t.mul_(2))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode, torch.no_grad])
def test_a_network_that_writes_to_its_inputs_changes_no_tensor_of_the_caller(mode):
    own = hosm.ScoreModel(Writing(), VP)
    with mode():
        x0, t, y = 1 * X0, 1 * T, 2 * X0
        before = copy.deepcopy([own.state_dict(), torch.get_rng_state(), x0, t, y])
        hosm.check_derivatives(own, x0, t=t, model_kwargs={"y": y}, engine="reverse")
    now = [own.state_dict(), torch.get_rng_state(), x0, t, y]
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    assert all(each.grad is None for each in own.parameters())


def test_indices_of_a_table_and_numbers_of_numpy_are_taken():
    table = hosm.DiscreteSchedule([0.9, 0.5, 0.1])
    hosm.check_derivatives(hosm.ScoreModel(MLP(3), table), X0, np.int64(2), t=T.round().long())


def test_a_network_that_cannot_be_copied_is_an_error_that_says_so():
    network = MLP(3)
    network.kept = network.inner.weight * 2
    with pytest.raises(RuntimeError, match="deepcopy"):
        hosm.check_derivatives(hosm.ScoreModel(network, VP), X0)


def test_nothing_is_said_of_engines():
    """It is differentiated in reverse mode, of which a training step would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "engine='auto'")
        hosm.check_derivatives(hosm.ScoreModel(Spectral(), VP), X0)
