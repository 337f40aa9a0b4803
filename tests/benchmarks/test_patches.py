"""Patches of photographs: splits, equal evaluations, what is chosen by what, paired errors."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import patches
from benchmarks.experiment import seeded
from benchmarks.networks import UNet
from benchmarks.patches import AFTER, EQUAL, RATES, ROWS, STAGES, TEST, VALIDATION, WHOLE, Sizes
from benchmarks.worth import Recipe

import hosm_losses as hosm


def numbered():
    """Pictures whose pixels all differ, with a rim that fills no tile."""
    pictures, start = {}, 0
    for name in ("one", *WHOLE, "other"):
        height, width = 4 * 64 + 3, 5 * 64 + 7
        pixels = torch.arange(start, start + height * width, dtype=torch.float64)
        pictures[name], start = pixels.reshape(height, width), start + height * width
    return pictures


@pytest.fixture
def splits():
    """Tiles with levels of grey."""
    return [part.float() % patches.LEVELS for part in patches.split(numbered())]


def test_splits_share_no_pixel():
    pictures = numbered()
    train, *held_out = parts = patches.split(pictures)
    assert torch.cat(parts).unique().numel() == sum(part.numel() for part in parts)
    assert len(train) == 2 * 16
    for k in (VALIDATION, TEST):
        assert len(held_out[k]) == 2 * 20 + 2 * 2
    for name, k in WHOLE.items():
        assert torch.isin(pictures[name][: 4 * 64, : 5 * 64], held_out[k]).all()


def test_patches_are_connected_and_within_tiles_and_levels():
    train = patches.split(numbered())[0]
    levels = (patches.draw(train, 500, seeded(0)) + 1) * patches.LEVELS / 2
    pixels = levels.floor()
    assert torch.isin(pixels, train).all()
    assert (pixels.diff(dim=3) == 1).all()
    assert (pixels.diff(dim=2) == 5 * 64 + 7).all()
    inside = levels - pixels
    assert abs(inside.mean() - 1 / 2) < 5 / math.sqrt(12 * inside.numel())
    assert abs(inside.var() - 1 / 12) < 5 / math.sqrt(180 * inside.numel())


@pytest.mark.parametrize("row", ROWS)
def test_evaluations_are_equal(row, monkeypatch, rows_called, splits):
    rows, sizes = rows_called(UNet), Sizes(steps=5, batch=66)
    monkeypatch.setattr(patches, "EVERY", 3)
    patches.trained(row, splits[0], sizes, 1e-3, 0)
    assert sum(rows) == sizes.steps * sizes.batch
    assert sum(each for each in rows if each < sizes.batch) == (row == "times") * sizes.batch


def test_second_stages_have_equal_steps_and_evaluations():
    spent = {
        stage: times * Recipe(order, "").evaluations for stage, (order, times) in STAGES.items()
    }
    for stage, base in EQUAL.items():
        assert spent[stage] == spent[base]
        assert STAGES[stage][1] == STAGES["one"][1]


def test_validation_chooses_the_rate_and_the_test_judges(monkeypatch, splits):
    """A model that predicts no noise has a validation loss of 1, and others of more."""

    def constant(row, tiles, sizes, rate, seed):
        value = 0.0 if rate == RATES[1] else 1.0
        return hosm.ScoreModel(lambda x, t: 0 * x + value, patches.SCHEDULE)

    monkeypatch.setattr(patches, "trained", constant)
    found = patches.measure("plain", splits, Sizes(validation=64, test=2), 0)
    assert min(found["validation"]) == found["validation"][1] == pytest.approx(1, abs=0.1)
    # Without a score the density is that of the prior, N(0, σ_max²).
    x = patches.draw(splits[1 + TEST], 2, seeded(0)).double()
    variance = (50 * patches.STD) ** 2
    nll = 32 * math.log(2 * math.pi * variance) + x.square().sum((1, 2, 3)) / (2 * variance)
    assert found["nll"] == pytest.approx(nll.tolist(), rel=1e-5)


def test_differences_are_paired_by_patch():
    """Those of 1, 2 and 6: mean 3, variance 7, and an error of √(7/3)."""
    assert patches.paired([2.0, 5.0, 9.0], [1.0, 3.0, 3.0]) == (3.0, pytest.approx((7 / 3) ** 0.5))
    rows = {
        "times": {"seeds": [{"nll": [2.0, 5.0, 9.0]}, {"nll": [1.0, 1.0, 1.0]}]},
        "plain": {"seeds": [{"nll": [1.0, 3.0, 3.0]}, {"nll": [2.0, 2.0, 2.0]}]},
    }
    assert [mean for mean, _ in patches.compared(rows)["times"]["over plain"]] == [3, -1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_stage_leaves_the_first_one_as_it_is(stage, splits):
    first = hosm.ScoreModel(patches.Network(), patches.SCHEDULE)
    before = [parameter.clone() for parameter in first.parameters()]
    last = patches.continued(first, stage, splits[0], Sizes(batch=3, second=1), 1e-3, 0)
    assert all(map(torch.equal, first.parameters(), before))
    assert not all(map(torch.equal, last.parameters(), before))


def test_second_stages_are_chosen_by_validation_and_paired(monkeypatch, splits):
    """Models of Gaussian pixels, whose NLL and bound are known."""
    stds = dict(zip(STAGES, (0.6, 0.65, 0.7, 0.75, 0.8), strict=True))

    def gaussian(std):
        def noise(x, t):
            sigma = patches.SCHEDULE.sigma(t)[:, None, None, None]
            return sigma * x / (sigma**2 + std**2)

        return hosm.ScoreModel(noise, patches.SCHEDULE)

    def nll(x, std):
        return 32 * math.log(2 * math.pi * std**2) + x.square().sum((1, 2, 3)) / (2 * std**2)

    def continued(first, stage, tiles, sizes, rate, seed):
        return gaussian(stds[stage] if rate == AFTER[1] else 3.0)

    monkeypatch.setattr(patches, "trained", lambda *_: gaussian(0.55))
    monkeypatch.setattr(patches, "continued", continued)
    bound = hosm.variational_nll
    above = lambda *args, **how: SimpleNamespace(nll=bound(*args, **how).nll + 3)  # noqa: E731
    monkeypatch.setattr(hosm, "variational_nll", above)
    found = patches.second_stages(splits, Sizes(validation=8, test=16), 0)
    x = patches.draw(splits[1 + TEST], 16, seeded(0)).double()
    assert found["nll"] == pytest.approx(float(nll(x, 0.55).mean()), abs=0.1)
    gap, low, high = found["gap"]
    assert gap - low == pytest.approx(high - gap)
    assert abs(gap - 3) < 5 * (high - low) / (2 * 1.96) < 5
    bases = {"over equal steps": dict.fromkeys(EQUAL, "one"), "over equal evaluations": EQUAL}
    for stage, row in found["stages"].items():
        assert row["rate"] == AFTER[1] == AFTER[row["validation"].index(min(row["validation"]))]
        expected = {"change": 0.55}
        if stage in EQUAL:
            expected |= {key: stds[base[stage]] for key, base in bases.items()}
        for key, std in expected.items():
            difference = nll(x, stds[stage]) - nll(x, std)
            half = 1.96 * float(difference.std()) / 4
            mean = float(difference.mean())
            assert row[key] == pytest.approx((mean, mean - half, mean + half), abs=0.1)
