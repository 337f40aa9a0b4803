"""The study of the losses: ensembles, equal costs, quantities, resumption."""

import json
import math
from dataclasses import replace

import mpmath
import pytest
import torch

import hosm_losses as hosm

pytest.importorskip("matplotlib")

from benchmarks import recipe, worth
from benchmarks.experiment import seeded
from benchmarks.intervals import STUDENT, over_seeds
from benchmarks.worth import Recipe
from benchmarks.worth_problems import CELLS, Cell, Ensemble
from benchmarks.worth_quantities import (
    base_of,
    by_rate,
    compare,
    dependence,
    effective_size,
    finite,
    rank_correlation,
    ratios,
)

from hosm_losses.losses import times
from hosm_losses.losses.options import check_weights


def small(name="many-well, d = 2", **changes) -> Cell:
    return replace(CELLS[name]().small(), **changes)


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
    model, row = cell.model(seeds).double(), worth.rows(cell)[name]
    x = cell.draw(8 * len(seeds), seeded(0)).double()
    worth.EnsembleLoss(cell, row, model, len(seeds))(x, None).backward()
    for i, seed in enumerate(seeds):
        alone = cell.model([seed]).double()
        worth.EnsembleLoss(cell, row, alone, 1)(x[i :: len(seeds)], None).backward()
        for both, single in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(len(seeds) * both.grad[i : i + 1], single.grad, atol=1e-10)


@pytest.mark.usefixtures("_drawn_from_data")
def test_a_fraction_is_that_of_the_library(monkeypatch):
    """Of the first rows, where the library takes random ones."""
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))
    cell, row = small(), Recipe(3, "one", fraction=0.5)
    model, x = cell.model([0]).double(), cell.draw(8, seeded(0)).double()
    found = worth.EnsembleLoss(cell, row, model, 1)(x, None)
    weights = worth.weights_of(row, 2)
    expected = hosm.third_order_dsm(model, x, fraction=0.5, weights=weights)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", [*recipe.ROWS])
def test_a_network_alone_trains_by_the_modules_as_one_of_an_ensemble(monkeypatch, name):
    monkeypatch.setattr(worth, "EVERY", 2)
    cell = small(uniform_in_t=True, schedule=hosm.VPSchedule(t_min=1e-3))
    row, member, alone = worth.rows(cell)[name], cell.model([1]), cell.model([1])
    list(recipe.training_alone(cell, alone, row, 6, 1e-3, 1, 2))
    list(worth.training(cell, member, row, 6, [1e-3]))
    for own, other in zip(alone.parameters(), member.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=0, atol=1e-6)


def test_a_quiet_row_under_vp_has_the_objective_of_the_others():
    """Its loss is that of times uniform in log σ̂, times their range."""
    cell = small("mixture, d = 1, VP")
    model, x = cell.model([0]), cell.draw(2**16, seeded(0))
    names = ("one, averaged", "one, averaged, pairs, times")
    plain, quiet = (
        worth.EnsembleLoss(cell, worth.rows(cell)[name]._replace(averaged=False), model, 1)
        for name in names
    )
    low, high = cell.schedule.log_sigma_hat_range
    expected = (high - low) * plain(x, seeded(1)).item()
    assert quiet(x, seeded(1)).item() == pytest.approx(expected, rel=0.02)


