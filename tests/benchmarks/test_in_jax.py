"""The twins in JAX are what they stand for: networks, losses and gradients equal PyTorch's."""

import pytest
import torch
from benchmarks.steps import NETWORKS, model_of

from tests.cases import FUNCTIONS, given, gradients

jax = pytest.importorskip("jax")

from benchmarks.peers.in_jax import training_step  # noqa: E402


def batch(name):
    """x0, what a loss draws, and all of it as the twin takes it."""
    x0, drawn = given((3, *NETWORKS[name][1][1:]), order=3)
    every = x0, drawn["t"], drawn["noise"], drawn["probe"][0]
    return x0, drawn, [each.numpy() for each in every]


@pytest.mark.parametrize(
    ("name", "order", "options"),
    [
        ("mlp", 1, {}),
        ("mlp", 3, {}),
        ("convolutional", 3, {}),
        ("unet", 2, {}),
        ("dit", 3, {}),
    ],
)
def test_a_step_in_double_precision(name, order, options):
    torch.set_default_dtype(torch.float64)
    model, (x0, drawn, arrays) = model_of(name), batch(name)
    if order == 1:
        del drawn["probe"]
    weights = {"weights": "paper"} if order > 1 else {}  # 1 for each
    loss = FUNCTIONS[order](model, x0, **drawn, **options, **weights)
    with jax.enable_x64(True):
        value, twins = training_step(model.network, order, **options)(*arrays)
        assert float(value) == pytest.approx(loss.item(), rel=1e-10)
        names = [key for key, _ in model.network.named_parameters()]
        for key, ours in zip(names, gradients(loss, model), strict=True):
            difference = abs(ours.numpy() - jax.device_get(twins[key])).max()
            assert difference < 1e-9 * ours.abs().max(), key
