"""The reference names all that is public, and the code of the pages runs."""

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


def test_the_reference_lists_exactly_the_public_names():
    public = [
        name
        for name, value in vars(hosm_losses).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    pages = (path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").iterdir())
    listed = re.findall(r"^(?:   |\.\. autodata:: )(\w+)$", "".join(pages), re.MULTILINE)
    assert sorted(listed) == sorted(public)


FIGURES = sorted((ROOT / "docs" / "images").iterdir())
GROUNDS = {False: ("#ffffff",), True: ("#131416", "#0d1117")}  # of light pages, and of dark ones


def contrast(color, ground):
    """That of WCAG 2, from 1 to 21."""

    def luminance(color):
        parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [
            part / 12.92 if part < 0.04 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(color), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def test_every_figure_is_on_a_page_and_has_a_dark_version():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = {*re.findall(r"\(images/(\S+)\.svg\)", text)}
    scripts = (path.read_text(encoding="utf-8") for path in (ROOT / "docs/tutorials").glob("*.py"))
    shown |= {*re.findall(r"image:: /images/(\S+)\.svg", "".join(scripts))}
    assert {*shown, *(f"{name}-dark" for name in shown)} == {path.stem for path in FIGURES}


def test_contrast():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.name)
def test_a_figure_reads_on_its_ground(path):
    """Every text has a colour of the style, and no ground is drawn."""
    drawn = path.read_text(encoding="utf-8")
    colors = {*re.findall(r"(?:fill|stroke): (#\w+)", drawn)}
    of_text = re.findall(r'<g id="text_\d+">\s*<!--[^>]*-->\s*<g style="fill: #', drawn)
    assert len(of_text) == drawn.count('<g id="text_') > 2
    for ground in GROUNDS[path.stem.endswith("-dark")]:
        assert min(contrast(color, ground) for color in colors) >= 4.5, colors


def test_every_colour_of_the_style_has_one_for_dark_pages():
    pytest.importorskip("matplotlib")
    from docs import pictures

    style = pictures.STYLE.read_text(encoding="utf-8")
    assert {f"#{color}" for color in re.findall(r"\b[0-9a-f]{6}\b", style)} == {*pictures.DARK}


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
