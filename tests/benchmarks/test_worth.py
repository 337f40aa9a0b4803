"""The study of the losses: densities, ensembles, quantities, resumption."""

import json
import math
from dataclasses import replace

import mpmath
import pytest
import torch

import hosm_losses as hosm
from tests.oracles import mixture_noise, paper_mixture

pytest.importorskip("matplotlib")

from benchmarks import recipe, worth
from benchmarks.intervals import STUDENT, over_seeds
from benchmarks.worth import Recipe
from benchmarks.worth_problems import (
    CELLS,
    Cell,
    Checkerboard,
    Digits,
    Ensemble,
    Funnel,
    Lattice,
    Line,
    Product,
    Ring,
    Rotated,
    many_well,
    mixture,
)
from benchmarks.worth_quantities import (
    OWN,
    base_of,
    by_rate,
    compare,
    dependence,
    effective_size,
    facts,
    finite,
    log_ratio,
    rank_correlation,
    ratios,
    score,
)

from hosm_losses.losses import times
from hosm_losses.losses.options import check_weights


def levels(*values):
    """α and σ as columns of one noise level each."""
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def small(name="many-well, d = 2", **changes) -> Cell:
    return replace(CELLS[name]().small(), **changes)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.01), (0.6, 0.8), (1.0, 30.0)])
def test_the_mixture_on_a_grid_is_that_in_closed_form(alpha, sigma):
    x = alpha * torch.linspace(-1.2, 1.5, 40, dtype=torch.float64)[:, None]
    at = [each.expand(len(x)) for each in levels(alpha, sigma)]
    log_q, slope = mixture().diffuse(x, *at)
    exact = paper_mixture()
    assert torch.allclose(log_q, exact.log_density(x, *at), atol=1e-7)
    assert torch.allclose(slope, exact.score(x, *at), rtol=1e-6, atol=1e-6)


def test_the_checkerboard_is_small_in_the_middle_of_its_holes():
    """The nearest edges of four squares are a quarter away, 25 σ."""
    hole = torch.tensor([[-0.25, 0.25]], dtype=torch.float64)
    (found,), pull = Checkerboard().diffuse(hole, *levels(1.0, 0.01))
    assert float(found) == pytest.approx(float(mpmath.log(2 * mpmath.ncdf(-25))), abs=1e-9)
    assert pull.abs().max() < 1e-9


def test_draws_of_the_mixture_have_its_distribution():
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    x = mixture().quantile(u[:, None])
    exact = paper_mixture()
    normal = (x - exact.means.T) / exact.covariances[:, 0, 0].sqrt()
    assert torch.allclose(torch.special.ndtr(normal) @ exact.weights, u, atol=5e-6)


def test_draws_of_the_checkerboard_fill_its_squares_evenly():
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    x = Checkerboard().quantile(torch.cartesian_prod(u, u))
    row, column = ((x + 1) * 2).floor().long().T
    counts = torch.zeros(4, 4).index_put((row, column), torch.ones(len(x)), accumulate=True)
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert torch.equal(counts, 64**2 / 8 * board)
    assert torch.unique((x[:, 1] + 1) * 2 % 1).numel() == 32


