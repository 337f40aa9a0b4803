"""The machinery behind docs/worth.md: judging, resuming, ensembles, and the page's numbers."""

import pytest
import torch

import hosm_losses as hosm
from tests.oracles import mixture_noise, paper_mixture

pytest.importorskip("matplotlib")

from benchmarks import quadratic, results, worth
from benchmarks.page import figures, tables
from benchmarks.worth_problems import PROBLEMS, Checkerboard, of_density, of_mixture


def exact(density, problem):
    """The true score, for a batch whose rows take turns between members."""
    return hosm.ScoreModel(mixture_noise(density, problem.schedule), problem.schedule)


@pytest.mark.parametrize(
    ("density", "tolerance"), [(paper_mixture(), 1e-3), (Checkerboard(), 2e-2)], ids=["1-D", "2-D"]
)
def test_the_exact_score_is_at_no_distance(density, tolerance):
    problem = of_density(density, hosm.VESchedule(), points=200)
    value, j_sm = problem.judged(exact(density, problem), 2)
    assert value.shape == (2, len(problem.test))
    assert value.mean(1).abs().max() < tolerance
    assert max(j_sm) < 1e-4


def test_the_score_of_the_checkerboard_is_the_slope_of_its_density():
    board = Checkerboard()
    generator = torch.Generator().manual_seed(0)
    x, ones = board.sample(20, generator), torch.ones(20).double()
    sigma = 0.1 * ones
    step = torch.tensor([1e-5, 0.0], dtype=torch.float64)
    rise = board.log_density(x + step, ones, sigma) - board.log_density(x - step, ones, sigma)
    assert torch.allclose(rise / 2e-5, board.score(x, ones, sigma)[:, 0], atol=1e-6)
    axis = torch.linspace(-2, 2, 201, dtype=torch.float64)
    points, many = torch.cartesian_prod(axis, axis), torch.ones(201**2).double()
    density = board.log_density(points, many, 0.2 * many).exp()
    assert float(density.sum()) * 0.02**2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["order one", "order three, paired", "Stein, weight 1"])
def test_members_of_an_ensemble_have_the_gradients_they_have_alone(name):
    problem, seeds, rows = of_mixture(8, 24).cut(8), 3, 4
    model, generator = problem.model(seeds), torch.Generator().manual_seed(0)
    model.double()
    x = problem.rows(rows * seeds, generator).double()
    t, noise = torch.rand(len(x)).double(), torch.randn(x.shape).double()
    probe = torch.randn(2, *x.shape).double().sign()
    one = name == "order one"
    loss = worth.losses(problem)[name]
    loss(model)(x, t=t, noise=noise, **({} if one else {"probe": probe})).backward()
    together = [each.grad for each in model.parameters()]
    for seed in range(seeds):
        alone = problem.model(1).double()
        parts = {key: each[seed : seed + 1] for key, each in model.network.named_parameters()}
        alone.network.load_state_dict(parts, strict=False)
        own = {} if one else {"probe": probe[:, seed::seeds]}
        loss(alone)(x[seed::seeds], t=t[seed::seeds], noise=noise[seed::seeds], **own).backward()
        for both, single in zip(together, alone.parameters(), strict=True):
            assert torch.allclose(seeds * both[seed : seed + 1], single.grad, atol=1e-10)


def test_a_second_run_does_what_the_first_left(tmp_path):
    name = next(iter(PROBLEMS))
    worth.Campaign(tmp_path, worth.SMOKE).run(name, "order one|order two, as")
    first = results.read(tmp_path / "worth.json")[name]
    assert set(first) == {"before", "order one", "order two, as in the paper"}
    again = worth.Campaign(tmp_path, worth.SMOKE)
    again.run(name, "order one|order two, weights 1|Stein, weight 1")
    second = again.report[name]
    assert {key: second[key] for key in first} == first
    assert set(second) - set(first) == {"order two, weights 1", "Stein, weight 1"}
    assert "order two, weights 1" in tables.of_worth(again.report)
    assert figures.worth(again.report).axes


