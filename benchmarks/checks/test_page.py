"""The pages are what the committed results say, and say what they are to say."""

import copy
import json

import pytest

from benchmarks import page, results
from benchmarks.environment import ROOT, environment
from benchmarks.page import choosing, gpu, headlines, likelihood, peers, speed

FILE = results.path("cpu-2-cores")
QUESTIONS = results.read(FILE)


def written(tmp_path, questions: dict) -> dict[str, str]:
    """All pages from some questions."""
    file = tmp_path / FILE.name
    results.write(file, questions)
    list(page.write(file, tmp_path))
    return {
        path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.md")
    }


def test_the_pages_are_those_of_the_committed_results(tmp_path):
    for name, text in written(tmp_path, QUESTIONS).items():
        assert text == (ROOT / name).read_text(encoding="utf-8"), (
            f"{name} is not what benchmarks/results/{FILE.name} gives: python -m benchmarks "
            "--page-only"
        )
    drawn = {path.name for path in (tmp_path / "docs" / "images").iterdir()}
    assert drawn <= {path.name for path in (ROOT / "docs" / "images").iterdir()}


def test_every_question_was_measured_in_full():
    names = {path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py")}
    assert set(QUESTIONS) == names
    assert {found["size"] for found in QUESTIONS.values()} == {"full"}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_that_was_not_measured_is_left_out(tmp_path, question):
    rest = {name: found for name, found in QUESTIONS.items() if name != question}
    pages = written(tmp_path, rest)
    assert f"benchmarks {question}" not in pages["docs/benchmarks.md"]


def test_no_host_and_no_path_is_kept():
    text = FILE.read_text()
    for question in QUESTIONS.values():
        assert set(question["environment"]) == set(environment())
    for word in ("node", "hostname", "/home", "/root", "/tmp"):
        assert word not in text


def test_a_peer_that_is_faster_is_shown():
    found = copy.deepcopy(QUESTIONS["speed"]["tests"])
    (network,) = [each for key, each in found.items() if "[mlp]" in key]
    network["variants"][speed.SECOND]["jax_ratio"] = [1.5, 1.4, 1.6]
    told = " ".join(speed.section(found).split())  # lines are broken anywhere
    assert f"mlp, {speed.SECOND}: 1.5 (1.4 to 1.6)" in told
    questions = {"speed": {"tests": found}}
    assert f"mlp, {speed.SECOND}: 1.5 (1.4 to 1.6)" in peers.section(questions)


def test_a_likelihood_that_is_ahead_is_shown():
    found = copy.deepcopy(QUESTIONS["likelihood"]["tests"])
    (ring,) = [each for key, each in found.items() if "[ring]" in key]
    (row, *_) = [row for row in ring["targets"][0]["rows"] if not row["ours"]]
    row |= {"ahead": True, "fewer_evaluations": False, "over_ours": [0.5, 0.4, 0.6]}
    name = row["method"].removesuffix(", exact")
    (line,) = [line for line in likelihood.peers(found) if line[0] == name]
    assert "ring of Gaussians" in line[2]
    assert "(time)" in line[2]
    assert "0.5 (0.4 to 0.6)" in likelihood.section(found)


def test_advice_follows_the_numbers():
    questions = copy.deepcopy(QUESTIONS)
    size = choosing.SIZES[1]
    (found,) = [
        each for key, each in questions["estimator_variance"]["tests"].items() if "digits" in key
    ]

    def chosen(option: str) -> str:
        (advice,) = [each for each in choosing.advice(questions, size) if each.option == option]
        return advice.choice

    option = "`distribution` of `ode_nll`"
    assert chosen(option) == '`"rademacher"`'
    for level in found["levels"]:
        level["trace"]["samplers"]["sphere"]["variance"] = [1e-3] * 3
    assert chosen(option) == '`"sphere"`'


def test_blocks_want_their_marks():
    with pytest.raises(ValueError, match="once each"):
        headlines.replaced("no marks", "cost", "text")
    text = "a <!-- benchmarks: cost -->old<!-- /benchmarks: cost --> b"
    assert "old" not in headlines.replaced(text, "cost", "new")


def test_headlines_are_printed():
    shown = headlines.printed(QUESTIONS)
    for place, block in headlines.blocks(QUESTIONS).items():
        assert block in shown
        assert block in (ROOT / place[0]).read_text(encoding="utf-8")


def test_results_of_a_gpu_have_a_section(tmp_path):
    rows = {
        key: {"gradient": {"error": 1e-6}, "step": {"ms": ms, "memory": 2**30, "kernels": 9}}
        for key, ms in (("order 1", 10.0), ("order 2 taylor", 21.0))
    }
    where = {"card": "A card", "cuda": "13", "torch": "2.13", "commit": "abc", "date": "today"}
    table = {"batch": 128, "precision": "bf16", "variants": rows}
    report = {"environment": where, "tables": [table]}
    (tmp_path / "gpu-card.json").write_text(json.dumps(report))
    text = "\n".join(gpu.sections(tmp_path))
    assert "On a GPU: A card" in text
    assert "| order 2 taylor | 21 (2.10) | 1 (1.00) | 9 (1.00) | – | – | 1.0e-06 |" in text
    assert gpu.sections(tmp_path / "nowhere") == []