def plane(length, count):
    """A grid of the plane and the area of its squares."""
    axis = torch.linspace(-length, length, count, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2


def sphere():
    """Points on a line, and the volumes of their shells in four dimensions."""
    radius = torch.linspace(0, 2.5, 501, dtype=torch.float64)[1:]
    direction = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    mass = 2 * math.pi**2 * radius**3 * (radius[1] - radius[0])
    return radius[:, None] * direction, mass


def funnel():
    """v, and shells of the three others."""
    axes = (torch.linspace(-6, 6, 61), torch.linspace(-5, 5, 61))  # v, and log of the radius
    grid = torch.cartesian_prod(*axes).double()
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3
    x = torch.cat([grid[:, :1], grid[:, 1:].exp() * direction], 1)
    return x, 4 * math.pi * torch.exp(3 * grid[:, 1]) * (12 / 60) * (10 / 60)


@pytest.mark.parametrize(
    ("density", "grid", "at"),
    [
        (Ring(), sphere(), (0.9, 0.15)),
        (Funnel(), funnel(), (0.9, 0.15)),
        (many_well(2), plane(4.5, 361), (0.9, 0.05)),
        (Checkerboard(), plane(1.5, 301), (0.9, 0.05)),
        (Lattice(2), plane(3.0, 601), (1.0, 0.01)),
    ],
    ids=["ring", "funnel", "wells", "board", "lattice"],
)
def test_densities_integrate_to_one_and_have_their_gradient(density, grid, at):
    """∫ q = 1, and E x·∇log q = −d."""
    x, mass = grid
    log_q, score = density.diffuse(x, *(each.expand(len(x)) for each in levels(*at)))
    inner = (x * score).sum(1)
    assert float((mass * log_q.exp()).sum()) == pytest.approx(1, abs=1e-4)
    assert float((mass * log_q.exp() * inner).sum()) == pytest.approx(-x.shape[1], abs=1e-3)


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


@pytest.mark.parametrize(
    "name", [name for name in CELLS if "board" not in name and "digits" not in name]
)
def test_the_score_of_the_data_is_that_of_the_density_without_noise(name):
    """E[−(x − x̄)·∇log p₀] = d, and at t_min the score of q is near that of the data."""
    cell = replace(CELLS[name](), points=8)
    x, _, noisy_score = cell.at_t_min
    data_score, scale = cell.density.data_score(x), noisy_score.abs().amax()
    assert (data_score - noisy_score).abs().max() < 0.1 * scale
    draws = cell.draw(20_000, torch.Generator().manual_seed(0)).double()
    products = -((draws - cell.density.mean) * cell.density.data_score(draws)).sum(1)
    error = products.std() / math.sqrt(len(draws))
    assert abs(products.mean() - cell.density.elements) < 5 * error
    assert error < 0.1 * cell.density.elements


def test_a_rotated_density_is_the_same_in_its_own_axes():
    plain, rotated = many_well(4), Rotated(many_well(4))
    u = torch.rand((8, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, turned = plain.quantile(u), rotated.quantile(u)
    at = [value.expand(8) for value in levels(1.0, 0.3)]
    log_q, score = plain.diffuse(x, *at)
    turned_log_q, turned_score = rotated.diffuse(turned, *at)
    assert torch.allclose(log_q, turned_log_q)
    for before, after in ((x, turned), (score, turned_score)):
        assert torch.allclose(before.square().sum(1), after.square().sum(1))
    back = rotated.rotation.T
    assert torch.allclose(turned_score @ back.T, score)
    moments = rotated.quantile(torch.rand((40_000, 4), dtype=torch.float64))
    assert torch.allclose(moments.std(0).float(), rotated.std, rtol=0.03)


def test_the_lattice_is_smoothed():
    """q = p₀ * N(0, σ²) by Gauss–Hermite quadrature, at a few points of two sites."""
    lattice, at = Lattice(2), [value.expand(3) for value in levels(1.0, 0.01)]
    points = torch.tensor([[0.3, -0.9], [1.1, 1.2], [-1.0, -0.8]], dtype=torch.float64)
    nodes, weights = (
        torch.tensor(part, dtype=torch.float64)
        for part in ([-(3**0.5), 0.0, 3**0.5], [1 / 6, 2 / 3, 1 / 6])
    )
    shifts, joint = torch.cartesian_prod(nodes, nodes), torch.outer(weights, weights).flatten()
    near = points[:, None] + 0.01 * shifts
    bonds = (near[..., 0] - near[..., 1]).square()  # two bonds, each of half a square
    energy = bonds + (near.square() - 1).square().sum(-1)
    smoothed = (joint * (-energy - lattice.log_z).exp()).sum(1).log()
    assert torch.allclose(lattice.diffuse(points, *at)[0], smoothed, atol=1e-6)


def test_splits_are_disjoint_and_data_is_dequantized_within_its_levels():
    pytest.importorskip("sklearn")
    digits = Digits()
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1197, 296, 304]
    drawn = (digits.draw(200, torch.Generator().manual_seed(0)) + 1) * 17 / 2
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 17
    rows = {tuple(row) for row in digits.train.tolist()}
    assert {tuple(row) for row in drawn.floor().tolist()} <= rows


def test_a_grid_that_is_coarser_than_the_noise_is_refused():
    """Its density of many wells was off by 3 nats under VP with the default t_min."""
    at = [value.expand(3) for value in levels(1.0, 0.001)]
    with pytest.raises(ValueError, match=r"expected 0\.004, .* or more; got 0\.001\."):
        many_well(2).diffuse(torch.zeros(3, 2, dtype=torch.float64), *at)


class Board:
    """The true score of the checkerboard, as oracles give it."""

    def score(self, x, alpha, sigma):
        return Checkerboard().diffuse(x, alpha, sigma)[1]


@pytest.mark.parametrize(
    ("name", "exact", "tolerance"),
    [("mixture, d = 1, VP", paper_mixture(), 1e-4), ("checkerboard, d = 2", Board(), 1e-3)],
    ids=["mixture", "board"],
)
def test_the_exact_score_is_at_no_distance(name, exact, tolerance):
    cell = small(name, solver=256, points=4, scored=2)
    model = hosm.ScoreModel(mixture_noise(exact, cell.schedule), cell.schedule)
    assert log_ratio(cell, model, 2).abs().max() < tolerance
    found = score(cell, model, 2)
    truth = cell.at_t_min[2].reshape(8, 4, -1)[:, :2].square().sum(-1).mean()
    assert max(found["score_mean"]) < 1e-4 * truth
    assert max(found["j_sm"]) < 1e-8


@pytest.fixture
def _drawn_from_data(monkeypatch):
    """Times, noises and probes are functions of the rows."""

    def fixed(loss, order):
        def call(model, x0, *, time_sampler=None, generator=None, **how):
            how |= {"t": 0.1 + 0.8 * x0[:, 0].sin().square(), "noise": (37 * x0).sin()}
            if order > 1:
                how["probe"] = (91 * x0).sin().sign()
            return loss(model, x0, **how)

        return call

    for order, name in enumerate(("first_order_dsm", "second_order_dsm", "third_order_dsm"), 1):
        monkeypatch.setattr(hosm, name, fixed(getattr(hosm, name), order))


@pytest.mark.usefixtures("_drawn_from_data")
@pytest.mark.parametrize("name", list(worth.rows(small())))
def test_members_of_an_ensemble_have_the_gradients_they_have_alone(name):
    cell, seeds = small(), (0, 1, 2)
    model, recipe = cell.model(seeds).double(), worth.rows(cell)[name]
    drawn = (8 + recipe.more) * len(seeds)
    x = cell.draw(drawn, torch.Generator().manual_seed(0)).double()
    worth.EnsembleLoss(cell, recipe, model, len(seeds))(x, None).backward()
    for i, seed in enumerate(seeds):
        alone = cell.model([seed]).double()
        worth.EnsembleLoss(cell, recipe, alone, 1)(x[i :: len(seeds)], None).backward()
        for both, single in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(len(seeds) * both.grad[i : i + 1], single.grad, atol=1e-10)


@pytest.mark.usefixtures("_drawn_from_data")
def test_a_fraction_is_that_of_the_library(monkeypatch):
    """Of the first rows, where the library takes random ones."""
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))
    cell, recipe = small(), Recipe(3, "one", fraction=0.5)
    model = cell.model([0]).double()
    x = cell.draw(8, torch.Generator().manual_seed(0)).double()
    found = worth.EnsembleLoss(cell, recipe, model, 1)(x, None)
    weights = worth.weights_of(recipe, 2)
    expected = hosm.third_order_dsm(model, x, fraction=0.5, weights=weights)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("problem", ["many-well, d = 2", "mixture, d = 1, VP"])
