"""Results name the commit that they come from, and no benchmark starts from changes to it."""

import pytest

pytest.importorskip("matplotlib")

from benchmarks import results


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


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("src/a.py", False),
        ("src/new.py", False),
        ("docs/examples/a.py", False),
        ("benchmarks/results/new.json", True),
        ("docs/page.md", True),
        ("a_out/weights.pt", True),
    ],
)
def test_nothing_is_measured_from_changes_but_what_benchmarks_write(
    tmp_path, monkeypatch, name, written
):
    """In a repository with one commit, in place of this one."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for file in ("src/a.py", "docs/page.md", "docs/examples/a.py", "a_out/log"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    (tmp_path / ".gitignore").write_text("*_out/\n")
    results.git("init")
    results.git("add", ".")
    results.git("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-m", "a")
    head = results.git("rev-parse", "--short", "HEAD")
    assert results.environment(dirty=False)["commit"] == head
    results.write(tmp_path / name, {})
    if written:
        assert results.environment(dirty=False)["commit"] == head
        return
    with pytest.raises(SystemExit, match=rf"got .* {name}\. Commit first, or pass --dirty"):
        results.environment(dirty=False)
    assert results.environment(dirty=True)["commit"] == f"{head}-dirty"
