"""The cells of digits, and the two that the recipe is tried on."""

import json
import math
from dataclasses import replace

import pytest
import torch

import hosm_losses as hosm

pytest.importorskip("matplotlib")

from benchmarks import worth, worth_digits
from benchmarks.worth_digits import Digits, DigitsStudy, Images, split
from benchmarks.worth_problems import Sizes
from benchmarks.worth_reserved import Funnel, Ring

ALPHA, SIGMA = 0.9, 0.15


def assert_density(density, x, mass):
    """∫ q = 1, and E x·∇log q = −d, at one noise level."""
    levels = [torch.full((len(x),), each, dtype=x.dtype) for each in (ALPHA, SIGMA)]
    log_q, score = density.diffuse(x, *levels)
    inner = (x * score).sum(1)
    assert float((mass * log_q.exp()).sum()) == pytest.approx(1, abs=1e-4)
    assert float((mass * log_q.exp() * inner).sum()) == pytest.approx(-4, abs=1e-3)


def test_the_ring_integrates_to_one_and_has_its_gradient():
    radius = torch.linspace(0, 2.5, 501, dtype=torch.float64)[1:]
    direction = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    mass = 2 * math.pi**2 * radius**3 * (radius[1] - radius[0])
    assert_density(Ring(), radius[:, None] * direction, mass)


def test_the_funnel_integrates_to_one_and_has_its_gradient():
    axes = (torch.linspace(-6, 6, 61), torch.linspace(-5, 5, 61))  # v, and log of the radius
    grid = torch.cartesian_prod(*axes).double()
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3
    x = torch.cat([grid[:, :1], grid[:, 1:].exp() * direction], 1)
    mass = 4 * math.pi * torch.exp(3 * grid[:, 1]) * (12 / 60) * (10 / 60)
    assert_density(Funnel(), x, mass)


def test_draws_have_the_moments_of_their_density():
    u = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    every = torch.cartesian_prod(*[u] * 4)
    ring = Ring().quantile(every)
    assert torch.allclose(ring.mean(0), torch.zeros(4).double(), atol=1e-12)
    products = ring.T @ ring / len(ring)
    assert torch.allclose(products, products.diagonal().mean() * torch.eye(4).double(), atol=1e-12)
    assert float(ring.norm(dim=1).mean()) == pytest.approx(Ring().line.mean, abs=2e-3)
    funnel = Funnel().quantile(every)
    assert torch.allclose(funnel[:, 0], 1.5 * torch.special.ndtri(every[:, 0]), atol=1e-4)
    scaled = funnel[:, 1:] * torch.exp(-funnel[:, :1] / 2)
    assert torch.allclose(scaled, torch.special.ndtri(every[:, 1:]), atol=1e-12)


def tiny(**changes) -> Digits:
    rows = torch.randint(0, 5, (80, 3), generator=torch.Generator().manual_seed(0)).float()
    images = split(rows, 4, (48, 16, 16))
    cell = Digits(images, hosm.VPSchedule(), Sizes(8, 2), 4, 16, 4, seeds=3)
    return replace(cell, **changes)


def test_splits_are_disjoint_and_data_is_dequantized_within_its_levels():
    rows = torch.arange(40.0)[:, None]
    images = split(rows, 39, (20, 8, 8))
    chosen = torch.cat(images[:3]).flatten()
    assert len(chosen.unique()) == 36
    cell = Digits(images, hosm.VPSchedule(), Sizes(8), 1)
    drawn = (cell.draw(500, torch.Generator().manual_seed(0)) + 1) * 20
    assert set(drawn.floor().flatten().tolist()) == set(images.train.flatten().tolist())
    assert torch.equal(images.uniform(images.test), images.uniform(images.test))


def test_the_likelihood_of_digits_is_that_of_the_solver_per_seed():
    cell = tiny()
    study = DigitsStudy.__new__(DigitsStudy)
    study.cell = cell
    model, rows = cell.model((0, 1), "plain"), cell.density.test
    found = study.nll(model, rows, 2)
    for i, seed in enumerate((0, 1)):
        x = cell.density.uniform(rows)
        alone = hosm.ode_nll(cell.model([seed], "plain"), x, **cell.ode())
        assert torch.allclose(found[i], alone.nll, rtol=1e-5, atol=1e-4)


def test_probes_of_many_elements_are_the_same_in_every_call(monkeypatch):
    monkeypatch.setattr(worth_digits, "EXACT", 2)
    cell = tiny()
    model, x = cell.model([0], "plain"), cell.density.uniform(cell.density.test)
    one, two = (hosm.ode_nll(model, x, **cell.ode(16)).nll for _ in range(2))
    assert torch.equal(one, two)
    assert cell.ode()["divergence"] == hosm.Hutchinson(worth_digits.PROBES)


@pytest.mark.parametrize("longest", [4.2, None])
def test_the_losses_of_digits_start_from_the_best_on_the_validation_split(
    longest, tmp_path, monkeypatch
):
    nats = {"budget 1": 5.0, "budget 3": 4.0, "budget 9": longest}
    original = DigitsStudy.go_further

    def go_further(self, kind, name, rate, times):
        row = original(self, kind, name, rate, times)
        if nats[f"budget {times}"] is None:
            raise ValueError("a likelihood is not finite, of a network that has overfitted")
        return row | {"validation": [[nats[f"budget {times}"]] * 8] * 3}

    monkeypatch.setattr(DigitsStudy, "go_further", go_further)
    study = DigitsStudy("digits", tiny(), tmp_path, tmp_path / "weights")
    study.run("one$|two$", rounds=1)
    report = json.loads(study.file.read_text())
    assert (report["start"], report["converged"]) == (3, True)
    assert torch.tensor(report["rows"]["order two"]["test"]).shape == (3, 8)
    assert len(report["rows"]["order two"]["self_consistency"]) == 3
    summary = study.summary()
    assert summary["budget 3"]["change"].value == 0
    budgets = {name for name, value in nats.items() if value is not None}
    assert {*summary} == {*budgets, worth.ONE, "order two"}


def test_one_image_has_the_levels_it_says():
    images = Images(*[torch.tensor([[0.0], [4.0]])] * 3, 4)
    found = images.uniform(images.train)
    assert -1 <= float(found[0]) < -0.6
    assert 0.6 <= float(found[1]) < 1
