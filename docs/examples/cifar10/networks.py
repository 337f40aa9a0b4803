"""The networks and the losses of the experiment, by name.

Both networks are diffusers' UNet2DModel with attention at 16 x 16. Its options make it resemble

    vp   DDPM++, with resampling by convolution and a positional embedding of 999 t. The network
         predicts the noise.
    ve   NCSN++, with FIR resampling, the input added and the output gathered at every resolution,
         and Fourier features of log σ. The UNet gets σ, takes the logarithm itself, and divides
         the output h of its last layer by σ. It predicts the score h/σ, so the noise is −h.

Data in [-1, 1] have twice the scale of data in [0, 1]. Hence σ from 0.02 to 100 here corresponds
to σ from 0.01 to 50 in the paper's code.
"""

from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from score_sde import score_sde_model
from torch import nn

from hosm_losses import (
    FirstOrderDSM,
    Hutchinson,
    Paired,
    ScoreModel,
    SecondOrderDSM,
    ThirdOrderDSM,
    VESchedule,
    VPSchedule,
)

# Channels at each resolution, residual blocks at each resolution, and groups of each group norm.
# "deep" has 8 blocks, like the paper's deep networks.
SIZES = {
    "tiny": ((8, 32), 1, 4),
    "small": ((32, 64, 64), 2, 8),
    "paper": ((128, 256, 256, 256), 4, 32),
    "deep": ((128, 256, 256, 256), 8, 32),
}
# The module, and the kind of its probes.
LOSSES: dict[str, tuple[type[nn.Module], type[Hutchinson | Paired]]] = {
    "first": (FirstOrderDSM, Hutchinson),
    "second": (SecondOrderDSM, Hutchinson),
    "third": (ThirdOrderDSM, Hutchinson),
    "paired2": (SecondOrderDSM, Paired),
    "paired3": (ThirdOrderDSM, Paired),
}
# The library's default weights for d = 3072.
WEIGHTS = {"second": [1.0, 0.5, 0.0], "third": [1.0, 0.5, 0.0, 1.0]}
WEIGHTS |= {"paired2": WEIGHTS["second"], "paired3": WEIGHTS["third"]}
TIMES = ("log_sigma_hat", "schedule")


def model_of(options: dict[str, Any], code: Path | None) -> ScoreModel:
    """Return a new network with the options of train.py; `code` is score_sde's checkout."""
    if (name := options["score_sde_config"]) is None:
        return score_model(options["sde"], options["size"], options["dropout"])
    if code is None:
        raise ValueError(f"{name}: expected --score-sde-code FOLDER, with its code; got none.")
    return score_sde_model(code, name)


def score_model(sde: str, size: str, dropout: float = 0.0) -> ScoreModel:
    """Return a new network of the given size, with the schedule "ve" or "vp"."""
    from diffusers import UNet2DModel  # score_sde's networks do not need it

    channels, layers, groups = SIZES[size]
    if sde == "ve":  # its blocks have group norms of 32 groups
        channels = tuple(max(32, width) for width in channels)
    skip = "Skip" if sde == "ve" else ""
    down = [f"{skip}DownBlock2D"] * len(channels)
    down[1] = f"Attn{skip}DownBlock2D"
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        norm_num_groups=groups,
        norm_eps=1e-6,
        attention_head_dim=None,  # one head
        dropout=dropout,
        time_embedding_type="fourier" if sde == "ve" else "positional",
        mid_block_scale_factor=2**0.5 if sde == "ve" else 1,
    )
    output = attrgetter("sample")
    if sde == "vp":
        return ScoreModel(network, VPSchedule(), "epsilon", time=999.0, output=output)
    schedule = VESchedule(sigma_min=0.02, sigma_max=100.0)
    return ScoreModel(network, schedule, "score", time=schedule.sigma, output=output)


def objective(model: ScoreModel, loss: str, *, times: str, **options: Any) -> nn.Module:
    """Return the module of a loss; options that are None keep the module's defaults.

    With times="log_sigma_hat", log σ̂ is uniform for every term, and no term is reweighted. The
    first term is then the likelihood-weighted term divided by the number of elements and by the
    range of log σ̂.
    """
    kind, probes = LOSSES[loss]
    chosen = {name: value for name, value in options.items() if value is not None}
    if (count := chosen.pop("probes", None)) is not None:
        chosen["probes"] = probes(count)
    elif probes is Paired:
        chosen["probes"] = Paired()
    if times == "log_sigma_hat":
        low, high = model.schedule.log_sigma_hat_range

        def uniform(batch: int, generator: torch.Generator | None) -> torch.Tensor:
            device = next(model.parameters()).device
            unit = torch.rand(batch, generator=generator, device=device)
            return model.schedule.time(low + (high - low) * unit)

        chosen["time_sampler"] = uniform
    return kind(model, **chosen)
