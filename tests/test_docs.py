"""The documentation names everything public, and its code runs."""

import inspect
import re
import textwrap
from pathlib import Path

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
