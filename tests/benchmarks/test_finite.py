"""The study on finite data: points, the choice of a checkpoint, comparisons, resumption."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import hosm_losses as hosm

pytest.importorskip("matplotlib")

from benchmarks import experiment, finite, worth
from benchmarks.worth_problems import CELLS, Ensemble

from hosm_losses.losses import times

QUIET = "one, averaged, pairs, times"


def small(name="many-well, d = 2", *, fixed: int | None = 16, **changes) -> finite.FiniteCell:
    cell = finite.FiniteCell(**vars(CELLS[name]()), fixed=fixed)
    return replace(cell.small(), **{"seeds": 2, "long": None, "rates": (1e-3,)} | changes)


def points(rows):
    return {tuple(row) for row in rows.tolist()}


def test_members_draw_points_of_their_own_that_stay():
    """And so does each rate of a seed, in its own order."""
    cell = small(seeds=3, rates=(1e-2, 1e-3))
    drawn = [cell.draw(6 * 200, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert torch.equal(cell.draw(6 * 200, torch.Generator().manual_seed(1)), drawn[0])
    assert not torch.equal(drawn[0][::6], drawn[0][1::6])
    own = [points(torch.cat(drawn)[2 * i :: 6]) for i in range(3)]
    assert [points(torch.cat(drawn)[2 * i + 1 :: 6]) for i in range(3)] == own
    assert [len(each) for each in own] == [16] * 3
    assert len(set().union(*own)) == 48
    train, validation = small(seeds=3).data
    assert [points(train[:, i]) for i in range(3)] == own
    fresh = points(validation.flatten(0, 1))
    assert len(fresh) == 48
    assert fresh.isdisjoint(set().union(*own))


def test_there_are_at_most_so_many_points_to_validate_by(monkeypatch):
    monkeypatch.setattr(finite, "MOST", 10)
    assert [len(part) for part in small().data] == [16, 10]
    assert [len(part) for part in small(fixed=4).data] == [4, 4]
    assert [len(part) for part in small(fixed=None).data] == [0, 10]


def test_digits_are_validated_by_the_split_of_their_own():
    pytest.importorskip("sklearn")
    cell = small("digits, d = 64", fixed=None)
    images, validation = cell.density.validation, cell.data[1]
    for i in range(2):
        assert torch.equal(((validation[:, i] + 1) * 17 / 2).floor(), images)
    train = points(cell.density.train)
    assert points(((cell.draw(20, torch.Generator()) + 1) * 17 / 2).floor()) <= train


def test_a_member_is_validated_by_order_one_at_noises_and_times_that_stay(monkeypatch):
    """At times uniform in log σ̂, from end to end, at each point as often."""
    monkeypatch.setattr(finite, "MOST", 40)
    cell, calls, forward = small(), [], Ensemble.forward

    def recorded(self, x, t):
        calls.append(cell.schedule.log_sigma_hat(t))
        return forward(self, x, t)

    monkeypatch.setattr(Ensemble, "forward", recorded)
    model, same = cell.model(range(2)), cell.model([1, 1])
    found = cell.validate(model)
    torch.manual_seed(5)
    assert torch.equal(cell.validate(model), found)
    assert found[0] != found[1]
    assert cell.validate(same)[1] == pytest.approx(float(found[1]), rel=1e-5)

    low, high = cell.schedule.log_sigma_hat_range
    for i in range(2):
        assert torch.allclose(calls[0][i::2], torch.linspace(low, high, 32), atol=1e-4)
    x0 = cell.data[1].repeat(2, 1, 1)[:, 1]
    t = cell.schedule.time(torch.linspace(low, high, 32))
    noise = torch.randn((32, 2, 2), generator=torch.Generator().manual_seed(3))[:, 1]
    exact = hosm.first_order_dsm(cell.model([1]), x0, t=t, noise=noise)
    assert float(found[1]) == pytest.approx(float(exact.detach()), rel=1e-5)


def test_what_is_validated_is_a_running_average_of_the_weights(tmp_path, monkeypatch):
    weights, found = [], []

    def training(cell, model, recipe, steps, rates):
        for step in range(steps):
            for parameter in model.parameters():
                parameter.data.fill_(step)
            weights.append(float(step))
            yield

    def validate(cell, model):
        found.extend(float(p.detach().flatten()[0]) for p in model.parameters())
        return torch.zeros(2)

    monkeypatch.setattr(finite, "TENTHS", 1)
    monkeypatch.setattr(finite, "DECAY", 0.5)
    monkeypatch.setattr(worth, "training", training)
    monkeypatch.setattr(finite, "judge", lambda cell, model, members: {})
    monkeypatch.setattr(finite.FiniteCell, "validate", validate)
    cell = small(budget=20)
    finite.FiniteStudy("cell", cell, {}, tmp_path, tmp_path).validated(worth.rows(cell)["one"], "")
    # 1/10, 2/11, … of what was there is kept until half of it is.
    expected = weights[0]
    for step, weight in enumerate(weights, 1):
        kept = min(0.5, step / (step + 9))
        expected = kept * expected + (1 - kept) * weight
    assert found == pytest.approx([expected] * len(found), rel=1e-5)
    assert found[0] < 18.5


def test_the_rates_of_a_seed_are_validated_alike():
    """Else the noises of the validation would choose among them."""
    cell = small(rates=(1e-2, 1e-3))
    a, b, c, d = cell.validate(cell.model(cell.members)).tolist()
    assert a == pytest.approx(b, rel=1e-6)
    assert c == pytest.approx(d, rel=1e-6)
    assert a != pytest.approx(c, rel=1e-3)


def test_the_choice_of_a_seed_is_by_validation_alone(tmp_path, monkeypatch):
    """Nothing is judged before all are validated; then the choice of each seed is, and its end."""
    # Of two seeds at two rates each, after each fifth of the steps.
    every = [[3, 3, 2, 8], [1, 3, 2, 8], [1, 3, 3, 8], [2, 3, 5, 1], [2, 1.5, 9, 4]]
    losses, events, states = iter(every), [], []

    def state(model):
        return torch.cat([each.detach().flatten(1) for each in model.parameters()], 1)

    def validate(cell, model):
        events.append("validated")
        states.append(state(model))
        return torch.tensor(next(losses))

    def judge(cell, model, members):
        events.append("judged")
        return {"kl": state(model).tolist()}

    monkeypatch.setattr(finite, "TENTHS", 5)
    monkeypatch.setattr(finite.FiniteCell, "validate", validate)
    monkeypatch.setattr(finite, "judge", judge)
    cell = small(budget=10, rates=(1e-3, 1e-2))
    study = finite.FiniteStudy("cell", cell, {}, tmp_path, tmp_path)
    row = study.validated(worth.rows(cell)["one"], "")
    assert events == ["validated"] * 5 + ["judged"] * 2
    assert (row["chosen"], row["rate"]) == ([4, 8], [1e-3, 1e-2])
    assert (row["end"]["chosen"], row["end"]["rate"]) == ([10, 10], [1e-2, 1e-2])
    assert torch.tensor(row["validation"]).flatten(1).tolist() == every
    assert torch.equal(torch.tensor(row["kl"]), torch.stack([states[1][0], states[3][3]]))
    assert torch.equal(torch.tensor(row["end"]["kl"]), states[4][[1, 3]])


def test_validation_is_no_part_of_the_training_and_not_counted(tmp_path, monkeypatch, rows_called):
    """With one rate and no average, the end is what it is in the study of fresh data."""
    validate = finite.FiniteCell.validate

    def quietly(cell, model):
        before = len(rows)
        found = validate(cell, model)
        del rows[before:]
        return found

    monkeypatch.setattr(finite, "DECAY", 0.0)
    monkeypatch.setattr(times, "SMALL", 0)
    monkeypatch.setattr(worth, "EVERY", 3)
    monkeypatch.setattr(worth, "LEARNT", 2)
    cell = small(budget=16)
    recipe = worth.rows(cell)[QUIET]
    plain = worth.Study("plain", cell, {}, tmp_path, tmp_path)
    expected = plain.finish(cell.model, recipe, 1e-3, "")
    study = finite.FiniteStudy("finite", cell, {}, tmp_path, tmp_path)
    rows = rows_called(Ensemble)
    with monkeypatch.context() as patch:
        patch.setattr(finite.FiniteCell, "validate", quietly)
        patch.setattr(finite, "judge", lambda cell, model, members: {})
        row = study.validated(recipe, "")
    assert row["evaluations"] == recipe.evaluations * sum(rows) / (2 * cell.batch)
    assert (row["evaluations"], row["steps"]) == (expected["evaluations"], expected["steps"])
    assert study.validated(recipe, "")["end"]["kl"] == expected["kl"]


def test_rows_are_compared_with_plain_ones_by_seed_at_the_choice_and_at_the_end():
    """A seed that has lost a mode stays, and a row that failed says so."""

    def row(choice, end):
        judged = [
            {"kl": [[factor, factor], [2 * factor, 2 * factor]], "lost": [0.5, 0.0]}
            | {"log_score": [[0.0, 0.0]] * 2}
            for factor in (choice, end)
        ]
        return judged[0] | {"end": judged[1]}

    rows = {"one": row(1.0, 2.0), QUIET: row(0.5, 3.0), "one, averaged": {"failed": "why"}}
    found = finite.compared({"rows": rows})
    assert found[f"{QUIET}, choice"]["kl"] == pytest.approx([0.5] * 3)
    assert found[f"{QUIET}, end"]["kl"] == pytest.approx([1.5] * 3)
    assert found["one, end"] == {"nats": 3.0, "lost": 0}
    assert found["one, averaged, end"] == {"nats": "failed"}


def test_cells_are_those_of_the_study_with_five_seeds():
    pytest.importorskip("sklearn")
    for name in ("digits, d = 64", *worth.SEARCHED, "many-well, d = 8, rotated"):
        changed = [title for title in finite.CHANGES if title.startswith(name)]
        for title in changed:
            fields = {"seeds": 5, "long": None} | finite.CHANGES[title]
            expected = replace(finite.FiniteCell(**vars(CELLS[name]())), density=None, **fields)
            assert repr(replace(finite.finite_cell(title), density=None)) == repr(expected)
    assert finite.finite_cell("checkerboard, d = 2, 10,000 points").fixed == 10_000
    assert finite.finite_cell("checkerboard, d = 2, 81,000 steps").budget == 81_000


def test_a_study_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    trained, original = [], worth.training

    def training(cell, model, recipe, steps, rates):
        trained.append(recipe.family)
        return original(cell, model, recipe, steps, rates)

    def cut_off(cell, model, recipe, steps, rates):
        for step, _ in enumerate(training(cell, model, recipe, steps, rates)):
            if step == 4 and recipe.times:
                raise KeyboardInterrupt
            yield

    def run(out):
        options = ["--cells", "board.* 1,000 points", "--rows", "^one$|pairs", "--smoke"]
        monkeypatch.setattr(sys, "argv", ["finite", *options, "--out", str(out)])
        finite.main()
        (file,) = out.glob("*.json")
        return json.loads(file.read_text())

    monkeypatch.setattr(worth, "EVERY", 3)
    monkeypatch.setattr(experiment, "environment", lambda _: {"commit": "a"})
    monkeypatch.setattr(worth, "training", training)
    whole = run(tmp_path / "whole")
    assert [*whole["rows"]] == ["one", QUIET]
    with monkeypatch.context() as patch:
        patch.setattr(worth, "training", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed")
    trained.clear()
    torch.manual_seed(7)
    assert run(tmp_path / "resumed") == whole
    assert trained == ["one, averaged, pairs, times"]
