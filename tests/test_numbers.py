"""Numbers on the pages that are counted or worked out: each is read from its page."""

import re
from pathlib import Path

import numpy as np
import pytest

import hosm_losses as hosm
from tests.losses.test_cost import evaluations

ROOT = Path(__file__).parent.parent
PAGES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
}
TWO, THREE = hosm.second_order_dsm, hosm.third_order_dsm
PAIRED = {"probes": hosm.Paired()}
TAYLOR, REVERSE = {"engine": "taylor"}, {"engine": "reverse"}
# By page: what is found in front of a number of evaluations, and the loss that takes so many.
EVALUATIONS = [
    ("cost", r"\| order one \|", hosm.first_order_dsm, {}),
    ("cost", r"\| order two \|", TWO, {}),
    ("cost", r"\| order three \|", THREE, {}),
    ("cost", r"\| order two, `probes=Paired\(\)` \|", TWO, PAIRED),
    ("cost", r"Paired\(\)` \| 12;", TWO, PAIRED | {"weights": (1, 0, 1)}),
    ("cost", r"\| order three, `probes=Paired\(\)` \|", THREE, PAIRED),
    ("cost", r"`fraction=0.25` at order three costs", THREE, {"fraction": 0.25}),
    ("derivatives", r"network in a step, order two \|", TWO, TAYLOR),
    ("derivatives", r"network in a step, order two \| 6 \|", TWO, REVERSE),
    ("derivatives", r"network in a step, order three \|", THREE, TAYLOR),
    ("derivatives", r"network in a step, order three \| 12 \|", THREE, REVERSE),
    (
        "derivatives",
        r"as much as 25 network\s+evaluations with \"reverse\" and",
        THREE,
        PAIRED | TAYLOR,
    ),
]


@pytest.mark.parametrize(("page", "before", "loss", "options"), EVALUATIONS)
def test_evaluations(page, before, loss, options):
    (said,) = re.findall(rf"{before} ([\d.]+)\b", PAGES[page])
    # Less than a half off: the first and last layers do not take part in everything.
    near = 0.02 if "." in said else 0.49
    assert evaluations(loss, **options) == pytest.approx(float(said), abs=near)


def test_evaluations_over_order_one():
    rows = re.findall(r"^\| order [^|]+\|([^|]+)\|([^|]+)\|$", PAGES["cost"], re.MULTILINE)
    assert rows
    for counts, ratios in rows:
        numbers = [re.findall(r"[\d.]+", cell) for cell in (counts, ratios)]
        assert [f"{int(count) / 3:.2g}" for count in numbers[0]] == numbers[1]


def test_the_noise_of_the_terms_near_t_min():
    """Means over ε of ε², (1 − ε²)² and (ε³ − 3ε)² and of their squares, by a Gauss rule."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    terms = {
        "second": (1 - nodes**2) ** 2,
        "third": (nodes**3 - 3 * nodes) ** 2,
        "first": nodes**2,
    }
    for name, term in terms.items():
        mean, square = (float(weights @ each / weights.sum()) for each in (term, term**2))
        (said,) = re.findall(rf"(\S+ ± \S+) for the {name}", PAGES["theory"])
        assert f"{mean:.0f} ± {(square - mean**2) ** 0.5:.1f}" == said
