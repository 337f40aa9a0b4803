r"""A noise schedule defined by a table, as used in DDPM training.

Source:
    The linear betas are from Ho et al., "Denoising Diffusion Probabilistic Models", arXiv
    2006.11239, section 4. The cosine table is from Nichol and Dhariwal, arXiv 2102.09672,
    equation 17.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from hosm_losses._checks import check_range, copy_like, error_message
from hosm_losses.schedules.base import Schedule, as_time

Numbers = Sequence[float] | np.ndarray | Tensor


@dataclass(frozen=True)
class Table:
    """Two or more numbers at the indices 0 … N−1, interpolated linearly.

    A tensor of the numbers is cached for each device and dtype, so that training steps do not
    copy the numbers again.
    """

    values: tuple[float, ...]
    _slopes: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _copies: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        # Computed here because, in `beside`, torch.compile would trace NumPy as tensors.
        object.__setattr__(self, "_slopes", (*np.diff(self.values).tolist(), 0.0))

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_copies": {}}

    def beside(self, like: Tensor) -> Tensor:
        """Return the numbers and the slopes, (2, N), with the dtype and device of `like`.

        Each slope is the next number minus the number at the same index; the last slope is 0.
        """
        # The slopes are rounded from float64, since differences of rounded entries lose digits.
        both = self.values, self._slopes
        # Created on the CPU: elsewhere, torch.tensor fails under forward-mode AD.
        make = partial(torch.tensor, both, dtype=torch.float64, device="cpu")
        return copy_like(self._copies, like, make)

    def __call__(self, t: Tensor | float) -> Tensor:
        """Interpolate the table at index t; on the CPU, check that t is in range."""
        t = as_time(t)
        check_range("t", t, 0, len(self.values) - 1)
        table, left = self.beside(t)[0], self._left(t)
        low, high = _entries(table, left), _entries(table, left + 1)
        return low + (t - left) * (high - low)

    def inverse(self, value: Tensor) -> Tensor:
        """Return the fractional index at which an increasing table has the given value."""
        table = self.beside(value)[0]
        right = torch.searchsorted(table, value.detach().contiguous(), right=True)
        left = (right - 1).clamp(0, len(table) - 2)
        low, high = _entries(table, left), _entries(table, left + 1)
        return left + (value - low) / (high - low)

    def slope(self, t: Tensor) -> Tensor:
        """Return the slope just after the index t or, at the end of the table, just before it."""
        return _entries(self.beside(t)[1], self._left(t))

    def _left(self, t: Tensor) -> Tensor:
        return t.detach().floor().clamp(0, len(self.values) - 2).long()


@dataclass(frozen=True, repr=False)
class DiscreteSchedule(Schedule):
    """A table of ᾱ = α², with σ² = 1 − ᾱ; t is an integer or fractional index from 0 to N−1.

    Between the entries, log σ̂ is linear in t. If the time sampler is "schedule" or
    "log_sigma_hat", losses draw integer indices and replace integrals over log σ̂ with
    trapezoidal sums. Likelihoods also evaluate the schedule at fractional indices. On the CPU,
    an index outside the table raises ValueError; on accelerators, indices are not checked, to
    avoid a synchronisation.

    Args:
        alphas_cumprod: the table ᾱ_0 > ᾱ_1 > … > ᾱ_{N−1}, with every entry in (0, 1), as a list,
            an array or a one-dimensional tensor. The table is stored as a tuple.

    Raises:
        ValueError: if the table has fewer than two entries, is not strictly decreasing, or
            contains a value outside (0, 1). If the table ends at ᾱ = 0 (zero terminal SNR), σ̂ is
            infinite there: omit the last entry.

    Example:
        >>> alpha, sigma = DiscreteSchedule([0.9, 0.5, 0.1])(torch.tensor([0, 1]))
        >>> [round(float(a) ** 2, 4) for a in alpha]
        [0.9, 0.5]
    """

    integer_time: ClassVar[bool] = True
    _prior_std = 1.0
    t_min = 0.0
    alphas_cumprod: Numbers
    t_max: float = field(init=False, compare=False)
    _log_sigma_hat: Table = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Store the table as a tuple of floats: hashable, picklable and not tied to a device."""
        table = _numbers(self.alphas_cumprod)
        rising = np.flatnonzero(~(np.diff(table) < 0))  # NaN does not fall
        if len(table) < 2 or len(rising) or not (table[-1] > 0 and table[0] < 1):
            where = f", which do not fall at index {rising[0]}" if len(rising) else ""
            expected = "two entries or more that fall from below 1 to above 0"
            remedy = (
                "A table that ends at 0 (zero terminal SNR) has an infinite sigma/alpha there: "
                "omit the last entry. A beta has to be above 0 and below 1. Half precision may "
                "round neighbours to the same number. "
                "Pass betas to DiscreteSchedule.from_betas."
            )
            got = f"{_describe(table)}{where}"
            raise ValueError(error_message("alphas_cumprod", expected, table, remedy, got=got))
        log_sigma_hat = 0.5 * (np.log1p(-table) - np.log(table))
        object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))
        object.__setattr__(self, "t_max", len(table) - 1.0)
        object.__setattr__(self, "_log_sigma_hat", Table(tuple(log_sigma_hat.tolist())))

    @classmethod
    def from_betas(cls, betas: Numbers) -> Self:
        """Return the schedule with ᾱ_i = (1 − β_0) … (1 − β_i), a product computed in float64.

        The betas are a list, an array or a tensor (N,). ValueError is raised if a beta is outside
        (0, 1).

        Example:
            >>> DiscreteSchedule.from_betas([0.1, 0.5])
            DiscreteSchedule(2 entries from 0.9 to 0.45)
        """
        return cls(np.cumprod(1 - _numbers(betas)))

    @classmethod
    def linear(
        cls,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        scaled: bool = False,
    ) -> Self:
        """Return DDPM's schedule: `steps` betas, equally spaced from beta_start to beta_end.

        If `scaled` is True, √β is equally spaced instead, as with "scaled_linear" in diffusers.
        An error is raised unless both betas are in (0, 1) and steps ≥ 2.

        Example:
            >>> DiscreteSchedule.linear(1000, 0.00085, 0.012, scaled=True)  # Stable Diffusion
            DiscreteSchedule(1000 entries from 0.99915 to 0.0046601)
        """
        if scaled and min(beta_start, beta_end) > 0:  # others are reported as they are
            return cls.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2)
        return cls.from_betas(np.linspace(beta_start, beta_end, steps))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Self:
        """Return the cosine schedule, ᾱ_i ∝ cos²(π/2 (t + s)/(1 + s)) at t = (i + 1)/steps.

        `offset` is s. Each β_i = 1 − ᾱ_i/ᾱ_{i−1} is limited to max_beta, so that the last ᾱ
        stays above 0. ValueError is raised unless 0 < max_beta < 1.

        Example:
            >>> DiscreteSchedule.cosine()
            DiscreteSchedule(1000 entries from 0.999959 to 2.42877e-09)
        """
        times = np.arange(steps + 1) / steps
        table = np.cos(np.pi / 2 * (times + offset) / (1 + offset)) ** 2
        return cls.from_betas(np.minimum(1 - table[1:] / table[:-1], max_beta))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_describe(np.asarray(self.alphas_cumprod))})"

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Return log σ̂ at the index t, interpolated linearly between the entries of the table."""
        return self._log_sigma_hat(t)

    def alpha(self, t: Tensor | float) -> Tensor:
        """Return α = (1 + σ̂²)^−½."""
        return torch.sqrt(torch.sigmoid(-2 * self.log_sigma_hat(t)))

    def sigma(self, t: Tensor | float) -> Tensor:
        """Return σ = σ̂ (1 + σ̂²)^−½."""
        return torch.sqrt(torch.sigmoid(2 * self.log_sigma_hat(t)))

    def drift(self, t: Tensor | float) -> Tensor:
        """Return d log α/dt = −½ g², which holds because α² + σ² = 1."""
        return -0.5 * self.squared_diffusion(t)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """Return g² = 2 σ² d log σ̂/dt, with the slope of log σ̂ between the entries around t."""
        t = as_time(t)
        return 2 * torch.sigmoid(2 * self.log_sigma_hat(t)) * self._log_sigma_hat.slope(t)

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (dα/dt, dσ/dt), which are α f and −(α²/σ) f for the drift f."""
        t = as_time(t)
        (alpha, sigma), slope = self(t), self._log_sigma_hat.slope(t)
        return -alpha * sigma.square() * slope, sigma * alpha.square() * slope

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the fractional index, clipped to [0, N−1], at which log σ̂ has the given value."""
        return self.clip(self._log_sigma_hat.inverse(as_time(log_sigma_hat)))

    def _density(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 / len(self.alphas_cumprod))

    def _draw(self, shape: tuple[int], **options: Any) -> Tensor:
        options["dtype"] = torch.int64
        return torch.randint(len(self.alphas_cumprod), shape, **options)


def step_labels(
    schedule: DiscreteSchedule, respaced: Sequence[int], factor: float
) -> Callable[[Tensor], Tensor]:
    """Return a function that converts indices of a respaced table to the network's times.

    `respaced` lists the steps that the schedule kept from the full table. The network's time at a
    step is factor · step. A fractional index is converted to the fractional step with the same
    noise level. This step is found by interpolation, which assumes that α falls smoothly from 1.
    Halfway between two respaced steps, the slope of α is taken to be the mean slope between these
    steps. From one midpoint to the next, the slope is interpolated linearly.
    """
    steps, alpha = np.asarray(respaced), np.sqrt(schedule.alphas_cumprod)
    ends = np.append(-1, steps)
    slopes = -np.diff(alpha, prepend=1.0) / np.diff(ends)
    middles = (ends[:-1] + 1 + ends[1:]) / 2
    fall = np.cumsum(np.interp(np.arange(steps[-1] + 1), middles, slopes))
    log_alpha = np.log1p(-np.interp(fall[steps[0] :], fall[steps], 1 - alpha))
    log_sigma_hat = 0.5 * np.log(np.expm1(-2 * log_alpha))
    places = np.interp(log_sigma_hat, schedule._log_sigma_hat.values, np.arange(len(steps)))
    places[steps - steps[0]] = np.arange(len(steps))
    return partial(_label, Table(tuple(places.tolist())), int(steps[0]), factor)


def _label(places: Table, first: int, factor: float, t: Tensor) -> Tensor:
    """Return factor · step at index t; `places` lists the index of every step from `first` on."""
    t = as_time(t)
    check_range("t", t, places.values[0], places.values[-1])
    return factor * (first + places.inverse(t))


def _entries(table: Tensor, index: Tensor) -> Tensor:
    """Return table[index]. Under torch.func.vmap, plain indexing fails for a single index."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


def _numbers(table: Numbers) -> np.ndarray:
    """Return the numbers (N,) in float64, using NumPy to avoid PyTorch's modes and transforms."""
    values = table.tolist() if isinstance(table, Tensor) else table
    return np.asarray(values).astype(np.float64, casting="same_kind")


def _describe(table: np.ndarray) -> str:
    ends = f" from {table[0]:.6g} to {table[-1]:.6g}" if len(table) else ""
    return f"{len(table)} entries{ends}"
