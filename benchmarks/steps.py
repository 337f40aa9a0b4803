"""The variants of the losses, and a training step of each on one of the networks."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import hosm_losses as hosm
from benchmarks.experiment import Row
from benchmarks.networks import MLP, Convolutional, DiT, UNet
from benchmarks.repositories import EDM, Guided, NCSNpp

LOSSES = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}
# With the shape of a batch. The first four have twins in JAX; of the last two a step takes a few
# milliseconds.
NETWORKS = {
    "mlp": (MLP, (2048, 2)),
    "convolutional": (Convolutional, (16, 3, 16, 16)),
    "unet": (UNet, (16, 3, 16, 16)),
    "dit": (DiT, (16, 3, 32, 32)),
    "ncsnpp": (NCSNpp, (8, 3, 32, 32)),
    "edm": (EDM, (8, 3, 32, 32)),
    "guided": (Guided, (8, 3, 32, 32)),
    "mlp, small": (partial(MLP, 64), (512, 2)),
    "dit, small": (partial(DiT, 16, 4, 64), (4, 3, 16, 16)),
}
NAMES = tuple(NETWORKS)
TWINS = NAMES[:4]
BASE = "order 1"
ENGINES = ("taylor", "reverse")
VARIANTS: dict[str, Row] = {
    BASE: {"order": 1},
    **{f"order 2, {engine}": {"order": 2, "engine": engine} for engine in ENGINES},
    **{f"order 3, {engine}": {"order": 3, "engine": engine} for engine in ENGINES},
    "order 3, fraction=1/4": {"order": 3, "engine": "taylor", "fraction": 0.25},
    "order 2, probes=4": {"order": 2, "engine": "taylor", "probes": 4},
}
# Of the networks without a twin.
MAIN = (BASE, "order 2, taylor", "order 3, taylor", "order 3, fraction=1/4")
COMPILED = {
    f"{key}, compiled": VARIANTS[f"{key}, taylor"] | {"engine": "auto", "compiled": True}
    for key in ("order 2", "order 3")
}


def model_of(name: str) -> hosm.ScoreModel:
    """One of NETWORKS with new weights, always the same, under the VP schedule."""
    torch.manual_seed(0)
    return hosm.ScoreModel(NETWORKS[name][0](), hosm.VPSchedule())


def loss_of(model: hosm.ScoreModel, order: int, compiled=False, **options: object) -> nn.Module:
    """The loss module of a variant."""
    loss = LOSSES[order](model, **options)
    return torch.compile(loss, fullgraph=True) if compiled else loss


def step_of(
    name: str, model: hosm.ScoreModel | None = None, **variant: object
) -> Callable[[int], None]:
    """A training step, loss and backward pass, as a function of the size of its batch."""
    model, shape = model or model_of(name), NETWORKS[name][1][1:]
    loss = loss_of(model, **variant)

    def step(batch: int) -> None:
        loss(torch.randn(batch, *shape)).backward()
        model.zero_grad()  # here and not before, so that no gradients are held before the next

    return step