def test_a_loss_that_diverges_is_a_row_that_says_so(tmp_path, monkeypatch):
    def diverging(model):
        return lambda x, **_: hosm.first_order_dsm(model, x * float("nan"))

    name, plain = next(iter(PROBLEMS)), worth.losses
    monkeypatch.setattr(worth, "losses", lambda *args: plain(*args) | {"bad": diverging})
    campaign = worth.Campaign(tmp_path, worth.SMOKE)
    campaign.run(name, "order one|bad")
    assert "failed" in campaign.report[name]["bad"]
    assert "diverged" in tables.of_worth(campaign.report)


def test_every_quadratic_has_the_gradient_of_its_loss(monkeypatch):
    monkeypatch.setattr(quadratic, "DRAWS", 64)
    mixture = quadratic.anisotropic(3, 4)
    network = quadratic.Features(mixture, 0)
    level = quadratic.Level(network, mixture, torch.tensor(0.3).double(), 1)
    before, weights = (torch.randn(3, quadratic.FEATURES).double() for _ in range(2))
    delta, error = level.field(before)
    weights.requires_grad_()
    of_field, of_jacobian = level.field(weights)
    trace, trace_before = (each.diagonal(dim1=1, dim2=2).sum(1) for each in (of_jacobian, error))
    square = delta.square().sum(1)
    bent = torch.einsum("ij,ji,jl,bj->bl", weights, level.scaled, level.scaled, level.bends)
    third = bent - level.third + (square - trace_before)[:, None] * delta
    third = third - 2 * torch.einsum("bij,bj->bi", error, delta)
    direct = {
        "first": of_field.square(),
        "second": (of_jacobian - delta[:, :, None] * delta[:, None, :]).square(),
        "trace": (trace - square).square(),
        "third": third.square(),
        "rate": (trace + (level.f * of_field).sum(1)).square(),
    }
    for name, vector in level.vectors(before).items():
        loss = direct[name].sum() / quadratic.DRAWS
        (expected,) = torch.autograd.grad(loss, weights, retain_graph=True)
        found = 2 * (level.matrices[name] @ weights.detach().flatten() - vector).reshape(
            expected.shape
        )
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


ROWS = {
    "order two, the paper's weights": "order two, as in the paper",
    "order three, the paper's weights": "order three, as in the paper",
    'order two, `estimator="paired", weights="balanced"`': "order two, balanced",
    "`stein_dsm`, weight 0.3": "Stein, weight 0.3",
    "`stein_dsm`, weight 1": "Stein, weight 1",
}
WIDTHS = ("width 24", "width 128")


def told(moved, error=None):
    shown = f"{moved:.0f}" if abs(moved) >= 0.95 else f"{round(moved, 1) + 0.0:.1f}"
    return shown if error is None else f"{shown} ± {error:.0f}"


@pytest.mark.parametrize("label", ROWS)
def test_the_table_of_readme_is_that_of_the_results(label):
    report, name = results.read(worth.FILE), ROWS[label]

    def change(problem, source):
        return tables.change(source[problem][name], source[problem][worth.BASE])

    board = "checkerboard, d = 2"
    cells = [told(*change(f"mixture, d = 1, {each}", report)) for each in ("VE", "VP")]
    cells.append(told(*change(board, report["longer"])))
    for width in WIDTHS:
        moved = [change(f"mixture, d = {d}, {width}", report)[0] for d in (8, 16, 32)]
        cells.append(f"{told(min(moved))} to {told(max(moved))}")
    moved, error = change("digits, d = 64", report)
    cells.append(f"{round(moved, 1) + 0.0:.1f} ± {error:.1f}")
    text = (results.ROOT / "README.md").read_text("utf-8")
    (line,) = [each for each in text.splitlines() if each.startswith(f"| {label} |")]
    assert line.replace("−", "-").strip("| ").split(" | ")[1:] == cells
