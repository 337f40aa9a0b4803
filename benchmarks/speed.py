"""What a training step costs on one network, by every route: FLOPs, time and memory.

    python -m benchmarks.speed NETWORK '{"rounds": 5, "batch": 4}'

prints JSON; the fields of `Setting` are what can be given. benchmarks/test_speed.py asks it for
all networks.

    flops     of matrix products and convolutions in loss and backward pass, counted.
    seconds   of processor time, the median over rounds in which all take turns, JAX too.
    memory    peak bytes of a step in a process of its own, see benchmarks.memory.
    jax       seconds of the same loss and network in JAX, benchmarks.peers.jax_losses. It is given
              its random numbers; ours draws them.
    compile   seconds of the first step of the compiled loss module, with an empty cache.

Ratios are to order one; those of times come with intervals. What fails is recorded as "failed".
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks import memory
from benchmarks.counts import flops_of
from benchmarks.environment import ONE_THREAD
from benchmarks.experiment import Row, alone, attempt
from benchmarks.intervals import ratio_of_medians
from benchmarks.networks import NETWORKS
from benchmarks.steps import BASE, COMPILED, VARIANTS, model_of, step_of
from benchmarks.timing import times

Step = Callable[[], object]


class Setting(NamedTuple):
    """How to measure; None stands for the network's own batch, or for every variant there is."""

    rounds: int = 20
    batch: int | None = None
    compiled: bool = False
    memory: list[str] | None = None
    peers: list[str] | None = None


def peer_of(variant: Row) -> str | None:
    """The loss in JAX that a variant is compared with, None where it does other work."""
    if {"fraction", "chunks", "probes"} & variant.keys():
        return None
    order = f"order {variant['order']}"
    return f"{order} {variant.get('third', 'exact')}" if variant["order"] == 3 else order


def peer_steps(name: str, batch: int, wanted: list[str] | None) -> dict[str, Step]:
    """Compiled steps in JAX, empty where it is not installed."""
    if importlib.util.find_spec("jax") is None:
        return {}
    import jax

    from benchmarks.peers.jax_losses import training_step

    network, shape = model_of(name).network, NETWORKS[name][1]
    drawn = [jax.numpy.asarray(torch.randn(batch, *shape[1:]).numpy()) for _ in range(4)]
    x0, noise, *probes = drawn
    steps: dict[str, Step] = {}
    for variant in VARIANTS.values():
        key = peer_of(variant)
        if key is None or (wanted is not None and key not in wanted):
            continue
        third = variant.get("third", "exact")
        step = training_step(network, variant["order"], third)
        given = (x0, jax.numpy.linspace(0.01, 1, batch), noise)
        given += tuple(probes[: 2 if third == "sliced" else 1])
        steps[f"JAX, {key}"] = lambda step=step, given=given: jax.block_until_ready(step(*given))
    for step in steps.values():
        step()
    return steps


def first_step(step: Step, variant: Row) -> Row:
    """FLOPs of a step, or the seconds of its compilation; it is warm afterwards."""
    if "compiled" not in variant:
        flops = flops_of(step)
        step()
        return {"flops": flops}
    start = time.perf_counter()
    step()
    return {"compile_seconds": round(time.perf_counter() - start, 1)}


def memory_of(name: str, batch: int, variant: Row) -> Row:
    """Peak memory of a step of a variant."""
    return {"memory": memory.peak(name, batch, **variant)}


def measure(name: str, setting: Setting) -> Row:
    """Everything about one network, in this process."""
    shape = NETWORKS[name][1]
    batch = setting.batch or shape[0]
    variants = VARIANTS | (COMPILED if setting.compiled else {})
    steps = {key: partial(step_of(name, **each), batch) for key, each in variants.items()}
    rows = {
        key: attempt(first_step, step, variants[key])
        for key, step in tqdm(steps.items(), f"{name}: first steps", leave=False)
    }
    able = {key: step for key, step in steps.items() if "failed" not in rows[key]}
    routes = able | peer_steps(name, batch, setting.peers)
    found = times(routes, setting.rounds, f"{name}: rounds")
    medians = {key: statistics.median(each) for key, each in found.items()}
    for key in tqdm(able, f"{name}: memory", leave=False):
        row, peer = rows[key], f"JAX, {peer_of(variants[key])}"
        row |= {"seconds": medians[key], "time_ratio": ratio_of_medians(found[key], found[BASE])}
        if peer in found:
            row["jax_seconds"] = medians[peer]
            row["jax_ratio"] = ratio_of_medians(found[key], found[peer])
        if setting.memory is None or key in setting.memory:
            row |= attempt(memory_of, name, batch, variants[key])
        for field in {"flops", "memory"} & row.keys() & rows[BASE].keys():
            row[f"{field}_ratio"] = row[field] / rows[BASE][field]
    return {
        "batch": [batch, *shape[1:]],
        "parameters": sum(parameter.numel() for parameter in model_of(name).parameters()),
        "threads": torch.get_num_threads(),
        "rounds": setting.rounds,
        "variants": rows,
    }


def measured(name: str, setting: Setting) -> Row:
    """`measure` in a process of its own, with one thread for everybody and nothing compiled."""
    with TemporaryDirectory() as cache:
        environment = {**ONE_THREAD, "TORCHINDUCTOR_CACHE_DIR": cache}
        return alone(measure, name, setting, environment=environment)


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], Setting(**json.loads(sys.argv[2])))))
