"""What the sections call what was measured, and the tests by the names of their parameters."""

from typing import Any

Found = dict[str, Any]
# In the order of the pages.
PROBLEMS = {
    "ring": "ring of Gaussians",
    "mixture": "Gaussian mixture",
    "digits": "network on digits",
    "images": "network on images",
    "large images": "network on 32×32 images",
}


def by_parameter(tests: dict[str, Found]) -> dict[str, Found]:
    """What tests found, by what they were parametrised with."""
    return {key.partition("[")[2].rstrip("]"): found for key, found in tests.items()}


def tests_of(questions: Found, question: str) -> dict[str, Found]:
    """`by_parameter` of a question, empty where it was not measured."""
    return by_parameter(questions.get(question, {}).get("tests", {}))


def problems(tests: dict[str, Found]) -> dict[str, Found]:
    """The tests by the name of their problem, in order."""
    found = by_parameter(tests)
    return {name: found[name] for name in PROBLEMS if name in found}


def title(name: str, found: Found) -> str:
    """A problem with its number of dimensions."""
    return f"{PROBLEMS[name]}, d = {found['elements']}"
