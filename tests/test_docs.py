"""The API page names all that is public, the code of the pages runs, the site is on its own."""

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import hosm_losses

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A fence with anything after "python" is for reading only.
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def test_api_page_lists_exactly_the_public_names():
    public = [
        name
        for name, value in vars(hosm_losses).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto\w+:: hosm_losses\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(public)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, in order, in one namespace, in the dtype a user has."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(2))  # for tracebacks that point into the page
        exec(compile("\n" * line + textwrap.dedent(block[2]), str(page), "exec"), namespace)


@pytest.mark.slow
def test_the_site_loads_nothing_from_other_hosts_and_every_formula_is_one(tmp_path):
    """A line that opens with a plus or a minus inside $...$ becomes a list."""
    for module in ("furo", "myst_parser"):
        pytest.importorskip(module, reason="needs the extra docs")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", ROOT / "docs", tmp_path]
    subprocess.run(command, check=True)
    loads = r"<(?:link|script|img|iframe)[^>]+(?:href|src)=\"(?:https?:)?//"
    for page in tmp_path.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.search(loads, html), page
        assert "$" not in re.sub(r"(?s)<(code|pre|script|style|dt)\b.*?</\1>", "", html), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text()), style
