"""The documentation names everything public, its code runs, and its site needs no other host."""

import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import hosm_losses

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLIC = {
    name: value
    for name, value in vars(hosm_losses).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
# A fence with anything after "python" is for reading only.
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def _own_methods(cls):
    """Public methods and properties written in this package, those of private bases included."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "hosm_losses":
            for name, member in vars(base).items():
                kinds = property | classmethod | staticmethod
                if not name.startswith("_") and (
                    inspect.isfunction(member) or isinstance(member, kinds)
                ):
                    yield f"{base.__name__}.{name}", member


def _blocks(text):
    """Code and the line it starts at, for tracebacks that point into the page."""
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start(2)), textwrap.dedent(match[2])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name):
    value = PUBLIC[name]
    # A dataclass and a NamedTuple without a docstring are given their signature.
    assert not (value.__doc__ or f"{name}(").startswith(f"{name}(")
    if inspect.isclass(value):
        missing = [where for where, member in _own_methods(value) if not member.__doc__]
        assert not missing


def test_api_page_lists_exactly_the_public_names():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto\w+:: hosm_losses\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(PUBLIC)


def test_fences_are_found():
    text = "```python\na\n```\n- b\n\n  ```python\n  c\n  ```\n```python no-run\nd\n```\n"
    assert list(_blocks(text)) == [(1, "a\n"), (6, "c\n")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, in order, in one namespace, in the dtype a user has."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    for line, code in _blocks(page.read_text(encoding="utf-8")):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


class _Page(HTMLParser):
    """What a page loads, and its text outside of code and formulas."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.text, self._inside = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        kind = (attrs.get("rel") or "").split()
        if tag == "link" and not {"next", "prev", "index", "search"} & {*kind}:
            self.loads.append(attrs["href"])
        elif tag != "a" and attrs.get("src"):
            self.loads.append(attrs["src"])
        formula = "math" in (attrs.get("class") or "").split()
        opens = self._inside or formula or tag in ("code", "pre", "script", "style", "dt")
        if opens and tag not in ("area", "br", "hr", "img", "input", "link", "meta", "wbr"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as for its readers."""
    for name in ("furo", "myst_parser", "sphinx-mathjax-offline"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs the extra docs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(ROOT / "docs"), out]
    subprocess.run(command, check=True)
    return out


def test_the_site_asks_no_other_host(site):
    asked, missing = [], []
    for page in site.rglob("*.html"):
        for url in _Page(page.read_text(encoding="utf-8")).loads:
            if urlsplit(url).netloc:
                asked.append((page.name, url))
            elif not (page.parent / urlsplit(url).path).exists():
                missing.append((page.name, url))
    for style in site.rglob("*.css"):
        urls = re.findall(
            r"(?:url\(|@import) *[\"']?([^\"')]+)", style.read_text(encoding="utf-8")
        )
        asked += [(style.name, url) for url in urls if urlsplit(url).netloc]
    assert not asked
    assert not missing


def test_every_formula_of_the_site_is_one(site):
    """A line that opens with a plus or a minus inside $...$ becomes a list."""
    for page in site.glob("*.html"):
        text = "".join(_Page(page.read_text(encoding="utf-8")).text)
        assert "$" not in text, (page.name, text[text.index("$") - 80 :][:160])


def test_what_a_page_loads_is_found():
    page = _Page(
        '<link rel="stylesheet" href="https://a/b.css"><script src="//c/d.js">$x$</script>'
        '<a href="https://e">$</a><img src="f.png"><code>$</code><span class="math">$</span>'
    )
    assert page.loads == ["https://a/b.css", "//c/d.js", "f.png"]
    assert page.text == ["$"]
