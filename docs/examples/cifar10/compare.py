"""A table of the evaluations of several runs; the last run is compared with each other run.

    python compare.py one more dear three

Each argument is a folder with an evaluation.json. To find out whether a higher order is worth its
cost, pass the start, order one continued for as many steps, order one continued for as many FLOPs,
and the higher order. Bits are subtracted image by image, for the images that all runs have, and
the error is the standard error of the mean difference. Because the images, the dequantization and
the probes are the same, this error is far smaller than the errors of the values.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

QUANTITIES = ("uniform", "truncated normal", "clean", "bound", "gap")


def read(folder: Path) -> dict[str, Any]:
    """Return the evaluation in a folder.

    Raises:
        FileNotFoundError: if the folder has no evaluation.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}; got no such file. Run evaluate.py there first.")
    return json.loads(path.read_text(encoding="utf-8"))


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of bits per dimension, and of the differences from the last run.

    Raises:
        ValueError: if the evaluations have different images or settings, or if the runs were
            continued from different weights.
    """
    (*others, last) = runs
    for name in others:
        ours, theirs = runs[last]["settings"], runs[name]["settings"]
        differing = [key for key in ours if ours[key] != theirs.get(key)]
        if differing:
            raise ValueError(
                f"expected evaluations with the same settings; {name} and {last} differ in "
                f"{', '.join(differing)}. Evaluate one of them again."
            )
    starts = {run["origin"] for run in runs.values() if run["origin"] is not None}
    starts |= {run["weights"] for run in runs.values() if starts and run["origin"] is None}
    if len(starts) > 1:
        raise ValueError(
            f"expected runs that went on from one checkpoint; got {', '.join(runs)}, which went "
            f"on from {len(starts)}. Compare a checkpoint with runs that have it as --init-from."
        )
    heads = ["", *runs, *(f"{last} less {name}" for name in others)]
    rows = [heads, ["---"] * len(heads)]
    for name in ("steps", "flops"):
        numbers = [run["step" if name == "steps" else name] for run in runs.values()]
        rows.append([name, *(f"{number:.4g}" for number in numbers), *[""] * len(others)])
    for quantity in QUANTITIES:
        if all(quantity in run and "bits" in run[quantity] for run in runs.values()):
            bits = np.array([run[quantity]["bits"] for run in runs.values()], float)
            bits = bits[:, np.isfinite(bits).all(0)]
            cells = [mean_and_error(values) for values in (*bits, *(bits[-1] - bits[:-1]))]
            rows.append([f"{quantity}, {bits.shape[1]} images", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def mean_and_error(values: np.ndarray) -> str:
    """Return a mean with its standard error, as text."""
    if not len(values):
        return "–"
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{values.mean():.4f} ± {error:.4f}"


if __name__ == "__main__":
    print(table({folder: read(Path(folder)) for folder in sys.argv[1:]}))
