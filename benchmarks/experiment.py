"""What the experiments share: command line, training, clocks, new processes, failures."""

import os
import re
import time
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import results

T = TypeVar("T")
Row = dict[str, Any]
Choose = Callable[..., Any]  # the first of two values in a smoke run, or else the second
Routes = Mapping[str, Callable[[], object]]


def ask(question: str, smoke: bool) -> Row:
    """What the file of a question finds, case by case; a warning is an error, as in the tests."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script`")  # torch.func.jvp, on first use
    module = import_module(f"benchmarks.{question}")
    torch.set_num_threads(1)
    found: Row = {}
    for case in module.CASES:
        if case == "large images" and smoke:
            continue
        print(case, flush=True)
        torch.manual_seed(0)
        found |= module.answer(case, lambda few, many: few if smoke else many)
    return {"size": "smoke" if smoke else "full", "found": found}


def parser(doc: str | None, *, smoke: bool = True) -> ArgumentParser:
    """A parser with the first line of a docstring as its description, --dirty and --smoke."""
    found = ArgumentParser(description=(doc or "").partition("\n")[0])
    found.add_argument("--dirty", action="store_true", help="keep results of uncommitted changes")
    if smoke:
        found.add_argument("--smoke", action="store_true", help="try everything, measure nothing")
    return found


def environment(options: Namespace) -> Row:
    """That of the results. With --smoke, which keeps none, files may have changed."""
    return results.environment(dirty=options.dirty or options.smoke)


def begin(given: ArgumentParser) -> tuple[Namespace, Row]:
    """The arguments of an experiment and its environment, in a process limited to one thread."""
    options = given.parse_args()
    where = environment(options)
    torch.set_num_threads(1)
    return options, where


def keep(options: Namespace, file: Path, found: Row) -> None:
    """Write what was found beside what a file holds already, unless nothing was measured."""
    if not options.smoke:
        results.keep(file, found)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def training(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float = 1e-3, decays=True
) -> Iterator[torch.optim.Adam]:
    """Take a step of Adam, by default with a cosine decay over all, each time it is advanced.

    The gradients of a step stay in place until the next one.
    """
    optimizer = torch.optim.Adam(model.parameters(), rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if decays else None
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if decay is not None:
            decay.step()
        yield optimizer


def training_by_module(
    loss: nn.Module,
    draw: Callable[[torch.Generator], Tensor],
    steps: int,
    rate: float,
    generator: torch.Generator,
    *,
    averaged: bool,
    every: int,
    rows: int,
) -> Iterator[None]:
    """`training` of a module of the losses, on half of what is drawn where it makes pairs of it.

    All that is drawn is the reference of averaged targets. After `every` so many steps, times that
    are learnt learn from some rows of a batch of their own.
    """
    sampler = getattr(loss, "time_sampler", None)

    def batch() -> Row:
        drawn = draw(generator)
        targets = hosm.AveragedTargets(drawn, own=False) if averaged else None
        x0 = drawn[: len(drawn) // (1 + loss.options.antithetic)]
        return {"x0": x0, "targets": targets, "generator": generator}

    for step, optimizer in enumerate(training(loss, lambda: loss(**batch()), steps, rate), 1):
        if isinstance(sampler, hosm.AdaptiveTimes) and step % every == 0 and step < steps:
            sampler.learn(loss, optimizer=optimizer, rows=rows, **batch())
        yield


def train(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, bar="training", **options: Any
) -> None:
    """Take all steps of a training; `bar` names its progress bar."""
    for _ in tqdm(training(model, loss, steps, **options), bar, steps, leave=False):
        pass


@contextmanager
def calls_of(network: nn.Module) -> Iterator[list[int]]:
    """The sizes of the batches that a network is called with inside of it."""
    sizes: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def clocked(route: Callable[[], T]) -> tuple[T, float]:
    """The result of a route, and its seconds of processor time."""
    start = time.process_time()
    found = route()
    return found, time.process_time() - start


def times(routes: Routes, rounds: int, bar: str | None = None) -> dict[str, list[float]]:
    """Seconds of processor time of each route, in every round; `bar` names a progress bar.

    All are timed in turns, so that another load hits them alike.
    """
    found: dict[str, list[float]] = {key: [] for key in routes}
    for _ in tqdm(range(rounds), bar, leave=False, disable=bar is None):
        for key, route in routes.items():
            found[key].append(clocked(route)[1])
    return found


def alone(function: Callable[..., T], *args: Any, variables=results.ONE_THREAD, **options) -> T:
    """The result of a function in a new process with these variables in its environment."""
    with patch.dict(os.environ, variables), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args, **options).result()


def reason(error: BaseException) -> str:
    """The first line of what was raised first, without paths, and where in this project."""
    while error.__context__ is not None:
        error = error.__context__
    frames = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    own = [f"{p.name}:{n}: " for p, n in frames if {"hosm_losses", "benchmarks"} & {*p.parts}]
    line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return "".join(own[-1:]) + re.sub(r"(/[\w.+-]+){2,}/?", "...", line)[:300]
