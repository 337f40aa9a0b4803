"""The pages say what the committed results say, and a number that moves is told."""

import copy
import re

import pytest

pytest.importorskip("matplotlib")

import benchmarks.__main__
from benchmarks import page, results
from benchmarks.page import marks, numbers, tables

from tests import test_docs, test_numbers

FILE = results.DIRECTORY / "cpu-2-cores.json"
QUESTIONS, FOUND, PAGES = results.read(FILE), page.tree(FILE), page.pages()
NUMBER = r"\d+(?:,\d{3})*"
SEVERAL = rf"{NUMBER}(?:(?:,|\s+to|\s+and|\s+or)\s+{NUMBER})*"
RESULT = r"(?!\.\d|,\d|\s%|\snats|\stimes)"  # what follows no choice
EXPLAINED = [
    # Filled in, printed by a block that runs, or code, mathematics, links, headings and lists.
    marks.MARK,
    test_docs.BLOCK,
    r"(?sm)^( *)```(?!text)\S.*?^\1```$",
    r"\$(?:[^$\n]|\n(?!\n))+\$",
    r"(?<!`)`(?!`)[^`]*`",
    r"\[[^\]]*\]\([^)]*\)",
    r"(?m)^(?:#+ .*| *\d+\. )",
    # Names and versions, 8×8, 64-D, d = 32, orders, and the level of an interval.
    r"(?<!\d)[^\W\d_][\w/-]*\d\w*",
    r"\b(?:PyTorch|Python|ICLR|December|commit)(?:(?:,| and| to| ≥)? [\d.]*\d)+\b",
    r"in 2\.\d+ and 2\.\d+",
    r"\d+(?:×\d+)+|\d+-D\b|\b[a-z] = \d+",
    rf"[Oo]rders? {SEVERAL}",
    r"95 %\s+(?:interval|coverage)",
    # How many, how large and within which bounds something was chosen to be.
    rf"{SEVERAL}\s+(?:\w+ )?(?:dimensions|images|patches|points|samples|steps)\b",
    rf"\b(?:[Ii]n|up to|more than|width|batches of) {SEVERAL}\b{RESULT}",
    rf"\d{{1,3}}(?:,\d{{3}})+{RESULT}",
    rf"(?<![\d.,/])[01]\b(?!/){RESULT}",
]
# What other tests read.
READ = [("cost", r"(?m)^\| order .*\|$"), ("theory", r"\S+ ± \S+ for the \w+")]
READ += [(name, rf"{before} [\d.]+") for name, before, *_ in reversed(test_numbers.EVALUATIONS)]
READ += [
    ("likelihood_errors", r".*-D \| \S+ nats, .*"),
    ("likelihood_errors", r"error is \S+ nats with \d+ steps and \S+ nats with \d+"),
    ("likelihood_errors", r"the estimate for \d+ % of samples, with a median error of \S+ nats"),
    ("likelihood_errors", r"covers \d+ to \d+ % of the errors .* and \d+ % or more"),
]
# Other choices, thresholds and definitions.
CHOSEN = """
3, 6 or 12 a sample
1/4 or 1/8
hidden layers of 512
64 channels
an EDM network of 64 units
64 forward and backward passes
Adam at 2e-4
(48 for order three)
an EMA decay of 0.999
how many probes a standard error of 0.2 nats requires
at least 0.001 nats per element
both 1000 and
(6 in 64-D)
100 ms a step
300 K and 800 K
which should be 63
off by 6 %
if this margin exceeds 10 %
relative error from 1e-2 to 1e-6
beyond 88 in float32
defaults, 0 and 0.5,
points 0.02 from a line of thickness
0.001, the median error
starts at 0.01
standard deviations 0.6 and 0.001
0.02 and 0.05 off
20, 40, 66 or 130 evaluations
a tolerance of 1e-11
16 sites and 32 bonds
0.5 is a perfect posterior
a GPU of 80 GB
over 64 GPUs
16 bytes a parameter
gradients, 8 bytes
""".strip().split("\n")
VERDICT = r"\b(?:right|wrong|raises)\b"
PLANTED = ["3", "2.5", "1/3", "1e-3", "in 12 %, and many", "0.3 nats, and many", "in 2.5"]