def test_a_quiet_row_has_the_mean_of_the_row_as_drawn(problem):
    """Its loss is the mean over ±ε of the averaged row's, over the density of its own member."""
    cell, members, generator = small(problem), 2, torch.Generator().manual_seed(0)
    low, high = cell.schedule.log_sigma_hat_range
    vp = problem.endswith("VP")
    model = cell.model(range(members)).double()
    recipe = worth.rows(cell)["one, averaged, pairs, times"]
    loss = worth.EnsembleLoss(cell, recipe, model, members)
    for own in loss.times.members:
        own.m.copy_(0.1 + torch.rand(len(own.m), generator=generator))
    x = cell.draw(8 * members, generator).double()
    found = loss(x, torch.Generator().manual_seed(1)).detach()

    generator, x0 = torch.Generator().manual_seed(1), x[: 4 * members]
    t, spread = loss.times.draw(cell.schedule, x0, generator, uniform=vp)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    averaged = worth.MemberTargets(batch=x, members=members, averaged=True)
    how = {"t": t, "targets": averaged, "reduction": "none"}
    both = [hosm.first_order_dsm(model, x0, noise=eps, **how) for eps in (noise, -noise)]
    terms = spread / (high - low) * sum(both) / 2
    scale = (high - low) * cell.density.elements if vp else 1
    assert float(found) == pytest.approx(scale * float(terms.detach().mean()), rel=1e-12)

    for i, own in enumerate(loss.times.members):
        weighting = "likelihood" if vp else "noise"
        objective = hosm.FirstOrderDSM(model, time_sampler=own, weighting=weighting)
        middles, density = own.density(objective)
        levels = cell.schedule.log_sigma_hat(t[i::members])
        nearest = (levels[:, None] - middles).abs().argmin(1)
        assert torch.allclose(spread[i::members] * density[nearest], torch.ones(4).double())


