r"""The mean and covariance of the posterior p(x₀ | x_t) of clean data, as implied by a network.

Formula (Tweedie's formulas of first and second order, with s = ∇ log q_t):
    E[x₀ | x_t] = (x + σ² s)/α = x̂₀
    Cov[x₀ | x_t] = σ²/α² (I + σ² ∂s/∂x) = σ²/α ∂x̂₀/∂x

    x̂₀ = p · prediction + q x is affine in the network's prediction, so the covariance is σ²/α (p
    ∂prediction/∂x + q I). If the network predicts x₀, the covariance is σ²/α times the network's
    Jacobian. For other predictions, p ∂prediction/∂x and q I may nearly cancel: at high noise,
    their sum is about α/σ². If the network predicts the noise or the score, q is 1/α, which is
    larger than the sum by a factor of σ̂². For "v", q is α/(α² + σ²), which is about as small as
    that sum of two terms. For "velocity", q depends on the schedule. For `LinearFlowSchedule`, q
    is 1, which is larger than the sum by a factor of about σ̂.

Source:
    Efron, "Tweedie's formula and selection bias" (2011). The formula for the covariance is given
    by Meng et al., arXiv 2111.04726, and Boys et al., arXiv 2310.06721.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hosm_losses._checks import (
    check_model_kwargs,
    check_sample_batch,
    error_message,
    expand_right,
    shown,
    sum_elements,
)
from hosm_losses._torch_internals import leave_inference_mode, outside_inference_mode
from hosm_losses.derivatives import derive, pull_backs, quadratic_forms
from hosm_losses.model.bound import BoundModel, bind_model, refuse_wrapped
from hosm_losses.model.score_model import ScoreModel, apply_affine, check_model, check_time
from hosm_losses.probes import Hutchinson, unit_vector_chunks

Probes = Literal["exact"] | Hutchinson


@dataclass(frozen=True, eq=False, repr=False)
class PosteriorCovariance:
    """The covariance of x₀ given x_t, as an operator with `@ v`, `diagonal`, `trace` and `dense`.

    No matrix is stored. Each method calls the network once, except that a product with the
    symmetric part calls the network twice. A network's Jacobian need not be symmetric, and the
    Jacobian's symmetric part need not be positive semidefinite. Variances may therefore be
    negative; they are not clipped.
    """

    _bound: BoundModel  # uses PyTorch's own operators, whose first derivatives are correct
    _bound_twice: BoundModel  # uses operators that can be differentiated twice
    _x: Tensor
    _scale: Tensor  # σ²/α, expanded to the dimensions of x
    _affine: tuple[Tensor | None, Tensor | None]

    def __repr__(self) -> str:
        count, *shape = self._x.shape
        return f"PosteriorCovariance({count} operators on samples of shape {tuple(shape)})"

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply each sample's vectors in v by the symmetric part of the sample's covariance."""
        return self.product(v)

    def product(self, v: Tensor, *, symmetric: bool = True) -> Tensor:
        """Multiply each sample's vectors in v by the covariance of that sample.

        All K vectors share one forward pass, and each vector needs one backward pass. With
        `symmetric=True`, the method also computes derivatives along v, and takes more than twice
        as long as with `symmetric=False`.

        Args:
            v: one vector per sample, (B, *), or K vectors per sample, (K, B, *).
            symmetric: if True, multiply v by the symmetric part of the operator, because a true
                covariance is symmetric. If False, return σ²/α (∂x̂₀/∂x)ᵀ v, the gradient of
                σ²/α x̂₀·v with respect to x. The two products are equal if the network is the
                gradient of a scalar function.

        Returns:
            The products, with the shape of v and without a graph.

        Raises:
            ValueError: if v has the wrong shape.
            DerivativeError: if the network cannot be differentiated.
        """
        x = self._x
        if v.shape[-x.ndim :] != x.shape or v.ndim > x.ndim + 1:
            expected = f"a tensor of shape {tuple(x.shape)}, or K of these"
            raise ValueError(error_message("v", expected, v))
        vectors = v.detach().reshape(-1, *x.shape).to(x.dtype)
        with torch.no_grad(), outside_inference_mode():
            vectors = leave_inference_mode(vectors)
            (products,) = pull_backs(self._bound, x, [vectors])
            if symmetric:
                jacobian_v = derive(self._bound_twice, x, vectors, order=2).directional
                products = (products + jacobian_v) / 2
        return (self._scale * apply_affine(products, vectors, *self._affine)).reshape(v.shape)

    def diagonal(
        self, probes: Probes = "exact", generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the exact variances (B, *), or estimates of the variances from random probes v.

        The estimates are the means of the elementwise products v ∘ Σᵀv over the probes, where Σ is
        the covariance.
        """
        x = self._x
        if probes != "exact":
            v = probes.draw(x, generator)
            return (v * self.product(v, symmetric=False)).mean(0)
        with torch.no_grad(), outside_inference_mode():
            _, forms = quadratic_forms(self._bound, x, unit_vector_chunks(x))
        jacobian = forms.T.reshape(x.shape)
        return self._scale * apply_affine(jacobian, torch.ones_like(x), *self._affine)

    def trace(self, probes: Probes = "exact", generator: torch.Generator | None = None) -> Tensor:
        """Return the traces (B,): for each sample, the sum of the variances from `diagonal`."""
        return sum_elements(self.diagonal(probes, generator), 1)

    def dense(self) -> Tensor:
        """Return the covariances' symmetric parts (B, d, d), from d backward passes."""
        x = self._x
        with torch.no_grad(), outside_inference_mode():
            rows = torch.cat(list(pull_backs(self._bound, x, unit_vector_chunks(x))))
            units = torch.cat(list(unit_vector_chunks(x)))
        rows = self._scale * apply_affine(rows, units, *self._affine)
        matrices = rows.flatten(2).movedim(0, 1)
        return (matrices + matrices.mT) / 2


@dataclass(frozen=True, eq=False, repr=False)
class DenoisingPosterior:
    """The mean and covariance of clean data x₀ given x at time t, as implied by a model.

    Attributes:
        mean: E[x₀ | x], (B, *), without a graph; `ScoreModel.denoise` keeps the graph.
        covariance: Cov[x₀ | x], an operator.
    """

    mean: Tensor
    covariance: PosteriorCovariance

    def __repr__(self) -> str:
        return f"DenoisingPosterior(mean={shown(self.mean)}, covariance={self.covariance!r})"


def denoising_posterior(
    model: ScoreModel,
    x: Tensor,
    t: Tensor,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
) -> DenoisingPosterior:
    """Return the mean and covariance of clean data x₀ given x at time t, by Tweedie's formulas.

    The covariance is σ²/α² (I + σ² ∂s/∂x). If the network predicts x₀, the covariance is computed
    as σ²/α times the network's Jacobian. For other predictions, the covariance is the sum of two
    terms that may nearly cancel. For "epsilon" and "score", the covariance's relative error grows
    in proportion to σ̂². In float32 and for data of unit variance, this error is about 2 % at
    σ̂ = 300 and over 100 % at 3,000. For "velocity" with `LinearFlowSchedule`, the relative error
    grows in proportion to σ̂. For "v", hardly any digits are lost.

    Args:
        model: the score model.
        x: the noised batch (B, *).
        t: the times (B,) of x, in the schedule's units.
        model_kwargs: keyword arguments for the network.

    Returns:
        The posterior, with `.mean` (B, *) and `.covariance`, an operator with `@ v`, `diagonal`,
        `trace` and `dense`. Neither the mean nor the operator's results are attached to an
        autograd graph.

    Raises:
        TypeError: if the network is compiled or wrapped for parallel training, or if an argument
            has the wrong type or dtype.
        ValueError: if an argument has the wrong shape or device, or if a time is out of range.

    Example:
        >>> from hosm_losses import VESchedule
        >>> def standard_normal(x, t):  # x₀ given x is N(x, t²)/(1 + t²)
        ...     return x / (1 + t[:, None] ** 2)
        >>> model = ScoreModel(standard_normal, VESchedule(), "x0", time=VESchedule().sigma)
        >>> t = VESchedule().time(torch.tensor([0.0]))  # σ = 1
        >>> posterior = denoising_posterior(model, torch.ones(1, 2), t)
        >>> posterior.mean, posterior.covariance.diagonal()
        (tensor([[0.5000, 0.5000]]), tensor([[0.5000, 0.5000]]))
    """
    refuse_wrapped(check_model(model).network)
    check_sample_batch("x", x)
    arguments = len(x), check_model_kwargs(model_kwargs), check_time(model, x, t)
    with torch.no_grad(), outside_inference_mode():
        x, bound = leave_inference_mode(x), bind_model(model, *arguments, graph=False)
        bound_twice = bind_model(model, *arguments)
        mean = model.denoise(x, bound.t, **bound.kwargs)
        alpha, sigma = (expand_right(number, x) for number in model.coefficients(bound.t, x))
        affine = model.affine_of_data(bound.t, x)
    scale = sigma.square() / alpha
    return DenoisingPosterior(mean, PosteriorCovariance(bound, bound_twice, x, scale, affine))
