r"""Dequantization of integer images, and averaging of densities over draws of the noise.

Formula:
    Uniform noise u in [0, 1) spreads each integer k over its cell. With K draws of u,
    x = low + (high − low)(k + u)/levels;    −log P(k) ≤ E[−log (1/K) Σ_j p(k + u_j)]
    Here p is the density of x. `bits_per_dim` accounts for the width of a cell.

    Suppose that a network was trained on the levels themselves, y = first + w k. At low noise, its
    density consists of Gaussian peaks with standard deviation σ̂ around the levels. Let t be the
    time at which half the width of a cell, w/2, equals τ σ̂, where τ = 3. At this time, the noise
    spreads each level over its cell. The noise u is drawn from the standard normal distribution
    truncated to [−τ, τ]. Before truncation, the probability of this interval is Z = erf(τ/√2). The
    noisy point and the bound are:
    x_t = α y + σ u;    −log P(k) ≤ E[−log p_t(x_t) − Σ_i (log σ + ½u_i² + ½log 2π + log Z)].
    For normal peaks, the bound exceeds −log P(k) by −log Z, which is 0.0027 nats per element. For
    a density that is smooth over a cell, the bound exceeds −log P(k) by 0.39 nats per element,
    which is the difference between log 2τ and the entropy of u.

Source:
    Theis et al., arXiv 1511.01844, for the uniform dequantization; Burda et al.,
    arXiv 1509.00519, and Ho et al., arXiv 1902.00275, for the importance-weighted bound; Zheng et
    al., arXiv 2305.03935, for the truncated normal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hosm_losses._checks import can_read_values, error_message, sum_elements, warn, widest_dtype
from hosm_losses.likelihood.divergence import DivergenceEstimator
from hosm_losses.likelihood.paths import Coordinates
from hosm_losses.likelihood.result import NLLResult, Quantization

LEVELS = 256
HALF_CELL = 3.0  # τ, in units of σ̂


@dataclass(frozen=True)
class Uniform:
    """Uniform dequantization of uint8 images: x = −1 + 2 (k + u)/256 with u uniform on [0, 1).

    Args:
        draws: the number K of draws of u and, if `clean` is True, of the diffusion noise. The
            densities of the draws are averaged, which tightens the bound at K times the cost of
            one draw. More than one draw requires divergence="exact".

    Example:
        >>> Uniform()
        Uniform(draws=1)
    """

    draws: int = 1

    @property
    def quantization(self) -> Quantization:
        """The number of levels, and the range that their cells cover."""
        return Quantization(LEVELS, -1.0, 1.0)

    def start_coordinates(self, coordinates: Coordinates) -> Coordinates:
        """Return the coordinates unchanged, because `draw` returns points at t_min."""
        return coordinates

    def draw(
        self, levels: Tensor, _: Coordinates, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return random points x in the cells, and None, because the nll needs no correction."""
        low, high = self.quantization[1:]
        return low + (high - low) * (levels + _unit(levels, generator)) / LEVELS, None


