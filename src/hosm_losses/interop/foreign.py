"""What the functions for foreign objects share: checks of attributes, tables and names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import describe
from hosm_losses.model import Prediction
from hosm_losses.schedules import DiscreteSchedule

ZERO = (0.0, 2.0**-24)  # the second is what diffusers writes in the place of the first
OWN = "For another object, build a ScoreModel with its schedule and prediction."


def check_has(value: object, expected: str, *names: str, advice: str = OWN) -> None:
    """Raise TypeError unless a foreign object has these attributes, each named in `expected`."""
    for name in names:
        if getattr(value, name, None) is None:
            raise TypeError(f"{expected.format(name)}; got {describe(value)}. {advice}")


def table_schedule(owner: Any, name: str) -> DiscreteSchedule:
    """The schedule of the table ᾱ of a foreign object of this name; ValueError if it ends at 0."""
    where, kind = f"{name}.alphas_cumprod", getattr(owner.alphas_cumprod, "dtype", None)
    table = torch.as_tensor(owner.alphas_cumprod, dtype=torch.float64, device="cpu").detach()
    zero = table.ndim == 1 and len(table) > 0 and float(table[-1]) in ZERO
    if (sigma := getattr(owner, "sqrt_one_minus_alphas_cumprod", None)) is not None:
        # Where both are kept in float32 it has the digits that 1 − ᾱ has lost at the first steps.
        table = table / (table + torch.as_tensor(sigma).detach().to(table).square())
    if getattr(kind, "itemsize", 8) < 4 and (zero or bool((table.diff() >= 0).any())):
        raise ValueError(
            f"{where}: expected a table that falls to above 0; got one in {kind}, which rounds "
            "neighbours to one number and the smallest to 0. Make the ScoreModel before .half() "
            f"or .to({kind}) of what has the table, or convert its network alone."
        )
    if zero:
        raise ValueError(
            f"{where}: expected a table that ends above 0; got one that ends at "
            f"{float(owner.alphas_cumprod[-1]):g} (zero terminal SNR), where sigma/alpha has no "
            "finite value. Cut it and say the rest yourself: ScoreModel(network, "
            f"DiscreteSchedule({where}[:-1]), prediction=..., ...)."
        )
    return DiscreteSchedule(table)


def predicted(value: object, names: Mapping[str, Prediction], where: str) -> Prediction:
    """Our name of the foreign prediction type that stands at `where`; ValueError for another."""
    if isinstance(value, str) and value in names:
        return names[value]
    raise ValueError(
        f"{where}: expected one of {', '.join(map(repr, names))}; got {describe(value)}. Build a "
        "ScoreModel with the prediction it stands for, or convert its output."
    )


def first_half(returned: Tensor) -> Tensor:
    """The prediction of a network that returns a variance as well, in as many channels more."""
    return returned.chunk(2, 1)[0]
