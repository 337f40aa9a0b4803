"""Numbers on the pages that are counted or worked out: each is read from its page."""

import re
from pathlib import Path

import numpy as np
import pytest

import hosm_losses as hosm
from hosm_losses.likelihood.adaptive import student_factor
from tests.test_cost import evaluations

ROOT = Path(__file__).parent.parent
PAGES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
TWO, THREE = hosm.second_order_dsm, hosm.third_order_dsm
LAPLACIAN = {"third": "laplacian"}
PAIRED = {"estimator": "paired"}


def cells(page, row):
    """The cells of the line of a table whose first cell is `row`."""
    (line,) = [each for each in PAGES[page].splitlines() if each.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def near(said):
    """Not a half off: the first and last layers do not take part in everything."""
    return pytest.approx(float(said), abs=0.49)


@pytest.mark.parametrize(
    ("row", "loss", "options"),
    [
        ("order one", hosm.first_order_dsm, {}),
        ("order two", TWO, {}),
        ("order three", THREE, {}),
        ('order three, `third="laplacian"`', THREE, LAPLACIAN),
        ("`stein_dsm`", hosm.stein_dsm, {}),
        ('order three, `estimator="paired"`', THREE, PAIRED),
    ],
)
def test_the_evaluations_of_each_loss(row, loss, options):
    said, ratio = cells("start", row)
    assert evaluations(loss, **options) == near(said)
    assert float(said) / 3 == pytest.approx(float(ratio), abs=0.05)


def test_the_evaluations_of_paired_probes_at_order_two():
    said, ratios = cells("start", 'order two, `estimator="paired"`')
    both, without = re.fullmatch(r"(\d+); (\d+) without the second term", said).groups()
    assert evaluations(TWO, **PAIRED) == near(both)
    assert evaluations(TWO, weights=(1, 0, 1), **PAIRED) == near(without)
    assert ratios == f"{int(both) // 3}; {int(without) // 3}"


@pytest.mark.parametrize(
    ("page", "sentence", "loss", "options"),
    [
        (
            "start",
            r"`fraction=0.25` at order three costs ([\d.]+) eval",
            THREE,
            {"fraction": 0.25},
        ),
        ("README", r"at (\d+)\s+evaluations for order two", TWO, PAIRED),
        ("README", r"evaluations for order two and (\d+) for order three", THREE, PAIRED),
        ("README", r"log-density of the ODE,\s+takes (\d+)", hosm.stein_dsm, {}),
        ("derivatives", r"step of order three costs (\d+) eval", THREE, PAIRED),
        ("derivatives", r"in place of (\d+)", THREE, {"derivative": "taylor", **PAIRED}),
        ("cifar10", r"`stein` costs (\d+) evaluations", hosm.stein_dsm, {}),
    ],
)
def test_the_evaluations_in_sentences(page, sentence, loss, options):
    (said,) = re.findall(sentence, PAGES[page])
    found = evaluations(loss, **options)
    assert found == (pytest.approx(float(said), abs=0.02) if "." in said else near(said))


FORMULAS = {
    "3 (1 + K)": (TWO, {"probes": 4}),
    "6 (1 + d)": (THREE, {"probes": "exact"}),
    "3 (2 + d)": (THREE, {"probes": "exact", **LAPLACIAN}),
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_formulas_of_evaluations(formula):
    assert f"${formula}$" in PAGES["start"]
    loss, options = FORMULAS[formula]
    said = eval(formula.replace(" (", " * ("), {"K": 4, "d": 8})
    assert evaluations(loss, **options) == near(said)


@pytest.mark.parametrize(("place", "engine"), [(0, "taylor"), (1, "reverse")])
def test_the_evaluations_of_each_engine(place, engine):
    row = "Evaluations of the network in a step, order "
    for loss, order in ((TWO, "two"), (THREE, "three")):
        said = cells("derivatives", row + order)[place]
        assert evaluations(loss, derivative=engine) == near(said)
    said = cells("derivatives", "Order three, laplacian")[place]
    assert (said == "no") == (engine == "reverse")
    if engine == "taylor":
        assert evaluations(THREE, derivative=engine, **LAPLACIAN) == near(said)


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
        (said,) = re.findall(rf"(\S+ ± \S+) for the {name}", PAGES["near_t_min"])
        assert f"{mean:.0f} ± {(square - mean**2) ** 0.5:.1f}" == said


def test_how_wrong_pytorch_alone_is():
    """The gradients of diffusers' transformers in the table of docs/compatibility.md."""
    wrong = re.findall(r"^\| diffusers (?:DiT|SD3).*", PAGES["compatibility"], re.MULTILINE)
    errors = [float(each) for each in re.findall(r"wrong \((\S+)\)", "".join(wrong))]
    low, high = re.findall(r"is off by (\d+) to (\d+) %", PAGES["README"])[0]
    assert [f"{100 * each:.0f}" for each in (min(errors), max(errors))] == [low, high]


def test_students_factor():
    (said,) = re.findall(r"Student's factor \((\S+) for four probes\)", PAGES["likelihood"])
    assert f"{student_factor(3):.2f}" == said
