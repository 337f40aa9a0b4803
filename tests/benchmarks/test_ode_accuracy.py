"""Every solver of the comparison is right, and its calls are those of the network."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm

pytest.importorskip("matplotlib")

from benchmarks import ode_accuracy

STD = torch.tensor([0.5, 0.8], dtype=torch.float64)


class Exact(nn.Module):
    """The velocity or the noise of independent normals."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, t):
        alpha, sigma = (part[:, None] for part in self.schedule(t))
        noise = sigma * x / (alpha**2 * STD**2 + sigma**2)
        if isinstance(self.schedule, hosm.LinearFlowSchedule):
            return noise - (x - sigma * noise) / alpha
        return noise


@pytest.fixture(params=["flow", "VP", "EDM"])
def problem(request):
    """An exact model, points at t_min, and their −log p but for the prior's difference."""
    torch.set_default_dtype(torch.float64)
    schedule = ode_accuracy.SCHEDULES[request.param]
    prediction = "velocity" if request.param == "flow" else "epsilon"
    model = hosm.ScoreModel(Exact(schedule), schedule, prediction)
    x = STD * torch.randn(20, 2)
    solver = hosm.FixedGrid(512, data_std=STD)
    return model, x, hosm.ode_nll(model, x, solver=solver, divergence="exact").nll


@pytest.mark.parametrize("name", ode_accuracy.PEERS)
def test_every_peer_is_right(name, problem):
    package, _, ways = ode_accuracy.PEERS[name]
    pytest.importorskip(package)
    model, x, expected = problem
    for solve in ways:
        even = getattr(solve, "keywords", {}) == {"logarithmic": False}
        if even and not isinstance(model.schedule, hosm.LinearFlowSchedule):
            continue  # the first of the steps is too long for them
        found = solve(model, x, 160 if name.endswith("RK4") else 1e-7)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_calls_are_those_of_the_network_and_errors_those_of_the_samples(problem):
    model, x, _ = problem
    answer = ode_accuracy.curves(model, x, {"data_mean": torch.zeros(2), "data_std": 2 * STD})
    ours = answer["curves"]["ours"]
    assert [row["calls"] for row in ours.values()] == [steps + 2 for steps in ode_accuracy.STEPS]
    assert ours["20"]["error"] > 10 * ours["64"]["error"] > 100 * ours["128"]["error"] > 0
    for most, best in answer["within"].items():
        for name, error in best.items():
            rows = answer["curves"][name].values()
            assert error == min(row["error"] for row in rows if row["calls"] <= int(most))
    if rows := answer["curves"].get("torchdiffeq, RK4"):
        assert [row["calls"] for row in rows.values()] == [20, 32, 40, 64, 128]
        assert answer["doubt"] < 1e-6
    assert not model.network._forward_pre_hooks
