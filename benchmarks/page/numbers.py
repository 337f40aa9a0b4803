"""The text of a number that a path names, and of a table of such numbers.

A path leads down the committed results, `question > problem > ... > field`:

    estimator_variance > PROBLEM > over signs > PROBES > QUANTITY > LEVEL, or sum
    gradient_variance > PROBLEM > noise, probe share, noise scale > TERM > LEVEL
    gradient_variance > PROBLEM > ratios > TERM / TERM > LEVEL
    likelihood > PROBLEM > rows > METHOD > SETTING > field
    likelihood > PROBLEM > targets > KIND, ERROR > METHOD > field
    speed > NETWORK > variants > VARIANT > field
    divergence_mode > ROUTE > PROBES > NETWORK
    measured > QUESTION > field

A part of it may hold `*`, or alternatives between ` or `; where it then names several numbers, the
text is their least and largest. An interval has the parts `value`, `low` and `high`, a list its
places from 0.

A table is `heads | path | column = path | ...`: a row for each match of the path, labelled by what
its wild parts stand for, and columns that are paths below it. A column alone has its path for a
name, and `*` stands for all there are. `digits = 3` asks for more than two, `turned` for rows and
columns exchanged.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

Found = dict[str, Any]
NOTHING = "–"
ENDS = ("value", "low", "high")  # an interval is a list of these three
# In the order of the pages.
PROBLEMS = {
    "ring": "ring of Gaussians",
    "mixture": "Gaussian mixture",
    "digits": "network on digits",
    "images": "network on images",
    "large images": "network on 32×32 images",
}
UNITS = {"seconds": 1e3, "memory": 2**-20, "flops": 1e-9, "parameters": 1e-6}  # ms, MiB, G, M


def walk(found: Found, path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every node of a path, with the keys that its wild parts stand for."""
    nodes: list[tuple[tuple[str, ...], Any]] = [((), found)]
    for part in path.split(" > "):
        patterns = part.split(" or ")
        wild = "*" in part or len(patterns) > 1
        nodes = [
            ((*keys, key) if wild else keys, below)
            for keys, node in nodes
            for key, below in _below(node)
            if any(fnmatchcase(key, each) for each in patterns)
        ]
    yield from nodes


def _below(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, each in node.items():
            yield key, _in_unit(each, UNITS.get(key, 1))
    elif isinstance(node, list):
        yield from ((str(i), each) for i, each in enumerate(node))
        if len(node) == len(ENDS):
            yield from zip(ENDS, node, strict=True)


def _in_unit(value: Any, unit: float) -> Any:
    if unit == 1 or value is None or isinstance(value, dict):
        return value
    return [unit * each for each in value] if isinstance(value, list) else unit * value


def named(found: Found, path: str, digits: int = 2) -> str:
    """The text of the number that a path names, of all of them the least and the largest.

    Raises:
        KeyError: where there is none.
    """
    values = [value for _, value in walk(found, path) if value is not None]
    if not values or any(isinstance(value, dict) for value in values):
        raise KeyError(path)
    if len(values) == 1:
        return text(values[0], digits)
    values = [value[0] if isinstance(value, list) else value for value in values]
    low, high = (number(each(values), digits) for each in (min, max))
    return low if low == high else f"{low} to {high}"


def text(value: Any, digits: int) -> str:
    """A value as it stands on the page."""
    if isinstance(value, list):
        return spread(value, digits)
    return value if isinstance(value, str) else number(value, digits)


def number(value: float, digits: int = 2) -> str:
    """A number with so many significant digits, a small whole one with all that it has."""
    if value == int(value) and abs(value) < 1000:
        return f"{value:.0f}"
    found = f"{value:.{digits}g}"
    return f"{float(found):.0f}" if "e+" in found and abs(value) < 1e5 else found


def spread(interval: Sequence[float], digits: int = 2) -> str:
    """A number with its interval in parentheses."""
    value, low, high = (number(each, digits) for each in interval)
    return value if low == high else f"{value} ({low} to {high})"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], labels: int = 1) -> str:
    """A table; of the first cells, those that are as in the line above are left empty."""
    shown, above = [], [""] * len(head)
    for line in lines:
        pairs = zip(line[:labels], above, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        shown.append([""] * same + [*line[same:]])
        above = line
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *shown])


def table(found: Found, described: str) -> str:
    """The table that is described so, without rows in which nothing was measured.

    Raises:
        KeyError: where that is every row.
        ValueError: for two columns of one name.
    """
    heads, path, *wanted = described.split(" | ")
    named_columns = [each.rpartition(" = ") for each in wanted]
    columns = {name or below: below for name, _, below in named_columns}
    if len(columns) < len(wanted):
        raise ValueError(f"table: expected columns of different names; got {', '.join(wanted)}.")
    digits, turned = int(columns.pop("digits", "2")), columns.pop("turned", None)
    rows = list(walk(found, path))
    if "*" in columns:
        columns = {key: key for _, node in rows for key in node}
    lines = []
    for keys, node in rows:
        cells = [cell(node, each, digits) for each in columns.values()]
        if set(cells) != {NOTHING}:
            lines.append([*(label(found[path.partition(" > ")[0]], key) for key in keys), *cells])
    if not lines:
        raise KeyError(path)
    labels = heads.split(", ")
    lines = [[*labels, *columns], *lines]
    head, *lines = zip(*lines, strict=True) if turned else lines
    return markdown(head, lines, 1 if turned else len(labels))


def cell(node: Any, path: str, digits: int) -> str:
    """The number of a path below a node, or a dash."""
    try:
        return named(node, path, digits)
    except KeyError:
        return NOTHING


def label(question: Found, key: str) -> str:
    """A key as the pages write it: a problem with its number of dimensions."""
    return f"{PROBLEMS[key]}, d = {question[key]['elements']}" if key in PROBLEMS else key
