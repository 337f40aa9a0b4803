"""The referee of derivatives: what it says of this PyTorch, and what it can tell apart."""

import math

import pytest
from benchmarks import results, upstream

REPORTS = results.read(upstream.FILE)
# The ways of PyTorch that the page shows.
SHOWN = (("second", "jvp"), ("second", "backward"), ("third", "backward"))


def check_library(tally):
    for ordinal in upstream.ORDERS.values():
        verdicts = tally[f"{ordinal}, library"]
        assert verdicts["wrong"] == verdicts["NaN"] == 0
        assert verdicts["right"] >= 79


def test_the_library_is_right_or_refuses_in_this_pytorch():
    rows = upstream.answer()
    check_library(upstream.tally(rows))
    reasons = [row["second"]["library"].get("reason") for row in rows.values()]
    own = "TaylorError: ", "DerivativeError: ", "ConstantError: "
    assert all(reason.startswith(own) for reason in reasons if reason)


def test_and_so_it_is_in_the_committed_results():
    minors = [version.rpartition(".")[0] for version in REPORTS]
    assert {"2.6", "2.13", "2.15"} <= {*minors}
    assert len({*minors}) == len(minors)  # the page names versions by these
    for report in REPORTS.values():
        assert [*report["found"]] == [*upstream.FUNCTIONS]
        assert report["tally"] == upstream.tally(report["found"])
        check_library(report["tally"])


def test_a_part_that_is_detached_is_wrong_in_every_way():
    for row in upstream.measure("detached", lambda x: x**3 * x.detach()).values():
        assert [row[way]["verdict"] for way in upstream.WAYS] == ["wrong"] * 3


def test_right_refused_and_nan_are_told_apart():
    for row in upstream.measure("sinh", lambda x: x.sinh()).values():
        assert [row[way]["verdict"] for way in upstream.WAYS] == ["right"] * 3
    row = upstream.measure("pdist", upstream.FUNCTIONS["pdist"])["second"]["jvp"]
    assert row["verdict"] == "refused"
    assert row["reason"].startswith("NotImplementedError: Trying to use forward AD")
    assert upstream.verdict(math.nan, 1.0) == "NaN"
    assert upstream.verdict(1e3 + 1e-5, 1e3) == "right"
    with pytest.raises(ValueError, match="far from it"):
        upstream.verdict(1.0, 1.0 + 1e-5)


ROUGH = {
    "a kink": lambda x: (x - upstream.X).abs(),
    "a jump": lambda x: (4 * x).floor(),
    "noise": lambda x: x + 1e-9 * (1e5 * x).sin(),
}


@pytest.mark.parametrize("name", ROUGH)
def test_what_differences_cannot_decide_has_no_verdict(name):
    with pytest.raises(ValueError, match=f"{name}: expected a smooth function"):
        upstream.measure(name, ROUGH[name])


def test_the_page_has_the_rows_in_which_pytorch_is_wrong():
    pytest.importorskip("matplotlib")
    from benchmarks.page import tables

    lines = tables.upstream({"upstream": REPORTS}).splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    for name in upstream.FUNCTIONS:
        rows = [report["found"][name] for report in REPORTS.values()]
        verdicts = {row[ordinal][way]["verdict"] for row in rows for ordinal, way in SHOWN}
        assert (name in cells) == bool(verdicts & {"wrong", "NaN"})
    assert "| wrong in 2.6, 2.13; right in 2.15 | right | right | right |" in cells["linalg.det"]
    assert "issues/196696" in cells["linalg.det"]
