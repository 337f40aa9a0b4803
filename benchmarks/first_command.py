"""What README's first command finds, for both schedules and two seeds.

python -m benchmarks.first_command

runs docs/examples/mixture_1d.py four times, three minutes each on two cores, and keeps the KL
divergences in results/mixture_1d.json, from which README's table is filled.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from benchmarks.environment import ROOT

FILE = results.DIRECTORY / "mixture_1d.json"
SCRIPT = ROOT / "docs/examples/mixture_1d.py"


def kept(report: results.Report) -> dict[str, float]:
    """The KL divergences of a results.json of the script, by what was equal and by order."""
    return {
        f"{kind.replace('_', ' ')}, order {order}": kl
        for kind in ("equal_steps", "equal_cost")
        for order, kl in report[kind].items()
    }


def main() -> None:
    """Run the script and keep what it found, run by run."""
    for schedule in ("ve", "vp"):
        for seed in (0, 1):
            with tempfile.TemporaryDirectory() as out:
                options = ["--schedule", schedule, "--seed", str(seed), "--out", out]
                subprocess.run([sys.executable, SCRIPT, *options], check=True)
                report = json.loads((Path(out) / "results.json").read_text("utf-8"))
            found = results.read(FILE) | {f"{schedule.upper()}, seed {seed}": kept(report)}
            results.write(FILE, found)


if __name__ == "__main__":
    main()
