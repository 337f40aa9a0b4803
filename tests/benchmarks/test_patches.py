"""Patches of photographs: splits, equal evaluations, paired errors, resumption."""

import json
import math
import sys

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import patches
from benchmarks.networks import UNet
from benchmarks.patches import AFTER, EQUAL, ROWS, STAGES, TEST, VALIDATION, WHOLE, Sizes
from benchmarks.worth import Recipe

import hosm_losses as hosm

SMALL = Sizes(steps=5, batch=66)


def numbered():
    """Pictures whose pixels all differ, with a rim that fills no tile."""
    pictures, start = {}, 0
    for name in ("one", *WHOLE, "other"):
        height, width = 4 * 64 + 3, 5 * 64 + 7
        pixels = torch.arange(start, start + height * width, dtype=torch.float64)
        pictures[name], start = pixels.reshape(height, width), start + height * width
    return pictures


def test_splits_share_no_pixel():
    pictures = numbered()
    train, *held_out = parts = patches.split(pictures)
    assert torch.cat(parts).unique().numel() == sum(part.numel() for part in parts)
    assert len(train) == 2 * 16
    for k in (VALIDATION, TEST):
        assert len(held_out[k]) == 2 * 20 + 2 * 2
    for name, k in WHOLE.items():
        whole = pictures[name][: 4 * 64, : 5 * 64]
        assert torch.isin(whole, held_out[k]).all()


def test_patches_are_connected_and_within_tiles_and_levels():
    train = patches.split(numbered())[0]
    drawn = patches.draw(train, 500, patches.seeded(0))
    levels = (drawn + 1) * patches.LEVELS / 2
    pixels = levels.floor()
    assert drawn.shape == (500, 1, 8, 8)
    assert torch.isin(pixels, train).all()
    assert (pixels.diff(dim=3) == 1).all()
    assert (pixels.diff(dim=2) == 5 * 64 + 7).all()
    corners = pixels[:, 0, 0, 0]
    for place in (corners % (5 * 64 + 7), corners // (5 * 64 + 7) % (4 * 64 + 3)):
        assert len((place % 8).unique()) == 8
    inside = levels - pixels
    assert abs(inside.mean() - 1 / 2) < 5 / math.sqrt(12 * inside.numel())
    assert abs(inside.var() - 1 / 12) < 5 / math.sqrt(180 * inside.numel())


def test_the_network_adds_to_the_predictor_for_gaussian_pixels():
    """E[ε | x] for x₀ ~ N(0, s²), and the U-Net's output in units of the standard deviation."""
    network = patches.Network()
    torch.nn.init.zeros_(network.unet.outer.weight)
    torch.nn.init.ones_(network.unet.outer.bias)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    sigma = patches.SCHEDULE.sigma(t)[:, None, None, None]
    mean, variance = sigma * x / (sigma**2 + 0.4**2), 0.4**2 / (sigma**2 + 0.4**2)
    assert torch.allclose(network(x, t), mean + variance.sqrt())


@pytest.mark.parametrize("budget", range(1, 12))
def test_steps_are_as_many_as_the_budget_allows(budget, monkeypatch):
    def evaluations(steps):
        learns = [step for step in range(1, steps) if step % 3 == 0]
        return steps + len(learns)

    monkeypatch.setattr(patches, "EVERY", 3)
    steps = patches.steps_of("times", budget)
    assert evaluations(steps) <= budget < evaluations(steps + 1)
    assert patches.steps_of("plain", budget) == budget


@pytest.mark.parametrize("row", ROWS)
def test_evaluations_are_equal(row, monkeypatch, rows_called):
    rows = rows_called(UNet)
    monkeypatch.setattr(patches, "EVERY", 3)
    train = patches.split(numbered())[0].float() % patches.LEVELS
    model = patches.trained(row, train, SMALL, 1e-3, 0)
    assert sum(rows) == SMALL.steps * SMALL.batch
    learnt = [each for each in rows if each < SMALL.batch]
    assert sum(learnt) == ("times" in row) * SMALL.batch
    assert not any(p.requires_grad for p in model.parameters())


def test_validation_chooses_the_rate_and_the_test_judges(monkeypatch):
    """A model that predicts no noise has a validation loss of 1, and others of more."""

    def constant(row, tiles, sizes, rate, seed):
        value = 0.0 if rate == patches.RATES[1] else 1.0
        return hosm.ScoreModel(lambda x, t: 0 * x + value, patches.SCHEDULE)

    monkeypatch.setattr(patches, "trained", constant)
    splits = [part.float() % patches.LEVELS for part in patches.split(numbered())]
    found = patches.measure("plain", splits, Sizes(validation=64, test=2), 0)
    assert min(found["validation"]) == found["validation"][1] == pytest.approx(1, abs=0.1)
    assert found["validation"][0] == pytest.approx(2, abs=0.2)
    # Without a score the density is that of the prior, N(0, σ_max²).
    x = patches.draw(splits[1 + TEST], 2, patches.seeded(0)).double()
    variance = (50 * patches.STD) ** 2
    nll = 32 * math.log(2 * math.pi * variance) + x.square().sum((1, 2, 3)) / (2 * variance)
    assert found["nll"] == pytest.approx(nll.tolist(), rel=1e-5)


def test_differences_are_paired_by_patch():
    """Those of 1, 2 and 6: mean 3, variance 7, and an error of √(7/3)."""
    assert patches.paired([2.0, 5.0, 9.0], [1.0, 3.0, 3.0]) == (3.0, pytest.approx((7 / 3) ** 0.5))
    times = {"seeds": [{"nll": [2.0, 5.0, 9.0]}, {"nll": [1.0, 1.0, 1.0]}]}
    assert "over plain" not in patches.compared({"times": times})["times"]
    plain = {"seeds": [{"nll": [1.0, 3.0, 3.0]}, {"nll": [2.0, 2.0, 2.0]}]}
    rows = patches.compared({"times": times, "plain": plain})
    assert [mean for mean, _ in rows["times"]["over plain"]] == [3, -1]
    assert rows["plain"]["over plain"] == [(0, 0), (0, 0)]


def test_a_second_run_goes_on_where_the_first_one_stopped(tmp_path, monkeypatch):
    measured = []

    def measure(row, splits, sizes, seed):
        measured.append((row, seed))
        return {"nll": [float(len(row)), float(seed)]}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["patches", "--dirty", *arguments])
        patches.main()
        return json.loads(patches.FILE.read_text())

    monkeypatch.setattr(patches, "measure", measure)
    monkeypatch.setattr(patches, "photographs", numbered)
    monkeypatch.setattr(patches, "FILE", tmp_path / "patches.json")
    first = run("--row", "times")["times"]
    assert measured == [("times", 0), ("times", 1)]
    assert first["environment"]["commit"]
    kept = run()
    assert measured[2:] == [(row, k) for row in ROWS if row != "times" for k in range(2)]
    assert kept["times"]["seeds"] == first["seeds"]
    assert set(kept) == {row for row in kept if "over plain" in kept[row]} == set(ROWS)


