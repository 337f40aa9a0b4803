r"""The linear subspace that contains the data, such as the subspace of centred positions.

Purpose:
    P is the orthogonal projection, the same for every sample, onto a subspace with d − k of the d
    dimensions. If Q has orthonormal columns, P = Q Qᵀ and x = Q y, then all results are the same
    as in the d − k coordinates y. Data, noise and probes lie in the subspace, and the
    network is treated as P network(P x), whose Jacobian and higher derivatives stay in the
    subspace.

Formula:
    d − k = tr P. On the subspace, a diagonal matrix h that commutes with P has the trace
    Σ_i P_ii h_i.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hosm_losses._checks import can_read_values, error_message
from hosm_losses._torch_internals import outside_inference_mode, without_autocast
from hosm_losses.probes import unit_vector_chunks

Projection = Callable[[Tensor], Tensor]  # maps samples (n, *), for any n and any floating dtype
TRACED = 4096  # the trace of P is computed if a sample has at most this many elements
VECTORS = 16  # the number of random vectors on which P is checked
ROUNDING = 1e-6  # the relative rounding error that is tolerated in float64
ERRORS = 6.0  # standard errors by which the dimensions may differ from an estimate
# How far x may lie from the subspace, relative to the size of the data; at least 4 ε of its dtype.
OFF = 1e-4


class Subspace(NamedTuple):
    """Properties of a projection for samples of a given shape."""

    dimensions: int  # d − k
    diagonal: Tensor  # P_ii, in the shape of a sample, on the CPU; (d − k)/d if P_ii is not known
    is_known: bool  # whether `diagonal` is P_ii


def random_vectors(like: Tensor, count: int) -> Tensor:
    """Draw normal vectors (count, *) for samples (B, *) without advancing any generator."""
    numbers = np.random.default_rng(0).standard_normal((count, *like.shape[1:]))
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    return torch.from_numpy(numbers).to(like.device, dtype)


def examine(project: Projection, x: Tensor, dimensions: int | None) -> Subspace:
    """Return the properties of a projection for samples like x, reading values back to the host.

    Raises ValueError unless the projection is symmetric and idempotent, treats samples
    independently and, if `dimensions` is not None, has rank `dimensions`.
    """

    def project_or_explain(vectors: Tensor) -> Tensor:
        expected = f"a projection that returns tensors like its argument, {tuple(vectors.shape)}"
        remedy = "It receives only samples, in any number: a mask must fit all of them."
        try:
            projected: object = project(vectors.clone())
        except (RuntimeError, TypeError, ValueError) as error:
            remedy = f"Use the dtype of x in it, for example matrix.to(x.dtype). {remedy}"
            got = f"{type(error).__name__}: {error}"
            raise ValueError(
                error_message("subspace", expected, project, remedy, got=got)
            ) from error
        if not isinstance(projected, Tensor):
            raise TypeError(error_message("subspace", expected, projected, remedy))
        if projected.shape != vectors.shape or projected.dtype != vectors.dtype:
            raise ValueError(
                error_message("subspace", f"{expected} in {vectors.dtype}", projected, remedy)
            )
        return projected

    def require(holds: Tensor | bool, expected: str, got: str, remedy: str = "") -> None:
        if not holds:
            raise ValueError(error_message("subspace", expected, project, remedy, got=got))

    with torch.no_grad(), outside_inference_mode(), without_autocast(x.device.type):
        v = random_vectors(x, VECTORS)
        rounding, d = (ROUNDING if v.dtype == torch.float64 else 1e-3), v[0].numel()
        project_or_explain(v.to(x.dtype))
        Pv = project_or_explain(v)
        alone = torch.cat([project_or_explain(row) for row in v.split(1)])
        flat, Pv_flat = v.flatten(1), Pv.flatten(1)
        products = flat @ Pv_flat.T
        size = rounding * d**0.5
        each = "a projection that treats samples independently"
        require((alone - Pv).abs().max() < size, each, "one that depends on the batch")
        symmetric = (products - products.T).abs().max() < size
        orthogonal = "an orthogonal projection, symmetric and idempotent"
        remedy = "It must remove an orthogonal part, as x - x.mean(1, keepdim=True) does."
        require(symmetric, orthogonal, "one that is not symmetric", remedy)
        again = project_or_explain(Pv)
        remedy = "Applying it twice must give the same result as applying it once."
        require((again - Pv).abs().max() < size, orthogonal, "one that is not idempotent", remedy)
        if d <= TRACED:
            units = (chunk.flatten(0, 1) for chunk in unit_vector_chunks(v[:1]))
            forms = [(project_or_explain(unit) * unit).flatten(1).sum(1) for unit in units]
            diagonal = torch.cat(forms).reshape(v.shape[1:])
            trace, error, is_known = float(diagonal.sum()), 0.5, True
        else:
            expected = f"(project, dimensions) for samples of more than {TRACED} elements"
            require(dimensions is not None, expected, "the projection alone")
            diagonal = project_or_explain(torch.ones_like(v[:1]))[0]
            is_known = bool((diagonal * v - Pv).abs().max() < size)  # true if P is a mask
            # If the subspace or its complement has fewer dimensions than there are vectors, the
            # inner products of the vectors give the rank.
            pairs = ((products + products.T) / 2).cpu(), (flat @ flat.T).cpu()
            inside, outside = (
                int((torch.linalg.eigvalsh(each) > size).sum())
                for each in (pairs[0], pairs[1] - pairs[0])
            )
            trace, error = float(d - outside), 0.5
            if inside < VECTORS <= outside:
                trace = float(inside)
            elif outside == VECTORS and is_known:
                trace = float(diagonal.sum())
            elif outside == VECTORS:  # estimated from squared norms in the subspace
                trace = d * float(pairs[0].trace() / pairs[1].trace())
                error += ERRORS * (2 * trace * max(d - trace, 0.0) / d / VECTORS) ** 0.5
            if not is_known:
                diagonal = torch.full_like(diagonal, (dimensions or trace) / d)
        rank = round(trace) if dimensions is None else dimensions
        expected = f"the {rank} dimensions that you gave"
        require(abs(trace - rank) < error, expected, f"about {trace:.4g} in {d}")
        require(rank > 0, "a subspace of one dimension or more", "a projection to zero")
    return Subspace(rank, diagonal.cpu(), is_known)


def check_on_subspace(name: str, x: Tensor, project: Projection) -> None:
    """Raise ValueError if a CPU tensor differs from its projection by more than rounding error."""
    if not can_read_values(x):
        return
    off = float((x - project(x)).detach().abs().max())
    tolerance = max(OFF, 4 * torch.finfo(x.dtype).eps)
    if off > tolerance * float(x.detach().abs().max()):
        expected, got = "samples on the subspace", f"some that lie {off:.2g} off it"
        remedy = f"Pass model.project({name})."
        raise ValueError(error_message(name, expected, x, remedy, got=got))


def check_commutes(project: Projection, std: Tensor) -> None:
    """Raise ValueError if diag(std) does not commute with `project`, for std (1, *) on the CPU."""
    if not can_read_values(std):
        return
    v = random_vectors(std, 1)
    difference = float((project(std * v) - std * project(v)).detach().abs().max())
    if difference > ROUNDING * float(std.detach().amax()) * v[0].numel() ** 0.5:
        expected = "one number, or numbers that commute with the projection onto the subspace"
        raise ValueError(error_message("data_std", expected, std, "Pass their mean."))
