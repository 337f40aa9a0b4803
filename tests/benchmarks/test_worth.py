"""What stands behind docs/worth.md: judging, ensembles, and the numbers of README."""

import pytest
import torch

import hosm_losses as hosm
from tests.oracles import mixture_noise, paper_mixture

pytest.importorskip("matplotlib")

from benchmarks import results, worth
from benchmarks.page import tables
from benchmarks.worth_problems import Checkerboard, of_density, of_mixture


def exact(density, problem):
    """The true score, for a batch whose rows take turns between members."""
    return hosm.ScoreModel(mixture_noise(density, problem.schedule), problem.schedule)


@pytest.mark.parametrize(
    ("density", "tolerance"), [(paper_mixture(), 1e-3), (Checkerboard(), 2e-2)], ids=["1-D", "2-D"]
)
def test_the_exact_score_is_at_no_distance(density, tolerance):
    problem = of_density(density, hosm.VESchedule(), points=50)
    value, j_sm = problem.judged(exact(density, problem), 2)
    assert value.shape == (2, len(problem.test))
    assert value.mean(1).abs().max() < tolerance
    assert max(j_sm) < 1e-4


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


# Rows of README's table, whose cells say by how much KL moves, in percent.
ROWS = {
    "order two, the paper's weights": "order two, as in the paper",
    "order three, the paper's weights": "order three, as in the paper",
    'order two, `estimator="paired", weights="balanced"`': "order two, balanced",
    "`stein_dsm`, weight 0.3": "Stein, weight 0.3",
    "`stein_dsm`, weight 1": "Stein, weight 1",
}


@pytest.mark.parametrize("label", ROWS)
def test_the_table_of_readme_is_that_of_the_results(label):
    report, name = results.read(worth.FILE), ROWS[label]

    def change(problem, source=report):
        moved, error = tables.change(source[problem][name], source[problem][worth.BASE])
        # Whole numbers but near zero, which "+ 0.0" keeps from a sign.
        return f"{moved:.0f}" if abs(moved) >= 0.95 else f"{round(moved, 1) + 0.0:.1f}", error

    small = [change(f"mixture, d = 1, {each}") for each in ("VE", "VP")]
    small.append(change("checkerboard, d = 2", report["longer"]))
    cells = [f"{moved} ± {error:.0f}" for moved, error in small]
    for width in ("width 24", "width 128"):
        moved = [change(f"mixture, d = {d}, {width}")[0] for d in (8, 16, 32)]
        cells.append(" to ".join(sorted(moved, key=float)[::2]))
    moved, error = change("digits, d = 64")
    cells.append(f"{moved} ± {error:.1f}")
    text = (results.ROOT / "README.md").read_text("utf-8")
    (line,) = [each for each in text.splitlines() if each.startswith(f"| {label} |")]
    assert line.replace("−", "-").strip("| ").split(" | ")[1:] == cells
