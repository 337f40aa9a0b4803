r"""Unbiased estimates, from a few paired probes, of the terms that probes="exact" computes.

Purpose:
    With random probes v, the target in a squared residual depends on v. In addition, the mean over
    v of the squared residual differs from the square of the mean residual. With paired probes, the
    target is replaced by its mean over v, and the square by the product of two estimates from
    independent probes. The remaining noise comes almost entirely from the random choice of x₀, ε
    and t.

Formula:
    Let ℓ = ε + f and A = σ ∂f/∂x. The quantities detached in `terms` are detached here as well:
        second = (mean_k(‖D_k‖² + 2 v_k·D_k) − 2 ℓ·(Aℓ) + d − 2 ‖ℓ‖² + ‖ℓ‖⁴)/d²
        a_k = v_k·D_k + d − ‖ℓ‖²                                       trace = a₁ a₂/d²
        R_k = G_k + (‖ℓ‖² − v_k·D_k − d) ℓ − 2 (Aℓ + ℓ)                third = R₁·R₂/d³

    With K > 2 probes, a₁ and R₁ are means over the first K // 2 probes, and a₂ and R₂ are means
    over the remaining probes. If the v_k are independent and E[v vᵀ] = I, the means of the
    numerators are ‖M₂‖²_F, (tr M₂)² and ‖R₃‖². Each term and its gradient therefore have the same
    mean as with probes="exact". The product of two estimates may be negative for some samples.

    If `targets` is not None, every sum Av + v, including Aℓ + ℓ, becomes Av + v − C₂v, and G_k
    becomes G_k + C₃(v_k, v_k, ·). C₂ and C₃ are applied to the same probes as the derivatives of
    the network. The noise from the probes therefore cancels where C₂ = A + I and C₃(v, v, ·) = −G.

    One network call suffices. A backward pass from the network's output computes ℓ·(Aℓ), and the
    Aℓ in R_k is not differentiated.

Cost of a step with two probes:
    At order two, a step costs as much as 12 network evaluations, or 9 if the weight of `second` is
    0. At order three, a step in reverse mode costs as much as 25 evaluations of the network. For
      comparison, a step at order one costs as much as 3 evaluations of the network.

Source:
    The formulas were derived for this library. The product of two independent estimates is an
    unbiased estimate of a squared mean (Hoeffding, "A class of statistics with asymptotically
    normal distribution", 1948).
"""

from torch import Tensor

from hosm_losses._checks import at_least_float32, expand_right, sum_elements
from hosm_losses.derivatives import derive
from hosm_losses.losses.options import LossOptions
from hosm_losses.losses.terms import (
    NoisyBatch,
    Terms,
    dot,
    first_term,
    mean_over_probes,
    scale_rows,
)
from hosm_losses.model import BoundModel


def means_of_halves(estimates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the first half and the mean over the second half of K estimates."""
    half = len(estimates) // 2
    return mean_over_probes(estimates[:half]), mean_over_probes(estimates[half:])


def paired_terms(
    model: BoundModel,
    batch: NoisyBatch,
    v: Tensor,
    order: int,
    options: LossOptions,
    *,
    second: bool = True,
) -> Terms:
    """Return the terms of each sample, including the second term only if `second` is True."""
    x, noise = batch.x, at_least_float32(batch.noise_without_x)
    sigma, d = expand_right(batch.sigma, x), float(batch.dimensions)
    w = (sigma * v).to(x.dtype)
    how = {"order": order, "engine": options.engine}
    vjp_c = jvp_c = None
    if second or order == 3:
        (f, Dv, third), _, vjp_c, jvp_c = model.derive_with_products(
            x, w, lambda f: at_least_float32(f) + noise, push=order == 3, **how
        )
    else:
        f, Dv, third = model.of_f(derive(model, x, w, **how), None, w)
    f, Dv, v = map(at_least_float32, (f, Dv, v))
    residual = f + noise
    ell = residual.detach()
    # At the noise end, D tends to −v: the sum D + v keeps digits that sums of squares lose.
    v_minus_C2v, C3v = batch.cumulants(v, ell, third=order == 3)
    ell_minus_C2ell, _ = batch.cumulants(ell, ell)
    Dv_plus_v = Dv + v_minus_C2v
    square = dot(ell, ell)
    # 0 up to rounding, except with "gaussian" probes.
    d_minus_vv = d - sum_elements(v.square())
    trace = dot(v, Dv_plus_v) + d_minus_vv - square  # a_k
    first_half, second_half = means_of_halves(trace)
    first = first_term(residual, batch.dimensions)
    terms = {"first": first, "trace": first_half * second_half / d**2}
    if second and vjp_c is not None:
        cross = dot(ell, sigma * at_least_float32(vjp_c) + ell_minus_C2ell)
        value = (sum_elements(Dv_plus_v.square()) + d_minus_vv).mean(0)
        value = value + (square.square() - 2 * cross).mean(0)
        terms["second"] = value / d**2
    if third is None or jvp_c is None:
        return terms
    A_ell_plus_ell = (sigma * at_least_float32(jvp_c)).detach() + ell_minus_C2ell
    estimate = at_least_float32(third) + C3v - scale_rows(trace.detach(), ell)
    first_half, second_half = means_of_halves(estimate - 2 * A_ell_plus_ell)
    return terms | {"third": sum_elements(first_half * second_half, 1) / d**3}
