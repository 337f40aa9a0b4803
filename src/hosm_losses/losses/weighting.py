r"""Which times a loss draws, and how much each counts.

What:
    Two factors per sample, one for the first-order term and one for all higher terms, and the
    draw of t that goes with them.

Formula:
    "noise"        1 and 1, t from the schedule's own `sample_time`.
    "native"       turns the squared error of ε̂ into that of the network's own prediction; 1 for
                   the higher terms.
    "likelihood"   the first term becomes an unbiased estimate of ½ ∫ g² E‖s − ∇ log q_0t‖² dt, a
                   sum over elements: u = log σ̂ is drawn uniformly on [u₀, u₁] and the factor is
                   ½ Z d, Z = 2 (u₁ − u₀). A t given by the caller counts as uniform: the factor
                   is ½ (t_max − t_min) (g²/σ²) d. The higher terms keep the meaning they have
                   under `sample_time`: their factor is its density over that of the draw.
    a callable     W(t), on every term.

    Against its default the first term of "likelihood" counts d g²/(2σ²) times as much: weights
    have to be chosen anew.

Source:
    Song et al., "Maximum Likelihood Training of Score-Based Diffusion Models", arXiv 2101.09258,
    theorem 1 and appendix B; g²/σ² = 2 d log σ̂/dt makes the importance density uniform in log
    σ̂ for every schedule.
"""

__all__ = ["WEIGHTINGS", "Weighting", "draw_time", "time_factors"]

from collections.abc import Callable

import torch
from torch import Tensor

from hosm_losses._checks import check_choice, check_finite, check_like
from hosm_losses.model import ScoreModel
from hosm_losses.schedules import Schedule

WEIGHTINGS = ("noise", "native", "likelihood")
Weighting = str | Callable[[Tensor], Tensor]


def check_weighting(weighting: object) -> None:
    """Raise ValueError unless this is the name of a weighting or a callable."""
    if not callable(weighting):
        check_choice("weighting (or a callable of t)", weighting, WEIGHTINGS)


def draw_time(
    model: ScoreModel, x0: Tensor, weighting: Weighting, generator: torch.Generator | None
) -> Tensor:
    """Draw a time (B,) for every sample, on its device: uniform in log σ̂ under "likelihood".

    Args:
        model: whose schedule is drawn from.
        x0: the batch (B, *).
        weighting: the weighting of the loss.
        generator: the source of randomness.

    Returns:
        t of shape (B,).
    """
    schedule = model.schedule
    dtype = torch.promote_types(x0.dtype, torch.float32)
    if weighting != "likelihood":
        return schedule.sample_time(len(x0), generator, device=x0.device, dtype=dtype)
    low, span = _range(schedule)
    unit = torch.rand((len(x0),), generator=generator, device=x0.device, dtype=dtype)
    return schedule.time(low + span * unit)


def time_factors(
    model: ScoreModel, x0: Tensor, t: Tensor, weighting: Weighting, *, drawn: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The factors (B,) of the first term and of the higher terms at t; None stands for 1.

    Args:
        model: whose schedule and prediction matter.
        x0: the batch (B, *).
        t: its times (B,).
        weighting: the weighting of the loss.
        drawn: whether `draw_time` drew t; otherwise it counts as uniform.

    Returns:
        The two factors.

    Raises:
        TypeError: if a callable weighting returns no tensor like t.
        ValueError: if it returns another shape than (B,), or (on the CPU) NaN or infinity.
    """
    if weighting == "noise":
        return None, None
    if weighting == "native":
        return model.native_weight(t, x0), None
    if callable(weighting):
        factor = weighting(t.clone())  # its own times, to which it may write
        reference = model.coefficients(t, x0)[1]
        shape = tuple(reference.shape)
        check_like("weighting(t)", factor, shape, reference.dtype, reference.device, "t")
        check_finite("weighting(t)", factor)
        return factor, factor
    schedule = model.schedule
    time = model.time_in(t, x0)
    rate = schedule.squared_diffusion(time) / (2 * schedule.sigma(time).square())
    elements = x0[0].numel()
    if not drawn:
        return (schedule.t_max - schedule.t_min) * rate * elements, None
    _, span = _range(schedule)
    return torch.ones_like(rate) * (span * elements), schedule.time_density(time) * span / rate


def _range(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Log σ̂(t_min) and its distance to log σ̂(t_max), 0-dim tensors that nothing reads back."""
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64, device="cpu")
    low, high = schedule.log_sigma_hat(ends).unbind()
    return low, high - low
