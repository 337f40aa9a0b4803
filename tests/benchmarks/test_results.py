"""Results name the commit that they come from, and no benchmark starts from changes to it."""

import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import experiment, page, results, scale

MAIN = {file.stem: file.read_text("utf-8") for file in results.ROOT.glob("benchmarks/*.py")}
WRITERS = [name for name, text in MAIN.items() if re.search(r"results\.DIRECTORY\b", text)]


def lost(commits):
    """Those that are not in the history, except where a result says so itself."""
    plain = {each.removesuffix("-dirty") for each in commits}
    said = {each for each in plain if each == "unknown" or each.endswith(", not in the history")}
    return {
        each
        for each in plain - said
        if results.git("merge-base", "--is-ancestor", each, "HEAD") is None
    }


def test_commits_of_results_are_in_the_history():
    """A rebase gives commits other names: results that name the old ones come from nowhere."""
    if results.git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("no Git history")
    head = results.git("rev-parse", "--short", "HEAD")
    assert lost([head, f"{head}-dirty", "unknown", "0123456-dirty"]) == {"0123456"}
    for file in results.DIRECTORY.rglob("*.json"):
        missing = lost(results.commits(results.read(file)))
        assert not missing, (
            f"{file.name}: expected commits of this history; got {', '.join(missing)}. Measure "
            "again, or append “, not in the history” to the commit, which the pages then show."
        )


def test_the_page_shows_where_every_result_comes_from():
    text = page.pages()["docs/benchmark_tables.md"]
    for name, row in results.sources(results.DIRECTORY).items():
        assert f"| {name} | {row['results']} | {row['dirty']} | {row['commits']} |" in text


def test_results_are_counted_by_commit(tmp_path):
    where = [{"commit": "a"}, {"commit": "b-dirty"}]
    study = {"environments": where, "rows": {str(i): {"environment": i > 0} for i in range(3)}}
    results.write(tmp_path / "study" / "a.json", study)
    results.write(tmp_path / "study" / "b.json", study)
    results.write(tmp_path / "whole.json", {"environment": where[0], "found": {}})
    results.write(tmp_path / "parts.json", {str(i): {"environment": where[1]} for i in range(2)})
    assert results.sources(tmp_path) == {
        "parts": {"results": 2, "dirty": 2, "commits": "b-dirty (2)"},
        "study": {"results": 6, "dirty": 4, "commits": "b-dirty (4); a (2)"},
        "whole": {"results": 1, "dirty": 0, "commits": "a (1)"},
    }
    results.write(tmp_path / "none.json", {"found": {}})
    with pytest.raises(KeyError):
        results.sources(tmp_path)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, in place of this one."""

    def git(*command):
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *author, *command], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name in ("src/a.py", "docs/page.md", "docs/examples/a.py", "benchmarks/results/a.json"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    (tmp_path / ".gitignore").write_text("*_out/\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    return tmp_path


@pytest.mark.parametrize("name", ["src/a.py", "src/new.py", "docs/examples/a.py"])
def test_results_are_not_measured_from_changed_files(repository, name):
    (repository / name).write_text("2")
    with pytest.raises(SystemExit, match=rf"got .* {name}\. Commit first, or pass --dirty"):
        results.environment(dirty=False)
    commit = results.environment(dirty=True)["commit"]
    assert commit == results.git("rev-parse", "--short", "HEAD") + "-dirty"


@pytest.mark.parametrize("name", ["benchmarks/results/a.json", "docs/page.md", "a_out/weights.pt"])
def test_what_benchmarks_write_is_no_change(repository, name):
    """A study is resumed beside the rows that it has written."""
    file = repository / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("2")
    (repository / "benchmarks/results/new.json").write_text("2")
    commit = results.environment(dirty=False)["commit"]
    assert commit == results.git("rev-parse", "--short", "HEAD")


def test_outside_of_git_the_commit_is_unknown(repository, monkeypatch):
    """Also in a folder of another repository, whose commits are not those of the results."""
    monkeypatch.setattr(results, "ROOT", repository / "src")
    with pytest.raises(SystemExit, match="got no Git history"):
        results.environment(dirty=False)
    assert results.environment(dirty=True)["commit"] == "unknown"


@pytest.mark.parametrize("name", [*WRITERS, "gpu"])
def test_a_benchmark_refuses_changed_files_before_it_measures(monkeypatch, name):
    def measures(*_, **__):
        raise AssertionError("expected that nothing is measured")

    for place, function in (
        (torch, "set_num_threads"),
        (experiment, "ProcessPoolExecutor"),
        (subprocess, "run"),
        (scale, "measure"),
    ):
        monkeypatch.setattr(place, function, measures)
    monkeypatch.setattr(results, "git", lambda *_: "?? new.py")
    monkeypatch.setattr(sys, "argv", [name, *(["--out", "gpu.json"] if name == "gpu" else [])])
    with pytest.raises(SystemExit, match=r"got \?\? new\.py\. Commit first, or pass --dirty"):
        import_module(f"benchmarks.{name}").main()


def test_a_smoke_run_starts_from_changed_files(monkeypatch):
    monkeypatch.setattr(results, "git", lambda *_: "?? new.py")
    options = experiment.parser("").parse_args(["--smoke"])
    assert experiment.environment(options)["torch"] == torch.__version__