@pytest.mark.parametrize(
    "name", ["one, scores, averaged, pairs, times", "two, averaged, pairs, times"]
)
def test_a_member_learns_its_times_as_it_would_alone(name):
    cell, seeds = small(), (0, 1, 2)
    recipe, count = worth.rows(cell)[name], len(seeds)
    x = cell.draw(8 * count, torch.Generator().manual_seed(0))

    def learnt(x, seeds, scale=1.0):
        """What each learns after a step from parameters of which the first member's are scaled."""
        model = cell.model(seeds)
        loss = worth.EnsembleLoss(cell, recipe, model, len(seeds))
        optimizer = torch.optim.Adam(model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[:1] *= scale
                parameter.grad = parameter.cos()
        optimizer.step()
        before = [parameter.clone() for parameter in model.parameters()]
        loss.learn(x, optimizer, torch.Generator().manual_seed(1))
        assert all(map(torch.equal, before, model.parameters()))
        return torch.stack([own.m for own in loss.times.members])

    together = learnt(x, seeds)
    assert len(torch.unique(together, dim=0)) == count
    torch.testing.assert_close(learnt(x[::count], seeds[:1]), together[:1])
    other = x.clone()
    other[::count] *= -0.5
    for changed in (learnt(x, seeds, scale=2.0), learnt(other, seeds)):
        same = (changed == together).all(1)
        assert same.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("one", 16),
        ("one, times", 15),  # and 4 calls, a quarter of a step each
        ("one, averaged, pairs, times, 2,048 more", 14),  # and 4, a half each
        ("two, averaged, pairs, times", 7),
    ],
)
def test_all_evaluations_are_counted(name, steps, monkeypatch, rows_called, tmp_path):
    """Those of a step and of a call of `learn`, row by row, in a backward for each."""
    rows = rows_called(Ensemble)
    monkeypatch.setattr(times, "SMALL", 0)
    monkeypatch.setattr(worth, "EVERY", 3)
    monkeypatch.setattr(worth, "LEARNT", 2)
    cell = small(budget=16, seeds=2)
    recipe = worth.rows(cell)[name]
    study = worth.Study("cell", cell, {}, tmp_path, tmp_path)
    assert study.steps(recipe) == steps
    row = study.train(cell.model(range(2)), recipe, steps, [1e-3] * 2, "")
    assert row["evaluations"] == recipe.evaluations * sum(rows) / (2 * cell.batch)
    assert row["evaluations"] == 3 * cell.budget


