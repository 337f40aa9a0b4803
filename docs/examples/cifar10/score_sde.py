"""Networks and checkpoints of score_sde_pytorch, built with the user's own checkout of its code.

The configurations of score_sde_pytorch name the network, the SDE and the range of the data. Under
VE, `centered` is False and the networks take data y in [0, 1], but here data x are in [-1, 1].
With y = (x + 1)/2, the score of x is half the score of y, and σ is twice as large, so the network
gets the σ of y.

A checkpoint is a dict. `model` has every tensor of the network, with names that start with
"module.", and `ema` has averages in `shadow_params`, a list in the order of the parameters that
require a gradient. Tensors that require no gradient, such as the frequencies of Fourier features,
are in `model` only.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hosm_losses import ScoreModel, VESchedule, from_score_sde

SDES = {
    "vpsde": ("VPSDE", ("beta_min", "beta_max")),
    "subvpsde": ("subVPSDE", ("beta_min", "beta_max")),
    "vesde": ("VESDE", ("sigma_min", "sigma_max")),
}


def score_sde_model(code: Path, name: str) -> ScoreModel:
    """Return a new network of a configuration, as a model of data in [-1, 1].

    Args:
        code: the checkout, a folder with `models`, `configs` and `sde_lib.py`.
        name: the name of the configuration, such as "vp/cifar10_ddpmpp_deep_continuous".

    Raises:
        FileNotFoundError: if the checkout has no such configuration.
        ValueError: if the network was trained on discrete steps.
    """
    path = code / "configs" / f"{name}.py"
    if not path.is_file() or not (code / "sde_lib.py").is_file():
        raise FileNotFoundError(
            f"expected score_sde_pytorch's code in {code}, with {path}; got no such file. Pass "
            "the checkout as --score-sde-code, and a file of its configs as --score-sde-config."
        )
    config = _module(code, f"configs.{name.replace('/', '.')}").get_config()
    _module(code, f"models.{config.model.name}")  # this registers the network
    network = _module(code, "models.utils").create_model(config)
    network = getattr(network, "module", network).to("cpu")  # inside DataParallel
    kind, names = SDES[config.training.sde.lower()]
    options = {key: getattr(config.model, key) for key in names}
    sde = getattr(_module(code, "sde_lib"), kind)(**options, N=config.model.num_scales)
    model = from_score_sde(network, sde, continuous=config.training.continuous)
    if config.data.centered:
        return model
    if not isinstance(model.schedule, VESchedule):
        raise ValueError(
            f"{name}: expected data.centered=True under {kind}; got False. Data in [0, 1] are "
            "supported under VESDE only."
        )
    sigma_min, sigma_max = (2 * getattr(sde, key) for key in names)
    schedule = VESchedule(sigma_min=sigma_min, sigma_max=sigma_max)
    return ScoreModel(network, schedule, "score", time=model.time, call=_of_unit_interval)


def _of_unit_interval(network: nn.Module, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return network((x + 1) / 2, sigma) / 2


def _module(code: Path, name: str) -> ModuleType:
    """Import a module from the checkout, and from no other folder."""
    if str(code) not in sys.path:
        sys.path.insert(0, str(code))
    module = importlib.import_module(name)
    if not Path(str(module.__file__)).resolve().is_relative_to(code.resolve()):
        raise ImportError(
            f"expected {name} from {code}; got {module.__file__}. Another module has that name: "
            "start in another folder, or shorten PYTHONPATH."
        )
    return module


def load_score_sde(network: nn.Module, path: Path) -> None:
    """Load the averaged weights of a checkpoint into a network.

    Raises:
        ValueError: if the file is not such a checkpoint, or belongs to another network.
    """
    expected = "a checkpoint of score_sde_pytorch, with model and ema"
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name.removeprefix("module."): w for name, w in state["model"].items()}
        averages = state["ema"]["shadow_params"]
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: expected {expected}; got another file ({error!r}).") from None
    network.load_state_dict(tensors)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    shapes = [tuple(weight.shape) for weight in weights]
    if shapes != [tuple(average.shape) for average in averages]:
        raise ValueError(
            f"{path}: expected an average for each of the network's {len(weights)} trained "
            f"parameters, in the same order and shapes; got {len(averages)} averages that do not "
            "match. Pass the --score-sde-config that was used in training."
        )
    with torch.no_grad():
        for weight, average in zip(weights, averages, strict=True):
            weight.copy_(average)
