"""What a training step costs on one network, by every route: FLOPs, time and memory.

    python -m benchmarks.speed NETWORK '{"rounds": 5, "batch": 4}'

prints JSON; the fields of `Setting` are what can be given. benchmarks/test_speed.py asks it for
all networks.

    flops     of matrix products and convolutions in loss and backward pass, counted. Attention is
              taken apart for it, as PyTorch has no count for its kernel on CPUs.
    seconds   of processor time, the median over rounds in which all take turns, JAX too.
    memory    peak bytes of a step in a process of its own, see benchmarks.memory.
    jax       seconds of the same loss and network in JAX, benchmarks.peers.jax_losses. It is given
              its random numbers; ours draws them.
    compile   seconds of the first step of the compiled loss module, with an empty cache.

Ratios are to order one; those of times come with intervals. What fails is recorded as "failed".
"""

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from tests.oracles import CountFlops
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import memory
from benchmarks.environment import ONE_THREAD, ROOT
from benchmarks.intervals import ratio_of_medians
from benchmarks.networks import NETWORKS
from benchmarks.timing import times

Step = Callable[[], object]
Row = dict[str, Any]
NAMES = ("mlp", "convolutional", "unet", "dit")
BASE = "order 1"
ENGINES = ("taylor", "reverse", "forward")
TAYLOR = {"derivative": "taylor"}
EXACT = {"order": 3, **TAYLOR}
LAPLACIAN = {**EXACT, "third": "laplacian"}
VARIANTS: dict[str, Row] = {
    BASE: {"order": 1},
    **{f"order 2, {engine}": {"order": 2, "derivative": engine} for engine in ENGINES},
    **{f"order 3 exact, {engine}": {"order": 3, "derivative": engine} for engine in ENGINES},
    **{
        f"order 3 {third}, {engine}": {"order": 3, "third": third, "derivative": engine}
        for third in ("laplacian", "sliced")
        for engine in ("taylor", "forward")
    },
    "order 3 exact, fraction=1/4": {**EXACT, "fraction": 0.25},
    "order 3 exact, chunks=4": {**EXACT, "chunks": 4},
    "order 2, probes=4": {"order": 2, **TAYLOR, "probes": 4},
    "order 3 laplacian, probes=4": {**LAPLACIAN, "probes": 4},
}
COMPILED: dict[str, Row] = {
    "order 2, compiled": {"order": 2},
    "order 3 exact, compiled": {"order": 3},
    "order 3 laplacian, compiled": {"order": 3, "third": "laplacian"},
}
MODULES = {2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}


class Setting(NamedTuple):
    """How to measure; None stands for the network's own batch, or for every variant there is."""

    rounds: int = 20
    batch: int | None = None
    compiled: bool = False
    memory: list[str] | None = None
    peers: list[str] | None = None


def peer_of(key: str) -> str | None:
    """The loss in JAX that a variant is compared with, None where it does other work."""
    variant = VARIANTS.get(key, COMPILED.get(key, {}))
    if {"fraction", "chunks", "probes"} & variant.keys():
        return None
    order = f"order {variant['order']}"
    return f"{order} {variant.get('third', 'exact')}" if variant["order"] == 3 else order


