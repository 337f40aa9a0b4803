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

from benchmarks import worth
from benchmarks.intervals import STUDENT, over_seeds
from benchmarks.worth_problems import CELLS, FILM, KINDS, Cell, Checkerboard, many_well, mixture
from benchmarks.worth_quantities import by_rate, compare, finite, log_ratio, score, weights

VE = hosm.VESchedule()


def levels(*values):
    """α and σ as columns of one noise level each."""
    return [torch.tensor([each], dtype=torch.float64) for each in values]


def small(name="many-well, d = 2, width 32", **changes) -> Cell:
    return replace(CELLS[name]().small(), **changes)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.01), (0.6, 0.8), (1.0, 30.0)])
def test_the_mixture_on_a_grid_is_that_in_closed_form(alpha, sigma):
    x = alpha * torch.linspace(-1.2, 1.5, 40, dtype=torch.float64)[:, None]
    at = [each.expand(len(x)) for each in levels(alpha, sigma)]
    log_q, slope = mixture().diffuse(x, *at)
    exact = paper_mixture()
    assert torch.allclose(log_q, exact.log_density(x, *at), atol=1e-7)
    assert torch.allclose(slope, exact.score(x, *at), rtol=1e-6, atol=1e-6)


def test_densities_integrate_to_one_and_have_their_gradient():
    well, axis = many_well(2), torch.linspace(-4.5, 4.5, 361, dtype=torch.float64)
    step = float(axis[1] - axis[0])
    at = [each.expand(361) for each in levels(0.9, 0.05)]
    parts = [line.diffuse(axis, *at) for line in well.lines]
    for log_q, slope in parts:
        mass = log_q.exp() * step
        # ∫ q = 1, ∫ q′ = 0 and ∫ x q′ = −1.
        sums = torch.stack([mass, mass * slope, mass * slope * axis]).sum(1)
        assert torch.allclose(sums, torch.tensor([1.0, 0.0, -1.0]).double(), atol=1e-4)
    log_q, slope = well.diffuse(torch.stack([axis, axis.flip(0)], 1), *at)
    (of_a, slope_a), (of_b, slope_b) = parts
    assert torch.allclose(log_q, of_a + of_b.flip(0))
    assert torch.allclose(slope, torch.stack([slope_a, slope_b.flip(0)], 1))


def test_the_checkerboard_integrates_to_one_and_is_small_in_the_middle_of_its_holes():
    axis = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    log_q, slope = Checkerboard().diffuse(x, *(each.expand(len(x)) for each in levels(0.9, 0.05)))
    mass = log_q.exp()[:, None] * 1e-4
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    assert torch.allclose((mass * slope * x).sum(0), -torch.ones(2).double(), atol=1e-5)
    # The nearest edges of four squares are a quarter away, 25 σ.
    hole = torch.tensor([[-0.25, 0.25]], dtype=torch.float64)
    (found,), pull = Checkerboard().diffuse(hole, *levels(1.0, 0.01))
    assert float(found) == pytest.approx(float(mpmath.log(2 * mpmath.ncdf(-25))), abs=1e-9)
    assert pull.abs().max() < 1e-9


def test_log_z_of_the_many_well_is_its_integral():
    well = mpmath.quad(
        lambda a: mpmath.exp(6 * a**2 + a / 2 - a**4), [-mpmath.inf, -2, 0, 2, mpmath.inf]
    )
    exact = 2 * mpmath.log(well * mpmath.sqrt(2 * mpmath.pi))
    assert many_well(4).log_z == pytest.approx(float(exact), abs=1e-9)


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
    truth = cell.at_t_min.score.reshape(8, 4, -1)[:, :2].square().sum(-1).mean()
    assert max(found["score_mean"]) < 1e-4 * truth
    assert max(found["j_sm"]) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["order one", "order three, averaged"])
def test_members_of_an_ensemble_have_the_gradients_they_have_alone(name, kind):
    cell, seeds = small(), (0, 1, 2)
    model = cell.model(seeds, kind).double()
    x = cell.draw(4 * len(seeds), torch.Generator().manual_seed(0)).double()
    t, noise = torch.rand(len(x)).double(), torch.randn(x.shape).double()
    probe = torch.randn(2, *x.shape).double().sign()

    def loss(model, members):
        return worth.losses(cell, members)[name](model)

    one = name == "order one"
    given = {} if one else {"probe": probe}
    loss(model, len(seeds))(x, t=t, noise=noise, **given).backward()
    for i, seed in enumerate(seeds):
        alone = cell.model([seed], kind).double()
        own = {} if one else {"probe": probe[:, i :: len(seeds)]}
        mine = slice(i, None, len(seeds))
        loss(alone, 1)(x[mine], t=t[mine], noise=noise[mine], **own).backward()
        for both, single in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(len(seeds) * both.grad[i : i + 1], single.grad, atol=1e-10)


