"""The study on finite data: points, the choice of a checkpoint, comparisons."""

from dataclasses import replace

import pytest
import torch

import hosm_losses as hosm

pytest.importorskip("matplotlib")

from benchmarks import finite, worth
from benchmarks.experiment import seeded
from benchmarks.worth_problems import CELLS

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
    drawn = torch.cat([cell.draw(6 * 200, seeded(seed)) for seed in (1, 2)])
    assert not torch.equal(drawn[::6], drawn[1::6])
    own = [points(drawn[2 * i :: 6]) for i in range(3)]
    assert [points(drawn[2 * i + 1 :: 6]) for i in range(3)] == own
    assert [len(each) for each in own] == [16] * 3
    assert len(set().union(*own)) == 48
    train, validation = small(seeds=3).data
    assert [points(train[:, i]) for i in range(3)] == own
    fresh = points(validation.flatten(0, 1))
    assert len(fresh) == 48
    assert fresh.isdisjoint(set().union(*own))


def test_digits_are_validated_by_the_split_of_their_own():
    pytest.importorskip("sklearn")
    cell = small("digits, d = 64", fixed=None)
    splits = [points(part) for part in (cell.density.train, cell.density.validation)]
    for drawn, split in zip((cell.draw(200, seeded(0)), cell.data[1][:, 1]), splits, strict=True):
        assert points(((drawn + 1) * 17 / 2).floor()) <= split
    assert splits[0].isdisjoint(splits[1] | points(cell.density.test))


def test_a_member_is_validated_by_order_one_at_noises_and_times_that_stay(monkeypatch):
    """At times uniform in log σ̂, from end to end; the rates of a seed alike."""
    monkeypatch.setattr(finite, "MOST", 40)
    cell, model = small(), small().model(range(2))
    found = cell.validate(model)
    torch.manual_seed(5)
    assert torch.equal(cell.validate(model), found)
    t = cell.schedule.time(torch.linspace(*cell.schedule.log_sigma_hat_range, 32))
    x0, noise = cell.data[1].repeat(2, 1, 1), torch.randn((32, 2, 2), generator=seeded(3))
    for i in range(2):
        exact = hosm.first_order_dsm(cell.model([i]), x0[:, i], t=t, noise=noise[:, i])
        assert float(found[i]) == pytest.approx(float(exact.detach()), rel=1e-5)
    several = small(rates=(1e-2, 1e-3))
    twice = several.validate(several.model(several.members))
    assert twice.tolist() == pytest.approx(found.repeat_interleave(2).tolist(), rel=1e-5)


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
    assert torch.equal(torch.tensor(row["kl"]), torch.stack([states[1][0], states[3][3]]))
    assert torch.equal(torch.tensor(row["end"]["kl"]), states[4][[1, 3]])


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_row_is_trained_as_in_the_study_of_fresh_data(tmp_path, monkeypatch, decay):
    """Validation is no part of it, and judged is a running average of the weights."""
    weights = []

    def watched(cell, model, *rest):
        for _ in worth_training(cell, model, *rest):
            weights.append([parameter.detach().clone() for parameter in model.parameters()])
            yield

    worth_training = worth.training
    monkeypatch.setattr(worth, "training", watched)
    monkeypatch.setattr(finite, "DECAY", decay)
    monkeypatch.setattr(times, "SMALL", 0)
    monkeypatch.setattr(worth, "EVERY", 3)
    cell = small(budget=16)
    row, model = worth.rows(cell)[QUIET], cell.model(range(2))
    plain = worth.Study("plain", cell, {}, tmp_path, tmp_path)
    expected = plain.finish(cell.model, row, 1e-3, "")
    with torch.no_grad():  # 1/10, 2/11, … of what was there is kept, and at most `decay`
        for step, fast in enumerate(weights, 1):
            for slow, new in zip(model.parameters(), fast, strict=True):
                slow.lerp_(new, 1 - min(decay, step / (step + 9)))
    found = finite.FiniteStudy("finite", cell, {}, tmp_path, tmp_path).validated(row, "")
    assert (found["evaluations"], found["steps"]) == (expected["evaluations"], expected["steps"])
    assert found["end"]["kl"] == finite.judge(cell, model, 2)["kl"]
    assert (found["end"]["kl"] == expected["kl"]) == (decay == 0)


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
