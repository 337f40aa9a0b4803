r"""A noise schedule from a table, as DDPM trainers keep it.

Source:
    Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
"""

__all__ = ["DiscreteSchedule", "Table"]

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hosm_losses.schedule import Schedule, as_time


@dataclass(frozen=True)
class Table:
    """Numbers at the indices 0 … N−1, two or more, and linear between them.

    Copies are kept beside every device and dtype asked for: a training step copies nothing there.
    """

    values: tuple[float, ...]
    _copies: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, object]:
        """Pickle and copy the numbers, not their copies on devices."""
        return {"values": self.values, "_copies": {}}

    def beside(self, like: Tensor) -> Tensor:
        """The numbers (N,), on the device and in the dtype of `like`."""
        key = (like.device, like.dtype)
        if key not in self._copies:
            self._copies[key] = torch.tensor(self.values, dtype=like.dtype, device=like.device)
        return self._copies[key]

    def __call__(self, t: Tensor | float) -> Tensor:
        """The number at the index t, an integer or between two."""
        t = as_time(t)
        table = self.beside(t)
        left = t.detach().floor().clamp(0, len(table) - 2).long()
        low, high = table[left], table[left + 1]
        return low + (t - left) * (high - low)


@dataclass(frozen=True)
class DiscreteSchedule(Schedule):
    """A table of ᾱ = α² with σ² = 1 − ᾱ; t is the index 0 … N−1, integer or float.

    Between the entries log σ̂ is linear in t.

    Args:
        alphas_cumprod: the table ᾱ_0 > ᾱ_1 > … > ᾱ_{N−1}, each in (0, 1).

    Raises:
        ValueError: for a table that is not decreasing inside (0, 1); one that ends at ᾱ = 0
            (zero terminal SNR) has an infinite σ̂ there: leave the last entry out.

    Example:
        >>> betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        >>> schedule = DiscreteSchedule(torch.cumprod(1 - betas, 0))
        >>> alpha, sigma = schedule(torch.tensor([0, 999]))
        >>> [round(float(s), 4) for s in sigma]
        [0.01, 1.0]
    """

    integer_time: ClassVar[bool] = True
    alphas_cumprod: Sequence[float] | Tensor
    _log_sigma_hat: Table = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Keep the table as a tuple of floats: hashable, comparable, picklable, on no device."""
        table = torch.as_tensor(self.alphas_cumprod, dtype=torch.float64).flatten()
        falls = table.numel() >= 2 and bool((table.diff() < 0).all())
        if not (falls and float(table[-1]) > 0 and float(table[0]) < 1):
            raise ValueError(
                "alphas_cumprod: expected two entries or more that fall from below 1 to above 0; "
                f"got {table.numel()} from {float(table[0]) if table.numel() else math.nan:g} to "
                f"{float(table[-1]) if table.numel() else math.nan:g}. A table that ends at 0 "
                "(zero terminal SNR) has an infinite sigma/alpha there: leave its last entry out."
            )
        object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))
        log_sigma_hat = 0.5 * (torch.log1p(-table) - table.log())
        object.__setattr__(self, "_log_sigma_hat", Table(tuple(log_sigma_hat.tolist())))

    @property
    def t_min(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """0, the first index."""
        return 0.0

    @property
    def t_max(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """N − 1, the last index."""
        return float(len(self.alphas_cumprod) - 1)

    @property
    def prior_std(self) -> float:
        """1, as the schedule preserves variance."""
        return 1.0

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Log σ̂ at the index t, linear between the entries of the table."""
        return self._log_sigma_hat(t)

    def alpha(self, t: Tensor) -> Tensor:
        """α = (1 + σ̂²)^−½."""
        return torch.sqrt(torch.sigmoid(-2 * self.log_sigma_hat(t)))

    def sigma(self, t: Tensor) -> Tensor:
        """σ = σ̂ (1 + σ̂²)^−½."""
        return torch.sqrt(torch.sigmoid(2 * self.log_sigma_hat(t)))

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the index, with its fraction, of this log σ̂."""
        target = as_time(log_sigma_hat)
        table = self._log_sigma_hat.beside(target)
        left = (torch.searchsorted(table, target.detach().contiguous(), right=True) - 1).clamp(
            0, len(table) - 2
        )
        low, high = table[left], table[left + 1]
        return left + (target - low) / (high - low)

    def sample_time(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Draw (batch,) integer indices, uniform, as DDPM trainers do."""
        device = generator.device if device is None and generator is not None else device
        return torch.randint(
            0, len(self.alphas_cumprod), (batch,), generator=generator, device=device
        )