def test_each_member_trains_at_its_own_rate():
    cell, rates = small(), [1e-2, 1e-3]

    def loss(model):
        return lambda *_, **__: sum((p - 1).square().sum() for p in model.parameters())

    both = cell.model([7, 7], FILM)
    list(worth.training(cell, both, loss, 3, rates))
    for i, rate in enumerate(rates):
        alone = cell.model([7], FILM)
        list(worth.training(cell, alone, loss, 3, [rate]))
        for each, single in zip(both.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(each[i], single[0], atol=1e-7)


def test_losses_take_turns():
    def constant(value):
        return lambda model: lambda: model + value

    loss = worth.in_turn(constant(1), constant(2), 2)(10)
    assert [loss() for _ in range(4)] == [11, 11, 12, 12]


def test_importance_weights_by_hand():
    found = weights(torch.tensor([[1.0, 3.0], [2.0, 2.0]]).double().log() - 4.9)
    assert found["effective_size"] == pytest.approx([0.8, 1.0])
    assert found["log_z_error"] == pytest.approx([math.log(2) - 4.9] * 2)
    assert found["reverse_kl"] == pytest.approx([4.9 - math.log(3) / 2, 4.9 - math.log(2)])
    assert weights(torch.tensor([[-5.1, -4.9, 0.0, 9.0]]))["low_share"] == [0.25]
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


def test_rows_are_compared_by_seed_and_block(tmp_path):
    kl, log_score = torch.rand(5, 8).double() + 1, torch.randn(5, 8).double()
    base = {"kl": kl.tolist(), "log_score": log_score.tolist()}
    row = {"kl": (0.7 * kl).tolist(), "log_score": (log_score - 2).tolist()}
    found = compare(row, base)
    # What all seeds and points share has no error.
    assert found["kl"] == pytest.approx([0.7] * 3)
    assert found["score"] == pytest.approx([float(torch.tensor(-2.0).exp())] * 3)
    # The geometric mean over seeds, whose interval holds no number below 0.
    factors = torch.tensor([0.01, 0.1, 0.1, 0.1, 1.0])
    found = compare(row | {"kl": (factors[:, None] * kl).tolist()}, base)["kl"]
    half = 2.776 * math.log(10) * (2 / 4 / 5) ** 0.5
    assert found == pytest.approx([0.1, 0.1 * math.exp(-half), 0.1 * math.exp(half)])
    # One block may be below 0, as the mean of r over few points is.
    below = kl - 2 * (torch.arange(8) == 0)
    rows = ({**base, "kl": each.tolist()} for each in (below, 2 * below))
    assert compare(*rows)["kl"].value == pytest.approx(0.5)
    better = {"kl": (0.97 * kl).tolist(), "log_score": base["log_score"]}
    study = worth.Study("cell", small(), tmp_path, tmp_path)
    study.rows |= {"budget 1": base, "budget 3": better, "order one": base}
    assert not study.converged()
    assert study.gain() == pytest.approx(0.03)
    study.rows["budget 9"] = better
    assert study.converged()


def test_rates_are_chosen_by_the_mean_of_the_spare_seeds(tmp_path):
    study = worth.Study("cell", small(spares=2), tmp_path, tmp_path)
    row = {"rates": [3.0, 2.0, 1.0], "kl": [1.0, 9.0, 4.0, 5.0, 0.0, None]}
    assert by_rate(row, "kl", row["rates"]) == {3.0: 5.0, 2.0: 4.5}
    assert by_rate({"failed": "why"}, "kl", row["rates"]) == {}
    study.rows["rates: order one"] = row
    models = study.fresh(FILM)
    assert study.best_rate("order one", models, "order one", 1, row["rates"], None) == 2
    del study.rows["rates: order one"]
    study.best_rate("order one", models, "order one", 1, row["rates"], None)
    assert len(study.rows["rates: order one"]["kl"]) == 6


def test_what_cells_chose_is_chosen_again_from_their_rows(tmp_path):
    studies = [
        worth.Study(name, make(), worth.DIRECTORY, tmp_path) for name, make in CELLS.items()
    ]
    begun = [each for each in studies if "budget 1" in each.rows]
    assert len(begun) > 3
    for study in begun:
        row = study.rows["budget 1"]
        assert study.choose() == (row["network"], row["targets"], row["rate"])


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    trained, original = [], worth.Study.train

    def train(self, *given):
        trained.append(given[-1])
        return original(self, *given)

    monkeypatch.setattr(worth.Study, "train", train)
    names, whole = [*worth.losses(small(), 1)], [f"whole: {name}" for name in worth.WHOLE]
    whole.append(f"switch: {worth.SWITCHED}")

    def run(pattern=""):
        trained.clear()
        study = worth.Study("cell", small(), tmp_path, tmp_path / "weights")
        study.run(pattern, levels=2, rounds=1)
        summary = study.summary()
        assert {*summary} == {"budget 1", "budget 3", *names, *whole}
        assert min(1.0, *(summary[name]["kl"].value for name in worth.TARGETS)) == 1
        return json.loads(study.file.read_text())

    first = run()
    assert len(trained) == 4 + 1 + 2 + 2 * len(names + whole)
    for name in names:
        row = first["rows"][name]
        assert torch.tensor(row["kl"]).shape == torch.tensor(row["log_score"]).shape == (5, 8)
        assert {len(row[key]) for key in ("j_sm", "effective_size", "score_median")} == {5}
        assert first["environments"][row["environment"]]["torch"] == torch.__version__
    assert run() == first
    assert trained == []
    # A row that is lost is made again, and so is one whose starting weights change.
    lost = {name: row for name, row in first["rows"].items() if name != "order two"}
    (tmp_path / "cell.json").write_text(json.dumps(first | {"rows": lost}))
    again = run()
    assert trained == ["order two"]
    assert [each["rows"]["order two"]["environment"] for each in (first, again)] == [0, 1]
    file = tmp_path / "weights" / "cell" / "3.pt"
    torch.save({key: 1.01 * each for key, each in torch.load(file).items()}, file)
    run("two$")
    assert trained == ["rates of order two", "order two"]
    with pytest.raises(ValueError, match="'budget': 5"):
        worth.Study("cell", small(budget=5), tmp_path, tmp_path)
