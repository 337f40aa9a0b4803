"""docs/choosing.md: what the results advise, for three sizes of data.

Every choice is made by a rule from the numbers, said beside it, so that other numbers give other
advice. Where a question was not measured there is none.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks import counts
from benchmarks.page import likelihood, variance
from benchmarks.page.markdown import filled, number, table
from benchmarks.page.problems import Found, tests_of

DISTRIBUTIONS = ("rademacher", "dct", "sphere", "gaussian")
THIRDS = ("third", "third laplacian", "third sliced")
SHARED = ("second", "trace")
COUNTS = (1, 2, 4, 8)
COUNTED = "convolutional"
DEFAULT, CLEARLY = "rademacher", 0.9  # what is not better by a tenth is no reason to change
FEW = 8  # up to so many dimensions the unit vectors are affordable
QUESTIONS = ("estimator_variance", "gradient_variance", "likelihood")


class Size(NamedTuple):
    """Which problems of each question stand for data of this size, the first that was measured."""

    title: str
    variance: tuple[str, ...]
    gradients: tuple[str, ...]
    likelihood: tuple[str, ...]


SIZES = (
    Size("Few dimensions, d = 2", ("ring",), ("mixture",), ("ring",)),
    Size("Vectors, d = 64", ("digits",), ("digits",), ("digits",)),
    Size("Images, d = 3072", *[("large images", "images")] * 3),
)


class Advice(NamedTuple):
    """What to choose, and why."""

    option: str
    choice: str
    reason: str


def first_of(questions: Found, question: str, names: tuple[str, ...]) -> Found | None:
    """The first of the problems that was measured."""
    tests = tests_of(questions, question)
    return next((tests[name] for name in names if name in tests), None)


def flops(key: str) -> float:
    """FLOPs of a training step, over those of order one."""
    held, _ = counts.read()
    return held[f"{COUNTED}: {key}"]["flops"] / held[f"{COUNTED}: order 1"]["flops"]


def distribution(found: Found) -> Advice:
    """The probes of the likelihood: the least variance of the trace, summed over noise levels."""
    sums = {
        name: sum(level["trace"]["samplers"][name]["variance"][0] for level in found["levels"])
        for name in DISTRIBUTIONS
    }
    best = min(sums, key=sums.__getitem__)
    if sums[best] > CLEARLY * sums[DEFAULT]:
        best = DEFAULT
    others = ", ".join(
        f"{name} {number(each / sums[best], 2)}" for name, each in sums.items() if name != best
    )
    return Advice(
        "`distribution` of `ode_nll`",
        f'`"{best}"`',
        f"variance of the trace over its own, summed over five noise levels: {others} times",
    )


def likelihood_probes(questions: Found) -> Advice | None:
    """Several probes at a node share its forward pass."""
    rows = {
        key: next(iter(list(each["ratios"].values())[1:]))[0]
        for key, each in tests_of(questions, "divergence_mode").items()
    }
    names = {key.rpartition("-")[0] for key in rows}
    ratios = [rows[f"{name}-4"] / rows[f"{name}-1"] for name in sorted(names)]
    if not ratios:
        return None
    low, high = (number(each, 2) for each in (min(ratios), max(ratios)))
    return Advice(
        "`probes` of `ode_nll`",
        "1 for the mean of a test set; more, before more `steps`, where one number must be sharp",
        f"4 probes divide the variance by 4 at {low} to {high} times the time, since they share "
        "the forward pass; 4 times the steps do so at 4 times",
    )


def exact_probes(found: Found) -> Advice:
    """All unit vectors, where there are few."""
    return Advice(
        "`probes` of the losses",
        '`"exact"`',
        f"the {found['elements']} unit vectors cost what {found['elements']} random probes cost, "
        "and leave none of their variance",
    )


def loss_distribution(found: Found) -> Advice:
    """Whether the probes of the losses matter."""
    largest = max(
        max(ratio[0], 1 / ratio[0])
        for term in ("Frobenius", "third")
        for name in ("dct", "sphere", "gaussian")
        for ratio in variance.over_rademacher(found, term, name)
        if ratio[0] > 0
    )
    return Advice(
        "`distribution` of the losses",
        '`"rademacher"`, the default',
        f"no other has a variance more than {number(largest, 2)} times larger or smaller, at any "
        "of five noise levels",
    )


def third(found: Found) -> Advice:
    """The estimator with the least variance at equal cost, among those of one objective."""
    keys = {"third": "order 3 exact, taylor", "third sliced": "order 3 sliced, taylor"}
    keys["third laplacian"] = "order 3 laplacian, taylor"
    base = flops(keys["third"])
    product = {"third": 1.0}
    for name in THIRDS[1:]:
        ratios = [ratio[0] for ratio in found["ratios"][f"{name} / third"]]
        product[name] = float(np.exp(np.mean(np.log(ratios)))) * flops(keys[name]) / base
    laplacian, sliced = (number(product[name], 2) for name in THIRDS[1:])
    best = "sliced" if product["third sliced"] < CLEARLY else "exact"
    saving = number(flops(keys["third laplacian"]) / base, 2)
    return Advice(
        "`third`",
        f'`"{best}"`; `"laplacian"` where its objective will do',
        f"variance of the gradient times cost, over that of the exact form, geometric mean over "
        f"noise levels: sliced {sliced}, laplacian {laplacian}; a step with the laplacian costs "
        f"{saving} of an exact one",
    )


def loss_probes(found: Found) -> Advice:
    """The number of probes with the least variance of order two's gradient at equal cost."""
    shares = {
        name: float(np.median([level[0] for level in found["probe share"][name]]))
        for name in SHARED
    }
    share = np.mean([shares[name] for name in SHARED])
    extra = flops("order 2, taylor") - 1
    products = {
        count: (1 - share + share / count) * (1 + count * extra) / (1 + extra) for count in COUNTS
    }
    best = min(products, key=products.__getitem__)
    told = ", ".join(f"{count}: {number(each, 2)}" for count, each in products.items())
    most = ", ".join(f"{name} {100 * each:.0f} %" for name, each in shares.items())
    choice = "1" if best == 1 else f"{best} at order two, before a larger batch; 1 at order three"
    return Advice(
        "`probes` of the losses",
        choice,
        f"the part of the probes in the gradient's variance, median over noise levels: {most}; at "
        f"order two variance times cost is, by number of probes, {told}; at order three K probes "
        "cost as much as a batch K times as large, which lessens the noise of the data as well",
    )


