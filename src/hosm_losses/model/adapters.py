r"""Modules that wrap a user's network, for example to handle data in a linear subspace.

Purpose:
    If the centre of mass of every sample has been removed, or if all samples are padded at the
    same elements, the samples lie in a subspace of dimension d − k. They then have no density over
    all d elements. Their coordinates y in an orthonormal basis of the subspace do have a density.
    If the network is wrapped as a function of y, all losses and likelihoods treat y as ordinary
    data with d − k elements.

Formula:
    Let the columns of Q (d, d − k) be an orthonormal basis of the subspace. Then P = Q Qᵀ is the
    orthogonal projection onto the subspace. The coordinates of a sample x are y = Qᵀ x, and
    x = Q y. As a function of y, the wrapped network is Qᵀ network(Q y, t).

    The columns of Q are the eigenvectors of P W P whose eigenvalues lie in [1, 2], where W is a
    diagonal matrix whose elements rise from 1 to 2. All other eigenvalues are 0, so the rank is
    unambiguous. If W were the identity, all nonzero eigenvalues would be 1, and the eigenvectors
    would be ambiguous. If the elements of W rose evenly, the eigenvalues would coincide for
    symmetric matrices or mirrored rows. Their increments are therefore 0.1 + h, where
    h_n = √2 n³ mod 1 is irregular. The sign of each column is chosen such that its dot product
    with h is not negative. Therefore, Q is the same on every computer, up to rounding error. If P
    is a mask, the columns of Q are unit vectors in the order of the elements. Saved coordinates
    still have to be read with the Q that produced them, so Q is saved with the module's state.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from hosm_losses._checks import (
    can_read_values,
    check_like,
    check_prediction,
    copy_like,
    error_message,
)
from hosm_losses._torch_internals import outside_inference_mode, without_autocast

LARGEST = 4096  # elements of a sample; computing that many eigenvectors takes half a minute
ROUNDING = 1e-5  # the allowed difference between `project` and Q Qᵀ, on random normal vectors
# The allowed distance of x from the subspace, as a fraction of the largest element of x. The
# fraction is never less than four times the machine epsilon of x's dtype.
OFF = 1e-4
WRAP_FIRST = (
    "Wrap a network that returns more than its prediction, or takes other arguments, in an "
    "nn.Module, and pass that to OnSubspace: output= and call= of ScoreModel act on y."
)
PROJECT = "Project them with OnSubspace.project."


class Wrapper(nn.Module):
    """A module that wraps a network; the network may be a function."""

    network: Callable[..., Any]

    @property
    def _innermost(self) -> Callable[..., Any]:
        return self.network._innermost if isinstance(self.network, Wrapper) else self.network

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the module; raise TypeError if the network is a function.

        A copy of the model would still call this function, which uses the original weights.
        """
        if not isinstance(self._innermost, nn.Module):
            expected = "an nn.Module in a model to copy"
            remedy = "Pass a module: ScoreModel(module, schedule, call=lambda module, x, t: ...)."
            raise TypeError(error_message("network", expected, self._innermost, remedy))
        return self._deep_copy(memo)

    def _deep_copy(self, memo: dict[int, Any]) -> Self:
        """Copy the module, except for functions and the modules that these functions use."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        if isinstance(self.network, Wrapper):
            self.network._deep_copy(memo)  # deepcopy finds it in the memo
        # __dict__ is not copied: the function that .compile() puts there calls the original.
        state: Any = self.__getstate__()
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied


class OnSubspace(Wrapper):
    """A network for samples x in a linear subspace, wrapped as a network for their coordinates y.

    Use the adapter for data whose centre of mass has been removed, or for data that are padded at
    the same elements in every sample. A sample is x = Q y, where the columns of Q are an
    orthonormal basis of the subspace. In a `ScoreModel` that contains the adapter, y replaces x
    everywhere: in data, noise, samples, `log_prior`, targets and their scores, and in a custom
    divergence. The arguments `output` and `call` of `ScoreModel` act on y, too.

    The state_dict contains Q. `load_state_dict` replaces Q by the loaded one, and raises
    ValueError if its columns span another subspace.

    Args:
        network: an nn.Module or any other callable, called as `network(x, t, **kwargs)` with
            samples x (B, *). The result must be a floating-point tensor with the shape and device
            of x; the component of the result orthogonal to the subspace is dropped.
        project: the orthogonal projection onto the subspace, such as a function that subtracts the
            centre of mass. The function is called only in the constructor, with n float64 samples
            (n, *) on the CPU. It must accept any n and treat all samples alike.
        shape: the shape of a sample, of at most 4,096 elements.

    Attributes:
        dimensions: d − k, the dimension of the subspace.

    Raises:
        ValueError: if `project` is not an orthogonal projection that treats samples independently,
            if it projects everything to zero, or if `shape` has more than 4,096 elements.

    Example:
        >>> from hosm_losses import ScoreModel, VPSchedule, ode_nll
        >>> def without_centre(x):
        ...     return x - x.mean(1, keepdim=True)
        >>> space = OnSubspace(lambda x, t: 0.5 * x, without_centre, (4, 3))
        >>> space
        OnSubspace(shape=(4, 3), dimensions=9)
        >>> y = space.reduce(without_centre(torch.randn(2, 4, 3)))
        >>> latent = ode_nll(ScoreModel(space, VPSchedule()), y).latent
        >>> latent.shape, space.expand(latent).shape
        (torch.Size([2, 9]), torch.Size([2, 4, 3]))
    """

    def __init__(
        self,
        network: Callable[..., Any],
        project: Callable[[Tensor], Tensor],
        shape: Sequence[int],
    ) -> None:
        super().__init__()
        self.network, self.shape = network, tuple(shape)
        # Not a buffer: .to(torch.bfloat16) would round a buffer, MPS does not support float64, and
        # DDP would broadcast it.
        self._basis = _basis(project, self.shape)
        self._copies: dict[Any, Tensor] = {}
        self.dimensions = self._basis.shape[1]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the copies of the basis, which may be on an accelerator."""
        state: Any = super().__getstate__()
        return {**state, "_copies": {}}

    def get_extra_state(self) -> Tensor:
        """Return Q (d, d − k), for the state_dict."""
        return self._basis

    def set_extra_state(self, state: Tensor) -> None:
        """Replace Q with a basis of the same subspace, from a state_dict."""
        Q = state.to("cpu", torch.float64)
        like = Q.shape == self._basis.shape
        if not like or not (self._basis @ (self._basis.mT @ Q) - Q).abs().amax() < ROUNDING:
            expected, remedy = "the Q of this subspace", "Pass the same `project` and `shape`."
            raise ValueError(error_message("state_dict", expected, Q, remedy, got="another"))
        self._basis, self._copies = Q, {}

    def extra_repr(self) -> str:
        """Return the shape of a sample and the dimension of the subspace, for printing."""
        return f"shape={self.shape}, dimensions={self.dimensions}"

    def reduce(self, x: Tensor) -> Tensor:
        """Return the coordinates y (B, d − k) of samples x (B, *).

        Raises:
            ValueError: if x has the wrong shape, or does not lie in the subspace. The second
                condition is checked only on the CPU, where the check needs no synchronisation.
        """
        y = self._reduce(x)
        if can_read_values(x):
            exact = x.detach().double()
            off = (exact - self.project(exact)).abs().amax()
            if off > max(OFF, 4 * torch.finfo(x.dtype).eps) * exact.abs().amax():
                expected, got = "samples on the subspace", f"some that lie {off:.2g} off it"
                raise ValueError(error_message("x", expected, x, PROJECT, got=got))
        return y

    def expand(self, y: Tensor) -> Tensor:
        """Return the samples x (B, *) with coordinates y (B, d − k)."""
        return self._times_basis("y", y, (self.dimensions,), self.shape)

    def project(self, x: Tensor) -> Tensor:
        """Return the orthogonal projection of samples x (B, *) onto the subspace."""
        return self.expand(self._reduce(x))

    def forward(self, y: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return the coordinates (B, d − k) of the network's prediction at y (B, d − k)."""
        x = self.expand(y)
        predicted = self.network(x, t, **kwargs)
        check_prediction(predicted, x, WRAP_FIRST)
        return self._reduce(predicted)

    def _reduce(self, x: Tensor) -> Tensor:
        return self._times_basis("x", x, self.shape, (self.dimensions,))

    def _times_basis(
        self, name: str, value: Tensor, own: tuple[int, ...], other: tuple[int, ...]
    ) -> Tensor:
        """Multiply x by Qᵀ, or y by Q; `value` is (B, *own), and the result is (B, *other)."""
        of = "OnSubspace.reduce(x)" if name == "y" else "OnSubspace.expand(y)"
        check_like(name, value, (len(value), *own), value.dtype, value.device, of)
        Q = copy_like(self._copies, value, lambda: self._basis)
        kind, is_compiling = value.device.type, torch.compiler.is_compiling()
        # PyTorch 2.6 cannot trace the check of whether a device supports autocast.
        full = torch.autocast(kind, enabled=False) if is_compiling else without_autocast(kind)
        with full:
            return (value.flatten(1) @ (Q if name == "x" else Q.mT)).reshape(-1, *other)


def _basis(project: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return Q (d, d − k), in float64 on the CPU, after checking the projection."""
    d = math.prod(shape)
    if d > LARGEST:
        expected = f"at most {LARGEST} elements"
        remedy = "Write a module with forward(y, t) of your own; y may be x[:, mask], for example."
        raise ValueError(error_message("shape", expected, shape, remedy, got=f"{d}"))
    like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}

    def projected(rows: Tensor) -> Tensor:
        x = rows.reshape(-1, *shape)
        value = project(x.clone())  # a copy, which may be overwritten
        return check_like("project(x)", value, tuple(x.shape), x.dtype, x.device, "x").flatten(1)

    with outside_inference_mode(), torch.no_grad():
        n = torch.arange(1, d + 1, **like)
        h = math.sqrt(2) * (n * n * n) % 1
        rise = (0.1 + h).cumsum(0)
        P, weights = projected(torch.eye(d, **like)), 1 + rise / rise[-1]
        eigenvalues, vectors = torch.linalg.eigh(P @ (weights[:, None] * P))
        Q = vectors[:, eigenvalues > 0.5]
        Q = Q * torch.where(h @ Q < 0, -1.0, 1.0)
        v = torch.randn(2, d, generator=torch.Generator().manual_seed(0), **like)
        if not Q.shape[1] or not (projected(v) - v @ Q @ Q.mT).abs().amax() < ROUNDING:
            expected = "an orthogonal projection of each sample, onto one dimension or more"
            remedy = "An example is lambda x: x - x.mean(1, keepdim=True)."
            raise ValueError(error_message("project", expected, project, remedy, got="another"))
    return Q
