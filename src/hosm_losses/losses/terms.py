r"""Residuals of high-order denoising score matching, and their squares, which are the loss terms.

Purpose:
    f(x, t) = σ_t s(x, t), the dimensionless score, is minus the predicted noise. For a probe v,
    D = ∂f/∂x (σ v) is the derivative of f along σ v, and G = σ² ∇_x (vᵀ ∂f/∂x v) is σ² times the
    gradient of the Jacobian's quadratic form. Let ε be the noise in x = α x₀ + σ ε. If the model
    is correct at all orders below that of a residual, the residual's conditional mean given x is
    zero exactly when the model is also correct at the residual's own order.

Formula, with ℓ = ε + f held fixed (detached), and D also held fixed inside r3:
    r1 = f + ε
    r2 = D + v − (ℓ·v) ℓ
    rt = v·D + ‖v‖² − (ℓ·v)²
    r3 = G + (ℓ·v)² ℓ − (v·D + ‖v‖²) ℓ − 2 (ℓ·v) (D + v)

    Shapes: f is (K, B, *), or (1, B, *) if all probes share one f. ε is (B, *). All other vectors,
    including r2 and r3, are (K, B, *), and rt is (K, B).

    The targets are conditional cumulants of ε given x: f = −κ₁, σ ∂f/∂x + I = κ₂, G = −κ₃(v, v,
    ·). If targets are averaged over data, the mean of ε over these data replaces ε, D + v becomes
    D + v − C₂v, and G becomes G + C₃(v, v, ·). Here C₂ is the covariance and C₃ the third cumulant
    of ε over these data. If the targets use the score of the data, C₂v and C₃(v, v, ·) are
    replaced by other vectors, which depend on ℓ (see `targets`).

Why lower orders are detached:
    Detaching is part of the method, not a performance optimisation. If the lower orders are held
    fixed, their errors shift the targets of the higher orders only by a bounded amount. At order
    two, the norm of the minimiser's error is exactly ‖ŝ₁ − ∇log q‖². At order three, the
    minimiser's error is a sum of products of lower-order errors. If gradients flowed through the
    lower orders, training could reduce the loss of the higher orders by making the lower orders
    worse.

Terms of a sample with d elements, averaged over probes:
    first = ‖r1‖²/d      second = ‖r2‖²/d²      trace = rt²/d²      third = ‖r3‖²/d³

    With probes="exact", the numerators of the higher-order terms are ‖M₂‖²_F, (tr M₂)² and ‖R₃‖²,
    where M₂ is the residual of the whole Jacobian and R₃ is that of the gradient of the Jacobian's
    trace. With random probes, the second term has the same mean as with "exact". On average, the
    numerators of the trace and third terms exceed those with "exact" by the variances of rt and r3
    over the probes. If the targets have no noise, these variances are zero at the true score. For
    an unrestricted vector field, the loss with random probes has the same minimiser as with
    "exact". For a restricted family of fields, the minimisers may differ.

Precision:
    Residuals and terms are in float32 or float64, because a sum of a few thousand squares may
    exceed the range of float16. The network and its derivatives are computed in the dtype of x.

    Here f = −(p · prediction + q x). To avoid cancellation, f + ε is computed as
    (f + q x) + (ε − q x). If the prediction is "x0" or "v" and α is near 0, f equals −q x up to a
    remainder of order α. If f and ε were added directly, r1 would be mostly rounding error. With
    weighting="native", this error would also be divided by p, which is of order α.

Source:
    Lu et al., "Maximum Likelihood Training for Score-Based Diffusion ODEs by High-Order
    Denoising Score Matching", ICML 2022, arXiv 2206.08265, equations 10 to 15 and appendix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import (
    DerivativeError,
    all_finite,
    at_least_float32,
    can_read_values,
    expand_right,
    shown,
    sum_elements,
)
from hosm_losses.derivatives import derive
from hosm_losses.losses.options import LossOptions
from hosm_losses.losses.targets import ControlledMoments, NoiseMoments, cumulants
from hosm_losses.model import BoundModel, apply_affine

Terms = dict[str, Tensor]  # the terms of each sample that are needed, by name


class DSMTerms(NamedTuple):
    """The unweighted terms of a loss, per sample.

    Attributes:
        first: ‖r1‖²/d, of shape (B,).
        second: ‖r2‖²/d², of shape (B,) or, if `fraction` is below 1, with one entry per selected
            row. It is None at order 1 and, with probes=Paired(), if the weight of this term is the
            number 0.
        trace: rt²/d², with the shape of `second`; None at order 1.
        third: ‖r3‖²/d³, with the shape of `second`; None below order 3.

    If the weights of an order and of all higher orders are 0 (a number, not a tensor), the terms
    of these orders are None.
    """

    first: Tensor
    second: Tensor | None = None
    trace: Tensor | None = None
    third: Tensor | None = None

    def __repr__(self) -> str:
        terms = (f"{name}={shown(term)}" for name, term in self._asdict().items())
        return f"{type(self).__name__}({', '.join(terms)})"


class Logged:
    """Base class that attaches t and rows to logged terms, so that both survive DDP's repacking.

    Some wrappers, such as DistributedDataParallel with static_graph=True, rebuild named tuples
    from their entries. Therefore, t and rows are also stored on the first entry.
    """

    t: Tensor
    rows: Tensor | None

    def __getattr__(self: Any, name: str) -> Any:
        """Return t or rows after a wrapper has rebuilt the tuple."""
        logged = getattr(self[0], "_logged", {}) if name in ("t", "rows") else {}
        if name not in logged:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return logged[name]


class LoggedTerms(Logged, DSMTerms):
    """Detached terms that unpack like `DSMTerms`, with their times and rows as attributes.

    Attributes:
        t: the times of the batch, (B,).
        rows: the rows that `fraction` selected for the higher-order terms, in the same order as
            the entries of these terms; None if all rows have higher-order terms, or if there are
            no higher-order terms.
    """


class NoisyBatch(NamedTuple):
    """Perturbed data with their targets."""

    x: Tensor  # α x₀ + σ ε, of shape (B, *)
    t: Tensor  # (B,), in the units of the caller
    noise_without_x: Tensor  # ε − q x, where the targets may have replaced ε, (B, *)
    sigma: Tensor  # σ(t), of shape (B,)
    moments: NoiseMoments | ControlledMoments | None = None  # of less noisy targets

    @property
    def dimensions(self) -> int:
        """The dimension d of a sample."""
        return self.x.shape[1:].numel()

    def at(self, index: Tensor | slice) -> "NoisyBatch":
        """Return the rows at `index`."""
        x, t, noise, sigma = (tensor[index] for tensor in self[:4])
        moments = self.moments and self.moments.at(index)
        return NoisyBatch(x, t, noise, sigma, moments)

    def cumulants(
        self, v: Tensor, ell: Tensor, *, third: bool = False
    ) -> tuple[Tensor, Tensor | float]:
        """Return v − C₂v and C₃(v, v, ·) or, if there are no moments, v and 0."""
        if self.moments is None:
            return v, 0.0
        v_minus_C2v, C3v = cumulants(self.moments, v, ell, third=third)
        return v_minus_C2v, 0.0 if C3v is None else C3v


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products (K, B) of two tensors (K, B, *) over the elements of a sample."""
    return sum_elements(a * b)


