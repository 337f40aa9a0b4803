"""Run a loss on a network and compare its parameter gradient with the reference."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hosm_losses as hosm
from tests.cases import default_dtype, gradients
from tests.integration.networks import BATCH, NETWORKS, SHAPE
from tests.integration.reference import Reference, reference, relative_error

ORDERS = (2, 3)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def arguments(name: str, dtype: torch.dtype, probes: int = 1) -> dict[str, Any]:
    """Fixed data, times, noise, probe and conditions: the arguments of a loss."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x0, noise = torch.randn(2, BATCH, *SHAPE, dtype=torch.float64)
        probe = torch.randint(0, 2, (3, BATCH, *SHAPE), dtype=torch.float64) * 2 - 1
        kwargs = NETWORKS[name].kwargs()
    given = {"x0": x0, "t": torch.tensor([0.3, 0.6]), "noise": noise, "probe": probe[:probes]}

    def cast(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}

    return {**cast(given), "model_kwargs": cast(kwargs)}


@functools.cache
def reference_of(name: str) -> Reference:
    """The reference of a network, in float64 and on the plain network."""
    network = NETWORKS[name]
    for other, each in NETWORKS.items():
        if (each.build, each.model) == (network.plain, network.model):
            return reference_of(other)
    with default_dtype(torch.float64):
        model = network.score_model(torch.float64, plain=True)
        given = arguments(name, torch.float64)
        alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in model.schedule(given["t"]))
        return reference(
            lambda x: -model.noise(x, given["t"], **given["model_kwargs"]),
            list(model.parameters()),
            alpha * given["x0"] + sigma * given["noise"],
            given["noise"],
            given["probe"][0],
            sigma.flatten(),
        )


def measured(
    model: hosm.ScoreModel, given: dict[str, Any], order: int, engine: str, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The terms per sample, (order + 1, B), and the parameter gradient of their weighted means."""
    terms = hosm.dsm_terms(model, order=order, engine=engine, **given)
    rows = torch.stack(terms[: order + 1])
    loss = weights[: order + 1].to(rows) @ rows.mean(1)
    return rows.detach(), torch.cat([part.flatten() for part in gradients(loss, model)])


@dataclass(frozen=True)
class Outcome:
    """What became of one gradient: its relative error, or what was raised in its place.

    `of_terms` is the largest relative error of a term.
    """

    dtype: torch.dtype
    error: float = 0.0
    of_terms: float = 0.0
    raised: Exception | None = None

    @property
    def verdict(self) -> str:
        """right, wrong or refused."""
        if self.raised is not None:
            return "refused"
        return "right" if self.error < TOLERANCE[self.dtype] else "wrong"


@functools.cache
def outcome(
    name: str,
    engine: str,
    order: int,
    *,
    primitives: bool = True,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """Run one loss of one network, all its terms weighing alike.

    Without primitives PyTorch's math kernel is used for attention, as its others refuse.
    """
    network, expected = NETWORKS[name], reference_of(name)
    kind = dtype or network.dtype
    kernel = nullcontext() if primitives else sdpa_kernel(SDPBackend.MATH)
    with default_dtype(kind), kernel:
        model = network.score_model(kind, primitives=primitives)
        try:
            terms, got = measured(model, arguments(name, kind), order, engine, expected.weights)
        except (RuntimeError, AttributeError, hosm.DerivativeError) as error:
            return Outcome(kind, raised=error.with_traceback(None))
    of_terms = max(map(relative_error, terms, expected.terms))
    return Outcome(kind, relative_error(got, expected.gradient(order)), of_terms)
