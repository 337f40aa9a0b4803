r"""Estimators of a network's divergence, and the function that selects one of them.

Formula:
    exact        ∇·f = tr ∂f/∂x = Σ_i e_iᵀ ∂f/∂x e_i
    hutchinson   ∇·f = E[vᵀ ∂f/∂x v]; the variance of the mean over K probes is
                 Var[vᵀ ∂f/∂x v]/K
    Since ε̂ = p · prediction + q x, ∇·ε̂ follows from vᵀ ∂prediction/∂x v and ‖v‖². All directions
    (e_i or v) share one forward pass. Each direction requires one vector-Jacobian product.

Source:
    Grathwohl et al., arXiv 1810.01367, for Hutchinson's estimator in likelihoods.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hosm_losses._checks import (
    check_like,
    check_prediction,
    error_message,
    shown,
    widest_dtype,
)
from hosm_losses.model import BoundModel
from hosm_losses.probes import Hutchinson, unit_vector_chunks

# Largest number of elements for which "auto" means "exact". There, one probe adds an error of
# 0.4 nats, and the exact divergence takes 2.6 times as long.
EXACT_UP_TO = 16


@runtime_checkable
class DivergenceEstimator(Protocol):
    """Interface for objects that estimate the divergence along ODE paths, such as `Hutchinson`.

    An object of any class that defines `products`, `is_random`, `draw` and `estimate` can be
    passed as `divergence`.

    Example:
        >>> from hosm_losses import ScoreModel, VPSchedule, ode_nll
        >>> class ForwardMode:  # one Gaussian probe, by a Jacobian-vector product
        ...     products, is_random = 1, True
        ...     def draw(self, x, generator):
        ...         like = {"dtype": x.dtype, "device": x.device}
        ...         return torch.randn((1, *x.shape), generator=generator, **like)
        ...     def estimate(self, model, x, probes):
        ...         f, product = torch.func.jvp(model.f, (x,), (probes[0],))
        ...         return f, (probes * product).flatten(2).sum(2)
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> ode_nll(model, torch.zeros(4, 2), divergence=ForwardMode()).products[0]
        tensor(66)
    """

    @property
    def products(self) -> int:
        """The number of products with the network's Jacobian in one call of `estimate`.

        `NLLResult.products` is the sum of these numbers over all calls. The number is 0 if
        `estimate` does not differentiate the network.
        """
        ...

    @property
    def is_random(self) -> bool:
        """Whether estimates are random; if so, a likelihood's standard error is estimated."""
        ...

    def draw(self, x: Tensor, generator: torch.Generator | None, /) -> Tensor | None:
        """Return probes (n, B, *) for points x (B, *), or None if the estimator uses no probes.

        With a fixed grid, `draw` is called at each node. With `Adaptive`, it is called once, and
        the same probes are used along the whole path.
        """
        ...

    def estimate(
        self, model: BoundModel, x: Tensor, probes: Any, /
    ) -> tuple[Tensor, Tensor | None]:
        """Return f(x) = −ε̂(x), (B, *), and n estimates (n, B) of the divergence of f at x.

        `model.f(x)` evaluates f; the times and conditions are already bound. If n ≥ 2, the
        estimates have to be independent: their variance yields the standard error. If n = 1, the
        variance is estimated from adjacent nodes of a fixed grid. `Adaptive` needs one estimate
        for each of the n probes drawn.

        Unless `enable_grad` is True, `estimate` is called under `torch.no_grad()`. Differentiate
        with `torch.func` or under `torch.enable_grad()`.
        """
        ...


class _WithoutProbes:
    is_random = False

    def draw(self, _: Tensor, __: torch.Generator | None, /) -> None:
        """Draw nothing."""


@dataclass(frozen=True)
class NoDivergence(_WithoutProbes):
    """An estimator that only evaluates f, for calls that need only the end points of paths."""

    products: int = 0

    def estimate(self, model: BoundModel, x: Tensor, _: None, /) -> tuple[Tensor, None]:
        """Return f."""
        return model.f(x), None