def scale_rows(coefficient: Tensor, vector: Tensor) -> Tensor:
    """Multiply vectors (K, B, *) by coefficients (K, B)."""
    return expand_right(coefficient, vector) * vector


def mean_over_probes(estimates: Tensor) -> Tensor:
    """Return the mean over the first dimension."""
    return estimates.squeeze(0) if len(estimates) == 1 else estimates.mean(0)


def first_residual(model: BoundModel, batch: NoisyBatch, prediction: Tensor) -> Tensor:
    """Return r1 = f + ε, (1, B, *), from the network's prediction at x, as float32 or float64."""
    p, _ = model.model.affine(model.t, batch.x)
    value = apply_affine(prediction, None, p, None)
    return (at_least_float32(batch.noise_without_x) - at_least_float32(value)).unsqueeze(0)


def first_term(residual: Tensor, dimensions: int) -> Tensor:
    """Return ‖r1‖²/d, (B,), for residuals r1 (K, B, *)."""
    return mean_over_probes(sum_elements(residual.square())) / dimensions


def higher_residuals(ell: Tensor, Dv_plus_v: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return r2 (K, B, *), rt (K, B) and the target of G (the value of G at which r3 is zero).

    `Dv_plus_v` is D + v or, with `targets`, D + v − C₂v.
    """
    ell_dot_v = dot(ell, v)
    second = Dv_plus_v - scale_rows(ell_dot_v, ell)
    trace = dot(v, Dv_plus_v) - ell_dot_v.square()
    third_target = scale_rows(trace.detach(), ell) + scale_rows(2 * ell_dot_v, Dv_plus_v.detach())
    return second, trace, third_target


def squared_terms(
    model: BoundModel, batch: NoisyBatch, v: Tensor, order: int, options: LossOptions
) -> Terms:
    """Return the terms of each sample, computed from squared residuals along the probes v."""
    exact, d = isinstance(options.probes, str), float(batch.dimensions)
    w = (expand_right(batch.sigma, batch.x) * v).to(batch.x.dtype)
    derivatives = derive(model, batch.x, w, order=order, engine=options.engine, summed=exact)
    # f is computed without q x, which is also left out of the noise.
    derived = model.of_f(derivatives, None, w)
    f, Dv, noise, v = map(at_least_float32, (*derived[:2], batch.noise_without_x, v))
    r1 = f + noise  # the sum of f + q x and ε − q x
    ell = r1.detach()
    v_minus_C2v, C3v = batch.cumulants(v, ell, third=order == 3)
    r2, trace, target = higher_residuals(ell, Dv + v_minus_C2v, v)
    # Over all unit vectors, ‖r2‖² is summed, but rt and r3 are summed before they are squared.
    second_term = sum_elements(r2.square()).sum(0) / (1 if exact else len(v))
    trace = trace.sum(0, keepdim=True) if exact else trace
    first, trace_term = first_term(r1, batch.dimensions), mean_over_probes(trace.square())
    terms = {"first": first, "second": second_term / d**2, "trace": trace_term / d**2}
    if derived.third is None:
        return terms
    third, target = at_least_float32(derived.third), target - C3v
    if exact:
        third, target = third.sum(0, keepdim=True), target.sum(0, keepdim=True)
    squares = sum_elements((third - target).square())
    return terms | {"third": mean_over_probes(squares) / d**3}


def check_result(loss: Tensor, terms_of: Callable[[], DSMTerms], t: Tensor) -> None:
    """If a loss on the CPU is not finite, raise an error naming the terms or times at fault."""
    if not can_read_values(loss) or all_finite(loss):
        return
    terms = {name: term for name, term in terms_of()._asdict().items() if term is not None}
    names = [name for name, term in terms.items() if not bool(torch.isfinite(term).all())]
    if "first" in names:
        bad = ~torch.isfinite(terms["first"])
        times = t[bad]
        raise ValueError(
            "network: expected finite outputs; got NaN, infinite or huge ones for "
            f"{int(bad.sum())} of {len(bad)} samples, at t from {times.min().item():g} to "
            f"{times.max().item():g}. Check the parameters, the learning rate and the range of x, "
            "and look for a division by zero, a root or a logarithm."
        )
    if names:
        first = terms["first"].max().item()  # float() warns of the graph
        raise DerivativeError(
            "network: expected finite derivatives; its outputs are finite, but the terms "
            f"{', '.join(names)} are not. If the first term, here up to {first:.1e}, is large as "
            "well, the training diverges: use a lower learning rate. Otherwise, a root or a norm "
            "has no derivative at zero: add a small number under the root. "
            "check_derivatives(model, x0) names the module at fault."
        )
    raise ValueError(
        "loss: expected a finite value; got finite terms whose sum, after multiplication by the "
        "weights and the weighting, is not finite."
    )
