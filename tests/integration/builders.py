"""Builds networks of other packages at their smallest, called as (x, t, **kwargs).

Packages are imported where a network is built, so that this file can be read without them. A
package that casts to float32 inside is run with that cast turned off, as differences need the
digits of float64.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SIZE = 4
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


class _Adapter(nn.Module):
    """A network called as (x, t, **kwargs), whatever its own order of arguments."""

    def __init__(self, network: nn.Module, call: Callable[..., Any], *, casts: bool = False):
        super().__init__()
        self.network = network
        self.call = call
        self.casts = casts

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        stay = self.casts and x.dtype == torch.float64
        with _StayDouble() if stay else nullcontext():
            return self.call(self.network, x, t, **kwargs)


class _Modulated(nn.Module):
    """A backbone that takes a vector of features in the place of the time."""

    def __init__(self, backbone: nn.Module, features: int):
        super().__init__()
        self.backbone = backbone
        self.inner = nn.Linear(3, features)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        known = torch.stack([t, (3 * t).sin(), (3 * t).cos()], -1)
        return self.backbone(x, torch.tanh(self.inner(known)))


# What the two UNets of diffusers share.
_SMALL_UNET: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


def unet_2d(out_channels: int = 2, **checkpointing: Any) -> nn.Module:
    from diffusers import UNet2DModel

    network = UNet2DModel(
        **{**_SMALL_UNET, "out_channels": out_channels},
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    if checkpointing:
        network.enable_gradient_checkpointing(checkpointing["by"])
    return network


def unet_2d_condition() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **_SMALL_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
    )


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=SIZE,
        in_channels=2,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        num_embeds_ada_norm=10,
        norm_num_groups=2,
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=SIZE,
        in_channels=2,
        out_channels=2,
        patch_size=2,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        pos_embed_max_size=SIZE,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return _Adapter(network, lambda net, x, t, **kwargs: net(x, timestep=t, **kwargs), casts=True)


def unet_1d() -> nn.Module:
    from diffusers import UNet1DModel

    network = UNet1DModel(
        in_channels=2,
        out_channels=2,
        extra_in_channels=0,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        mid_block_type="MidResTemporalBlock1D",
        up_block_types=("UpResnetBlock1D",),
        out_block_type="OutConv1DBlock",
        act_fn="mish",
        time_embedding_type="positional",
        use_timestep_embedding=True,
    )
    return _Adapter(network, lambda net, x, t: net(x.flatten(2), t).sample.view_as(x))


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        sample_size=SIZE,
        in_channels=2,
        out_channels=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=6,
        num_embeds_ada_norm=10,
        norm_num_groups=2,
        use_additional_conditions=False,
    )
    return _Adapter(network, lambda net, x, t, **kwargs: net(x, timestep=t, **kwargs))


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=SHAPE[0],
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )
    places = torch.cartesian_prod(*map(torch.arange, (1, SIZE, SIZE)))

    def call(net: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        ids = {"img_ids": places, "txt_ids": torch.zeros(3, 3)}
        found = net(x.flatten(2).mT, timestep=t, **ids, **kwargs).sample
        return found.mT.reshape(x.shape)

    return _Adapter(network, call, casts=True)


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        in_channels=2,
        out_channels=2,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        text_dim=6,
        freq_dim=8,
        ffn_dim=16,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=16,
    )

    def call(net: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return net(x.unsqueeze(2), timestep=t, **kwargs).sample.squeeze(2)

    return _Adapter(network, call, casts=True)


def lucidrains(flash: bool, self_condition: bool = False) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(
        dim=4,
        dim_mults=(1, 2),
        channels=2,
        attn_dim_head=4,
        attn_heads=2,
        flash_attn=flash,
        self_condition=self_condition,
    )


def torchcfm(use_checkpoint: bool = False) -> nn.Module:
    from torchcfm.models.unet import UNetModel

    network = UNetModel(
        dim=SHAPE,
        num_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 1),
        attention_resolutions="2",
        use_checkpoint=use_checkpoint,
    )

    def call(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        net.dtype = x.dtype  # it casts its input to this
        return net(t, x)

    return _Adapter(network, call, casts=True)


def azula_vit(checkpointing: bool = False) -> nn.Module:
    from azula.nn.vit import ViT

    backbone = ViT(
        2,
        2,
        mod_features=8,
        hid_channels=8,
        hid_blocks=2,
        attention_heads=2,
        patch_size=2,
        rope=True,
        checkpointing=checkpointing,
    )
    return _Modulated(backbone, 8)


def azula_unet(norm: str, checkpointing: bool = False) -> nn.Module:
    from azula.nn.unet import UNet

    backbone = UNet(
        2,
        2,
        mod_features=8,
        hid_channels=(4, 8),
        hid_blocks=(1, 1),
        norm=norm,
        groups=2,
        checkpointing=checkpointing,
    )
    return _Modulated(backbone, 8)


def monai_unet() -> nn.Module:
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=2,
        channels=(4, 8),
        attention_levels=(False, True),
        num_res_blocks=1,
        norm_num_groups=2,
        num_head_channels=4,
        with_conditioning=True,
        cross_attention_dim=6,
    )


class _OfEmbeddings(nn.Module):
    """A transformer of a sequence of vectors, the places of an image, each with the time."""

    def __init__(self, network: nn.Module, features: int, call: Callable[..., Tensor]):
        super().__init__()
        self.network = network
        self.inner = nn.Linear(SHAPE[0] + 1, features)
        self.outer = nn.Linear(features, SHAPE[0])
        self.call = call

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        places = x.flatten(2).mT
        time = t[:, None, None].expand(-1, places.shape[1], 1)
        found = self.outer(self.call(self.network, self.inner(torch.cat([places, time], -1))))
        return found.mT.reshape(x.shape)


def x_transformer() -> nn.Module:
    from x_transformers import ContinuousTransformerWrapper, Encoder

    layers = Encoder(
        dim=8,
        depth=2,
        heads=2,
        attn_dim_head=8,
        attn_flash=True,  # its other attention casts to float32 where it takes the softmax
        attn_qk_norm=True,
        rotary_pos_emb=True,
        ff_glu=True,
        use_rmsnorm=True,
    )
    network = ContinuousTransformerWrapper(max_seq_len=SIZE**2, attn_layers=layers)
    return _OfEmbeddings(network, 8, lambda net, h: net(h))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=2,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
    )
    call = lambda net, h: net(inputs_embeds=h).last_hidden_state  # noqa: E731
    return _Adapter(
        _OfEmbeddings(LlamaModel(config), 8, call), lambda net, x, t: net(x, t), casts=True
    )
