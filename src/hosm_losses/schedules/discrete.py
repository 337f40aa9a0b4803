r"""A noise schedule from a table, as DDPM trainers keep it.

Source:
    Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
"""

__all__ = ["DiscreteSchedule", "Table"]

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hosm_losses._checks import check_range, describe, owns_values
from hosm_losses._torch_internals import outside_inference_mode
from hosm_losses.schedules.base import Schedule, as_time, drawing_device


@dataclass(frozen=True)
class Table:
    """Numbers at the indices 0 … N−1, two or more, and linear between them.

    Copies are kept beside every device and dtype asked for: a training step copies nothing there.
    """

    values: tuple[float, ...]
    _copies: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Refuse fewer than two numbers, between which nothing is linear."""
        if len(self.values) < 2:
            raise ValueError(f"table: expected two entries or more; got {len(self.values)}.")

    def __getstate__(self) -> dict[str, object]:
        """Pickle and copy the numbers, not their copies on devices."""
        return {"values": self.values, "_copies": {}}

    def beside(self, like: Tensor) -> Tensor:
        """The numbers (N,), on the device and in the dtype of `like`."""
        key = (like.device, like.dtype)
        if key in self._copies:
            return self._copies[key]
        with outside_inference_mode():
            # By way of the CPU: elsewhere torch.tensor fails under forward-mode differentiation.
            copy = torch.tensor(self.values, dtype=like.dtype, device="cpu").to(like.device)
        if torch.compiler.is_compiling() or owns_values(copy):
            self._copies[key] = copy
        return copy

    def __call__(self, t: Tensor | float) -> Tensor:
        """The number at the index t, an integer or between two.

        Raises:
            ValueError: for an index outside the table, where looking is free.
        """
        t = as_time(t)
        check_range("t", t, 0, len(self.values) - 1)
        table = self.beside(t)
        left = t.detach().floor().clamp(0, len(table) - 2).long()
        low, high = _entries(table, left), _entries(table, left + 1)
        return low + (t - left) * (high - low)


@dataclass(frozen=True, repr=False)
class DiscreteSchedule(Schedule):
    """A table of ᾱ = α² with σ² = 1 − ᾱ; t is the index 0 … N−1, integer or float.

    Between the entries log σ̂ is linear in t.

    Args:
        alphas_cumprod: the table ᾱ_0 > ᾱ_1 > … > ᾱ_{N−1}, each in (0, 1): a list, an array or a
            tensor with one dimension. It is kept as a tuple.

    Raises:
        TypeError: for a table that is not made of real numbers.
        ValueError: for one of another shape, or that is not decreasing inside (0, 1); one that
            ends at ᾱ = 0 (zero terminal SNR) has an infinite σ̂ there: leave the last entry out.

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
        table = _numbers(self.alphas_cumprod)
        if table.ndim != 1:
            raise ValueError(
                "alphas_cumprod: expected a table with one dimension, (N,); got one of shape "
                f"{table.shape}. Give one schedule's table: a row, or table.flatten() where all "
                "but one dimension are 1."
            )
        falls = len(table) >= 2 and bool((np.diff(table) < 0).all())  # NaN does not
        if not (falls and table[-1] > 0 and table[0] < 1):
            raise ValueError(
                "alphas_cumprod: expected two entries or more that fall from below 1 to above 0; "
                f"got {_ends(table)}. A table that ends at 0 (zero terminal SNR) has an infinite "
                "sigma/alpha there: leave its last entry out. One that rises has its data at the "
                "last index: reverse it."
            )
        object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))
        log_sigma_hat = 0.5 * (np.log1p(-table) - np.log(table))
        object.__setattr__(self, "_log_sigma_hat", Table(tuple(log_sigma_hat.tolist())))

    def __repr__(self) -> str:
        """Name the table's size and its ends; it may have a thousand entries."""
        return f"DiscreteSchedule({_ends(np.asarray(self.alphas_cumprod))})"

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
        """Log σ̂ at the index t, linear between the entries of the table.

        Raises:
            ValueError: for a CPU tensor, or a number, outside the table; on an accelerator a look
                would make the host wait.
        """
        return self._log_sigma_hat(t)

    def alpha(self, t: Tensor | float) -> Tensor:
        """α = (1 + σ̂²)^−½."""
        return torch.sqrt(torch.sigmoid(-2 * self.log_sigma_hat(t)))

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ = σ̂ (1 + σ̂²)^−½."""
        return torch.sqrt(torch.sigmoid(2 * self.log_sigma_hat(t)))

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the index, with its fraction, of this log σ̂, clipped to the table's ends."""
        target = as_time(log_sigma_hat)
        table = self._log_sigma_hat.beside(target)
        left = (torch.searchsorted(table, target.detach().contiguous(), right=True) - 1).clamp(
            0, len(table) - 2
        )
        low, high = _entries(table, left), _entries(table, left + 1)
        return self.clip(left + (target - low) / (high - low))

    def sample_time(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Draw (batch,) integer indices, uniform, as DDPM trainers do."""
        return torch.randint(
            *(0, len(self.alphas_cumprod), (batch,)),
            generator=generator,
            device=drawing_device(device, generator),
        )


def _entries(table: Tensor, index: Tensor) -> Tensor:
    """table[index], which for one index reads it back under torch.func.vmap, and fails."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


def _numbers(table: object) -> np.ndarray:
    """A table in float64, by NumPy, which no device, mode or transform of PyTorch reaches.

    Raises:
        TypeError: for anything that holds no real numbers, or shows none.
    """
    problem = ""
    try:
        values: Any = table.tolist() if isinstance(table, Tensor) else table
        if not np.iscomplexobj(values):
            return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f" ({error})"
    raise TypeError(
        "alphas_cumprod: expected real numbers, in a list, an array or a tensor; got "
        f"{describe(table)}{problem}."
    )


def _ends(table: np.ndarray) -> str:
    """The size of a table, its first entry and its last."""
    if len(table) == 0:
        return "0 entries"
    return f"{len(table)} entries from {table[0]:.6g} to {table[-1]:.6g}"