def advice(questions: Found, size: Size) -> Iterator[Advice]:
    """All that was measured for one size."""
    solved = first_of(questions, "likelihood", size.likelihood)
    if solved is not None:
        yield from (Advice(*each) for each in likelihood.advice(solved))
    spread = first_of(questions, "estimator_variance", size.variance)
    if spread is not None:
        yield distribution(spread)
    several = likelihood_probes(questions)
    if several is not None:
        yield several
    few = spread is not None and spread["elements"] <= FEW
    trained = first_of(questions, "gradient_variance", size.gradients)
    if trained is not None:
        yield third(trained)
    if few:
        yield exact_probes(spread)
    elif trained is not None:
        yield loss_probes(trained)
    if spread is not None and not few:
        yield loss_distribution(spread)


def sources(questions: Found, size: Size) -> str:
    """Which problems the advice for one size is from."""
    told = []
    for question, names in zip(QUESTIONS, size[1:], strict=True):
        tests = tests_of(questions, question)
        told += [f"{question} on {name}" for name in names if name in tests][:1]
    return filled(f"From: {', '.join(told)}.")


def page(questions: Found, written: str) -> str:
    """The page in Markdown."""
    parts = [
        written,
        "# How to choose",
        filled(
            """What the numbers of {doc}`benchmarks` advise, for three sizes of data. Each row is
            made from the results by the rule that its reason states. They are results of small
            networks on few kinds of data: where a choice matters to you, measure it on yours."""
        ),
    ]
    for size in SIZES:
        lines = [list(each) for each in advice(questions, size)]
        if lines:
            parts += [f"## {size.title}", sources(questions, size)]
            parts.append(table(["Option", "Choose", "Because"], lines))
    parts += [
        "## Which order?",
        filled(
            """Order three where the likelihood of the ODE is what counts and the training is long
            enough; order one first where it is short. {doc}`start` has trainings at equal cost."""
        ),
    ]
    return "\n\n".join(parts) + "\n"