def test_second_stages_have_equal_evaluations():
    def evaluations(stage):
        order, times = STAGES[stage]
        return times * Recipe(order, "").evaluations

    for stage, base in EQUAL.items():
        assert STAGES[stage] == (STAGES[stage][0], STAGES["one"][1])
        assert evaluations(stage) == evaluations(base)


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_stage_leaves_the_first_one_as_it_is(stage, monkeypatch):
    orders, steps = [], []

    def loss_of(order):
        def make(model):
            def value(x0, generator):
                steps.append(len(x0))
                return hosm.first_order_dsm(model, x0, generator=generator)

            orders.append(order)
            return value

        return make

    monkeypatch.setattr(patches, "LOSSES", {order: loss_of(order) for order in (1, 2, 3)})
    train = patches.split(numbered())[0].float() % patches.LEVELS
    first = hosm.ScoreModel(patches.Network(), patches.SCHEDULE)
    before = [parameter.clone() for parameter in first.parameters()]
    last = patches.continued(first, stage, train, Sizes(batch=3, second=2), 1e-3, 0)
    assert orders == [STAGES[stage][0]]
    assert steps == [3] * (2 * STAGES[stage][1])
    assert all(map(torch.equal, first.parameters(), before))
    assert not all(map(torch.equal, last.parameters(), before))


def test_second_stages_are_chosen_by_validation_and_paired(monkeypatch):
    """Models of Gaussian pixels, whose NLL and bound are known."""
    stds = {"one": 0.6, "one, twice the steps": 0.65, "one, four times the steps": 0.7}
    stds |= {"two": 0.75, "three": 0.8}

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
    splits = [part.float() % patches.LEVELS for part in patches.split(numbered())]
    found = patches.second_stages(splits, Sizes(validation=8, test=16), 0)
    x = patches.draw(splits[1 + TEST], 16, patches.seeded(0)).double()
    assert found["nll"] == pytest.approx(float(nll(x, 0.55).mean()), abs=0.1)
    gap, low, high = found["gap"]
    assert gap - low == pytest.approx(high - gap)
    assert abs(gap) < 5 * (high - low) / (2 * 1.96) < 5
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


def test_a_second_run_of_second_stages_goes_on(tmp_path, monkeypatch):
    measured = []

    def second_stages(splits, sizes, seed):
        measured.append((sizes, seed))
        return {"nll": float(seed)}

    monkeypatch.setattr(patches, "second_stages", second_stages)
    monkeypatch.setattr(patches, "photographs", numbered)
    monkeypatch.setattr(patches, "SECOND_FILE", tmp_path / "second_stage.json")
    patches.SECOND_FILE.write_text('{"0": {}}')
    for arguments in (["--dirty"], ["--dirty"], ["--smoke"]):
        monkeypatch.setattr(sys, "argv", ["patches", "--second-stage", *arguments])
        patches.main()
    assert [seed for _, seed in measured] == [1, 0, 1]
    assert measured[0][0] == patches.LONG != measured[1][0]
    found = json.loads(patches.SECOND_FILE.read_text())
    assert found["0"] == {}
    assert found["1"]["nll"] == 1
    assert found["1"]["environment"]["commit"]


def test_photographs_are_grey_levels():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    pictures = patches.photographs()
    assert set(WHOLE) < set(pictures)
    for picture in pictures.values():
        assert picture.ndim == 2
        assert 0 <= picture.min() < picture.max() < patches.LEVELS
        assert torch.equal(picture, picture.round())
    pixels = torch.cat([part.flatten() for part in patches.split(pictures)])
    assert 2 / patches.LEVELS * pixels.std() == pytest.approx(patches.STD, rel=0.2)


def test_without_scikit_image_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(SystemExit, match="expected the extra benchmarks; got no skimage"):
        patches.photographs()
