"""The figures and tables of the study of orders, and the figure of claims."""

import math

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmarks.page import figures, numbers, orders


def row(kl, score=None, lost=0.0):
    """Five seeds, eight blocks of points, of seeds that differ by a constant factor."""
    seeds = np.exp(0.1 * np.arange(5))[:, None]
    made = {"kl": (kl * seeds * np.ones(8)).tolist(), "lost": [lost] * 5}
    return made | ({} if score is None else {"log_score": np.full((5, 8), math.log(score))})


REPORT = {
    "name": "checkerboard, d = 2",
    "rows": {
        "rates: one": {"kl": [0.1]},
        "failed": {"failed": "ValueError"},
        "one": row(0.4, 8.0),
        "one, averaged": row(0.2, 4.0),
        "one, scores, averaged": row(0.1, 2.0),
        "two, averaged": row(0.1, 1.0),
        "two, scores, averaged": row(0.02, 1.0),
        "three, averaged": row(-0.01, 20.1),
        "three, averaged, fraction 0.25": row(0.1, 1.0, lost=1.0),
        "after: one, averaged": row(0.01, 0.5),
        "after: two, averaged": row(0.03, 0.25),
    },
}


def test_a_row_is_compared_with_the_one_that_differs_in_one_respect():
    found = orders.ratios(REPORT)
    expected = {
        "one, averaged": (1 / 2, 1 / 2),
        "one, scores, averaged": (1 / 4, 1 / 4),
        "two, averaged": (1 / 2, 1 / 4),
        "two, scores, averaged": (1 / 5, 1 / 2),
        "after: two, averaged": (3, 1 / 2),
    }
    for name, ratios in expected.items():
        assert (found[name]["kl"][0], found[name]["score"][0]) == pytest.approx(ratios)
    for name in ("one", "after: one, averaged"):
        assert found[name].keys() == {"nats", "lost"}
    assert (found["three, averaged"]["kl"], found["three, averaged"]["below"]) == (None, 1)
    lost = found["three, averaged, fraction 0.25"]
    assert (lost["kl"], lost["lost"], "below" in lost) == (None, 5, False)


def test_cells_are_in_the_order_of_the_study_and_have_a_table():
    reports = [{**REPORT, "name": name} for name in ("many-well, d = 4", "mixture, d = 1, VE")]
    reports.append({"name": "checkerboard, d = 2", "rows": {"one": row(0.4, 8.0)}})
    found = {"orders": orders.cells(reports)}
    assert [*found["orders"]] == ["mixture, d = 1, VE", "many-well, d = 4"]
    table = "Problem | orders > * > two, averaged | KL = kl | score error = score | lost = lost"
    assert numbers.table(found, table).splitlines()[-1] == "| many-well, d = 4 | 0.5 | 0.25 | 0 |"


def test_finite_cells_are_in_the_order_of_their_study():
    names = ["many-well, d = 8, rotated, 2,000 points", "checkerboard, d = 2, 1,000 points"]
    rows = {"one": row(0.4, 8.0), "one, averaged": row(0.2, 4.0) | {"end": row(0.1, 1.0)}}
    found = orders.finite([{"name": name, "rows": rows} for name in names])
    assert [*found] == names[::-1]
    ratios = [found[names[0]][f"one, averaged, {when}"]["kl"][0] for when in ("choice", "end")]
    assert ratios == pytest.approx([1 / 2, 1 / 4])


def test_gains_are_over_plain_order_one_by_what_one_has():
    """At rates of the cell's own where plain order one has one; a row of base is not compared."""
    scored = "one, scores, averaged, pairs, times"
    rows = {"one": row(0.4, 8.0), orders.QUIET: row(0.2, 4.0), scored: row(0.1, 2.0)}
    own = {"one, own rate": row(0.3, 8.0), f"{orders.QUIET}, own rate": row(0.1, 4.0)}
    name, other = "many-well, d = 8", "many-well, d = 8, rotated"
    study = [{"name": name, "rows": rows}, {"name": other, "rows": rows | own}]
    study.append({"name": "digits, d = 64", "rows": rows})
    titles = (f"{other}, equal time, rate 3e-3", f"{other}, rate 1e-3")
    recipe = [{"name": title, "rows": rows} for title in titles]
    ended = {"one": row(0.4, 8.0), orders.QUIET: row(0.3, 4.0) | {"end": row(0.1, 1.0)}}
    limited = orders.finite([{"name": f"{other}, 2,000 points", "rows": ended}])
    found = orders.gains(study, recipe, limited)
    assert [*found] == [name, other]
    assert [*found[name]] == ["fresh samples", "with scores"]
    kept = {what: rows[orders.QUIET]["kl"][0] for what, rows in found[other].items()}
    fresh = {"fresh samples": 1 / 3, "with scores": 1 / 3}
    assert kept == pytest.approx(fresh | {"equal time, rate 3e-3": 1 / 2, "2,000 points": 3 / 4})


def test_a_ratio_outside_of_the_picture_is_at_its_edge():
    report = REPORT | {"name": "many-well, d = 4"}
    outside = {"one, averaged": row(-0.01, 1.0), orders.QUIET: row(0.8, 1.0)}
    figure = orders.picture(orders.gains([report | {"rows": report["rows"] | outside}], [], {}))
    (axes,) = figure.axes
    least, most = (
        [line.get_xdata()[0] for line in axes.lines if line.get_marker() == marker]
        for marker in "<>"
    )
    assert (least, most) == ([orders.LEAST], [orders.MOST])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [*orders.SHOWN.values()]


def test_normal_errors_of_the_claimed_size_lie_on_the_diagonal():
    normal = np.abs(np.random.default_rng(0).standard_normal(40_000))
    found = {"ring": {"standard_error": normal, "solver_error": normal / 2}}
    found["ring"]["solver_error, companion"] = normal
    _, coverage = figures.calibration(found).axes
    own, half = (line.get_ydata() - line.get_xdata() for line in coverage.lines[:2])
    assert np.abs(own).max() < 5 * 0.5 / 200  # five standard errors
    assert half.max() > 0.2
