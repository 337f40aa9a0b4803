"""What the figures and tables of the study of orders show, and the figure of claims."""

import math

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmarks.page import figures, orders


def row(kl, score=1.0, lost=0.0):
    """Five seeds, eight blocks of points, of seeds that differ by a constant factor."""
    seeds = np.exp(0.1 * np.arange(5))[:, None]
    log_score = np.full((5, 8), math.log(score))
    return {"kl": (kl * seeds * np.ones(8)).tolist(), "lost": [lost] * 5, "log_score": log_score}


def test_rows_without_a_ratio_say_why():
    """Of KL divergences below 0, and of seeds that lost a mode, which have no row to compare."""
    rows = {"failed": {"failed": "ValueError"}, "one, averaged": row(0.2, 4.0)}
    rows |= {"two, averaged": row(0.1), "three, averaged": row(-0.01)}
    found = orders.ratios({"rows": rows | {"two, averaged, lost": row(0.1, lost=1.0)}})
    assert found["failed"] == {"nats": "failed"}
    assert found["one, averaged"].keys() == {"nats", "lost"}
    ratios = [found["two, averaged"][key][0] for key in ("kl", "score")]
    assert ratios == pytest.approx([1 / 2, 1 / 4])
    assert (found["three, averaged"]["kl"], found["three, averaged"]["below"]) == (None, 1)
    lost = found["two, averaged, lost"]
    assert (lost["kl"], lost["lost"], "below" in lost) == (None, 5, False)


def test_gains_are_over_plain_order_one_by_what_one_has():
    """At rates of the cell's own where plain order one has one; a row of base is not compared."""
    rows = {"one": row(0.4), orders.QUIET: row(0.2), orders.SCORES: row(0.1)}
    own = {"one, own rate": row(0.3), f"{orders.QUIET}, own rate": row(0.1)}
    name, other = "many-well, d = 8", "many-well, d = 8, rotated"
    study = [{"name": name, "rows": rows}, {"name": other, "rows": rows | own}]
    study.append({"name": "digits, d = 64", "rows": rows})
    titles = (f"{other}, equal time, rate 3e-3", f"{other}, rate 1e-3")
    recipe = [{"name": title, "rows": rows} for title in titles]
    ended = {"one": row(0.4), orders.QUIET: row(0.3) | {"end": row(0.1)}}
    limited = orders.finite([{"name": f"{other}, 2,000 points", "rows": ended}])
    found = orders.gains(study, recipe, limited)
    assert [*found] == [name, other]
    assert [*found[name]] == ["fresh samples", "with scores"]
    kept = {what: rows[orders.QUIET]["kl"][0] for what, rows in found[other].items()}
    fresh = {"fresh samples": 1 / 3, "with scores": 1 / 3}
    assert kept == pytest.approx(fresh | {"equal time, rate 3e-3": 1 / 2, "2,000 points": 3 / 4})


def test_normal_errors_of_the_claimed_size_lie_on_the_diagonal():
    normal = np.abs(np.random.default_rng(0).standard_normal(40_000))
    found = {"ring": dict.fromkeys(figures.CLAIMS, normal) | {"solver_error": normal / 2}}
    _, coverage = figures.calibration(found).axes
    own, half = (line.get_ydata() - line.get_xdata() for line in coverage.lines[:2])
    assert np.abs(own).max() < 5 * 0.5 / 200  # five standard errors
    assert half.max() > 0.2
