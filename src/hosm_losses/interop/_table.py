"""What projects with a table of noise levels share."""

__all__ = ["check_diffusion", "first_half", "predicted", "table_schedule"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import describe
from hosm_losses.schedules import DiscreteSchedule

ZERO = (0.0, 2.0**-24)  # the second is what diffusers writes in the place of the first


def check_diffusion(diffusion: object, *names: str) -> None:
    """Raise TypeError unless this has the attributes of a GaussianDiffusion that are read."""
    for name in names:
        if not hasattr(diffusion, name):
            raise TypeError(
                f"diffusion: expected a GaussianDiffusion with {name}; got {describe(diffusion)}."
            )


def table_schedule(alphas_cumprod: Any, where: str) -> DiscreteSchedule:
    """The schedule of a table, in float64, which must not end at 0.

    Args:
        alphas_cumprod: ᾱ, a tensor or an array.
        where: the name of the table, for the error.

    Returns:
        The schedule, whose t is the index.

    Raises:
        ValueError: for a table with zero terminal SNR.
    """
    table = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
    if table.ndim == 1 and len(table) and float(table[-1]) in ZERO:
        raise ValueError(
            f"{where}: expected a table that ends above 0; got one that ends at "
            f"{float(table[-1]):g} (zero terminal SNR), where sigma/alpha has no finite value. "
            "Cut it and say the rest yourself: ScoreModel(network, "
            f"DiscreteSchedule({where}[:-1]), prediction=..., ...)."
        )
    return DiscreteSchedule(table)


def predicted(value: object, names: Mapping[str, str], where: str) -> str:
    """Our name of a foreign prediction type.

    Raises:
        ValueError: for a type that is not among the names.
    """
    if isinstance(value, str) and value in names:
        return names[value]
    raise ValueError(
        f"{where}: expected one of {', '.join(map(repr, names))}; got {describe(value)}. Build a "
        "ScoreModel with the prediction it stands for, or convert its output."
    )


def first_half(returned: Tensor) -> Tensor:
    """The prediction of a network that returns a variance as well, in as many channels more."""
    return returned.chunk(2, 1)[0]
