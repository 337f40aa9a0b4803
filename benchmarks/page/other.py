"""Sections on smaller questions."""

from collections.abc import Iterator

from benchmarks.page.markdown import filled, spread, table
from benchmarks.page.problems import Found, by_parameter


def divergence_mode(tests: dict[str, Found]) -> str:
    """Routes to value and divergence."""
    routes = list(next(iter(tests.values()))["ratios"])[1:]
    lines = [
        [*key.split("-"), *(spread(found["ratios"][route], 2) for route in routes)]
        for key, found in by_parameter(tests).items()
    ]
    told = "; ".join(f"({number}) {route}" for number, route in enumerate(routes, 1))
    return "\n\n".join(
        [
            "## Which derivative gives value and divergence at the least cost?",
            filled(f"Time over one evaluation of the network: {told}."),
            table(["Network", "Probes", *(f"({n})" for n, _ in enumerate(routes, 1))], lines),
        ]
    )


def primitive_cost(tests: dict[str, Found]) -> str:
    """The safe primitives."""
    lines = [
        [*key.split("-"), spread(found["ratio"])] for key, found in by_parameter(tests).items()
    ]
    return "\n\n".join(
        [
            "## What do the safe primitives cost?",
            "A first-order training step with them over one without:",
            table(["Network", "Time"], lines),
        ]
    )


QUESTIONS = {"divergence_mode": divergence_mode, "primitive_cost": primitive_cost}


def sections(questions: Found) -> Iterator[tuple[str, str]]:
    """Every question that was measured, with its section."""
    for question, section in QUESTIONS.items():
        if question in questions:
            yield question, section(questions[question]["tests"])
