"""The registry of rules, and the table of it on the page on the engines.

python -m tests.taylor.test_registry writes the table."""

from pathlib import Path

import pytest

from hosm_losses.taylor.registry import RULES, rule
from tests.taylor.table import HOMES

PAGE = Path(__file__).parent.parent.parent / "docs" / "engine.md"
KINDS = ("linear", "bilinear", "pointwise", "composite", "stack")
START, END = "<!-- rules: python -m tests.taylor.test_registry -->\n", "<!-- /rules -->"


def name(function):
    """As a user writes it: a method of operators, __add__, by none of its names."""
    found = getattr(function, "__name__", "__").removeprefix("linalg_").removeprefix("special_")
    homes = [each for each in HOMES if hasattr(each, found)]
    return None if found.startswith("__") or not homes else found


def table():
    lines = ["| Kind | Operators |", "| --- | --- |"]
    for kind in KINDS:
        rules = [each for each, found in RULES.items() if found.kind == kind]
        names = {name(each) for each in rules} - {None}
        lines.append(f"| {kind} | {', '.join(f'`{each}`' for each in sorted(names))} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_table():
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(START)[2].partition(END)[0] == table(), table()


def test_a_name_that_names_no_function_is_an_error():
    with pytest.raises(LookupError, match=r"got .*'log_ndtr'"):
        rule("log_ndtr")(lambda x: x)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + table() + END + rest.partition(END)[2], encoding="utf-8")
