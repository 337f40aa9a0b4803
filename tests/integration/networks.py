"""The networks of the table, at their smallest, each with what it is called with.

Packages are imported where a network is built, so that this file can be read without them. A
package that casts to float32 inside is run with that cast turned off, as differences need the
digits of float64.
"""

import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hosm_losses as hosm
from tests.cases import default_dtype

BATCH, SIZE = 2, 4
SHAPE = (2, SIZE, SIZE)


class _StayDouble(TorchFunctionMode):
    """Takes a cast of float64 to float32 for no cast at all."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == torch.float64:
            casts = func in (Tensor.to, Tensor.type)
            if func is Tensor.float or (casts and torch.float32 in (*args, *kwargs.values())):
                return first
        return func(*args, **kwargs)


def _staying_double(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a network that casts inside."""

    def called(network: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        with _StayDouble() if x.dtype == torch.float64 else nullcontext():
            return call(network, x, t, **kwargs)

    return called


# Small sizes that several packages and models share.
_CHANNELS = {"in_channels": 2, "out_channels": 2}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 4}
_UNET = {**_CHANNELS, "sample_size": SIZE, "block_out_channels": (4, 8), "norm_num_groups": 2}
_UNET["layers_per_block"] = 1
_DIT = {**_HEADS, "in_channels": 2, "sample_size": SIZE, "num_layers": 2, "norm_num_groups": 2}


def unet_2d(**checkpointing: Any) -> nn.Module:
    from diffusers import UNet2DModel

    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    kinds = {"down_block_types": down, "up_block_types": up}
    network = UNet2DModel(**_UNET, **kinds, attention_head_dim=4)
    if checkpointing:
        network.enable_gradient_checkpointing(checkpointing["by"])
    return network


