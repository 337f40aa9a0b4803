"""What the diagnostics report of a model on a subspace is that in its coordinates."""

from functools import partial

import pytest
import torch

import hosm_losses as hosm
from tests.cases import assert_same
from tests.subspaces import PARTICLES, Draws, basis, centred, masked, pair

VP = hosm.VPSchedule()


class Trained(torch.nn.Module):
    """The exact noise of normal data, of x or of coordinates, with junk outside of a subspace."""

    def __init__(self, project=None):
        super().__init__()
        self.project = project

    def forward(self, x, t):
        alpha, sigma = (part.reshape(-1, *(1,) * (x.ndim - 1)) for part in VP(t))
        value = sigma * x / (0.25 * alpha**2 + sigma**2)
        junk = torch.cos(3 * x)
        return value if self.project is None else value + junk - self.project(junk)


@pytest.mark.parametrize("project", [centred, masked])
@pytest.mark.parametrize("count", [16, 60])  # the linear predictor by element, and by covariance
def test_wrappings_are_compared_on_the_subspace(project, count, monkeypatch):
    Q = basis(project, PARTICLES)
    y = 0.5 * torch.randn(count, Q.shape[1], generator=torch.Generator().manual_seed(0)).double()
    x = (y @ Q.T).reshape(count, *PARTICLES)
    for prediction in ("epsilon", "v"):
        whole = hosm.ScoreModel(Trained(project), VP, prediction, subspace=project)
        small = hosm.ScoreModel(Trained(), VP, prediction)
        reports = Draws(monkeypatch, Q).both(
            partial(hosm.check_wrapping, whole, x), partial(hosm.check_wrapping, small, y)
        )
        if project is centred and count == 16:  # where the elements are no coordinates
            assert reports[0].linear != reports[1].linear
            continue
        for name in ("losses", "linear", "log_sigma_hat"):
            found, expected = (torch.tensor(getattr(report, name)) for report in reports)
            assert_same(found, expected, 1e-6)
        assert reports[0].ok == reports[1].ok
    with pytest.raises(ValueError, match="x0: expected samples on the subspace"):
        hosm.check_wrapping(whole, x + 0.3)


def test_other_units_of_padded_data_are_found():
    """A velocity of data -1 and 1, given 0 and 1: the padding stays 0 in all units."""
    flow, Q = hosm.LinearFlowSchedule(), basis(masked, PARTICLES)
    bits = torch.rand(200, Q.shape[1], generator=torch.Generator().manual_seed(0)) > 0.5
    y = bits.double()
    x = masked((y @ Q.abs().T).reshape(-1, *PARTICLES))

    def trained(x, t):
        alpha, sigma = (part.reshape(-1, *(1,) * (x.ndim - 1)) for part in flow(t))
        x0 = torch.tanh(alpha * x / sigma**2)
        return (x - alpha * x0) / sigma - x0

    whole = hosm.ScoreModel(trained, flow, "velocity", subspace=masked)
    own = {"generator": torch.Generator().manual_seed(1)}
    report = hosm.check_wrapping(whole, x, **own)
    assert report.best.units == "2 * x0 - 1"
    right = hosm.check_wrapping(
        whole, masked(2 * x - 1), generator=own["generator"].manual_seed(1)
    )
    assert right.ok
    assert report.best.loss == pytest.approx(sum(right.losses) / len(right.losses), rel=0.05)


def test_derivatives_are_checked_through_the_projection():
    model, _, Q = pair("vp", "epsilon")
    x = (torch.randn(4, Q.shape[1]) @ Q.T).reshape(4, *PARTICLES)
    assert "ok" in str(hosm.check_derivatives(model, x)).lower()
