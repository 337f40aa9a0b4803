"""Numbers of the results in other pages: README.md and docs, between marks.

A block stands between `<!-- benchmarks: NAME -->` and `<!-- /benchmarks: NAME -->`, and is written
anew from the results of its question, so that no number there is written by hand. Where the
question was not measured the block stays as it is.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.page import likelihood, speed
from benchmarks.page.markdown import NOTHING, filled, number, table

Found = dict[str, Any]
COSTS = {
    "order 2": (speed.SECOND, "6"),
    "order 3": (speed.EXACT, "12"),
    'order 3, `third="laplacian"`': (speed.LAPLACIAN, "9"),
    "order 3, `fraction=0.25`": (speed.QUARTER, "5.25"),
    "order 3, `chunks=4`": (speed.CHUNKS, "16"),
}


def cost(tests: Found) -> str:
    """What a training step costs on the network that is drawn."""
    rows = speed.networks_of(tests)[speed.DRAWN]["variants"]
    lines = []
    for label, (key, evaluations) in COSTS.items():
        row = rows[key]
        jax = row.get("jax_ratio", [None])[0]
        lines.append(
            [
                label,
                evaluations,
                speed.number(row["flops_ratio"]),
                f"{row['time_ratio'][0]:.1f}",
                f"{row['memory_ratio']:.1f}" if "memory_ratio" in row else NOTHING,
                speed.number(jax),
            ]
        )
    header = ["training step, order one = 1", "network evaluations (order one: 3)", "FLOPs"]
    return table([*header, "time", "peak memory", "time over JAX's"], lines)


def modes(tests: Found) -> str:
    """What other derivatives take for value and divergence, over ours."""
    others: dict[str, list[float]] = {}
    for found in tests.values():
        (_, _), (_, ours), *rest = found["ratios"].items()
        for route, ratio in rest:
            others.setdefault(route, []).append(ratio[0] / ours[0])
    told = ", ".join(
        f"{route} {number(min(each), 2)} to {number(max(each), 2)} times"
        for route, each in others.items()
    )
    return filled(f"Time over that of reverse mode, over networks and one or four probes: {told}.")


# The page and the name of a block, its question, and what writes it.
BLOCKS: dict[tuple[str, str], tuple[str, Callable[[Found], str]]] = {
    ("README.md", "cost"): ("speed", cost),
    ("README.md", "likelihood"): ("likelihood", likelihood.paragraph),
    ("docs/likelihood.md", "accuracy"): ("likelihood", likelihood.accuracy),
    ("docs/likelihood.md", "modes"): ("divergence_mode", modes),
}


def replaced(text: str, name: str, block: str) -> str:
    """A page with one of its blocks written anew.

    Raises:
        ValueError: where the marks are not there once.
    """
    start, end = f"<!-- benchmarks: {name} -->", f"<!-- /benchmarks: {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"expected the marks {start} and {end} once each on the page.")
    pattern = re.escape(start) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{start}\n\n{block}\n\n{end}", text, flags=re.DOTALL)


def blocks(questions: Found) -> dict[tuple[str, str], str]:
    """Every block whose question was measured."""
    return {
        place: write(questions[question]["tests"])
        for place, (question, write) in BLOCKS.items()
        if question in questions
    }


def pages(questions: Found, root: Path) -> dict[str, str]:
    """The pages with their blocks, from those under `root`."""
    found: dict[str, str] = {}
    for (page, name), block in blocks(questions).items():
        text = found.get(page) or (root / page).read_text(encoding="utf-8")
        found[page] = replaced(text, name, block)
    return found


def printed(questions: Found) -> str:
    """All blocks, to be read in a terminal."""
    return "\n".join(
        f"\n{page}, {name}:\n{block}" for (page, name), block in blocks(questions).items()
    )
