"""check_derivatives on networks of other packages: no false alarm, and no wrong one let through."""

import dataclasses

import pytest
import torch

import hosm_losses as hosm
from tests.integration.measure import arguments
from tests.integration.networks import FLOW, NETWORKS
from tests.oracles import default_dtype

# It is meant for a network before its training, in the dtype of the training.
NEAR = 0.1


def check(network, name, derivative="auto", **options):
    with default_dtype(torch.float32):
        model = network.score_model(torch.float32, moved=NEAR, **options)
        given = arguments(name, torch.float32)
        hosm.check_derivatives(
            model,
            given["x0"],
            t=given["t"],
            model_kwargs=given["model_kwargs"],
            derivative=derivative,
        )


@pytest.mark.parametrize("name", list(NETWORKS))
def test_it_passes_what_is_right_and_objects_to_the_rest(name, need):
    network = NETWORKS[name]
    need(network.module)
    if ("auto", 3) in network.refused:
        with pytest.raises(hosm.DerivativeError, match="checkpoint"):
            check(network, name)
    else:
        check(network, name)


@pytest.mark.parametrize(
    "name", ["diffusers DiTTransformer2DModel", "diffusers SD3Transformer2DModel"]
)
def test_it_objects_to_layer_norm_without_its_primitive(name, need):
    need(NETWORKS[name].module)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        pytest.raises(hosm.DerivativeError, match="Leave primitives=True in ScoreModel"),
    ):
        check(NETWORKS[name], name, "reverse", primitives=False)


def test_it_objects_to_a_checkpoint_that_a_flow_prediction_would_hide(need):
    """The straight part of the flow has a graph where the network's own part has lost it.

    The package's backward frees what a second pass needs, so the error may be its own.
    """
    name = "torchcfm UNetModel, use_checkpoint"
    need(NETWORKS[name].module)
    errors = (hosm.DerivativeError, AttributeError)
    with pytest.raises(errors, match=r"checkpoint|input_tensors"):
        check(dataclasses.replace(NETWORKS[name], model=FLOW), name)