def compiled_step(name: str, order: int, **options: Any) -> Callable[[int], None]:
    """`memory.step_of` with the compiled loss module."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make()
    module = MODULES[order](hosm.ScoreModel(network, hosm.VPSchedule()), **options)
    loss = torch.compile(module, fullgraph=True)

    def step(batch: int) -> None:
        loss(torch.randn(batch, *shape[1:])).backward()
        network.zero_grad()

    return step


def peer_steps(name: str, batch: int, wanted: list[str] | None) -> dict[str, Step]:
    """Compiled steps in JAX, empty where it is not installed."""
    if importlib.util.find_spec("jax") is None:
        return {}
    import jax

    from benchmarks.peers import jax_losses

    make, shape = NETWORKS[name]
    parameters = jax_losses.parameters_of(make())
    x0, noise, *probes = (
        jax.numpy.asarray(torch.randn(batch, *shape[1:]).numpy()) for _ in range(4)
    )
    inputs = (x0, jax.numpy.linspace(0.01, 1, batch), noise)
    losses: dict[str, tuple[Any, ...]] = {"order 1": (1,), "order 2": (2,)}
    losses |= {f"order 3 {third}": (3, third) for third in jax_losses.THIRDS}
    steps: dict[str, Step] = {}
    for key, loss in losses.items():
        if wanted is None or key in wanted:
            step = jax_losses.training_step(name, parameters, *loss)
            given = (*inputs, *probes[: 2 if "sliced" in key else 1])
            steps[key] = lambda step=step, given=given: jax.block_until_ready(step(*given))
            steps[key]()
    return steps


def attempt(measure: Callable[[], Row]) -> Row:
    """What is measured, or why not: the first line of what was raised, without paths."""
    try:
        return measure()
    except Exception as error:
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        return {"failed": re.sub(r"(/[\w.+-]+){2,}/?", "...", line)[:200]}


def first_step(step: Step, *, compiled: bool) -> Row:
    """Warm up, and meanwhile count FLOPs or the seconds of compilation."""
    if compiled:
        start = time.perf_counter()
        step()
        return {"compile_seconds": round(time.perf_counter() - start, 1)}
    with sdpa_kernel(SDPBackend.MATH), CountFlops() as count:
        step()
    step()
    return {"flops": count.total}


def prepare(
    name: str, batch: int, *, compiled: bool = False
) -> tuple[dict[str, Row], dict[str, Step]]:
    """A row for each variant, with what its first step tells, and the steps that did not fail."""
    steps: dict[str, Step] = {
        key: partial(memory.step_of(name, **variant), batch) for key, variant in VARIANTS.items()
    }
    for key, variant in COMPILED.items() if compiled else ():
        steps[key] = partial(compiled_step(name, **variant), batch)
    rows = {
        key: attempt(partial(first_step, step, compiled=key in COMPILED))
        for key, step in tqdm(steps.items(), f"{name}: first steps", leave=False)
    }
    return rows, {key: step for key, step in steps.items() if "failed" not in rows[key]}


def add_times(rows: Mapping[str, Row], found: Mapping[str, list[float]]) -> None:
    """Put median seconds and ratios, to order one and to "JAX, ..." in `found`, into the rows."""
    medians = {key: statistics.median(each) for key, each in found.items()}
    for key in rows.keys() & found.keys():
        row, peer = rows[key], f"JAX, {peer_of(key)}"
        row["seconds"] = medians[key]
        row["time_ratio"] = ratio_of_medians(found[key], found[BASE])
        if peer in found:
            row["jax_seconds"] = medians[peer]
            row["jax_ratio"] = ratio_of_medians(found[key], found[peer])


def peak(name: str, batch: int, key: str) -> Row:
    """Peak memory of a step of a variant."""
    if key in VARIANTS:
        return {"memory": memory.peak(name, batch=batch, **VARIANTS[key])}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", name, json.dumps({"batch": batch}), key],
        cwd=ROOT,
        env={**os.environ, **memory.ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {"memory": int(done.stdout)}


def add_memory(rows: Mapping[str, Row], name: str, batch: int, wanted: list[str] | None) -> None:
    """Put peak memory and ratios into the rows."""
    keys = [key for key in rows if wanted is None or key in wanted]
    for key in tqdm(keys, f"{name}: memory", leave=False):
        if "failed" not in rows[key]:
            rows[key] |= attempt(partial(peak, name, batch, key))
        if "memory" in rows[key] and "memory" in rows[BASE]:
            rows[key]["memory_ratio"] = rows[key]["memory"] / rows[BASE]["memory"]


def measure(name: str, setting: Setting) -> Row:
    """Everything about one network, in this process."""
    make, shape = NETWORKS[name]
    batch = setting.batch or shape[0]
    rows, steps = prepare(name, batch, compiled=setting.compiled)
    peers = peer_steps(name, batch, setting.peers)
    routes = {**steps, **{f"JAX, {key}": step for key, step in peers.items()}}
    add_times(rows, times(routes, setting.rounds, f"{name}: rounds"))
    add_memory(rows, name, batch, setting.memory)
    for row in rows.values():
        if "flops" in row and "flops" in rows[BASE]:
            row["flops_ratio"] = row["flops"] / rows[BASE]["flops"]
    return {
        "batch": [batch, *shape[1:]],
        "parameters": sum(parameter.numel() for parameter in make().parameters()),
        "threads": torch.get_num_threads(),
        "rounds": setting.rounds,
        "variants": rows,
    }


def measured(name: str, setting: Setting) -> Row:
    """`measure` in a process of its own, with one thread for everybody and nothing compiled."""
    with TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.speed", name, json.dumps(setting._asdict())],
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD, "TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


def main() -> None:
    """Print what `measure` finds, or the peak of a step of the compiled variant that is named."""
    name, given, *key = sys.argv[1:]
    setting = Setting(**json.loads(given))
    if not key:
        print(json.dumps(measure(name, setting)))
        return
    step = partial(compiled_step(name, **COMPILED[key[0]]), setting.batch)
    step()
    print(memory.peak_bytes(step))


if __name__ == "__main__":
    main()