@dataclass(frozen=True)
class TruncatedNormal:
    """Dequantization of uint8 images with the kind of noise that the network was trained on.

    `TruncatedNormal` is meant for networks trained on the levels themselves,
    x = first + (last − first) k/255, without added uniform noise. The paths start at the time t at
    which half the width of a cell equals three times σ̂. The noise at this time, truncated at
    three standard deviations, spreads each level over its cell. For a network trained with uniform
    noise, the bound from `Uniform` is tighter than the bound from `TruncatedNormal` by 0.56 bits
    per dimension. Only `ode_nll` with clean=False accepts `TruncatedNormal`.

    Args:
        draws: the number K of draws of the noise, as in `Uniform`.
        first: the value that represented level 0 in training.
        last: the value of level 255 in training, which must be greater than `first`.

    Example:
        >>> TruncatedNormal()
        TruncatedNormal(draws=1, first=-1.0, last=1.0)
    """

    draws: int = 1
    first: float = -1.0
    last: float = 1.0

    @property
    def _cell(self) -> float:
        return (self.last - self.first) / (LEVELS - 1)

    @property
    def quantization(self) -> Quantization:
        """The number of levels, and the range of the cells, which are centred on the levels."""
        return Quantization(LEVELS, self.first - self._cell / 2, self.last + self._cell / 2)

    def start_coordinates(self, coordinates: Coordinates) -> Coordinates:
        """Return coordinates whose paths start at the σ̂ that is a sixth of a cell's width.

        A ValueError is raised if the schedule does not reach such a small σ̂.
        """
        sigma_hat = self._cell / (2 * HALF_CELL)
        lowest = math.exp(coordinates.span[0])
        if lowest > sigma_hat:
            raise ValueError(
                f"dequantization: expected a schedule that starts at σ/α of {sigma_hat:.3g} or "
                f"less, a sixth of a cell, with TruncatedNormal; got {coordinates.schedule!r}, "
                f"which starts at {lowest:.3g}. Lower its t_min if the network was trained at "
                "such small noise, or use Uniform()."
            )
        return replace(coordinates, start=math.log(sigma_hat))

    def draw(
        self, levels: Tensor, coordinates: Coordinates, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return random starting points x_t in the cells, and corrections (B,) to the nll."""
        start, _ = coordinates.ends(coordinates.span)
        mass = math.erf(HALF_CELL / math.sqrt(2))
        u = math.sqrt(2) * torch.erfinv(mass * (2 * _unit(levels, generator) - 1))
        data = self.first + self._cell * levels
        # −log p_t − log σ is the nll of x_t/α minus log σ̂. The width of a cell is 2 τ σ̂.
        constant = math.log(2 * HALF_CELL / math.sqrt(2 * math.pi) / mass) - start.alpha.log()
        return start.alpha * data + start.sigma * u, sum_elements(constant - u.square() / 2, 1)


Dequantization = Uniform | TruncatedNormal


def check_dequantization(value: object, *, clean: bool = False) -> None:
    """Raise ValueError if the dequantization `value` cannot be combined with `clean`."""
    if clean and isinstance(value, TruncatedNormal):
        expected = "Uniform(...) or None for clean data, at t = 0"
        remedy = (
            "TruncatedNormal already adds the noise at its start: use ode_nll with clean=False."
        )
        raise ValueError(error_message("dequantization", expected, value, remedy, got=repr(value)))


def refuse_biased_draws(value: Dequantization, divergence: DivergenceEstimator) -> None:
    """Raise ValueError if several draws of u are combined with random probes.

    Averaging densities turns noise in log p into an apparent increase in log p. For example,
    suppose that Hutchinson's estimator causes noise in log p with a standard deviation of 7 nats.
    Averaging the density over 20 draws then appears to raise log p by 11 nats.
    """
    if value.draws > 1 and divergence.is_random:
        raise ValueError(
            "dequantization: expected one draw with random probes for the divergence; got "
            f"{value.draws}. The mean of exp(log p) turns the noise of log p into a gain, which "
            "flatters the model: use divergence='exact'."
        )


def check_images(x: object) -> None:
    """Raise TypeError unless x is a uint8 tensor (B, *)."""
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        expected = "a uint8 tensor (B, *) of levels 0 to 255 with dequantization=Uniform()"
        remedy = "Dequantize other data yourself, and give levels, low and high to bits_per_dim."
        raise TypeError(error_message("x", expected, x, remedy))


def warn_of_levels(x: Tensor) -> None:
    """Warn if x consists of 8-bit images without dequantization, in one of three usual ranges.

    Samples that have fewer than 64 elements or take at most 16 different values, such as binary
    data, are not regarded as images. Only the first samples are read, and only on the CPU.
    """
    if not can_read_values(x) or x[0].numel() < 64:
        return
    first = x[:16].detach().double()
    forms = {"k": first, "k / 255": 255 * first, "k / 127.5 - 1": 127.5 * (first + 1)}
    for form, k in forms.items():
        levels = k.round()
        whole = levels.min() >= 0 and levels.max() < LEVELS and (k - levels).abs().max() < 1e-3
        if whole and len(levels.unique()) > 16:
            warn(
                f"x: expected continuous data; got only the levels {form} of 8-bit images, with k "
                "from 0 to 255. Without noise, their nll is not that of the images: pass uint8 "
                "images with dequantization=Uniform(), which maps k to −1 + 2 (k + u)/256. If the "
                "network was trained on another range, add the noise u and scale k + u yourself."
            )
            return


def _unit(levels: Tensor, generator: torch.Generator | None) -> Tensor:
    dtype, device = widest_dtype(levels), levels.device
    return torch.rand(levels.shape, generator=generator, dtype=dtype, device=device)


def importance_weighted(draws: Sequence[NLLResult], quantization: Quantization) -> NLLResult:
    """Combine the results of K draws of u by averaging their densities.

    `nll` is the negative log of the average density. `latent` comes from the first draw, `nfe` is
    summed over draws, and solver errors are averaged with the densities as weights.
    """
    first = replace(draws[0], quantization=quantization)
    if len(draws) == 1:
        return first

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(draw, name) for draw in draws])

    log_density, prior_error = -stacked("nll"), None
    if first.prior_error is not None:  # the prior error of the averaged density
        corrected = log_density.detach() + stacked("prior_error")
        prior_error = corrected.logsumexp(0) - log_density.detach().logsumexp(0)
    weight = torch.softmax(log_density.detach(), 0)
    return replace(
        first,
        nll=math.log(len(draws)) - log_density.logsumexp(0),
        nfe=stacked("nfe").sum(0),
        products=None if first.products is None else stacked("products").sum(0),
        solver_error=(weight * stacked("solver_error")).sum(0),
        failed=stacked("failed").any(0),
        cause=stacked("cause").amax(0),
        prior_error=prior_error,
    )
