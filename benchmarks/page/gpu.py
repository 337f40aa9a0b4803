"""Sections on GPUs, one for every file of results that `python -m benchmarks.gpu --out` wrote."""

import json
from pathlib import Path
from typing import Any

from benchmarks.page.markdown import NOTHING, filled, number, table

BASE = "order 1"


def part(row: dict[str, Any], name: str, field: str) -> float | None:
    """A number of a variant, None where it was not measured."""
    return (row.get(name) or {}).get(field)


def cell(row: dict[str, Any], base: dict[str, Any], name: str, field: str, unit: float) -> str:
    """A number with its ratio to order one."""
    value, first = part(row, name, field), part(base, name, field)
    if value is None:
        return NOTHING
    return number(value / unit) + (f" ({value / first:.2f})" if first else "")


def variants_table(rows: dict[str, Any]) -> str:
    """A row for each variant."""
    lines = []
    for key, row in rows.items():
        numbers = [
            cell(row, rows[BASE], name, field, unit)
            for name, field, unit in (
                ("step", "ms", 1),
                ("step", "memory", 2**30),
                ("step", "kernels", 1),
                ("graph_given", "ms", 1),
                ("compiled", "ms", 1),
            )
        ]
        error = part(row, "gradient", "error")
        lines.append([key, *numbers, NOTHING if error is None else f"{error:.1e}"])
    header = ["Variant", "ms", "GiB", "kernels", "ms in a CUDA graph", "ms compiled"]
    return table([*header, "error of the gradient"], lines)


def sections(directory: Path) -> list[str]:
    """The sections, in the order of the files' names."""
    parts = []
    for file in sorted(directory.glob("gpu*.json")):
        report = json.loads(file.read_text())
        where = report["environment"]
        parts += [
            f"## On a GPU: {where['card']}",
            filled(
                f"""`python -m benchmarks.gpu --out benchmarks/results/{file.name}`, CUDA
                {where["cuda"]}, PyTorch {where["torch"]}, commit {where["commit"]},
                {where["date"]}. In parentheses is the ratio to order one."""
            ),
        ]
        for each in report["tables"]:
            parts.append(f"A batch of {each['batch']}, {each['precision']}:")
            parts.append(variants_table(each["variants"]))
    return parts
