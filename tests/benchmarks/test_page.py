"""The pages say what the committed results say, and a number that moves is told."""

import copy
import json

import pytest

pytest.importorskip("matplotlib")

import benchmarks.__main__
from benchmarks import examples, page, results
from benchmarks.page import marks, numbers, tables

FILE = results.DIRECTORY / "cpu-2-cores.json"
QUESTIONS = results.read(FILE)
FOUND = page.tree(FILE)
PAGES, BENCHMARKS = page.pages(), "docs/benchmarks.md"
AGAIN = "see what moved: python -m benchmarks --page-only"


@pytest.mark.parametrize("name", PAGES)
def test_what_is_marked_is_what_the_results_say(name):
    _, moved = marks.fill(PAGES[name], lambda mark: page.value(FOUND, mark))
    assert not moved, "\n".join([AGAIN, *moved])


def test_every_table_stands_on_a_page():
    used = {mark for text in PAGES.values() for mark in marks.names(text)}
    assert tables.TABLES.keys() <= used


def test_a_number_that_moves_and_a_peer_that_is_ahead_are_told():
    found = copy.deepcopy(FOUND)
    found["speed"]["mlp"]["variants"]["order 3 exact, taylor"]["jax_ratio"] = [1.5, 1.4, 1.6]
    target = found["likelihood"]["ring"]["targets"]["random, 0.1 nat"]
    target["torchdiffeq"]["over_ours"] = [0.5, 0.4, 0.6]
    target["k-diffusion"]["fewer_evaluations"] = True
    (told,) = ["\n".join(moved) for name, _, moved in page.filled(found) if name == BENCHMARKS]
    path = "speed > mlp > variants > order 3 exact, taylor > jax_ratio | digits = 3"
    before = page.value(FOUND, path)
    assert f"“What others do better”, {path}: {before} → 1.5" in told
    assert "“Others at a glance”, peers: 3 of 7 lines of the table moved" in told
    shown = tables.peers(found)
    assert "mlp, order 3 exact, taylor: 0.67 (0.62 to 0.71)" in shown
    assert "ring of Gaussians, random, 0.1 nat: 0.5 (0.4 to 0.6)" in shown
    assert "ring of Gaussians, random, 0.1 nat: fewer evaluations" in shown


def test_columns_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="expected columns of different names"):
        page.value(FOUND, "Network | speed > mlp | ms = parameters | ms = rounds")


def test_an_unknown_mark_is_an_error():
    with pytest.raises(ValueError, match="expected a path or one of peers"):
        page.value(FOUND, "peer")
    with pytest.raises(KeyError):
        page.value(FOUND, "speed > mlp > nothing")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a <!-- benchmarks: known -->1", "closed"),
        ("<!-- benchmarks: a -->1<!-- benchmarks: b -->2<!-- /benchmarks -->", "closed"),
        ("a\n  <!-- benchmarks: known -->1<!-- /benchmarks --> b", "opens one"),
    ],
)
def test_a_mark_is_closed_and_inside_of_a_line(text, match):
    with pytest.raises(ValueError, match=match):
        marks.names(text)


def test_a_number_is_replaced_in_place_and_a_table_on_lines_of_its_own():
    text = "# A\n\nb <!-- benchmarks: x -->1<!-- /benchmarks --> c"
    assert marks.fill(text, lambda _: "2") == (text.replace("1", "2"), ["line 3, “A”, x: 1 → 2"])
    filled, _ = marks.fill(text, lambda _: "| a |\n| - |")
    assert "-->\n\n| a |\n| - |\n\n<!--" in filled


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_was_not_measured_stays_as_it_was(question):
    rest = {name: found for name, found in FOUND.items() if name != question}
    lines = [line for *_, moved in page.filled(rest) for line in moved]
    assert any("not measured" in line for line in lines)
    assert not any(" → " in line for line in lines)


def test_every_question_was_measured_in_full():
    assert set(QUESTIONS) == set(benchmarks.__main__.QUESTIONS)
    assert {found["size"] for found in QUESTIONS.values()} == {"full"}


def test_no_host_and_no_path_is_kept():
    for question in QUESTIONS.values():
        assert set(question["environment"]) == set(results.environment())
    for word in ("node", "hostname", "/home", "/root", "/tmp"):
        assert word not in FILE.read_text()


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
    with pytest.raises(KeyError):
        numbers.table(found, "N | q > * | none")


def test_the_numbers_that_an_example_prints_are_kept():
    printed = "order 1\n 1.0 2.0\nnll: -0.1 ± 2e\none, 17 steps: 2.5\nnll: 3\nnone: x\n"
    found = {"nll": {"1": -0.1, "2": 2}, "one": {"1": 17, "2": 2.5}, "nll (2)": {"1": 3}}
    assert examples.kept(printed) == found


def test_the_figures_are_drawn(tmp_path):
    drawn = [path.name for path in page.figures.draw(FOUND, tmp_path)]
    kept = {path.name for path in (results.ROOT / "docs" / "images").iterdir()}
    assert set(drawn) <= kept


def test_results_of_a_gpu_have_a_table(tmp_path):
    rows = {
        key: {"gradient": {"error": 1e-6}, "step": {"ms": ms, "memory": 2**29}}
        for key, ms in (("order 1", 10.0), ("order 2 taylor", 21.0))
    }
    where = {"card": "A card", "cuda": "13", "torch": "2.13", "commit": "abc", "date": "today"}
    table = {"batch": 128, "precision": "bf16", "variants": rows}
    (tmp_path / "gpu-card.json").write_text(json.dumps({"environment": where, "tables": [table]}))
    columns = "ms = step > ms | MiB = step > memory | ms compiled = compiled > ms"
    found = page.tree(tmp_path / "none.json")
    text = page.value(found, f"Card, Variant | gpu > * > * | {columns}")
    assert "| A card, PyTorch 2.13, commit abc, today: batch 128, bf16 | order 1 |" in text
    assert "|  | order 2 taylor | 21 | 512 | – |" in text
