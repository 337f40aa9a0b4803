"""The API page names all that is public, and the code of the pages runs."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

import hosm_losses
from hosm_losses.taylor.registry import RULES

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))  # README has a test of its own
# A fence with anything after "python" is for reading only. Text below is what a block prints.
BLOCK = re.compile(
    r"^( *)```python\n(.*?)^\1```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def test_api_page_lists_exactly_the_public_names():
    public = [
        name
        for name, value in vars(hosm_losses).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^   (\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(public)


def test_every_figure_is_on_a_page_and_has_a_transparent_ground():
    """One that was drawn without the style file of the others is opaque, its text black."""
    image = pytest.importorskip("PIL.Image")
    figures = list((ROOT / "docs" / "images").iterdir())
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {*re.findall(r"\(images/(\S+)\)", text)} == {path.name for path in figures}
    for path in figures:
        if path.suffix == ".svg":
            drawn = path.read_text(encoding="utf-8")
            assert "#7f7f7f" in drawn, path
            assert "fill: #ffffff" not in drawn, path
        else:
            with image.open(path) as picture:
                assert picture.convert("RGBA").getpixel((0, 0))[3] == 0, path


@pytest.fixture
def rules():
    """What a page registers is forgotten after it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    """All blocks of a page, in order, in one namespace, in the dtype a user has.

    A block prints what the page shows below it: lines may be wrapped, and numbers differ by 2 %.
    """
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(2))  # for tracebacks that point into the page
        exec(compile("\n" * line + textwrap.dedent(block[2]), str(page), "exec"), namespace)
        printed, shown = capsys.readouterr().out, block[3]
        if shown is not None:
            words = [NUMBER.sub("0", text).split() for text in (printed, shown)]
            numbers = [[*map(float, NUMBER.findall(text))] for text in (printed, shown)]
            assert words[0] == words[1], printed
            assert numbers[0] == pytest.approx(numbers[1], rel=0.02), printed
