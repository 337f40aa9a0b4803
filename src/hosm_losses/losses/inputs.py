r"""What a loss is evaluated on: checked arguments, drawn times and noise, perturbed data.

Formula:
    x = α(t) x₀ + σ(t) ε. What the caller gives is used as it is; what he leaves out is drawn on
    the device of x₀, in the order t, ε, v.
"""

__all__ = ["Inputs", "prepare", "probe_tensor"]

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import (
    check_finite,
    check_generator,
    check_like,
    check_sample_batch,
    expand_right,
)
from hosm_losses._torch_internals import normal
from hosm_losses.losses.weighting import Weighting, draw_time
from hosm_losses.model import ScoreModel, check_model, check_time
from hosm_losses.probes import draw_probes, unit_vectors


class Inputs(NamedTuple):
    """A perturbed batch.

    Attributes:
        x: α x₀ + σ ε, of shape (B, *).
        t: times (B,), as the caller gave them.
        noise: ε, of shape (B, *).
        sigma: σ(t), of shape (B,).
        drawn: whether t was drawn here.
    """

    x: Tensor
    t: Tensor
    noise: Tensor
    sigma: Tensor
    drawn: bool


def prepare(
    model: object,
    x0: object,
    t: object,
    noise: object,
    weighting: Weighting,
    generator: torch.Generator | None,
) -> tuple[ScoreModel, Inputs]:
    """Check the arguments of a loss, draw what is missing and perturb the data.

    Raises:
        TypeError: for a model that is no ScoreModel, or a tensor of a wrong type or dtype.
        ValueError: for a wrong shape, device or value.
    """
    score_model = check_model(model)
    batch = normal(check_sample_batch("x0", x0))
    check_generator(generator, batch.device)
    drawn = t is None
    times = (
        draw_time(score_model, batch, weighting, generator)
        if t is None
        else check_time(score_model, batch, t)
    )
    if noise is None:
        eps = torch.randn(batch.shape, generator=generator, device=batch.device, dtype=batch.dtype)
    else:
        shape = tuple(batch.shape)
        eps = normal(check_like("noise", noise, shape, batch.dtype, batch.device, "x0"))
        check_finite("noise", eps)
    alpha, sigma = score_model.coefficients(times, batch)
    x = expand_right(alpha, batch) * batch + expand_right(sigma, batch) * eps
    return score_model, Inputs(x.to(batch.dtype), times, eps, sigma, drawn)


def probe_tensor(
    x0: Tensor,
    probe: object,
    probes: int | Literal["exact"],
    distribution: str,
    generator: torch.Generator | None,
) -> Tensor:
    """The probes (K, B, *): the caller's, all unit vectors, or drawn.

    Raises:
        TypeError: for a probe that is no tensor, or of another dtype.
        ValueError: for a probe of a shape other than (B, *) or (K, B, *), or one that
        contradicts `probes`.
    """
    if probe is None:
        if probes == "exact":
            return unit_vectors(x0)
        return draw_probes(x0, probes, distribution, generator)
    if isinstance(probe, Tensor) and probe.ndim == x0.ndim:
        probe = probe.unsqueeze(0)
    count = len(probe) if isinstance(probe, Tensor) and probe.ndim == x0.ndim + 1 else 1
    given = check_like(
        "probe",
        probe,
        (max(count, 1), *x0.shape),
        x0.dtype,
        x0.device,
        "x0 after one for the probes",
    )
    if probes not in (1, count):
        raise ValueError(
            f"probe: expected as many as probes={probes!r} asks for; got {count}. Leave probes "
            "out when you give the probe."
        )
    check_finite("probe", given)
    return normal(given)
