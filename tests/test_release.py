"""What a release needs besides code: pinned actions, few permissions, one version, no pickles."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import hosm_losses

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"(?P<action>[\w.-]+/[\w./-]+)@(?P<commit>[0-9a-f]{40}) # v\d+(\.\d+)*")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_every_action_is_pinned_by_its_commit():
    commits = {}
    for path in WORKFLOWS:
        for used in re.findall(r"\buses: *(.+)", path.read_text(encoding="utf-8")):
            found = PINNED.fullmatch(used)
            assert found, f"{path.name}: {used}"
            commits.setdefault(found["action"], set()).add(found["commit"])
    assert len(commits) == 7
    assert all(len(each) == 1 for each in commits.values()), "one action, two commits"


def test_only_the_jobs_that_publish_may_do_more_than_read():
    granted = {}
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            granted[path.stem, name] = job.get("permissions")
    assert {job: given for job, given in granted.items() if given} == {
        ("release", "publish"): {"id-token": "write"},
        ("docs", "deploy"): {"pages": "write", "id-token": "write"},
    }


def test_the_tests_run_on_every_python_from_the_oldest_declared():
    workflow = yaml.safe_load((WORKFLOWS[0].parent / "test.yml").read_text(encoding="utf-8"))
    pythons = workflow["jobs"]["python"]["strategy"]["matrix"]["python"]
    minors = [int(version.removeprefix("3.")) for version in pythons]
    (oldest,) = re.findall(r'requires-python = ">=3\.(\d+)"', PROJECT)
    assert minors == list(range(int(oldest), max(minors) + 1))


def test_issue_forms_parse():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    parsed = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in forms}
    asked = {part["id"] for part in parsed["bug"]["body"] if part["validations"]["required"]}
    assert asked == {"versions", "network", "schedule", "code", "expected", "got"}


def test_the_citation_is_of_this_version_and_of_the_paper():
    assert CITATION["version"] == hosm_losses.__version__
    assert CITATION["license"] == "MIT"
    (paper,) = CITATION["references"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Lu", "Zheng", "Bao", "Chen", "Li", "Zhu"]
    assert paper["year"] == 2022
    assert paper["url"].endswith("2206.08265")


def loads(tree):
    """Calls of torch.load, and imports of what unpickles."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("torch.load"):
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
            yield "safe" if keywords.get("weights_only") == "True" else ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            yield from {"pickle", "dill", "joblib", "shelve"} & set(names)


@pytest.mark.parametrize("part", ["src", "docs/examples", "benchmarks"])
def test_nothing_is_unpickled(part):
    files = list((ROOT / part).rglob("*.py"))
    assert files
    found = [
        (path.name, each) for path in files for each in loads(ast.parse(path.read_text("utf-8")))
    ]
    assert [pair for pair in found if pair[1] != "safe"] == []


def test_unpickling_would_be_seen():
    code = (
        "import pickle\nfrom joblib import load\ntorch.load(f)\ntorch.load(f, weights_only=True)"
    )
    assert sorted(loads(ast.parse(code))) == ["joblib", "pickle", "safe", "torch.load(f)"]
