"""Measure everything, or the questions named, and fill the numbers on the pages from it.

    python -m benchmarks [QUESTION ...] [--smoke] [--name NAME] [--page-only] [--dirty]

A question is a file whose `answer` is called for each of its CASES, in a process of its own with
one thread. What is found goes to benchmarks/results/NAME.json, beside what is there already. From
all of that file come the figures, and the tables and numbers between marks in README.md and docs.
They are printed, and last what moved: a person reads the sentences beside it again.

An hour and a quarter on two cores. --smoke tries everything for some minutes, and leaves results
and pages in a temporary directory that it removes.
"""

from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import experiment, page, results
from benchmarks.trained import KEPT

QUESTIONS = ("estimator_variance", "gradient_variance", "likelihood", "speed")


def main() -> None:
    parser = experiment.parser(__doc__)
    told = f"of {', '.join(QUESTIONS)}; default: all"
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=told)
    parser.add_argument(
        "--name", default="cpu-2-cores", help="of the results; default: %(default)s"
    )
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    unknown = set(options.questions) - set(QUESTIONS)
    if unknown:
        parser.error(f"expected questions among {', '.join(QUESTIONS)}; got {', '.join(unknown)}.")
    chosen = [] if options.page_only else options.questions or QUESTIONS
    if options.smoke:
        with TemporaryDirectory() as directory:
            run(chosen, options, Path(directory), Path(directory))
        return
    run(chosen, options, results.DIRECTORY, results.ROOT)


def run(chosen: list[str], options: Namespace, directory: Path, root: Path) -> None:
    """Measure what is chosen into a directory, and fill the pages under a root."""
    file = directory / f"{options.name}.json"
    kept = results.read(file)
    with TemporaryDirectory() as weights:
        for number, question in enumerate(chosen, 1):
            print(f"\n[{number}/{len(chosen)}] {question}", flush=True)
            where = experiment.environment(options)
            given = {**results.ONE_THREAD, KEPT: weights}
            found = experiment.alone(experiment.ask, question, options.smoke, variables=given)
            kept[question] = {"environment": where} | found
            results.write(file, kept)
    for line in page.write(file, root):
        print(line)


if __name__ == "__main__":
    main()
