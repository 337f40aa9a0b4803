"""The claimed error of the fixed grid covers the true one, at no further call of the network.

Networks here differ from the score of their own density, as users' do: the first-order estimate
of what an error does to the log-density is then wrong, and local errors need not cancel.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import SCHEDULES
from tests.likelihood.problems import problem
from tests.oracles import ring

EDM, VP = hosm.EDMSchedule(), SCHEDULES["vp"]
PAGE = (Path(__file__).parents[2] / "docs" / "likelihood_errors.md").read_text(encoding="utf-8")


class Network(nn.Module):
    """Two hidden layers on x of unit size and log σ̂."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        layers = nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t):
        alpha, sigma = self.schedule(t)
        scaled = x / (alpha**2 + sigma**2).sqrt()[:, None]
        return self.layers(torch.cat([scaled, self.schedule.log_sigma_hat(t)[:, None] / 4], 1))


@cache
def setting(schedule, steps):
    """The exact score if None, else a network of so many steps of training, points and truth."""
    model, x, *_ = problem(schedule, ring(), 60)
    if steps is not None:
        torch.manual_seed(0)
        model = hosm.ScoreModel(Network(schedule), schedule)
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(steps):
            x0 = ring().sample(128, generator)
            optimizer.zero_grad()
            hosm.first_order_dsm(model, x0, generator=generator).backward()
            optimizer.step()
    return model, x, hosm.ode_nll(model, x, solver=hosm.FixedGrid(512), divergence="exact").nll


@pytest.mark.parametrize(
    ("schedule", "steps", "companion"),
    [
        (VP, None, False),
        (VP, None, True),
        (SCHEDULES["flow"], 0, False),
        (SCHEDULES["flow"], 0, True),
        pytest.param(SCHEDULES["cosine"], 150, False, marks=pytest.mark.slow),
        pytest.param(EDM, 600, True, marks=pytest.mark.slow),
    ],
)
def test_twice_the_claim_covers_the_truth(schedule, steps, companion):
    """For 95 % of samples, and it is no larger than need be, with random probes too."""
    model, x, truth = setting(schedule, steps)
    options = {"solver": hosm.FixedGrid(companion=companion)}
    options["generator"] = torch.Generator().manual_seed(0)
    claimed = hosm.ode_nll(model, x, divergence="exact", **options)
    error = (claimed.nll - truth).abs()
    # With random probes the claim is the path's alone, and has to cover that of the same grid.
    for result in (claimed, hosm.ode_nll(model, x, **options)):
        assert float((error <= 2 * result.solver_error).double().mean()) >= 0.95
        assert float(result.solver_error.median()) <= max(10 * float(error.median()), 0.01)


@pytest.mark.parametrize("steps", [32, 64])
def test_twice_the_claim_covers_the_truth_at_the_samples_of_an_untrained_network(steps):
    """Its paths from one latent by two grids agree far better than those back from one x."""
    torch.manual_seed(0)
    model, generator = hosm.ScoreModel(Network(VP), VP), torch.Generator().manual_seed(1)
    latent = torch.randn(60, 2, generator=generator)
    options = {"solver": hosm.FixedGrid(steps, companion=True), "generator": generator}
    exact, random = (
        hosm.ode_sample(model, latent, divergence=each, **options)
        for each in ("exact", hosm.Hutchinson())
    )
    truth = hosm.ode_nll(model, exact.x, solver=hosm.FixedGrid(512), divergence="exact").nll
    error = (exact.nll - truth).abs()
    for drawn in (exact, random):  # the claim of random probes is the path's alone
        assert float((error <= 2 * drawn.solver_error).double().mean()) >= 0.95
        assert float(drawn.solver_error.median()) <= 4 * float(error.median())


@pytest.mark.slow
def test_where_the_claim_is_too_small():
    """The known miss of the page on errors, to be changed there if this turns red."""
    model, x, truth = setting(EDM, 600)
    result = hosm.ode_nll(model, x, divergence="exact")
    error = (result.nll - truth).abs()
    covered = float((error <= 2 * result.solver_error).double().mean())
    print(f"covered {covered:.2f}, median error {float(error.median()):.4f} nats")  # noqa: T201
    said = r"within twice the estimate for (\d+) % of samples, with a median error of (\S+) nats"
    ((share, median),) = re.findall(said, PAGE)
    assert covered == pytest.approx(float(share) / 100, abs=0.1)
    assert float(error.median()) == pytest.approx(float(median), rel=0.5)
