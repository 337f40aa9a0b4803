"""The pages say what the committed results say, and a number that moves is told."""

import copy

import pytest

pytest.importorskip("matplotlib")

import benchmarks.__main__
from benchmarks import page, results
from benchmarks.page import marks, numbers, tables

FILE = results.DIRECTORY / "cpu-2-cores.json"
QUESTIONS, FOUND, PAGES = results.read(FILE), page.tree(FILE), page.pages()


def test_what_is_marked_is_what_the_results_say():
    moved = [f"{name}, {each}" for name, _, several in page.filled(FOUND) for each in several]
    assert not moved, "\n".join(["see what moved: python -m benchmarks --page-only", *moved])
    assert tables.TABLES.keys() <= {mark for text in PAGES.values() for mark in marks.names(text)}


def test_every_question_was_measured_in_full_and_no_host_is_kept():
    assert set(QUESTIONS) == set(benchmarks.__main__.QUESTIONS)
    for found in QUESTIONS.values():
        assert found["size"] == "full"
        assert set(found["environment"]) == set(results.environment(dirty=True))
    for word in ("node", "hostname", "/home", "/root", "/tmp"):
        assert word not in FILE.read_text()


def test_a_number_that_moves_and_a_peer_that_is_ahead_are_told():
    found = copy.deepcopy(FOUND)
    found["speed"]["mlp"]["variants"]["order 3, taylor"]["jax_ratio"] = [1.5, 1.4, 1.6]
    target = found["likelihood"]["ring"]["targets"]["random, 0.1 nat"]
    target["torchdiffeq"]["over_ours"] = [0.5, 0.4, 0.6]
    del found["estimator_variance"]
    moved = "\n".join(each for *_, several in page.filled(found) for each in several)
    path = "speed > mlp > variants > order 3, taylor > jax_ratio | digits = 3"
    assert f"“Where another is ahead”, {path}: {page.value(FOUND, path)} → 1.5" in moved
    assert "“In numbers”, peers: 2 of 7 lines of the table moved" in moved
    assert "not measured, left as it was" in moved
    assert "ring of Gaussians, random, 0.1 nat: 0.5 (0.4 to 0.6)" in tables.peers(found)


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
