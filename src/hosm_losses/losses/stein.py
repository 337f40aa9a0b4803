r"""The rate at which the log-density of the model's ODE goes wrong, as a term beside order one.

What:
    Along the path of the probability-flow ODE from x₀ the model's log-density departs from the
    data's by r = ∫ a du, u = log σ̂, to first order in the error δf of the field, and the KL
    divergence is ½ E r² to second order. Order one makes ‖δf‖ small; this term makes a small.

Formula, with δf = f − f*, f* = σ ∇log q_t and δtr = σ ∇·δf:
    a(x, t) = σ² (∇·δs + δs·∇log q_t) = δtr + δf·f*                  E_q[a] = 0 at every t
    ρ_k = v_k·D_k + d − ε·(ε + f)                                     E[ρ_k | x] = a

    E a² has the gradient 2 E a ∂(σ ∇·f + f·f*), of which an estimate is, with f for f*,
        ρ₁.detach() ∂(v₂·D₂ + f.detach()·f) + ρ₂.detach() ∂(v₁·D₁ + f.detach()·f)
    The term has this gradient, and the value ρ₁ρ₂ of mean a² + Var(ε·(ε + f) | x). With K > 2
    probes 1 and 2 are means over the first K // 2 probes and over the others.

    The mean gradient is zero where f = f*, for a is zero there. That of ρ₁ρ₂ is not: both factors
    have the same ε, and the variance depends on f. A loss that squares ρ has another minimiser.
    So the value is for a look at its noise, and falls with a only as far as that allows.

    With averaged targets ε is the mean ε̄, and ρ_k = v_k·(D_k − C₂v_k) + d − ε̄·(ε̄ + f): the second
    moment of ε given x is ε̄ ε̄ᵀ + C₂. It has the mean a where the reference is dense.

Terms of a sample:
    first = ‖r1‖², of which the integral over u has the mean J_SM, up to a constant, in nats
    rate = ρ₁ρ₂, negative for some samples

Source:
    derived for this library from the instantaneous change of variables (Chen et al., "Neural
    ordinary differential equations", 2018). Lu et al. (2022) bound the same divergence by the
    errors of three orders. Huang et al., "Flow and Divergence Matching", arXiv 2602.00869, square
    a conditional residual of this kind for flows.
"""

from typing import NamedTuple

from torch import Tensor

from hosm_losses._checks import at_least_float32, expand_right, over_elements
from hosm_losses.losses.arguments import Options
from hosm_losses.losses.paired import means_of_halves
from hosm_losses.losses.terms import Inputs, Logged, first_residual_of, inner
from hosm_losses.model import NoiseField


class SteinTerms(NamedTuple):
    """The terms of `stein_dsm`, per sample and before any weight, in nats for a unit of log σ̂.

    Attributes:
        first: ‖r1‖², of shape (B,).
        rate: ρ₁ρ₂, of shape (B,), or of the rows a fraction chose. Its mean is a² plus the
            variance of ε·(ε + f) given x. Negative for some samples. None where its weight is the
            number 0.
    """

    first: Tensor
    rate: Tensor | None = None


class LoggedSteinTerms(Logged, SteinTerms):
    """Detached terms with what they are plotted against; unpacks to the two as `SteinTerms` does.

    Attributes:
        t: the times of the batch, (B,).
        rows: the rows that a fraction chose for the rate, in their order; None for all.
    """


def stein_terms(
    field: NoiseField, inputs: Inputs, probe: Tensor | None, options: Options
) -> SteinTerms:
    """The terms of every sample, along probes (K, B, *); without these the first alone."""
    x = inputs.x
    if probe is None:
        return SteinTerms(over_elements(first_residual_of(field, inputs).square())[0])
    direction = (expand_right(inputs.sigma, x) * probe).to(x.dtype)
    value, directional, _ = field.derive(x, direction, **options.derivatives)
    parts = (value, directional, inputs.noise, probe)
    value, directional, noise, probe = map(at_least_float32, parts)
    directional = directional + (inputs.spread(probe)[0] - probe)  # D − C₂v
    residual, along = value + noise, inner(probe, directional)
    rate = along + x[0].numel() - inner(noise.unsqueeze(0), residual)
    one, other = means_of_halves(rate.detach())
    moved, other_moved = means_of_halves(along + inner(value.detach(), value))
    term = one * other_moved + other * moved
    return SteinTerms(over_elements(residual.square())[0], term + (one * other - term).detach())
