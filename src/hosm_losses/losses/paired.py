r"""The terms of orders two and three from paired probes: those of probes="exact", at few probes.

What:
    With one probe a residual is squared whose target is random in v, and the mean of a square is
    not the square of the mean. Here the target is what its mean over v is, and a square is a
    product of two estimates by independent probes. The noise that is left is that of the data.

Formula, with ℓ = ε + f and A = σ ∂f/∂x, everything held fixed that `terms` holds fixed, C_k = G_k,
or σ² ∂²f[v_k, v_k] for the Laplacian form:
    second = (mean_k(‖D_k‖² + 2 v_k·D_k) − 2 ℓ·(Aℓ) + d − 2 ‖ℓ‖² + ‖ℓ‖⁴)/d²
    a_k = v_k·D_k + d − ‖ℓ‖²                                       trace = a₁ a₂/d²
    R_k = C_k + (‖ℓ‖² − v_k·D_k − d) ℓ − 2 (Aℓ + ℓ)                third = R₁·R₂/d³

    With K > 2 probes 1 and 2 are means over the first K // 2 probes and over the others. The means
    over independent v_k with E[v vᵀ] = I are ‖M₂‖²_F, (tr M₂)² and ‖R₃‖²: each term, and its
    gradient, has the mean of probes="exact". A product is negative for some samples.

    With averaged targets v − C₂v stands for each vector v that is added to Av, and C₃(v_k, v_k, ·)
    beside C_k. They share the probe of what they are compared with, so that its noise, too, is
    gone where the two are equal.

    ℓ·(Aℓ) is taken by a pass back from the value, Aℓ without a graph: the network is called once.

Cost of a step, in network evaluations with two probes, where one of order one is 3:
    order two 12, and 9 where the weight of `second` is 0; order three 25.

Source:
    derived for this library; the products of independent estimates are those of an unbiased
    estimate of a squared mean (Hoeffding, "A class of statistics with asymptotically normal
    distribution", 1948).
"""

from torch import Tensor

from hosm_losses._checks import at_least_float32, expand_right, over_elements
from hosm_losses.losses.arguments import Options
from hosm_losses.losses.terms import (
    DSMTerms,
    Inputs,
    first_term,
    inner,
    only_first,
    over_probes,
    scaled,
)
from hosm_losses.model import NoiseField


def means_of_halves(estimates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the first half of K estimates, and that over the others."""
    half = len(estimates) // 2
    return over_probes(estimates[:half]), over_probes(estimates[half:])


def paired_terms(
    field: NoiseField,
    inputs: Inputs,
    probe: Tensor | None,
    options: Options,
    *,
    second: bool = True,
) -> DSMTerms:
    """The terms of every sample, as `terms_along` has them; `second` only if it is wanted."""
    if probe is None:
        return only_first(field, inputs)
    x, noise = inputs.x, at_least_float32(inputs.noise)
    sigma = expand_right(inputs.sigma, x)
    direction = (sigma * probe).to(x.dtype)
    elements = float(x[0].numel())  # as in `terms`

    def ell_of(value: Tensor) -> Tensor:
        return (at_least_float32(value) + noise).detach()

    pulled = pushed = None
    if second or options.order == 3:
        derived, _, pulled, pushed = field.derive_with_products(
            x, direction, ell_of, push=options.order == 3, **options.derivatives
        )
    else:
        derived = field.derive(x, direction, **options.derivatives)
    value, directional, probe = map(at_least_float32, (*derived[:2], probe))
    residual = value + noise
    ell = residual.detach()
    # D tends to −v at the noisy end: their sum keeps the digits that those of squares lose.
    held, skew = inputs.spread(probe, third=options.order == 3)
    square, shifted, (held, _) = inner(ell, ell), directional + held, inputs.spread(ell)
    beyond = elements - over_elements(probe.square())  # 0 but for rounding and "gaussian"
    along = inner(probe, shifted) + beyond  # v·D + d
    of_second = None
    if second and pulled is not None:
        cross = inner(ell, sigma * at_least_float32(pulled) + held)
        of_second = (over_elements(shifted.square()) + beyond).mean(0)
        of_second = (of_second + (square.square() - 2 * cross).mean(0)) / elements**2
    one, other = means_of_halves(along - square)
    terms = DSMTerms(first_term(residual), of_second, one * other / elements**2)
    if derived.third is None or pushed is None:
        return terms
    moved = (sigma * at_least_float32(pushed)).detach() + held
    rest = scaled((square - along).detach(), ell) - 2 * moved
    rest = rest if skew is None else rest + skew
    one, other = means_of_halves(at_least_float32(derived.third) + rest)
    return terms._replace(third=over_elements(one * other, 1) / elements**3)
