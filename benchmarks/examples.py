"""The numbers and figures of scripts of docs/examples, kept for the pages.

python -m benchmarks.examples [WORD ...] [--dirty]

runs the commands with these words in them, or all in half an hour. A printed line is kept under
the words before its first comma or colon, as the numbers in it, a second one as NAME (2); of
mixture_1d.py the results.json that it writes. They go to results/examples.json, which the figures
of the pages are drawn from.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from benchmarks.experiment import parser

FILE = results.DIRECTORY / "examples.json"
COMMANDS = {
    "VE, seed 0": "mixture_1d.py",
    "checkerboard": "checkerboard.py",
    "checkerboard, 20 s": "checkerboard.py --seconds 20",
    "checkerboard, 90 s": "checkerboard.py --seconds 90",
    "digits": "digits.py",
    "fine_tune_unet": "fine_tune_unet.py",
    "gap_1d": "gap_1d.py --steps 1500",
    "inverse_problem": "inverse_problem.py",
    "many_well": "many_well.py",
    "pytorch_fault": "pytorch_fault.py",
    "velocity_2d": "velocity_2d.py",
}
LINE = re.compile(r"^(?P<name>[^,:\n]+)[,:](?P<rest>.*\d.*)$", re.MULTILINE)


def kept(printed: str) -> results.Report:
    """The numbers of each line, by their place in it."""
    found: results.Report = {}
    for line in LINE.finditer(printed):
        name = f"{line['name']} (2)" if line["name"] in found else line["name"]
        numbers = re.findall(r"-?\d+(?:\.\d+)?", line["rest"])
        found[name] = {str(i): float(each) for i, each in enumerate(numbers, 1)}
    return found


def main() -> None:
    arguments = parser(__doc__, smoke=False)
    arguments.add_argument("words", nargs="*", metavar="WORD")
    given = arguments.parse_args()
    for name, command in COMMANDS.items():
        if not all(word in command for word in given.words):
            continue
        where = results.environment(dirty=given.dirty)
        script, *options = command.split()
        run = [sys.executable, results.ROOT / "docs/examples" / script, *options]
        with tempfile.TemporaryDirectory() as out:
            printed = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, cwd=out)
            found = kept(printed.stdout)
            for path in Path(out).glob("*/results.json"):
                found = results.read(path)
        results.keep(FILE, {name: {"environment": where, "found": found}})


if __name__ == "__main__":
    main()
