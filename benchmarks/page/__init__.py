"""docs/benchmarks.md, docs/choosing.md, figures and headlines, from a file of results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.environment import ROOT
from benchmarks.page import (
    choosing,
    gpu,
    gradients,
    headlines,
    likelihood,
    other,
    peers,
    speed,
    variance,
)
from benchmarks.page.markdown import filled

WRITTEN = "<!-- Written by `python -m benchmarks`; change that, and not this page. -->"
# In the order of the page.
SECTIONS = {
    "estimator_variance": variance,
    "gradient_variance": gradients,
    "likelihood": likelihood,
    "speed": speed,
}


def measured(question: str, found: results.Report) -> str:
    """Where and when a question was measured, and by which command."""
    where = found["environment"]
    size = "" if found["size"] == "default" else f" --{found['size']}"
    versions = ", ".join(
        f"{name} {each}" for name, each in where["peers"].items() if each is not None
    )
    missing = [name for name, each in where["peers"].items() if each is None]
    without = f" Not installed: {', '.join(missing)}." if missing else ""
    return filled(
        f"""`python -m benchmarks {question}{size}`, on {where["threads"]} thread of
        {where["cores"]} cores, {where["processor"]}, load before {where["load_before"]}; Python
        {where["python"]}, PyTorch {where["torch"]}, NumPy {where["numpy"]}, {versions}; commit
        {where["commit"]}, {where["date"]}.{without}"""
    )


def benchmarks_page(questions: results.Report, file: Path) -> str:
    """docs/benchmarks.md."""
    introduction = filled(
        f"""Everything here comes from `benchmarks/results/{file.name}`, which
        `python -m benchmarks --full` (extra `benchmarks`) measures anew; the line under a section
        has the command for it alone. Without `--full` that takes ten minutes and measures less.
        Times are processor times of one thread, compared within one run only. What the numbers
        advise is on the page {{doc}}`choosing`."""
    )
    parts = [WRITTEN, "# Benchmarks", introduction, peers.section(questions)]
    for question, module in SECTIONS.items():
        if question in questions:
            found = questions[question]
            parts += [module.section(found["tests"]), measured(question, found)]
    for question, text in other.sections(questions):
        parts += [text, measured(question, questions[question])]
    parts += gpu.sections(file.parent)
    return "\n\n".join(part for part in parts if part) + "\n"


def write(file: Path, root: Path) -> Iterator[str]:
    """Write the pages and figures under `root`; yield what there is to say of each."""
    questions = results.read(file)
    pages: dict[str, Any] = {
        "docs/benchmarks.md": benchmarks_page(questions, file),
        "docs/choosing.md": choosing.page(questions, WRITTEN),
        **headlines.pages(questions, ROOT),
    }
    for name, text in pages.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        yield f"Written: {name}"
    for question, module in SECTIONS.items():
        if question in questions:
            for path in module.draw(questions[question]["tests"], root / "docs" / "images"):
                yield f"Written: {path.relative_to(root)}"
    yield headlines.printed(questions)
