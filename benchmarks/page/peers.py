"""The first section: every peer at a glance, and where one is ahead of ours."""

from benchmarks.page import gradients, likelihood, speed, variance
from benchmarks.page.markdown import filled, number, table
from benchmarks.page.problems import PROBLEMS, Found, problems


def of_speed(tests: dict[str, Found]) -> list[list[str]]:
    """The losses in JAX."""
    networks = speed.networks_of(tests)
    ratios = [
        row["jax_ratio"]
        for found in networks.values()
        for key, row in found["variants"].items()
        if "jax_ratio" in row and speed.is_default(key)
    ]
    if not ratios:
        return []
    values = sorted(1 / ratio[0] for ratio in ratios)
    theirs = f"time of theirs over ours {number(values[0], 2)} to {number(values[-1], 2)}"
    ahead = speed.ahead(networks, default=True)
    told = f"time of ours over theirs: {'; '.join(ahead)}" if ahead else "nowhere"
    return [["the paper's losses, jitted by JAX", f"a training step: {theirs}", told]]


def of_gradients(tests: dict[str, Found]) -> list[list[str]]:
    """The second-order loss of Meng et al."""
    every = problems(tests)
    if not every:
        return []
    key = f"{gradients.MENG} / second"
    values = sorted(each[0] for found in every.values() for each in found["ratios"][key])
    told = f"variance of theirs over ours {number(values[0], 2)} to {number(values[-1], 2)}"
    ahead = "; ".join(gradients.places(every, key, ahead=True)) or "nowhere"
    return [["second-order loss of Meng et al.", f"its gradient: {told}", ahead]]


def of_variance(tests: dict[str, Found]) -> list[list[str]]:
    """Hutch++, whose K times its variance is set against that of one Rademacher probe."""
    ratios = {
        f"{PROBLEMS[name]}, K = {count}": ratio
        for name, found in problems(tests).items()
        for count, ratio in variance.efficiencies(found, "trace", "Hutch++").items()
    }
    if not ratios:
        return []
    values = sorted(ratio[0] for ratio in ratios.values())
    told = f"variance of theirs over signs {number(values[0], 2)} to {number(values[-1], 2)}"
    ahead = "; ".join(key for key, (_, _, high) in ratios.items() if high < 1) or "nowhere"
    return [["Hutch++ of curvlinops", f"a trace, by K products: {told}", ahead]]


def section(questions: Found) -> str:
    """The section in Markdown."""

    def tests(question: str) -> dict[str, Found]:
        return questions.get(question, {}).get("tests", {})

    lines = [
        *likelihood.peers(tests("likelihood")),
        *of_variance(tests("estimator_variance")),
        *of_gradients(tests("gradient_variance")),
        *of_speed(tests("speed")),
    ]
    return "\n\n".join(
        [
            "## Others at a glance",
            filled(
                """What others compute, called as their users call it, on the same network and
                data. Ahead is who is ahead by the whole of the 95 % interval, or in evaluations,
                which are counted, by their number."""
            ),
            table(["Peer", "Compared", "The peer is ahead at"], lines),
        ]
    )
