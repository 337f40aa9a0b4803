"""The page docs/worth.md: its tables and its plot, from the results of worth and quadratic.

    python -m benchmarks.worth_page [FILE]

fills the page. FILE is copied to benchmarks/results/worth.json first: what worth wrote, and under
"quadratic", "samples" and "longer" what quadratic, worth_samples and a longer run of worth did.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from benchmarks import results
from benchmarks.environment import ROOT
from benchmarks.page.figures import DPI, TEXT, WIDTH
from benchmarks.page.numbers import markdown
from benchmarks.worth import BASE, BEFORE, SEEDS, SWEEP
from benchmarks.worth_problems import PROBLEMS

FILE, PAGE = results.DIRECTORY / "worth.json", ROOT / "docs/worth.md"


def change(row: dict[str, Any], base: dict[str, Any], key: str = "kl") -> tuple[float, float]:
    """The mean difference to order one, and its standard error, in per cent of order one's mean.

    The error is the larger of those over seeds and over points.
    """
    mean = float(np.mean(base[key]))
    error = max(row.get("seeds_error", 0.0), float(np.mean(row.get("error", 0.0))))
    return 100 * (float(np.mean(row[key])) / mean - 1), 100 * error / abs(mean)


def tables(report: results.Report) -> str:
    """Tables in Markdown: KL, J_SM, step times, how far order one had got, the weights tried.

    Where there is no KL, for the digits, differences are in nats.
    """
    found = {name: report[name] for name in PROBLEMS if BASE in report.get(name, {})}
    names = compared(found)

    def cell(rows: dict[str, Any], name: str, key: str) -> str:
        row, base = rows.get(name, {}), rows[BASE]
        if "failed" in row:
            return "diverged"
        if row.get(key) is None:
            return "–"
        if key == "step_time":
            return f"{row[key]:.1f}"
        moved, error = change(row, base, key)
        if base["j_sm"] is None:
            mean = float(np.mean(base[key]))
            moved, error = moved * mean / 100, error * abs(mean) / 100
            text = f"{moved:+.2f} ± {error:.2f} nats"
        else:
            text = f"{moved:+.1f}" + (f" ± {error:.1f}" if key == "kl" else "")
        return f"**{text}**" if key == "kl" and moved < -2 * error else text

    def grid(key: str, first: str) -> list[list[str]]:
        of_one = [rows[BASE][key] for rows in found.values()]
        base = [BASE, *("–" if each is None else f"{np.mean(each):.4g}" for each in of_one)]
        lines = [[name, *(cell(rows, name, key) for rows in found.values())] for name in names]
        return [[first, *found], base, *lines]

    starts = [["", "seconds before", "KL before", "order one", "change of KL", "its steps"]]
    for problem, rows in found.items():
        before, base = rows[BEFORE], rows[BASE]
        moved = f"{change(base, before)[0]:+.1f} %"
        if base["j_sm"] is None:
            moved = f"{np.mean(base['kl']) - np.mean(before['kl']):+.2f} nats"
        cells = [f"{before['seconds']:.0f}", f"{np.mean(before['kl']):.4g}"]
        cells += [f"{np.mean(base['kl']):.4g}", moved, str(base["steps"])]
        starts.append([problem, *cells])
    rows = found.get(next(iter(PROBLEMS)), {})
    tried = [name for name in rows if SWEEP in name]
    sweep = [["Tried", "KL, per cent"]]
    sweep += [[name.removeprefix(SWEEP), cell(rows, name, "kl")] for name in tried]
    grids = [grid("kl", "KL, per cent"), grid("j_sm", "J_SM, per cent")]
    every = *grids, grid("step_time", "time of a step"), starts, sweep
    return "\n\n".join(markdown(head, lines) for head, *lines in every)


def compared(found: results.Report) -> list[str]:
    """The losses that are compared with order one."""
    names = dict.fromkeys(name for rows in found.values() for name in rows)
    return [name for name in names if name not in (BEFORE, BASE) and SWEEP not in name]


def draw(report: results.Report, path: Path) -> None:
    """Draw KL over that of order one, for each problem and loss."""
    with rc_context(TEXT):
        drawn(report).savefig(path, dpi=DPI, metadata={"Software": None})


def drawn(report: results.Report) -> Figure:
    """The figure, in the text size of the context."""
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    axes = figure.subplots()
    found = [name for name in PROBLEMS if BASE in report.get(name, {})]
    found = [name for name in found if report[name][BASE]["j_sm"] is not None]
    names = compared({name: report[name] for name in found})
    markers = "osDv^<>PX"
    for i, loss in enumerate(names):
        rows = [
            (k, report[name].get(loss, {}), report[name][BASE]) for k, name in enumerate(found)
        ]
        shown = [(k, *change(row, base)) for k, row, base in rows if "kl" in row]
        if not shown:
            continue
        places, changes, errors = np.array(shown).T
        offset = (i - (len(names) - 1) / 2) / (len(names) + 2)
        style: dict[str, Any] = {"fmt": markers[i % len(markers)], "markersize": 5, "capsize": 2}
        ratio = 1 + changes / 100
        axes.errorbar(places + offset, ratio, errors / 100, label=loss, **style)
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set_yscale("log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(FormatStrFormatter("%.2f"))
    axes.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found])
    axes.tick_params(axis="x", labelsize="small")
    axes.set_ylabel("KL over that of order one,\nat equal processor time")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def of_quadratic(report: results.Report) -> str:
    """A table of KL without an optimizer, against order one."""
    names = list(next(iter(report.values())))
    rows = [["KL, per cent", *report]]
    for name in names:
        cells = []
        for losses in report.values():
            base = np.mean([kl for kl, _ in losses[BASE]])
            kls, errors = np.transpose(losses[name])
            moved, error = 100 * (kls.mean() / base - 1), 100 * errors.mean() / base
            cells.append(f"{base:.4g}" if name == BASE else f"{moved:+.1f} ± {error:.1f}")
        rows.append([name, *cells])
    return markdown(rows[0], rows[1:])


def of_samples(report: results.Report) -> str:
    """A table of the distances of samples to data, a column for each seed."""
    rows = [["distance of samples", *(f"seed {i}" for i in range(SEEDS))]]
    rows += [[name, *(f"{each:.3f}" for each in row)] for name, row in report.items()]
    return markdown(rows[0], rows[1:])


OTHERS = {
    "quadratic": of_quadratic,
    "samples": of_samples,
    "longer": lambda report: tables(report).partition("\n\n")[0],  # the first alone
}


def filled(text: str, report: results.Report) -> str:
    """The page with its tables written anew."""
    found = {"tables": tables(report)}
    for name, table in OTHERS.items():
        if name in report:
            found[name] = table(report[name])
    for name, value in found.items():
        mark = re.compile(rf"(<!-- worth: {name} -->).*?(<!-- /worth -->)", re.DOTALL)
        text = mark.sub(lambda match, value=value: f"{match[1]}\n\n{value}\n\n{match[2]}", text)
    return text


def main() -> None:
    """Copy results where they are given, draw, and fill the page."""
    for given in sys.argv[1:]:
        shutil.copy(given, FILE)
    report = results.read(FILE)
    draw(report, ROOT / "docs/images/worth.png")
    PAGE.write_text(filled(PAGE.read_text(), report))


if __name__ == "__main__":
    main()
