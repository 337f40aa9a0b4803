"""Files of results, kept by question.

A file holds, for each question, the environment and the commit it was measured in, how much was
measured ("smoke", "default" or "full"), and what was found. Measuring one question anew leaves
the others as they are.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

Report = dict[str, Any]
DIRECTORY = ROOT / "benchmarks" / "results"
DIGITS = 5


def rounded(found: Any) -> Any:
    """Numbers with five digits, as far down as there are any."""
    if isinstance(found, dict):
        return {key: rounded(each) for key, each in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(each) for each in found]
    return float(f"{found:.{DIGITS}g}") if isinstance(found, float) else found


def read(file: Path) -> Report:
    """The questions of a file; none where there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


def keep(file: Path, found: Report) -> None:
    """Write what was found beside what a file holds already."""
    write(file, read(file) | found)


def write(file: Path, questions: Report) -> None:
    """Write the questions, sorted by name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ordered = rounded(dict(sorted(questions.items())))
    file.write_text(json.dumps(ordered, separators=(",", ":")) + "\n")
