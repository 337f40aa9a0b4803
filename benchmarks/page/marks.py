"""Marks on the pages, and what stands between them.

`<!-- benchmarks: NAME -->text<!-- /benchmarks -->` holds a table, or a number in a sentence. NAME
is one of `benchmarks.page.tables`, or a path or a table as in `benchmarks.page.numbers`, over as
many lines as it takes. A mark in a sentence never opens a line, which would make the line HTML.
"""

import re
from collections.abc import Callable

MARK = re.compile(
    r"(?P<opening><!-- benchmarks: (?P<name>.+?) -->)(?P<text>.*?)"
    r"(?P<closing><!-- /benchmarks(?:: (?P=name))? -->)",
    re.DOTALL,
)
ANY = re.compile(r"<!-- /?benchmarks\b")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def names(text: str) -> list[str]:
    """The names of the marks of a page, each in one line.

    Raises:
        ValueError: where a mark is not closed, or one in a sentence opens a line.
    """
    found = list(MARK.finditer(text))
    if len(ANY.findall(text)) != 2 * len(found):
        raise ValueError("expected every mark to be closed before the next one opens.")
    for each in found:
        opens = not text[: each.start()].rpartition("\n")[2].strip()
        if opens and "\n" not in each["text"]:
            raise ValueError(f"expected the mark {each['name']} inside of a line; it opens one.")
    return [" ".join(each["name"].split()) for each in found]


def fill(text: str, value: Callable[[str], str]) -> tuple[str, list[str]]:
    """A page with what stands between its marks written anew, and a line on each that moved."""
    ordered, moved = iter(names(text)), []

    def filled(mark: re.Match[str]) -> str:
        name, old = next(ordered), mark["text"].strip()
        try:
            new = value(name)
        except KeyError:
            new = None
        if new != old:
            line = text.count("\n", 0, mark.start()) + 1
            heading = HEADING.findall(text, 0, mark.start())[-1]
            moved.append(f"line {line}, “{heading}”, {name}: {_change(old, new)}")
        if new is None:
            return mark[0]
        around = "\n\n" if "\n" in new else ""
        return f"{mark['opening']}{around}{new}{around}{mark['closing']}"

    return MARK.sub(filled, text), moved


def _change(old: str, new: str | None) -> str:
    if new is None:
        return "not measured, left as it was"
    if "\n" not in new:
        return f"{old} → {new}"
    lines = new.splitlines()
    return f"{len(set(lines) - set(old.splitlines()))} of {len(lines)} lines of the table moved"