def test_a_row_that_was_cut_off_is_made_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(worth, "EVERY", 3)
    name, original, cell = "one, averaged, pairs, times", worth.training, small()

    def cut_off(*arguments):
        for step, _ in enumerate(original(*arguments)):
            if step == 4 and len(arguments[-1]) == cell.seeds:
                raise KeyboardInterrupt
            yield

    def run(directory):
        study = worth.Study("cell", cell, {}, directory, directory)
        study.run(f"^{name}$")
        return json.loads(study.file.read_text())

    whole = run(tmp_path / "whole")
    assert [*whole["rows"]] == [f"rates: {name}", name]
    with monkeypatch.context() as patch:
        patch.setattr(worth, "training", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed")
    torch.manual_seed(7)
    assert run(tmp_path / "resumed") == whole


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("one, times", "one"),
        ("one, scores, matrix", "one"),
        ("one, averaged, pairs, times, 2,048 more", "one, averaged"),
        ("one, scores, averaged, times", "one, scores, averaged"),
        ("two, averaged, pairs, times", "one, averaged, pairs, times"),
        ("three, averaged, fraction 1, weights × .1", "one, averaged"),
        ("one, own rate", "one"),
        ("one, averaged, own rate", "one, own rate"),
        ("one, averaged, pairs, times, own rate", "one, averaged, own rate"),
    ],
)
def test_a_row_is_compared_with_one_that_differs_in_one_respect(name, base):
    assert base_of(name) == base


def test_each_member_trains_at_its_own_rate(monkeypatch):
    cell, rates = small(), [1e-2, 1e-3]

    def loss_of(cell, recipe, model, members):
        return lambda *_: sum((p - 1).square().sum() for p in model.parameters())

    monkeypatch.setattr(worth, "EnsembleLoss", loss_of)
    both, recipe = cell.model([7, 7]), Recipe(1, "one")
    list(worth.training(cell, both, recipe, 3, rates))
    for i, rate in enumerate(rates):
        alone = cell.model([7])
        list(worth.training(cell, alone, recipe, 3, [rate]))
        for parameter, single in zip(both.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(parameter[i], single[0], atol=1e-7)


@pytest.mark.parametrize("elements", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_weights_are_those_that_the_library_ships(order, elements):
    shipped = check_weights(None, order, elements)[: order + (order > 1)]
    assert worth.weights_of(Recipe(order, "one"), elements) == pytest.approx(shipped)
    first, *higher = worth.weights_of(Recipe(order, "one", scale=0.1), elements)
    assert (first, *higher) == pytest.approx((1, *(0.1 * weight for weight in shipped[1:])))


def test_effective_size_by_hand():
    log_w = torch.tensor([[1.0, 3.0], [2.0, 2.0]]).double().log() - 4.9
    assert effective_size(log_w) == pytest.approx([0.8, 1.0])
    with pytest.raises(ValueError, match="got 1 of 2"):
        finite(torch.tensor([0.0, torch.nan]))


def test_intervals_over_seeds_are_those_of_student():
    for freedom, quantile in enumerate(STUDENT, 1):
        share = freedom / (freedom + quantile**2)
        outside = mpmath.betainc(freedom / 2, 0.5, 0, share, regularized=True)
        assert float(outside) == pytest.approx(0.05, abs=4e-5)
    seeds, blocks = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 2.0, 2.0, 0.0])
    found = over_seeds(5 + seeds[:, None] + blocks)
    assert found.value == 6
    half = 4.303 * (1 / 3 + (4 / 3) / 4) ** 0.5
    assert (found.low, found.high) == pytest.approx((6 - half, 6 + half))
    alone = over_seeds(blocks[None])
    assert (alone.value, alone.high) == pytest.approx((1, 1 + 3.182 * (4 / 3 / 4) ** 0.5))


