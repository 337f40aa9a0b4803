"""The networks of the table, each with what it is called with and what may be refused."""

import importlib.metadata
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hosm_losses as hosm
from tests.integration import builders
from tests.oracles import default_dtype

BATCH = 2


Refusal = tuple[type[Exception], str]


@dataclass(frozen=True)
class Network:
    """One network of the table.

    Attributes:
        package: the distribution it comes from.
        imports: the module to import.
        build: makes the network.
        model: options of the ScoreModel.
        kwargs: makes the keyword arguments of the network.
        plain: makes the same network without what first derivatives are lost in; None if it is
            plain itself.
        dtype: float32 where it cannot be run in float64.
        training: whether it is in training mode.
        refused: the error of an engine at an order, by type and by words of the message.
        optional: whether its package is not in the extra `integration`, and may be missing.
    """

    package: str
    build: Callable[[], nn.Module]
    imports: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Callable[[], dict[str, Any]] = dict
    plain: Callable[[], nn.Module] | None = None
    dtype: torch.dtype = torch.float64
    training: bool = True
    refused: Mapping[tuple[str, int], Refusal] = field(default_factory=dict)
    optional: bool = False

    @property
    def module(self) -> str:
        """The name under which the package is imported."""
        return self.imports or self.package

    @property
    def version(self) -> str:
        """The version that is installed."""
        return importlib.metadata.version(self.package)

    def score_model(
        self,
        dtype: torch.dtype | None = None,
        *,
        plain: bool = False,
        moved: float = 0.1,
        **options: Any,
    ) -> hosm.ScoreModel:
        """The same network at every call, away from where its parameters start.

        What starts at zero would hide what lies behind it.
        """
        build = self.plain if plain and self.plain else self.build
        with torch.random.fork_rng(), default_dtype(torch.float64):
            torch.manual_seed(0)
            network = build().double()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(moved * torch.randn_like(parameter))
        # Not network.to(dtype), which diffusers overrides.
        network = network.float() if (dtype or self.dtype) == torch.float32 else network
        network.train(self.training)
        return hosm.ScoreModel(network, **{"schedule": hosm.VPSchedule(), **self.model, **options})


def _both(engine: str, kind: type[Exception], words: str) -> dict[tuple[str, int], Refusal]:
    return {(engine, order): (kind, words) for order in (2, 3)}


FOREIGN_CHECKPOINT = (hosm.DerivativeError, "checkpoint: expected hosm_losses.checkpoint inside")
BY_A_FUNCTION = (hosm.DerivativeError, r"expected operators that the engine 'taylor' knows")
BY_NONE = (hosm.DerivativeError, "expected operators that can be differentiated")
NOT_AGAIN = (hosm.DerivativeError, "whose backward is once_differentiable or detaches")

_DIFFUSERS = {"time": 1000.0, "output": operator.attrgetter("sample")}
FLOW = {"schedule": hosm.LinearFlowSchedule(), "prediction": "flow_prediction"}
_LUCIDRAINS = {
    "package": "denoising-diffusion-pytorch",
    "imports": "denoising_diffusion_pytorch",
    "model": {"time": 1000.0},
}


def _text() -> Tensor:
    return torch.randn(BATCH, 3, 6, dtype=torch.float64)


