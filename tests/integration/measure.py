"""Run a loss on a network and compare its parameter gradient with the reference."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hosm_losses as hosm
from tests.integration.builders import SHAPE
from tests.integration.networks import BATCH, NETWORKS
from tests.integration.reference import Reference, reference, relative_error
from tests.oracles import default_dtype

ENGINES = ("auto", "taylor", "reverse")
ORDERS = (2, 3)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
LOSSES = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}


def arguments(name: str, dtype: torch.dtype, probes: int = 1) -> dict[str, Any]:
    """Fixed data, times, noise, probe and conditions: the arguments of a loss."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x0, noise = torch.randn(2, BATCH, *SHAPE, dtype=torch.float64)
        probe = torch.randint(0, 2, (3, BATCH, *SHAPE), dtype=torch.float64) * 2 - 1
        kwargs = NETWORKS[name].kwargs()

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return {
        "x0": cast(x0),
        "t": torch.tensor([0.3, 0.6], dtype=dtype),
        "noise": cast(noise),
        "probe": cast(probe[:probes]),
        "model_kwargs": {key: cast(value) for key, value in kwargs.items()},
    }


@functools.cache
def reference_of(name: str, step: float | None = None) -> Reference:
    """The reference of a network, in float64 and on the plain network."""
    with default_dtype(torch.float64):
        model = NETWORKS[name].score_model(torch.float64, plain=True)
        given = arguments(name, torch.float64)
        alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in model.schedule(given["t"]))
        return reference(
            lambda x: -model.noise(x, given["t"], **given["model_kwargs"]),
            list(model.parameters()),
            alpha * given["x0"] + sigma * given["noise"],
            given["noise"],
            given["probe"][0],
            sigma.flatten(),
            **({} if step is None else {"step": step}),
        )


def gradient(
    model: hosm.ScoreModel,
    given: dict[str, Any],
    order: int,
    engine: str,
    weights: tuple[float, ...],
) -> Tensor:
    """The parameter gradient of a loss as one vector."""
    loss = LOSSES[order](model, derivative=engine, weights=weights[: order + 1], **given)
    return torch.cat([part.flatten() for part in parameter_gradients(loss, model)])


def parameter_gradients(loss: Tensor, model: hosm.ScoreModel) -> tuple[Tensor, ...]:
    """The gradient in every parameter, zero where the loss does not depend on it."""
    return torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, materialize_grads=True
    )


@dataclass(frozen=True)
class Outcome:
    """What became of one gradient: its relative error, or what was raised in its place."""

    dtype: torch.dtype
    error: float | None = None
    raised: Exception | None = None

    @property
    def verdict(self) -> str:
        """right, wrong or refused."""
        if self.error is None:
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
    network = NETWORKS[name]
    kind = dtype or network.dtype
    weights = reference_of(name).weights
    kernel = nullcontext() if primitives else sdpa_kernel(SDPBackend.MATH)
    with default_dtype(kind), kernel:
        model = network.score_model(kind, primitives=primitives)
        try:
            got = gradient(model, arguments(name, kind), order, engine, weights)
        except (RuntimeError, AttributeError, hosm.DerivativeError) as error:
            return Outcome(kind, raised=error.with_traceback(None))
    return Outcome(kind, relative_error(got, reference_of(name).gradient(order, weights)))