def test_rows_are_compared_by_seed_and_block_without_seeds_that_lost_a_mode():
    kl, log_score = torch.rand(5, 8).double() + 1, torch.randn(5, 8).double()
    base = {"kl": kl.tolist(), "log_score": log_score.tolist(), "lost": [0.0] * 5}
    row = base | {"kl": (0.7 * kl).tolist(), "log_score": (log_score - 2).tolist()}
    ratios = compare(row, base)
    # What all seeds and points share has no error.
    assert ratios["kl"] == pytest.approx([0.7] * 3)
    assert ratios["score"] == pytest.approx([math.exp(-2)] * 3)
    # The geometric mean over seeds, whose interval holds no number below 0.
    factors = torch.tensor([0.01, 0.1, 0.1, 0.1, 1.0])
    row |= {"kl": (factors[:, None] * kl).tolist()}
    half = 2.776 * math.log(10) * (2 / 4 / 5) ** 0.5
    expected = [0.1, 0.1 * math.exp(-half), 0.1 * math.exp(half)]
    assert compare(row, base)["kl"] == pytest.approx(expected)
    # A seed is left out where either row has lost a mode: of the first and the last here.
    row |= {"lost": [0.02, 0.01, 0.0, 0.0, 0.0]}
    assert compare(row, base | {"lost": [0.0] * 4 + [0.5]})["kl"] == pytest.approx([0.1] * 3)
    assert math.isnan(compare(row | {"lost": [1.0] * 4 + [0.0]}, base)["kl"].value)
    # One block may be below 0, as the mean of r over few points is.
    below = kl - 2 * (torch.arange(8) == 0)
    rows = (base | {"kl": values.tolist()} for values in (below, 2 * below))
    assert compare(*rows)["kl"].value == pytest.approx(0.5)
    # Two seeds below 0 have no ratio either.
    below = base | {"kl": [(-kl[0]).tolist(), *kl[1:].tolist()]}
    assert math.isnan(compare(below, below)["kl"].value)
    assert compare(below, below)["score"].value == 1


def test_rates_are_chosen_by_the_mean_of_the_spare_seeds():
    row = {"kl": [1.0, 9.0, 4.0, 5.0, 0.0, None]}
    assert by_rate(row, [3.0, 2.0, 1.0]) == {3.0: 5.0, 2.0: 4.5}
    assert by_rate({"failed": "why"}, [3.0]) == {}


def test_one_cell_of_each_low_dimension_searches_its_rates():
    cells = {name: make() for name, make in CELLS.items() if "digits" not in name}
    searched = [name for name, cell in cells.items() if cell.searched]
    assert searched == list(worth.SEARCHED)
    assert [cells[name].density.elements for name in searched] == [1, 2, 4]


def test_settings_of_the_recipe_differ_from_its_base(tmp_path):
    studies = list(recipe.studies("", {}, smoke=False, out=tmp_path))
    timed = [study for *_, study in studies if isinstance(study, recipe.TimedStudy)]
    assert [study.cell.sizes.width for study in timed] == [512] * 4
    settings = [name for name in recipe.SETTINGS if "equal time" not in name]
    cells = {}
    for name, setting, study in studies:
        if study in timed:
            continue
        rate, kind = recipe.SETTINGS[setting].rate, type(study)
        cells.setdefault(name, set()).add((rate, kind, repr(replace(study.cell, density=None))))
    *searched, transferred = cells.values()
    assert [len(found) for found in searched] == [len(settings)] * 3
    assert sorted(rate for rate, *_ in transferred) == [3e-4, 1e-3, 3e-3, 3e-3, 1e-2]
    assert len({text for *_, text in transferred}) == 1


@pytest.mark.parametrize("name", [*recipe.ROWS])
def test_a_network_alone_trains_by_the_modules_as_one_of_an_ensemble(monkeypatch, name):
    monkeypatch.setattr(worth, "EVERY", 2)
    cell = small(uniform_in_t=True)
    row, member, alone = worth.rows(cell)[name], cell.model([1]), cell.model([1])
    list(recipe.training_alone(cell, alone, row, 6, 1e-3, 1, 2))
    list(worth.training(cell, member, row, 6, [1e-3]))
    for own, other in zip(alone.parameters(), member.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=0, atol=1e-6)