NETWORKS: Mapping[str, Network] = {
    "diffusers UNet2DModel": Network("diffusers", builders.unet_2d, model=_DIFFUSERS),
    "diffusers UNet2DModel, hosm_losses.checkpoint": Network(
        "diffusers",
        lambda: builders.unet_2d(by=hosm.checkpoint),
        model=_DIFFUSERS,
        plain=builders.unet_2d,
    ),
    "diffusers UNet2DModel, its own checkpoint": Network(
        "diffusers",
        lambda: builders.unet_2d(by=None),
        model=_DIFFUSERS,
        plain=builders.unet_2d,
        refused=_both("reverse", *FOREIGN_CHECKPOINT),
    ),
    "diffusers UNet2DConditionModel": Network(
        "diffusers",
        builders.unet_2d_condition,
        model=_DIFFUSERS,
        kwargs=lambda: {"encoder_hidden_states": _text()},
    ),
    "diffusers DiTTransformer2DModel": Network(
        "diffusers",
        builders.dit,
        model={**_DIFFUSERS, "output": lambda out: out.sample[:, :2]},
        kwargs=lambda: {"class_labels": torch.tensor([3, 7])},
        training=False,  # it drops labels at random in training
    ),
    "diffusers SD3Transformer2DModel": Network(
        "diffusers",
        builders.sd3,
        model={**_DIFFUSERS, **FLOW},
        kwargs=lambda: {
            "encoder_hidden_states": _text(),
            "pooled_projections": torch.randn(BATCH, 5, dtype=torch.float64),
        },
    ),
    "diffusers UNet1DModel, mish": Network("diffusers", builders.unet_1d, model={"time": 1000.0}),
    "diffusers PixArtTransformer2DModel": Network(
        "diffusers",
        builders.pixart,
        model=_DIFFUSERS,
        kwargs=lambda: {"encoder_hidden_states": _text()},
    ),
    "diffusers FluxTransformer2DModel": Network(
        "diffusers",
        builders.flux,
        model=FLOW,
        kwargs=lambda: {
            "encoder_hidden_states": _text(),
            "pooled_projections": torch.randn(BATCH, 5, dtype=torch.float64),
        },
    ),
    "diffusers WanTransformer3DModel": Network(
        "diffusers",
        builders.wan,
        model={"time": 1000.0, **FLOW},
        kwargs=lambda: {"encoder_hidden_states": _text()},
    ),
    "denoising_diffusion_pytorch Unet": Network(
        build=lambda: builders.lucidrains(False), **_LUCIDRAINS
    ),
    "denoising_diffusion_pytorch Unet, flash_attn": Network(
        build=lambda: builders.lucidrains(True), **_LUCIDRAINS
    ),
    "torchcfm UNetModel": Network("torchcfm", builders.torchcfm, model=FLOW),
    "torchcfm UNetModel, use_checkpoint": Network(
        "torchcfm",
        lambda: builders.torchcfm(use_checkpoint=True),
        plain=builders.torchcfm,
        dtype=torch.float32,  # it computes again in backward, where nothing keeps float64
        refused={
            **_both("taylor", *BY_A_FUNCTION),
            **_both("reverse", *NOT_AGAIN),
            **_both("auto", *BY_NONE),
        },
    ),
    "azula ViT": Network("azula", builders.azula_vit),
    "azula ViT, checkpointing": Network(
        "azula",
        lambda: builders.azula_vit(checkpointing=True),
        plain=builders.azula_vit,
        refused=_both("reverse", *FOREIGN_CHECKPOINT),
    ),
    "azula ViT, checkpointing, eval()": Network(
        "azula",
        lambda: builders.azula_vit(checkpointing=True),
        plain=builders.azula_vit,
        training=False,
        refused={
            **_both("taylor", *BY_A_FUNCTION),
            **_both("reverse", *NOT_AGAIN),
            **_both("auto", *BY_NONE),
        },
    ),
    "azula UNet": Network("azula", lambda: builders.azula_unet("layer")),
    "azula UNet, group norm": Network("azula", lambda: builders.azula_unet("group")),
    "monai DiffusionModelUNet": Network(
        "monai",
        builders.monai_unet,
        model={"time": 1000.0},
        kwargs=lambda: {"context": _text()},
        optional=True,
    ),
    "x_transformers ContinuousTransformerWrapper": Network(
        "x-transformers", builders.x_transformer, imports="x_transformers", optional=True
    ),
    "transformers LlamaModel": Network("transformers", builders.llama, optional=True),
}
