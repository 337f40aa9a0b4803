"""Does the recipe hold at other learning rates, times, batches and networks?

    python -m benchmarks.recipe [--cells REGEX] [--dirty | --smoke]

Order one plain, orders one to three with averaged targets, and order one on quiet batches with
these train from scratch as in `benchmarks.worth`, for equal evaluations of the network, in its
cells of d = 1, 2 and 4 that search their rates. One setting at a time differs from BASE: a batch
of 256, times uniform in log σ̂, the cell's network, a rate of 3e-3. In eight dimensions, where
`benchmarks.worth` transfers its rates, only the rate is changed. A row is compared as there, with
one of the same setting, over three seeds. Each row is written to results/recipe/ at once, and a
second run goes on where the first one stopped.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import hosm_losses as hosm
from benchmarks import experiment, results
from benchmarks.worth import SEARCHED, Study, rows
from benchmarks.worth_problems import CELLS, Sizes
from benchmarks.worth_quantities import Row, ratios

DIRECTORY = results.DIRECTORY / "recipe"
BASE, RATE, SEEDS = "base", 3e-3, 3
ROWS = (
    "one",
    "one, averaged",
    "one, averaged, pairs, times",
    "two, averaged",
    "three, averaged",
)
TRANSFERRED = "many-well, d = 8, rotated"
PROBLEMS = (*SEARCHED, TRANSFERRED)


class Setting(NamedTuple):
    """What differs from the base: fields of the cell, and the rate."""

    changes: dict[str, Any]
    rate: float = RATE


SETTINGS = {
    BASE: Setting({}),
    "rate 3e-4": Setting({}, 3e-4),
    "rate 1e-3": Setting({}, 1e-3),
    "rate 1e-2": Setting({}, 1e-2),
    # Of the VE schedule of the base these are the same times.
    "VP, times uniform in t": Setting(
        {"schedule": hosm.VPSchedule(t_min=1e-3), "uniform_in_t": True}
    ),
    "batch 128": Setting({"batch": 128}),
    "batch 1024": Setting({"batch": 1024}),
    "six layers of width 32": Setting({"sizes": Sizes(32, 6)}),
    "one layer of width 512, no predictor": Setting(
        {"sizes": Sizes(512, 1, waves=2), "predictor": False}
    ),
}


def studies(
    pattern: str, where: Row, *, smoke: bool, out: Path
) -> Iterator[tuple[str, str, Study]]:
    """The cell, the setting and the study of each."""
    for name in PROBLEMS:
        for setting, (changes, _) in SETTINGS.items():
            title = f"{name}, {setting}"
            if not re.search(pattern, title) or (name == TRANSFERRED and changes):
                continue
            cell = replace(CELLS[name](), **{"batch": 256, "seeds": SEEDS, "long": None} | changes)
            if smoke:
                cell = replace(cell.small(), seeds=2)
            yield name, setting, Study(title, cell, where, out if smoke else DIRECTORY, out)


def main() -> None:
    parser = experiment.parser(__doc__)
    parser.add_argument("--cells", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--out", type=Path, default=Path("recipe_out"), help="of --smoke")
    arguments = parser.parse_args()
    where = experiment.environment(arguments)
    torch.set_num_threads(1)
    every = studies(arguments.cells, where, smoke=arguments.smoke, out=arguments.out)
    for name, setting, study in every:
        recipes = rows(study.cell)
        for row in ROWS:
            make = partial(study.finish, study.cell.model, recipes[row])
            study.row(row, partial(make, SETTINGS[setting].rate, f"{setting}: {row}"))
        results.show(f"{name}, {setting}", ratios(study.report))


if __name__ == "__main__":
    main()