def test_a_timed_row_has_the_steps_that_its_cost_leaves(tmp_path, monkeypatch):
    costs = {"one": 1.0, "one, averaged": 1.25, "one, averaged, pairs, times": 2.0}

    def times(routes, rounds):
        for route in routes.values():
            route()
        return {name: [0.5 * costs[name], 1.5 * costs[name]] * (rounds // 2) for name in routes}

    monkeypatch.setattr(recipe.experiment, "times", times)
    study = recipe.TimedStudy("cell", small(), {}, tmp_path, tmp_path)
    row = study.finish(study.cell.model, worth.rows(study.cell)["one, averaged"], 1e-3, "")
    assert row["steps"] == round(study.cell.budget / 1.25)
    assert study.rows["costs"]["over plain"] == costs
    assert study.rows["costs"]["seconds"] == 1.0


def test_times_are_those_of_the_schedule_where_a_cell_says_so():
    levels = []
    for uniform_in_t in (False, True):
        cell, times = small(schedule=hosm.VPSchedule(), uniform_in_t=uniform_in_t), []

        def network(x, t, times=times):
            times.append(t)
            return x

        model = hosm.ScoreModel(network, cell.schedule)
        loss = worth.EnsembleLoss(cell, Recipe(1, "one"), model, 1)
        x0 = torch.zeros(4096, cell.density.elements)
        loss(x0, torch.Generator().manual_seed(0))
        levels.append(cell.schedule.log_sigma_hat(times[0]).mean())
    low, high = cell.schedule.log_sigma_hat_range
    assert levels[0] == pytest.approx((low + high) / 2, abs=0.2)
    assert levels[1] > levels[0] + 1


def test_a_rate_is_transferred_from_all_cells_that_searched(tmp_path):
    for i in range(len(worth.SEARCHED)):
        with pytest.raises(SystemExit, match=f"got {i}"):
            worth.transferred_rate("one", tmp_path)
        kl = [1.0] * (2 * len(worth.RATES))
        kl[2 * (i % 3)] = kl[2 * (i % 3) + 1] = 0.0
        report = {"rows": {"rates: one": {"kl": kl}}}
        (tmp_path / f"{i}.json").write_text(json.dumps(report))
    assert worth.transferred_rate("one", tmp_path) == worth.RATES[1]


def test_a_rate_of_its_own_is_chosen_where_others_are_transferred(tmp_path, monkeypatch):
    monkeypatch.setattr(worth, "transferred_rate", lambda family, _: f"transferred: {family}")
    cell = small(searched=False)
    study, recipes = worth.Study("cell", cell, {}, tmp_path, tmp_path), worth.rows(cell)
    assert not [name for name in worth.rows(small()) if name.endswith(OWN)]
    assert study.rate(recipes["one"], cell.model) == "transferred: one"
    assert not study.rows
    assert study.rate(recipes["one, own rate"], cell.model) in worth.RATES
    assert [*study.rows] == ["rates: one, own rate"]


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    trained, original = [], worth.Study.train

    def train(self, *arguments):
        trained.append(arguments[-1])
        return original(self, *arguments)

    monkeypatch.setattr(worth.Study, "train", train)
    cell = small(long=8)
    names = [*worth.rows(cell)]

    def run(where):
        trained.clear()
        study = worth.Study("cell", cell, where, tmp_path, tmp_path / "weights")
        study.run()
        after = [f"after: {name}" for name in worth.SECOND_STAGE]
        assert {*ratios(study.report)} == {*names, "a third of long", "long", *after}
        return json.loads(study.file.read_text())

    one, other = {"commit": "a"}, {"commit": "b"}
    first = run(one)
    assert first["facts"]["elements"] == 2
    families = {recipe.family for recipe in worth.rows(cell).values()}
    assert len(families) == 4 + 6
    assert len(trained) == len(names) + len(families) + 2 + 2 * 3
    for name in names:
        row = first["rows"][name]
        assert torch.tensor(row["kl"]).shape == torch.tensor(row["log_score"]).shape == (5, 8)
        assert {len(row[key]) for key in ("j_sm", "effective_size", "lost")} == {5}
        assert first["environments"][row["environment"]] == one
        # Equal evaluations, but for a whole number of steps.
        recipe = worth.rows(cell)[name]
        assert row["evaluations"] == pytest.approx(3 * cell.budget, abs=recipe.evaluations / 2)
    assert run(other) == first
    assert trained == []
    lost = {name: row for name, row in first["rows"].items() if name != "two, averaged"}
    (tmp_path / "cell.json").write_text(json.dumps(first | {"rows": lost}))
    again = run(other)
    assert trained == ["two, averaged"]
    made = [report["rows"]["two, averaged"]["environment"] for report in (first, again)]
    assert (made, again["environments"]) == ([0, 1], [one, other])
    with pytest.raises(ValueError, match="'budget': 5"):
        worth.Study("cell", replace(cell, budget=5), {}, tmp_path, tmp_path)


def test_a_search_leaves_out_the_highest_rates_where_the_loss_diverges(tmp_path, monkeypatch):
    original = worth.Study.train

    def train(self, model, recipe, steps, rates, bar):
        if max(rates) > worth.RATES[5]:
            raise ValueError("outputs that are not finite")
        if max(rates) > worth.RATES[4]:
            raise hosm.DerivativeError("terms that are not finite")
        return original(self, model, recipe, steps, rates, bar)

    monkeypatch.setattr(worth.Study, "train", train)
    cell = small()
    study = worth.Study("cell", cell, {}, tmp_path, tmp_path)
    row = study.search(cell.model, worth.rows(cell)["two, averaged"])
    assert [kl is None for kl in row["kl"]] == [False] * 5 + [True] * 2
    assert [*by_rate(row, worth.RATES)] == [*worth.RATES[:5]]


def test_without_a_density_rows_are_compared_by_their_difference():
    """Of likelihoods, which may be negative, a ratio would mean nothing."""
    base = {"kl": [[-20.0, -22.0], [-21.0, -23.0]], "lost": [0.0, 0.0]}
    row = base | {"kl": [[-21.0, -23.0], [-22.0, -24.0]]}
    assert compare(row, base) == {"difference": pytest.approx([-1.0, -1.0, -1.0])}
    failed = {"two, averaged": {"failed": "why"}, "rates: two, averaged": {"kl": [0.0]}}
    found = ratios({"rows": {"one": base, "one, averaged": row} | failed})
    assert [*found] == ["one", "one, averaged", "two, averaged"]
    row = {"nats": -22.5, "lost": 0, "difference": pytest.approx([-1.0] * 3)}
    assert found["one, averaged"] == row
    assert found["two, averaged"] == {"nats": "failed"}


def test_the_noise_of_targets_is_the_loss_of_the_true_score():
    """Of a Gaussian N(0, 1) in each element, Var(ε | x) = 1/(1 + σ̂²): ∫ du over u = log σ̂."""
    cell = replace(small("many-well, d = 2"), density=standard_normals(), points=512)
    low, high = cell.schedule.log_sigma_hat_range
    exact = [u - math.log1p(math.exp(2 * u)) / 2 for u in (low, high)]
    found = facts(cell)
    assert found["elements"] == 2
    assert found["noise"] == pytest.approx(2 * (exact[1] - exact[0]), rel=0.02)
    assert facts(small("φ⁴ ring, d = 16")) == {"elements": 16, "noise": None}


def standard_normals():
    return Product([Line(lambda a: -(a**2) / 2, -8, 8, 2001)] * 2)


def test_rank_correlations_are_of_ranks_with_ties():
    assert rank_correlation([1, 10, 100], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([0, 5, 5, 6], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_the_dependence_is_over_cells_that_have_the_row():
    def report(elements, ratio, noise):
        known = {"log_score": [[0.0, 1.0]] * 2, "lost": [0, 0]}
        plain = known | {"kl": [[1.0, 1.0]] * 2, "j_sm": [0.5 * elements] * 2}
        averaged = known | {"kl": [[ratio, ratio]] * 2}
        rows = {"one": plain, "one, averaged": averaged}
        return {"rows": rows, "facts": {"elements": elements, "noise": noise}}

    reports = [
        report(1, 0.2, 9.0),
        report(2, -0.1, None),
        report(4, 0.6, 3.0),
        report(8, 0.9, 1.0),
    ]
    found = dependence(reports)
    assert found.keys() == {"one, averaged: kl", "one, averaged: score"}
    row = found["one, averaged: kl"]
    assert row["cells"] == 4
    # A KL divergence below 0 ranks lowest, and a cell without noise is left out of its column.
    assert row["elements"] == pytest.approx(0.8)
    assert row["noise"] == pytest.approx(-1)
    assert row["gap"] == pytest.approx(-0.8)
