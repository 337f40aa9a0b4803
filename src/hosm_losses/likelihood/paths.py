r"""The paths of a batch from data to noise, solved by either method.

What:
    Between the coordinates, which know the schedule, the divergence, which knows the network, and
    the solvers, which know neither.
"""

__all__ = ["Paths", "Solved", "solve_adaptive", "solve_fixed"]

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses.likelihood.adaptive import adaptive
from hosm_losses.likelihood.coordinates import Coordinates, Place
from hosm_losses.likelihood.divergence import Divergence, exact_divergence, hutchinson_divergence
from hosm_losses.likelihood.multistep import Node, multistep, multistep_evaluations
from hosm_losses.likelihood.student import student_factor
from hosm_losses.model import ConditionedModel, NoiseField
from hosm_losses.probes import draw_probes

MAX_EVALUATIONS = 10_000
STATE_TOLERANCE = 0.03
MINIMUM_PATHS = 4


class Solved(NamedTuple):
    """Where the paths end, and what was gathered on the way.

    Attributes:
        z: the states at the noise end, (B, *).
        integral: ∫ (σ ∇·ε̂ − Σ_i σ̂²/c²) du, (B,).
        nfe: network evaluations, (B,).
        standard_error: of the integral, from the probes, (B,); None where it is not known.
        solver_error: estimate, (B,).
        failed: (B,).
    """

    z: Tensor
    integral: Tensor
    nfe: Tensor
    standard_error: Tensor | None
    solver_error: Tensor
    failed: Tensor


@dataclass(frozen=True)
class Paths:
    """A batch of paths.

    Attributes:
        model: the score model, conditioned on the batch.
        coordinates: of the state.
        dtype: the network's.
        probes: K, the number of random probes; 0 stands for the exact divergence.
        distribution: that of the probes.
        generator: their source of randomness.
        advance: told how many samples' worth of work was just done.
    """

    model: ConditionedModel
    coordinates: Coordinates
    dtype: torch.dtype
    probes: int
    distribution: str
    generator: torch.Generator | None
    advance: Callable[[float], object]

    def rows(self, index: Tensor) -> "Paths":
        """Return the paths of the samples at `index`."""
        return replace(self, model=self.model.rows(index))

    def noise(self, z: Tensor, place: Place) -> Tensor:
        """ε̂ at z, in the precision of z."""
        field, x = self._at(self.model, z, place)
        return -field(x).to(z.dtype)

    def noise_and_divergence(
        self, z: Tensor, place: Place, probes: Tensor | None, rows: Tensor | None = None
    ) -> Divergence:
        """ε̂ of the rows (all if None), and the samples (K, n) of its divergence."""
        model = self.model if rows is None else self.model.rows(rows)
        field, x = self._at(model, z, place)
        if probes is None:
            value, samples = exact_divergence(field, x)
        else:
            value, samples = hutchinson_divergence(field, x, probes)
        return Divergence(-value.to(z.dtype), -samples)

    def draw(self, z: Tensor) -> Tensor | None:
        """Fresh probes (K, B, *), or None where the divergence is exact."""
        if self.probes == 0:
            return None
        like = torch.empty_like(z, dtype=self.dtype)
        return draw_probes(like, self.probes, self.distribution, self.generator)

    def _at(self, model: ConditionedModel, z: Tensor, place: Place) -> tuple[NoiseField, Tensor]:
        t = place.t.to(torch.promote_types(self.dtype, torch.float32)).expand(len(z))
        return model.at(t), self.coordinates.to_x(z, place).to(self.dtype)


def solve_fixed(paths: Paths, z: Tensor, span: tuple[float, float], steps: int) -> Solved:
    """Solve on a uniform grid in u = log σ̂, with fresh probes at every node.

    Args:
        paths: the batch.
        z: the states at the data end, (B, *).
        span: u at both ends.
        steps: the number of steps.

    Returns:
        The solution.
    """
    coordinates = paths.coordinates

    def slope(u: float, z: Tensor) -> Tensor:
        here = coordinates.at(u)
        return coordinates.slope(z, paths.noise(z, here), here)

    def node(u: float, z: Tensor) -> Node:
        paths.advance(len(z) / (steps + 1))
        here = coordinates.at(u)
        noise, samples = paths.noise_and_divergence(z, here, paths.draw(z))
        integrand = coordinates.integrand(samples, here)
        seen = integrand.detach()
        variance = seen.var(0) / len(seen) if len(seen) > 1 else torch.zeros_like(seen[0])
        covector = coordinates.covector(noise.detach(), here)
        return Node(coordinates.slope(z, noise, here), integrand.mean(0), variance, covector)

    end, integral, variance, path_error, quadrature_error = multistep(slope, node, z, span, steps)
    nfe = torch.full((len(z),), multistep_evaluations(steps), device=z.device)
    exact = paths.probes == 0
    return Solved(
        end,
        integral,
        nfe,
        variance.sqrt() if exact or paths.probes > 1 else None,
        path_error + quadrature_error if exact else path_error,
        torch.zeros_like(nfe, dtype=torch.bool),
    )


def solve_adaptive(paths: Paths, z: Tensor, span: tuple[float, float], tolerance: float) -> Solved:
    """Solve with steps of each sample's own in r = σ̂/(σ̂ + s), s the data's standard deviation.

    In r the noise end is no farther than the data end, and neither is at infinity:
    du = dr/(r (1 − r)).

    Args:
        paths: the batch.
        z: the states at the data end, (B, *).
        span: u at both ends.
        tolerance: acceptable error of a step in the log-density, in nats; the state is held to
            0.03 of it in root mean square.

    Returns:
        The solution.
    """
    coordinates = paths.coordinates
    batch, elements = len(z), z[0].numel()
    probes = paths.draw(z)
    on_their_way = batch
    reference = float(coordinates.std.log().mean())

    def slope(r: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        nonlocal on_their_way
        paths.advance(on_their_way - len(rows))
        on_their_way = len(rows)
        here = coordinates.place(torch.logit(r) + reference)
        state = y[:, :elements].reshape(len(y), *z.shape[1:])
        chosen = None if probes is None else probes[:, rows]
        noise, samples = paths.noise_and_divergence(state, here, chosen, rows)
        integrand = coordinates.integrand(samples, here)
        moved = coordinates.slope(state, noise, here).reshape(len(y), -1)
        return torch.cat([moved, integrand.T], 1) / (r * (1 - r))[:, None]

    def norm(error: Tensor) -> Tensor:
        state = error[:, :elements].square().mean(1).sqrt()
        return torch.maximum(error[:, elements:].mean(1), state / STATE_TOLERANCE) / tolerance

    start = torch.cat([z.reshape(batch, elements), z.new_zeros(batch, max(paths.probes, 1))], 1)
    low, high = (1 / (1 + math.exp(reference - u)) for u in span)
    end, nfe, error, failed = adaptive(slope, start, (low, high), norm, MAX_EVALUATIONS)
    paths.advance(on_their_way)
    integrals = end[:, elements:]
    standard_error = None
    if paths.probes == 0:
        standard_error = torch.zeros_like(integrals[:, 0])
    elif paths.probes >= MINIMUM_PATHS:
        spread = integrals.detach().std(1) / paths.probes**0.5
        standard_error = spread * student_factor(paths.probes - 1)
    return Solved(
        end[:, :elements].reshape(z.shape),
        integrals.mean(1),
        nfe,
        standard_error,
        error[:, elements:].mean(1),
        failed,
    )