def test_a_member_learns_its_times_as_it_would_alone():
    cell, seeds = small(), (0, 1, 2)
    row, count = worth.rows(cell)["one, scores, averaged, pairs, times"], len(seeds)
    x = cell.draw(8 * count, seeded(0))

    def learnt(x, seeds, scale=1.0):
        """What each learns after a step from parameters of which the first member's are scaled."""
        model = cell.model(seeds)
        loss = worth.EnsembleLoss(cell, row, model, len(seeds))
        optimizer = torch.optim.Adam(model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[:1] *= scale
                parameter.grad = parameter.cos()
        optimizer.step()
        loss.learn(x, optimizer, seeded(1))
        return torch.stack([own.m for own in loss.times.members])

    together = learnt(x, seeds)
    assert len(torch.unique(together, dim=0)) == count
    torch.testing.assert_close(learnt(x[::count], seeds[:1]), together[:1])
    other = x.clone()
    other[::count] *= -0.5
    for changed in (learnt(x, seeds, scale=2.0), learnt(other, seeds)):
        assert (changed == together).all(1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("one", 16),
        ("one, times", 15),  # and 4 calls, a quarter of a step each
        ("one, averaged, pairs, times", 14),  # and 4, a half each
        ("two, averaged", 8),
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


def test_a_timed_row_has_the_steps_that_its_cost_leaves(tmp_path, monkeypatch):
    costs = {"one": 2.0, "one, averaged": 2.5, "one, averaged, pairs, times": 4.0}

    def times(routes, rounds):
        return {name: [0.5 * costs[name], 1.5 * costs[name]] * (rounds // 2) for name in routes}

    monkeypatch.setattr(recipe.experiment, "times", times)
    study = recipe.TimedStudy("cell", small(), {}, tmp_path, tmp_path)
    row = study.finish(study.cell.model, worth.rows(study.cell)["one, averaged"], 1e-3, "")
    assert row["steps"] == round(study.cell.budget / 1.25)


def test_each_member_trains_at_its_own_rate(monkeypatch):
    cell, rates = small(), [1e-2, 1e-3]

    def loss_of(cell, recipe, model, members):
        return lambda *_: sum((p - 1).square().sum() for p in model.parameters())

    monkeypatch.setattr(worth, "EnsembleLoss", loss_of)
    both, row = cell.model([7, 7]), Recipe(1, "one")
    list(worth.training(cell, both, row, 3, rates))
    for i, rate in enumerate(rates):
        alone = cell.model([7])
        list(worth.training(cell, alone, row, 3, [rate]))
        for parameter, single in zip(both.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(parameter[i], single[0], atol=1e-7)


@pytest.mark.parametrize("elements", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_weights_are_those_that_the_library_ships(order, elements):
    shipped = [*check_weights(None, order, elements).values()][: order + (order > 1)]
    assert worth.weights_of(Recipe(order, "one"), elements) == pytest.approx(shipped)
    first, *higher = worth.weights_of(Recipe(order, "one", scale=0.1), elements)
    assert (first, *higher) == pytest.approx((1, *(0.1 * weight for weight in shipped[1:])))


def test_a_rate_is_transferred_from_all_cells_that_searched(tmp_path):
    for i in range(len(worth.SEARCHED)):
        with pytest.raises(SystemExit, match=f"got {i}"):
            worth.transferred_rate("one", tmp_path)
        kl = [1.0] * (2 * len(worth.RATES))
        kl[2 * (i % 3)] = kl[2 * (i % 3) + 1] = 0.0
        report = {"rows": {"rates: one": {"kl": kl}}}
        (tmp_path / f"{i}.json").write_text(json.dumps(report))
    assert worth.transferred_rate("one", tmp_path) == worth.RATES[1]


def test_a_study_goes_on_where_it_stopped_and_mixes_no_settings(tmp_path, monkeypatch):
    trained, training = [], worth.training

    def counted(cell, model, row, steps, rates):
        trained.append(row)
        return training(cell, model, row, steps, rates)

    def cut_off(cell, model, row, steps, rates):
        for step, _ in enumerate(training(cell, model, row, steps, rates)):
            if step == 2 and row.order == 2 and len(rates) == cell.seeds:
                raise KeyboardInterrupt
            yield

    cell, rows, one, other = small(long=8), "averaged$|long", {"commit": "a"}, {"commit": "b"}

    def run(directory, where):
        study = worth.Study("cell", cell, where, directory, directory / "weights")
        study.run(rows)
        return json.loads(study.file.read_text())

    monkeypatch.setattr(worth, "training", counted)
    whole = run(tmp_path / "whole", one)
    assert {row["environment"] for row in whole["rows"].values()} == {0}
    assert {*ratios(whole)} >= {"a third of long", "long", "after: three, averaged"}
    with monkeypatch.context() as patch:
        patch.setattr(worth, "training", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed", one)
    torch.manual_seed(7)
    trained.clear()
    resumed = run(tmp_path / "resumed", other)
    assert trained[0].order == 2
    assert resumed["environments"] == [one, other]
    for report in (whole, resumed):
        assert report.pop("environments")
        for row in report["rows"].values():
            row.pop("environment")
    assert resumed == whole
    with pytest.raises(ValueError, match="'budget': 5"):
        worth.Study("cell", replace(cell, budget=5), {}, tmp_path / "whole", tmp_path)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("one, times", "one"),
        ("one, scores, matrix", "one"),
        ("one, averaged, pairs, times", "one, averaged"),
        ("one, scores, averaged, pairs, times", "one, scores, averaged"),
        ("three, averaged, fraction 1, weights × .1", "one, averaged"),
        ("two, scores, averaged", "one, scores, averaged"),
        ("one, own rate", "one"),
        ("one, averaged, own rate", "one, own rate"),
        ("one, averaged, pairs, times, own rate", "one, averaged, own rate"),
        ("after: two, averaged", "after: one, averaged"),
    ],
)
def test_a_row_is_compared_with_one_that_differs_in_one_respect(name, base):
    assert base_of(name) == base


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

    facts = [(1, 0.2, 9.0), (2, -0.1, None), (4, 0.6, 3.0), (8, 0.9, 1.0)]
    found = dependence([report(*each) for each in facts])
    assert found.keys() == {"one, averaged: kl", "one, averaged: score"}
    row = found["one, averaged: kl"]
    assert row["cells"] == 4
    # A KL divergence below 0 ranks lowest, and a cell without noise is left out of its column.
    assert row["elements"] == pytest.approx(0.8)
    assert row["noise"] == pytest.approx(-1)
    assert row["gap"] == pytest.approx(-0.8)