def test_what_is_marked_is_what_the_results_say():
    moved = [f"{name}, {each}" for name, _, several in page.filled(FOUND) for each in several]
    assert not moved, "\n".join(["see what moved: python -m benchmarks --page-only", *moved])
    assert tables.TABLES.keys() <= {mark for text in PAGES.values() for mark in marks.names(text)}


def test_words_fit_their_mark():
    """The last verdict between the mark before and that of a tally, or else the first after it."""
    told = set()
    for text in PAGES.values():
        parts = marks.MARK.split(text)
        for before, name, after in zip(parts[:-1:5], parts[2::5], parts[5::5], strict=True):
            if " > tally > " in name:
                word = [*re.findall(VERDICT, before)[-1:], *re.findall(VERDICT, after)][0]
                told.add((name.rpartition(" > ")[2], word))
    assert told == {("right", "right"), ("wrong", "wrong"), ("refused", "raises")}


def unexplained(text, page=""):
    """The lines with a number that nothing explains."""
    for phrase in CHOSEN:
        text = text.replace(phrase, " ")
    for pattern in [*(pattern for name, pattern in READ if name == page), *EXPLAINED]:
        text = re.sub(pattern, " ", text)
    return re.findall(r".*\d.*", text)


def test_every_other_number_is_explained():
    every = ""
    for path in (results.ROOT / "README.md", *test_docs.PAGES):
        if path.stem != "compatibility_tables":  # a test writes all of it
            text = path.read_text("utf-8")
            assert unexplained(text, path.stem) == [], path
            every += text
    assert [phrase for phrase in CHOSEN if phrase not in every] == []


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_number_is_found(planted):
    text = "In 3 dimensions, it takes {} times as long with 256 samples."
    assert unexplained(text.format("many")) == []
    assert unexplained(text.format(planted)) != []


def test_every_question_was_measured_in_full_and_no_host_is_kept():
    assert set(QUESTIONS) == set(benchmarks.__main__.QUESTIONS)
    for found in QUESTIONS.values():
        assert found["size"] == "full"
        assert set(found["environment"]) == set(results.environment(dirty=True))
    for word in ("node", "hostname", "/home", "/root", "/tmp"):
        assert word not in FILE.read_text()


def test_a_peer_that_is_ahead_is_told():
    found = copy.deepcopy(FOUND)
    found["speed"]["dit"]["variants"]["order 1"]["jax_ratio"] = [1.5, 1.4, 1.6]
    target = found["likelihood"]["ring"]["targets"]["random, 0.1 nat"]
    target["torchdiffeq"]["over_ours"] = [0.5, 0.4, 0.6]
    told = tables.peers(found)
    assert "ring of Gaussians, random, 0.1 nat: 0.5 (0.4 to 0.6)" in told
    assert "dit, order 1: 0.67 (0.62 to 0.71)" in told


def test_a_mark_is_filled_in_place_and_closed_inside_of_a_line():
    text = "# A\n\nb <!-- benchmarks: x -->1<!-- /benchmarks --> c"
    assert marks.fill(text, lambda _: "2") == (text.replace("1", "2"), ["line 3, “A”, x: 1 → 2"])
    filled, _ = marks.fill(text, lambda _: "| a |\n| - |")
    assert "-->\n\n| a |\n| - |\n\n<!--" in filled
    for bad in (text[:-24], text.replace("b <", "<")):
        with pytest.raises(ValueError):
            marks.names(bad)


def test_paths_name_one_number_or_a_span():
    found = {"q": {"a": {"seconds": [0.1, 0.09, 0.11]}, "b": {"seconds": 2.0, "none": None}}}
    assert numbers.named(found, "q > a > seconds") == "100 (90 to 110)"
    assert numbers.named(found, "q > a > seconds > low") == "90"
    assert numbers.named(found, "q > a or b > seconds") == "100 to 2000"
    assert numbers.named({"q": {"a": [1, 4, 2, 8]}}, "q > a > 3") == "8"
    for path in ("q > c", "q > a", "q > b > none"):
        with pytest.raises(KeyError):
            numbers.named(found, path)
    rows = numbers.table(found, "N | q > * | ms = seconds | none | turned").splitlines()
    assert rows[:2] == ["| N | a | b |", "| --- | --- | --- |"]
    assert rows[2:] == ["| ms | 100 (90 to 110) | 2000 |", "| none | – | – |"]
