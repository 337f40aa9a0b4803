"""What a training step costs by every route, over one of order one: FLOPs, time and memory.

python -m benchmarks speed

All variants of a network take turns in one process of one thread, JAX too, so that their ratios
are of one run. Memory is measured on networks with twins in JAX. Compiled losses are those of
benchmarks.compiled.

    flops     of matrix products and convolutions in loss and backward pass, counted.
    seconds   of processor time, the median over rounds in which all take turns, JAX too.
    memory    peak bytes of a step in a process of its own, above what the process held before: of
              the batch, the parameter gradients and what operators work with.
    jax       seconds of the same loss and network in JAX, benchmarks.peers.in_jax. It is given
              its random numbers; ours draws them.
    compile   seconds of the first step of the compiled loss module, with an empty cache.

Ratios are to order one; those of times come with intervals.
"""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import results
from benchmarks.counts import count_of
from benchmarks.experiment import Choose, Row, alone, times
from benchmarks.intervals import ratio_of_medians
from benchmarks.steps import BASE, MAIN, NAMES, NETWORKS, TWINS, VARIANTS, model_of, step_of

CASES = NAMES
Step = Callable[[], object]
# The C library returns freed tensors at once. Setting it also turns off glibc's habit of raising
# the threshold when something large is freed.
MEMORY = (
    dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    | results.ONE_THREAD
)
MARK = Path("/proc/self/clear_refs")  # Linux's; elsewhere no memory is measured


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_memory(name: str, batch: int, **variant: Any) -> int:
    """Peak resident memory of a step of a variant above that before, in bytes.

    Run it in a new process with the environment MEMORY. The steps before load what is not the last
    one's; one of them has as many samples, since two may take other operators. The result is
    within 2 % of what PyTorch's profiler counts as allocated, and repeats within 1 %, on Linux and
    glibc.
    """
    step = step_of(name, **variant)
    step(2)
    step(batch)
    gc.collect()
    MARK.write_text("5")  # from here on the peak counts anew
    before = resident("VmRSS")
    step(batch)
    return resident("VmHWM") - before


def peer_of(variant: Row) -> str | None:
    """The loss in JAX that a variant is compared with, None where it does other work."""
    if {"fraction", "probes"} & variant.keys():
        return None
    return f"JAX, order {variant['order']}"


def peer_steps(name: str, batch: int) -> dict[str, Step]:
    """Compiled steps in JAX, empty where it is not installed."""
    if importlib.util.find_spec("jax") is None or name not in TWINS:
        return {}
    import jax

    from benchmarks.peers.in_jax import training_step

    network, shape = model_of(name).network, NETWORKS[name][1]
    drawn = [jax.numpy.asarray(torch.randn(batch, *shape[1:]).numpy()) for _ in range(3)]
    x0, noise, probe = drawn
    steps: dict[str, Step] = {}
    for variant in VARIANTS.values():
        if key := peer_of(variant):
            given = (x0, jax.numpy.linspace(0.01, 1, batch), noise, probe)
            run = partial(training_step(network, variant["order"]), *given)
            steps[key] = lambda run=run: jax.block_until_ready(run())
    for step in steps.values():
        step()
    return steps


def first_step(step: Step, variant: Row) -> Row:
    """FLOPs of a step, or the seconds of its compilation; it is warm afterwards."""
    if "compiled" not in variant:
        flops = count_of(step).total
        step()
        return {"flops": flops}
    start = time.perf_counter()
    step()
    return {"compile_seconds": round(time.perf_counter() - start, 1)}


def measure(
    name: str, variants: dict[str, Row], rounds: int, batch: int, weighed: Collection[str]
) -> Row:
    """Everything about one network; memory of the variants that are to be weighed."""
    steps = {key: partial(step_of(name, **each), batch) for key, each in variants.items()}
    rows = {
        key: first_step(step, variants[key])
        for key, step in tqdm(steps.items(), f"{name}: first steps", leave=False)
    }
    found = times(steps | peer_steps(name, batch), rounds, f"{name}: rounds")
    for key, row in tqdm(rows.items(), f"{name}: memory", leave=False):
        row["seconds"] = statistics.median(found[key])
        row["time_ratio"] = ratio_of_medians(found[key], found[BASE])
        if (peer := peer_of(variants[key])) in found:
            row["jax_ratio"] = ratio_of_medians(found[key], found[peer])
        if key in weighed and MARK.exists():
            row["memory"] = alone(peak_memory, name, batch, variables=MEMORY, **variants[key])
        for field in {"flops", "memory"} & row.keys() & rows[BASE].keys():
            row[f"{field}_ratio"] = row[field] / rows[BASE][field]
    parameters = sum(each.numel() for each in model_of(name).parameters())
    return {"parameters": parameters, "rounds": rounds, "variants": rows}


def answer(name: str, choose: Choose) -> Row:
    """Everything about one network, in a process of its own."""
    if name not in choose(NAMES[:2], NAMES):
        return {}
    variants = VARIANTS if name in TWINS else {key: VARIANTS[key] for key in MAIN}
    weighed = choose([BASE] if name == "convolutional" else [], variants if name in TWINS else [])
    batch, rounds = choose(4, NETWORKS[name][1][0]), choose(1, 10)
    return {name: alone(measure, name, variants, rounds, batch, weighed)}
