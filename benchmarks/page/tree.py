"""The committed results as one tree of dictionaries, with what the pages work out from them.

estimator_variance > PROBLEM > over signs > PROBES > QUANTITY > LEVEL, or sum
estimator_variance > PROBLEM > scaled > PROBES > QUANTITY > K
gradient_variance > PROBLEM > noise, probe share, signal, noise scale > TERM > LEVEL
gradient_variance > PROBLEM > ratios > TERM / TERM > LEVEL
likelihood > PROBLEM > rows > METHOD > SETTING > field
likelihood > PROBLEM > targets > KIND, ERROR > METHOD > field
speed > NETWORK > variants > VARIANT > field
divergence_mode > ROUTE > PROBES > NETWORK
primitive_cost > NETWORK > ratio
measured > QUESTION > field
"""

import json
from pathlib import Path
from typing import Any

Found = dict[str, Any]
ROUNDING = 1e-6
SAME_IN_ONE = ("trace", "third laplacian", "third sliced")
# In the order of the pages.
PROBLEMS = {
    "ring": "ring of Gaussians",
    "mixture": "Gaussian mixture",
    "digits": "network on digits",
    "images": "network on images",
    "large images": "network on 32×32 images",
}


def tree(questions: Found) -> Found:
    """{question: {parameter: what a test found}}, and {"measured": {question: where}}."""
    found: Found = {"measured": {}}
    shapes = {
        "estimator_variance": _of_estimators,
        "gradient_variance": _of_gradients,
        "likelihood": _of_likelihood,
    }
    for question, report in questions.items():
        tests = {key.partition("[")[2].rstrip("]"): each for key, each in report["tests"].items()}
        tests = {name: tests[name] for name in PROBLEMS if name in tests} or tests
        shape = shapes.get(question, lambda each: each)
        found[question] = {name: shape(each) for name, each in tests.items()}
        where = {"size": report["size"], **report["environment"]}
        peers = {name: each or "not installed" for name, each in where.pop("peers").items()}
        found["measured"][question] = where | peers
    if "divergence_mode" in found:
        found["divergence_mode"] = _by_route(found["divergence_mode"])
    return found


def of_gpus(directory: Path) -> Found:
    """What `python -m benchmarks.gpu --out` wrote, by card, batch and precision."""
    found: Found = {}
    for file in sorted(directory.glob("gpu*.json")):
        report = json.loads(file.read_text())
        where = "{card}, PyTorch {torch}, commit {commit}, {date}".format(**report["environment"])
        for each in report["tables"]:
            found[f"{where}: batch {each['batch']}, {each['precision']}"] = each["variants"]
    return {"gpu": found}


def _of_estimators(found: Found) -> Found:
    """Variances over those of sign probes, by level, and K times that of K probes, by K."""
    over: Found = {}
    scaled: Found = {}
    for quantity in ("trace", "Frobenius", "third"):
        levels = {f"{each['level']:g} std": each[quantity]["samplers"] for each in found["levels"]}
        signs = {level: each["rademacher"]["variance"][0] for level, each in levels.items()}
        over.setdefault("rademacher, absolute", {})[quantity] = signs
        for sampler in next(iter(levels.values())):
            rows = {level: each[sampler] for level, each in levels.items()}
            total = sum(row["variance"][0] for row in rows.values())
            ratios = {level: row["over_rademacher"] for level, row in rows.items()}
            summed = {"sum": total / sum(signs.values())}
            over.setdefault(sampler, {})[quantity] = ratios | summed
    for quantity, samplers in found["probes"].items():
        one = samplers["rademacher"]["1"]["variance"][0]
        for sampler, rows in samplers.items():
            scaled.setdefault(sampler, {})[quantity] = {
                count: [_unrounded(int(count) * each / one) for each in row["variance"]]
                for count, row in rows.items()
            }
    levels = {f"{each['level']:g} std": each for each in found["levels"]}
    return found | {"over signs": over, "scaled": scaled, "levels": levels}


def _unrounded(ratio: float) -> float:
    return 0.0 if ratio < ROUNDING else ratio


def _of_gradients(found: Found) -> Found:
    """Estimates by level, and the batch whose noise is of the size of the mean.

    In one dimension signs are exact and estimators the same, so that only one of each is kept.
    """
    names = [f"{level:g} std" for level in found["levels"]]
    one = found["elements"] == 1
    fields = {
        field: {
            key: dict(zip(names, each, strict=True))
            for key, each in found[field].items()
            if not (one and (field == "probe share" or key.startswith(SAME_IN_ONE)))
        }
        for field in ("noise", "probe share", "signal", "ratios")
    }
    fields["noise scale"] = {
        term: {
            level: [fields["noise"][term][level][0] ** 2 / each for each in (value, high, low)]
            if low > 0
            else None
            for level, (value, low, high) in signal.items()
        }
        for term, signal in fields["signal"].items()
    }
    return found | fields


def _of_likelihood(found: Found) -> Found:
    """Rows by method and setting, targets by kind and error, and then by method."""
    rows: Found = {}
    for row in found["rows"]:
        rows.setdefault(row["method"], {})[f"{row['setting']:g}"] = row
    targets = {
        f"{'random' if target['random'] else 'exact'}, {target['error']:g} nat": {
            row["method"]: row for row in target["rows"]
        }
        for target in found["targets"]
    }
    return found | {"rows": rows, "targets": targets}


def _by_route(found: Found) -> Found:
    """Times by route, number of probes and network."""
    routes: Found = {}
    for key, each in found.items():
        network, probes = key.split("-")
        for route, ratio in each["ratios"].items():
            routes.setdefault(route, {}).setdefault(probes, {})[network] = ratio
    return routes
