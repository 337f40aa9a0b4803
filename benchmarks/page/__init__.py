"""What the results put on the pages: tables, numbers between marks, and figures.

    numbers     the text of a number that a path names, and of a table of such numbers
    tables      the tables that are worked out
    figures     every figure; orders has that of the study of the losses
    marks       what stands between marks, and what moved

The sentences are written by hand on the pages themselves. A check fails where a number on a page
is not that of the committed results.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks import molecule, results
from benchmarks.page import figures, marks, orders
from benchmarks.page.numbers import Found, named, table
from benchmarks.page.tables import TABLES
from benchmarks.worth_quantities import dependence


def tree(file: Path) -> Found:
    """What was found by question, where it was measured, and what the files beside it hold.

    Those have their names: "keeping" is the question of speed with a C library that keeps freed
    memory. "divergence_mode" and "exact_up_to" are answered: nothing measures them again.
    """
    found: Found = {each.stem: below(results.read(each)) for each in file.parent.glob("*.json")}
    questions = results.read(file)
    found |= below(questions) | {"measured": {}}
    for question, report in questions.items():
        where = {"size": report["size"], **report["environment"]}
        peers = {name: each or "not installed" for name, each in where.pop("peers").items()}
        found["measured"][question] = where | peers
    study = results.read_all(file.parent / "orders")
    found["orders"], found["dependence"] = orders.cells(study), dependence(study)
    found["sources"] = results.sources(file.parent)
    limited, recipe = (results.read_all(file.parent / name) for name in ("finite", "recipe"))
    found["finite"], found["recipe"] = orders.finite(limited), orders.settings(recipe)
    found["molecule"] = molecule.found_in(file.parent / "molecule")
    found["gains"] = orders.gains(study, recipe, found["finite"])
    return found


def below(report: Found) -> Found:
    """What a report holds beside where it was measured, or each of its parts does."""
    if "environment" not in report:
        return {part: below(each) for part, each in report.items()}
    held = {key: each for key, each in report.items() if key not in ("environment", "size")}
    return held if len(held) > 1 else next(iter(held.values()))


def value(found: Found, name: str) -> str:
    """What stands between the marks of a name: a table, or the number of a path.

    Raises:
        KeyError: where it was not measured.
        ValueError: where nothing has this name.
    """
    if name in TABLES:
        return TABLES[name](found)
    if " > " not in name:
        raise ValueError(f"expected a path or one of {', '.join(TABLES)}; got {name!r}.")
    path, _, digits = name.partition(" | digits = ")
    return table(found, name) if " | " in path else named(found, path, int(digits or 2))


def pages(root: Path = results.ROOT) -> dict[str, str]:
    """README.md and the pages of the documentation that have marks."""
    files = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    texts = {file.relative_to(root).as_posix(): file.read_text("utf-8") for file in files}
    return {name: text for name, text in texts.items() if marks.ANY.search(text)}


def filled(found: Found) -> Iterator[tuple[str, str, list[str]]]:
    """Every page: its name, its text by these results, and what moved."""
    for name, text in pages().items():
        yield name, *marks.fill(text, lambda mark: value(found, mark))


def write(file: Path, root: Path) -> Iterator[str]:
    """Write the pages and figures under `root`; yield what there is to say of each.

    Last comes what moved, so that a person reads the sentences beside it again.
    """
    found = tree(file)
    again: list[str] = []
    for name, text, moved in filled(found):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        again += [f"{name}, {each}" for each in moved]
        yield f"Written: {name}"
        yield from (
            f"{each['name']}: {each['text'].strip()}" for each in marks.MARK.finditer(text)
        )
    for path in figures.draw(found, root / "docs" / "images"):
        yield f"Written: {path.relative_to(root)}"
    yield "Read again, beside what moved:" if again else "No number on the pages moved."
    yield from again