NO_DIVERGENCE = NoDivergence()


@dataclass(frozen=True)
class Exact(_WithoutProbes):
    """The exact trace of the Jacobian, computed in chunks from products with all unit vectors."""

    products: int  # the number d of elements of a sample

    def estimate(self, model: BoundModel, x: Tensor, _: None, /) -> tuple[Tensor, Tensor]:
        """Return f, (B, *), and ∇·f, (1, B)."""
        prediction, forms = model.quadratic_forms(x, unit_vector_chunks(x))
        trace = forms.sum(0, keepdim=True)
        return model.f_and_divergence(x, prediction, trace, torch.full_like(trace, self.products))


# (x, t, **model_kwargs), in the form that the network receives, → (prediction, divergence).
Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DivergenceFunction(_WithoutProbes):
    """A function that returns the network's prediction and the divergence of this prediction.

    If the function returns the exact divergence, you can pass the function itself as `divergence`.

    Args:
        function: `(x, t, **model_kwargs)` → (prediction (B, *), its divergence (B,)), called with
            the arguments of the network.
        is_random: whether the function estimates the divergence with random probes; if so, the
            likelihood's standard error is estimated. Such a function draws new probes in each
            evaluation and therefore requires a fixed grid.

    Example:
        >>> DivergenceFunction(lambda x, t: (0.5 * x, 0.5 * x.new_full(x.shape[:1], x.shape[1])))
        DivergenceFunction(function=<lambda>, is_random=False)
    """

    function: Function
    is_random: bool = False
    products = 0

    def __repr__(self) -> str:
        return f"DivergenceFunction(function={shown(self.function)}, is_random={self.is_random})"

    def estimate(self, model: BoundModel, x: Tensor, _: None, /) -> tuple[Tensor, Tensor]:
        """Return f, (B, *), and ∇·f, (1, B)."""
        *arguments, kwargs = model.model.network_arguments(x, model.t, model.kwargs)
        prediction, divergence = self.function(*arguments, **kwargs)
        check_prediction(prediction, x)
        dtype = getattr(divergence, "dtype", x.dtype)
        check_like("divergence(x, t)[1]", divergence, (len(x),), dtype, x.device, "x")
        trace = divergence[None].to(widest_dtype(x))
        return model.f_and_divergence(x, prediction, trace, torch.full_like(trace, x[0].numel()))


Divergence = Literal["auto", "exact"] | DivergenceEstimator | Function
"""Type of the `divergence` argument, which selects how the ODE's divergence is computed.

The argument is "auto", "exact", an object with the methods of `DivergenceEstimator`, such as
`Hutchinson(count)`, or a callable (x, t) → (prediction, its divergence).
"""


def check_divergence(divergence: object, *, optional: bool = False) -> None:
    """Raise an error unless `divergence` is valid; None is valid only if `optional` is True."""
    known = isinstance(divergence, DivergenceEstimator) or callable(divergence)
    known = known and not isinstance(divergence, type)
    known = known or (optional and divergence is None)
    if not (known or (isinstance(divergence, str) and divergence in ("auto", "exact"))):
        expected = "'auto', 'exact', Hutchinson(...)" + ", None" * optional + ", a callable or an "
        expected += "object with products, is_random, draw and estimate"
        kind = ValueError if isinstance(divergence, str) else TypeError
        raise kind(error_message("divergence", expected, divergence))


def resolve_divergence(divergence: Divergence | None, x: Tensor) -> DivergenceEstimator:
    """Return the estimator that `divergence` selects for samples shaped like those in x (B, *)."""
    d = x[0].numel()
    if divergence is None:
        return NO_DIVERGENCE
    if isinstance(divergence, str):
        return Exact(d) if divergence == "exact" or d <= EXACT_UP_TO else Hutchinson()
    if isinstance(divergence, DivergenceEstimator):
        return divergence
    return DivergenceFunction(divergence)
