r"""Estimators of a network's divergence, and the choice between them.

Formula:
    exact        ∇·f = tr ∂f/∂x = Σ_i e_iᵀ ∂f/∂x e_i
    hutchinson   ∇·f = E[vᵀ ∂f/∂x v]; the mean over K probes has variance Var[vᵀ ∂f/∂x v]/K
    Since ε̂ = p · prediction + q x, ∇·ε̂ follows from vᵀ ∂prediction/∂x v and ‖v‖². All directions
    share one forward pass, and each direction costs one vector-Jacobian product.

Source:
    Grathwohl et al., arXiv 1810.01367, for the estimator in a likelihood.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hosm_losses._checks import check_like, check_prediction, error_message, sum_elements
from hosm_losses.derivatives import quadratic_forms
from hosm_losses.likelihood.coordinates import accumulator
from hosm_losses.model import BoundModel, apply_affine
from hosm_losses.probes import Hutchinson, draw_probes, unit_vector_chunks

# Largest number of elements for which "auto" means "exact". At d = 8, one probe has an error of
# 0.6 nats.
EXACT_UP_TO = 16
# A user's function: (x, t, **model_kwargs), as the network gets them, → (prediction, its
# divergence).
Function = Callable[..., tuple[Tensor, Tensor]]
Divergence = Literal["auto", "exact"] | Hutchinson | Function
"""How the divergence of the ODE is computed.

A callable (x, t) → (prediction, its divergence) computes both itself.
"""


@dataclass(frozen=True)
class Estimator:
    """Base class of the estimators; by itself, this class estimates no divergence."""

    products: int = 0  # products with the Jacobian for one divergence
    is_random: bool = False  # whether estimates are random, so that there is a standard error
    differentiates: bool = False  # whether the network is differentiated

    def draw(
        self, _z: Tensor, _dtype: torch.dtype, _generator: torch.Generator | None, /
    ) -> Tensor | None:
        """Draw probes (K, B, *) for states (B, *), or return None if no probes are needed."""
        return None

    def estimate(
        self, model: BoundModel, x: Tensor, _: Tensor | None, /
    ) -> tuple[Tensor, Tensor | None]:
        """Return f = −ε̂ at x (B, *), and ∇·f: (K, B) with K probes, or (1, B) without probes."""
        return model.f(x), None


NO_DIVERGENCE = Estimator()


@dataclass(frozen=True)
class Exact(Estimator):
    """The exact trace, summed over all unit vectors in chunks."""

    differentiates: bool = True

    def estimate(self, model: BoundModel, x: Tensor, _: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """Return f and ∇·f."""
        prediction, forms = quadratic_forms(model, x, unit_vector_chunks(x))
        trace = forms.to(accumulator(x)).sum(0, keepdim=True)
        return _of_f(model, x, prediction, trace, torch.full_like(trace, x[0].numel()))


@dataclass(frozen=True)
class OfFunction(Estimator):
    """The divergence that a user's function returns."""

    function: Function | None = None

    def estimate(self, model: BoundModel, x: Tensor, _: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """Return f and ∇·f."""
        *arguments, kwargs = model.model.network_arguments(x, model.t, model.kwargs)
        function: Any = self.function
        returned = function(*arguments, **kwargs)
        if not isinstance(returned, tuple) or len(returned) != 2:
            expected = "two tensors, the prediction (B, *) and its divergence (B,)"
            raise TypeError(error_message("divergence(x, t)", expected, returned))
        prediction, divergence = returned
        check_prediction(prediction, x)
        dtype = getattr(divergence, "dtype", x.dtype)
        check_like("divergence(x, t)[1]", divergence, (len(x),), dtype, x.device, "x")
        trace = divergence[None].to(accumulator(x))
        return _of_f(model, x, prediction, trace, torch.full_like(trace, x[0].numel()))


@dataclass(frozen=True)
class RandomProbes(Estimator):
    """Hutchinson's estimator, using vector-Jacobian products."""

    is_random: bool = True
    differentiates: bool = True
    distribution: str = "rademacher"

    def draw(self, z: Tensor, dtype: torch.dtype, generator: torch.Generator | None, /) -> Tensor:
        """Draw `products` probes."""
        like = torch.empty_like(z, dtype=dtype)
        return draw_probes(like, self.products, self.distribution, generator)

    def estimate(
        self, model: BoundModel, x: Tensor, probes: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Return f and vᵀ ∂f/∂x v."""
        assert probes is not None
        prediction, forms = quadratic_forms(model, x, [probes])
        squares = sum_elements(probes.square())
        return _of_f(model, x, prediction, forms.to(accumulator(x)), squares)


def _of_f(
    model: BoundModel, x: Tensor, prediction: Tensor, forms: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    """Return f and ∇·f from vᵀ ∂prediction/∂x v and ‖v‖² (K, B), or from their sums over v."""
    p, q = model.model.affine(model.t, x)
    p_rows = None if p is None else p.flatten()
    q_rows = None if q is None else q.flatten()
    return -apply_affine(prediction, x, p, q), -apply_affine(forms, squares, p_rows, q_rows)


def check_divergence(divergence: object, *, optional: bool = False) -> None:
    """Raise an error unless `divergence` is valid; None is valid only if `optional` is True."""
    known = isinstance(divergence, Hutchinson)
    known = known or (callable(divergence) and not isinstance(divergence, type))
    known = known or (optional and divergence is None)
    if not (known or (isinstance(divergence, str) and divergence in ("auto", "exact"))):
        expected = "'auto', 'exact', Hutchinson(...)" + ", None" * optional + " or a callable"
        kind = ValueError if isinstance(divergence, str) else TypeError
        raise kind(error_message("divergence", expected, divergence))


def resolve_divergence(divergence: Divergence | None, x: Tensor) -> Estimator:
    """Return the estimator for samples like x (B, *)."""
    d = x[0].numel()
    if divergence is None:
        return NO_DIVERGENCE
    if isinstance(divergence, str):
        if divergence == "exact" or d <= EXACT_UP_TO:
            return Exact(d)
        divergence = Hutchinson()
    if isinstance(divergence, Hutchinson):
        return RandomProbes(divergence.count, distribution=divergence.distribution)
    return OfFunction(function=divergence)