def unet_2d_condition() -> nn.Module:
    from diffusers import UNet2DConditionModel

    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    kinds = {"down_block_types": down, "up_block_types": up}
    return UNet2DConditionModel(**_UNET, **kinds, cross_attention_dim=6, attention_head_dim=2)


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(**_DIT, out_channels=4, num_embeds_ada_norm=10)


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    sizes = {"joint_attention_dim": 6, "caption_projection_dim": 8, "pooled_projection_dim": 5}
    kinds = {"patch_size": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    places = {"sample_size": SIZE, "pos_embed_max_size": SIZE, "num_layers": 2}
    return SD3Transformer2DModel(**_CHANNELS, **_HEADS, **sizes, **kinds, **places)


def unet_1d() -> nn.Module:
    from diffusers import UNet1DModel

    down, up = ("DownResnetBlock1D", "DownResnetBlock1D"), ("UpResnetBlock1D",)
    kinds = {"down_block_types": down, "up_block_types": up, "act_fn": "mish"}
    kinds |= {"mid_block_type": "MidResTemporalBlock1D", "out_block_type": "OutConv1DBlock"}
    kinds |= {"time_embedding_type": "positional", "use_timestep_embedding": True}
    sizes = {"extra_in_channels": 0, "block_out_channels": (16, 32), "layers_per_block": 1}
    return UNet1DModel(**_CHANNELS, **sizes, **kinds)


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    sizes = {"cross_attention_dim": 8, "caption_channels": 6, "num_embeds_ada_norm": 10}
    return PixArtTransformer2DModel(
        **_DIT, **sizes, out_channels=2, use_additional_conditions=False
    )


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    sizes = {"patch_size": 1, "in_channels": 2, "num_layers": 1, "num_single_layers": 1}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    return FluxTransformer2DModel(**sizes, **heads, joint_attention_dim=6, pooled_projection_dim=5)


def _call_flux(network: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    places = torch.cartesian_prod(*map(torch.arange, (1, SIZE, SIZE)))
    ids = {"img_ids": places, "txt_ids": torch.zeros(3, 3)}
    return network(x.flatten(2).mT, timestep=t, **ids, **kwargs).sample.mT.reshape(x.shape)


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_max_seq_len": 16}
    sizes = {"num_layers": 1, "text_dim": 6, "freq_dim": 8, "ffn_dim": 16}
    kinds = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
    return WanTransformer3DModel(**_CHANNELS, **heads, **sizes, **kinds, patch_size=(1, 2, 2))


def _call_wan(network: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    return network(x.unsqueeze(2), timestep=t, **kwargs).sample.squeeze(2)


def qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    sizes = {"patch_size": 1, "num_layers": 2, "joint_attention_dim": 6}
    return QwenImageTransformer2DModel(**_CHANNELS, **heads, **sizes)


def _call_qwen_image(network: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    shapes = {"img_shapes": [(1, SIZE, SIZE)] * len(x)}
    return network(x.flatten(2).mT, timestep=t, **shapes, **kwargs).sample.mT.reshape(x.shape)


def lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "axes_dim_rope": (4, 2, 2)}
    sizes = {"sample_size": SIZE, "patch_size": 1, "in_channels": 2, "hidden_size": 16}
    layers = {"num_layers": 1, "num_refiner_layers": 1, "multiple_of": 8, "cap_feat_dim": 6}
    return Lumina2Transformer2DModel(**heads, **sizes, **layers, axes_lens=(16, 8, 8))


def _call_lumina2(network: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    mask = torch.ones(kwargs["encoder_hidden_states"].shape[:2], dtype=torch.bool)
    return network(x, timestep=t, encoder_attention_mask=mask, **kwargs).sample


def lucidrains(**options: Any) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    sizes = {"dim": 4, "dim_mults": (1, 2), "channels": 2, "attn_dim_head": 4, "attn_heads": 2}
    return Unet(**sizes, **options)


def torchcfm(use_checkpoint: bool = False) -> nn.Module:
    from torchcfm.models.unet import UNetModel

    sizes = {"dim": SHAPE, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1)}
    return UNetModel(**sizes, attention_resolutions="2", use_checkpoint=use_checkpoint)


def _call_torchcfm(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    network.dtype = x.dtype  # it casts its input to this
    return network(t, x)


class _Modulated(nn.Module):
    """A backbone that takes a vector of features in the place of the time."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.inner = nn.Linear(3, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        known = torch.stack([t, (3 * t).sin(), (3 * t).cos()], -1)
        return self.backbone(x, torch.tanh(self.inner(known)))


def azula_vit(**options: Any) -> nn.Module:
    from azula.nn.vit import ViT

    sizes = {"mod_features": 8, "hid_channels": 8, "hid_blocks": 2, "attention_heads": 2}
    return _Modulated(ViT(2, 2, **sizes, patch_size=2, rope=True, **options))


def azula_unet(norm: str) -> nn.Module:
    from azula.nn.unet import UNet

    sizes = {"mod_features": 8, "hid_channels": (4, 8), "hid_blocks": (1, 1), "groups": 2}
    return _Modulated(UNet(2, 2, **sizes, norm=norm))


def monai_unet() -> nn.Module:
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    sizes = {"channels": (4, 8), "num_res_blocks": 1, "norm_num_groups": 2, "spatial_dims": 2}
    heads = {"attention_levels": (False, True), "num_head_channels": 4}
    return DiffusionModelUNet(
        **_CHANNELS, **sizes, **heads, with_conditioning=True, cross_attention_dim=6
    )


class _OfEmbeddings(nn.Module):
    """A transformer of a sequence of vectors, the places of an image, each with the time."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.network, self.call = network, call
        self.inner, self.outer = nn.Linear(SHAPE[0] + 1, 8), nn.Linear(8, SHAPE[0])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        places = x.flatten(2).mT
        time = t[:, None, None].expand(-1, places.shape[1], 1)
        found = self.outer(self.call(self.network, self.inner(torch.cat([places, time], -1))))
        return found.mT.reshape(x.shape)


def x_transformer() -> nn.Module:
    from x_transformers import ContinuousTransformerWrapper, Encoder

    # Its other attention casts to float32 where it takes the softmax.
    kinds = {"attn_flash": True, "attn_qk_norm": True, "rotary_pos_emb": True, "ff_glu": True}
    layers = Encoder(dim=8, depth=2, heads=2, attn_dim_head=8, use_rmsnorm=True, **kinds)
    network = ContinuousTransformerWrapper(max_seq_len=SIZE**2, attn_layers=layers)
    return _OfEmbeddings(network, lambda net, h: net(h))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"vocab_size": 2, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16}
    network = LlamaModel(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    return _OfEmbeddings(network, lambda net, h: net(inputs_embeds=h).last_hidden_state)


@dataclass(frozen=True)
class Network:
    """One network of the table.

    Attributes:
        package: the distribution it comes from.
        build: makes the network.
        model: options of the ScoreModel.
        kwargs: makes the keyword arguments of the network.
        plain: makes the same network without what first derivatives are lost in; None if it is
            plain itself.
        dtype: float32 where it cannot be run in float64.
        training: whether it is in training mode.
        optional: whether its package is not in the extra `integration`, and may be missing.
    """

    package: str
    build: Callable[[], nn.Module]
    model: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Callable[[], dict[str, Any]] = dict
    plain: Callable[[], nn.Module] | None = None
    dtype: torch.dtype = torch.float64
    training: bool = True
    optional: bool = False

    @property
    def module(self) -> str:
        """The name under which the package is imported."""
        return self.package.replace("-", "_")

    def score_model(
        self,
        dtype: torch.dtype | None = None,
        *,
        plain: bool = False,
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
                    parameter.add_(0.1 * torch.randn_like(parameter))
        # Not network.to(dtype), which diffusers overrides.
        network = network.float() if (dtype or self.dtype) == torch.float32 else network
        network.train(self.training)
        return hosm.ScoreModel(network, **{"schedule": hosm.VPSchedule(), **self.model, **options})


def text(name: str = "encoder_hidden_states") -> dict[str, Tensor]:
    return {name: torch.randn(BATCH, 3, 6, dtype=torch.float64)}


def pooled_text() -> dict[str, Tensor]:
    return text() | {"pooled_projections": torch.randn(BATCH, 5, dtype=torch.float64)}


def by_name(network: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
    return network(x, timestep=t, **kwargs)


THOUSAND = {"time": 1000.0}
DIFFUSERS = {**THOUSAND, "output": operator.attrgetter("sample")}
FLOW = {"schedule": hosm.LinearFlowSchedule(), "prediction": "velocity"}
CHECKPOINTS = partial(azula_vit, checkpointing=True)
NETWORKS: Mapping[str, Network] = {
    "diffusers UNet2DModel": Network("diffusers", unet_2d, DIFFUSERS),
    "diffusers UNet2DModel, hosm_losses.checkpoint": Network(
        "diffusers", partial(unet_2d, by=hosm.checkpoint), DIFFUSERS, plain=unet_2d
    ),
    "diffusers UNet2DModel, its own checkpoint": Network(
        "diffusers", partial(unet_2d, by=None), DIFFUSERS, plain=unet_2d
    ),
    "diffusers UNet2DConditionModel": Network("diffusers", unet_2d_condition, DIFFUSERS, text),
    "diffusers DiTTransformer2DModel": Network(
        "diffusers",
        dit,
        {**DIFFUSERS, "output": lambda out: out.sample[:, :2]},
        lambda: {"class_labels": torch.tensor([3, 7])},
        training=False,  # it drops labels at random in training
    ),
    "diffusers SD3Transformer2DModel": Network(
        "diffusers", sd3, {**DIFFUSERS, **FLOW, "call": _staying_double(by_name)}, pooled_text
    ),
    "diffusers UNet1DModel, mish": Network(
        "diffusers",
        unet_1d,
        {**THOUSAND, "call": lambda net, x, t: net(x.flatten(2), t).sample.view_as(x)},
    ),
    "diffusers PixArtTransformer2DModel": Network(
        "diffusers", pixart, {**DIFFUSERS, "call": by_name}, text
    ),
    "diffusers FluxTransformer2DModel": Network(
        "diffusers", flux, {**FLOW, "call": _staying_double(_call_flux)}, pooled_text
    ),
    "diffusers WanTransformer3DModel": Network(
        "diffusers", wan, {**THOUSAND, **FLOW, "call": _staying_double(_call_wan)}, text
    ),
    "diffusers QwenImageTransformer2DModel": Network(
        "diffusers", qwen_image, {**FLOW, "call": _staying_double(_call_qwen_image)}, text
    ),
    "diffusers Lumina2Transformer2DModel": Network(
        "diffusers", lumina2, {**FLOW, "call": _staying_double(_call_lumina2)}, text
    ),
    "denoising_diffusion_pytorch Unet": Network(
        "denoising-diffusion-pytorch", partial(lucidrains, flash_attn=False), THOUSAND
    ),
    "denoising_diffusion_pytorch Unet, flash_attn": Network(
        "denoising-diffusion-pytorch", partial(lucidrains, flash_attn=True), THOUSAND
    ),
    "torchcfm UNetModel": Network(
        "torchcfm", torchcfm, {**FLOW, "call": _staying_double(_call_torchcfm)}
    ),
    "torchcfm UNetModel, use_checkpoint": Network(
        "torchcfm",
        partial(torchcfm, use_checkpoint=True),
        {"call": _staying_double(_call_torchcfm)},
        plain=torchcfm,
        dtype=torch.float32,  # it computes again in backward, where nothing keeps float64
    ),
    "azula ViT": Network("azula", azula_vit),
    "azula ViT, checkpointing": Network("azula", CHECKPOINTS, plain=azula_vit),
    "azula ViT, checkpointing, eval()": Network(
        "azula", CHECKPOINTS, plain=azula_vit, training=False
    ),
    "azula UNet": Network("azula", partial(azula_unet, "layer")),
    "azula UNet, group norm": Network("azula", partial(azula_unet, "group")),
    "monai DiffusionModelUNet": Network(
        "monai", monai_unet, THOUSAND, partial(text, "context"), optional=True
    ),
    "x_transformers ContinuousTransformerWrapper": Network(
        "x-transformers", x_transformer, optional=True
    ),
    "transformers LlamaModel": Network(
        "transformers",
        llama,
        {"call": _staying_double(lambda net, x, t: net(x, t))},
        optional=True,
    ),
}
