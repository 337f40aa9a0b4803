"""What a release needs besides code: one version, pinned actions, nothing unpickled."""

import re
from pathlib import Path

import yaml

import hosm_losses

ROOT = Path(__file__).parent.parent
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*")


def test_every_action_is_pinned_by_its_commit():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for used in re.findall(r"\buses: *(.+)", path.read_text(encoding="utf-8")):
            assert PINNED.fullmatch(used), f"{path.name}: {used}"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hosm_losses.__version__


def test_nothing_is_unpickled():
    imported = r"^ *(?:import|from) (?:pickle|dill|joblib|shelve)\b"
    unpickles = re.compile(rf"{imported}|torch\.load\((?!.*weights_only=True)", re.M)
    for part in ("src", "docs/examples", "benchmarks"):
        for path in (ROOT / part).rglob("*.py"):
            assert not unpickles.search(path.read_text(encoding="utf-8")), path
