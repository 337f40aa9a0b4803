r"""Regression targets in place of the drawn noise: its moments over a reference, or a tensor.

What:
    A batch fixes one noise ε for every x = α x₀ + σ ε. But x may have come from other data x_j as
    well, with the noises ε_j = (x − α x_j)/σ. Averaging over these, in place of ε alone, takes the
    noise of the data out of the targets of every order, at no call of the network.

Formula, with ε_j of a reference and the own sample, whose ε_j is ε:
    w_j ∝ exp(−‖ε_j‖²/2), Σ w_j = 1
    ε̄ = Σ w_j ε_j      C₂ = Σ w_j (ε_j − ε̄)(ε_j − ε̄)ᵀ
    C₃(v, v, ·) = Σ w_j ((ε_j − ε̄)·v)² (ε_j − ε̄)

    The residuals of `terms`, averaged over w, are those of ε̄ with C₂ and C₃ added. With
    ℓ = ε̄ + f and D as held fixed there:
        r1 = f + ε̄
        r2 = D + v − C₂v − (ℓ·v) ℓ
        rt = v·(D + v − C₂v) − (ℓ·v)²
        r3 = G + C₃(v, v, ·) + (ℓ·v)² ℓ − v·(D + v − C₂v) ℓ − 2 (ℓ·v) (D + v − C₂v)

    Where all weight is on the own sample C₂ and C₃ are zero, and these are the paper's residuals.
    Where the reference has every point of the data they are zero at the true score, without noise.
    The weights normalise themselves, which is biased by O(1/R) for R references.

    Shapes: weights (B, R), ε̄ (B, *); C₂v and C₃(v, v, ·) as the probes, (K, B, *).

Precision:
    Everything is written in δ_j = ε_j − ε = α/σ (x₀ − x_j), which is zero for the own sample: what
    has no weight beside it adds exact zeros. Sums over j of differences are differences of sums,
    products of matrices that cancel as σ/α → 0. So they are in float64, where α/σ = 1e4 leaves
    eight digits, and which neither autocast nor TF32 shortens; in float32 on a device without it.

Source:
    Xu, Tong and Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion
    Models", ICLR 2023, for order one. Orders two and three were derived for this library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses._checks import (
    can_read_values,
    check_flag,
    check_like,
    check_sample_batch,
    error_message,
    shown,
)
from hosm_losses._torch_internals import leave_inference_mode
from hosm_losses.model import per_sample

# Elements of a tensor over probes, samples and references, above which it is split. On the CPU
# small tensors are faster, since they take memory that was in use before.
LARGEST = {"cpu": 2**18}
ELSEWHERE = 2**24


@dataclass(frozen=True, eq=False, repr=False)
class AveragedTargets:
    """Targets averaged over all data that may have led to x, weighted by their likelihood.

    They take the noise of the data out of the targets, for a few products of matrices and no call
    of the network. Order one has ε̄ = Σ w_j ε_j in place of ε, with ε_j = (x − α x_j)/σ and
    w_j ∝ exp(−‖ε_j‖²/2) over the reference and the sample's own x₀: the stable targets of Xu, Tong
    and Jaakkola (ICLR 2023). Orders two and three have the second and third moments, which is new
    here. A reference that is dense at the scale of the noise leaves no noise in them. One that is
    sparse gives the paper's targets. In between they have a bias that falls as 1/R.

    Nothing of a target carries a gradient.

    Args:
        reference: data (R, *) of the type and device of x₀. None is the batch itself: under DDP
            that of each process, unless it gives each call a gathered one, as
            `dataclasses.replace(targets, reference=gathered, own=False)`.
        own: whether x₀ is added to a given reference for its own sample. False is right where the
            reference contains every x₀ unchanged, as the whole training set does without flips,
            crops or dequantization noise: added again, x₀ would count twice. Where it does not,
            the targets are wrong: on the CPU a loss raises a ValueError, but on an accelerator no
            value is looked at.
        same: model_kwargs → a mask (B, R) of the references that may stand for a sample, those
            with its condition. Required where `model_kwargs` holds a tensor per sample. A sample
            that finds none has its own x₀.

    Raises:
        TypeError: if `reference` is not a floating-point tensor, `own` is not a bool, or `same` is
            not callable.
        ValueError: if `reference` is empty or not finite.

    Example:
        >>> import torch
        >>> from hosm_losses import ScoreModel, VPSchedule, third_order_dsm
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> x0 = torch.randn(8, 2)
        >>> third_order_dsm(model, x0, targets=AveragedTargets()).shape
        torch.Size([])
        >>> AveragedTargets(torch.randn(100, 2))
        AveragedTargets(reference=<(100, 2)>, own=True, same=None)
    """

    reference: Tensor | None = None
    own: bool = True
    same: Callable[[dict[str, Any]], Tensor] | None = None

    def __post_init__(self) -> None:
        """Check every argument."""
        if self.reference is not None:
            check_sample_batch("reference", self.reference)
        check_flag("own", self.own)
        if not (self.same is None or callable(self.same)):
            raise TypeError(error_message("same", "a callable of model_kwargs or None", self.same))

    def __repr__(self) -> str:
        """Return the constructor's call, with the shape of the reference."""
        reference, same = shown(self.reference), shown(self.same)
        return f"AveragedTargets(reference={reference}, own={self.own}, same={same})"

    def posterior(
        self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, kwargs: dict[str, Any]
    ) -> "NoiseMoments":
        """Posterior moments of the noise in x = α x₀ + σ ε, for α and σ (B,)."""
        dtype = torch.float32 if x0.device.type == "mps" else torch.float64
        data, eps, alpha, sigma = (
            part.detach().reshape(len(x0), -1).to(dtype) for part in (x0, noise, alpha, sigma)
        )
        reference, scale = data, alpha / sigma
        if self.reference is not None:
            shape = (len(self.reference), *x0.shape[1:])
            reference = check_like(
                "targets.reference", self.reference, shape, x0.dtype, x0.device, "x0"
            )
            reference = leave_inference_mode(reference).detach().flatten(1).to(dtype)
        # Differences alone count. Squares of data that lie far from zero would take their digits.
        origin = reference.mean(0)
        data, reference = data - origin, reference - origin
        # One product has −‖ε_j‖²/2 less that of the own sample, which has a row of zeros.
        scaled, half = scale * (eps + scale * data), scale.square() / 2  # α/σ times x/σ
        itself = (half * data.square() - scaled * data).sum(1, keepdim=True)
        squares = reference.square().sum(1, keepdim=True)
        points = F.pad(torch.cat([squares, reference, torch.ones_like(squares)], 1), (0, 0, 0, 1))
        logits = torch.cat([-half, scaled, itself], 1) @ points.T
        if self.same is not None:
            like = (len(x0), len(reference)), torch.bool, x0.device, "batch and reference"
            mask = check_like("targets.same(model_kwargs)", self.same(kwargs), *like)
            logits[:, :-1].masked_fill_(~mask, -torch.inf)
        if self.reference is None:
            logits.diagonal().fill_(-torch.inf)
        elif not self.own:
            if can_read_values(logits):
                # That of x₀ itself is 0 but for rounding; −∞ is a row of which `same` leaves none.
                best, slack = logits[:, :-1].amax(1), 1 + 1e-12 * (scale * data).square().sum(1)
                outside = int(((best < -slack) & ~best.isneginf()).sum())
                if outside:
                    raise ValueError(
                        "targets: expected samples that the reference of AveragedTargets(own=False"
                        f") contains; got {outside} of {len(x0)} outside it, as after a flip or "
                        "added noise. Set own=True, or give x0 as it is in the reference."
                    )
            logits[:, -1] = torch.finfo(dtype).min  # but where there is no other
        weights = logits.sub_(logits.amax(1, keepdim=True)).exp_()
        weights.div_(weights.sum(1, keepdim=True))
        moments = NoiseMoments(weights, scale, data, data, points[:, 1:])
        return moments._replace(mean=moments.sum_of(weights))


class NoiseMoments(NamedTuple):
    """Moments of δ_j = ε_j − ε over the data that may have led to x; the own sample has δ = 0."""

    weights: Tensor  # of the references, and the own sample, (B, R + 1)
    scale: Tensor  # α/σ, (B, 1)
    data: Tensor  # x₀, (B, d)
    mean: Tensor  # ε̄ − ε, (B, d)
    points: Tensor  # the references, with a column of ones, and a row of zeros, (R + 1, d + 1)

    def at(self, index: Tensor | slice) -> "NoiseMoments":
        """Return the rows at `index`."""
        return self._make([*(part[index] for part in self[:4]), self.points])

    def sum_of(self, weights: Tensor) -> Tensor:
        """Σ_j of weights (*, B, R + 1) times δ_j, (*, B, d)."""
        sums = weights @ self.points
        return self.scale * (sums[..., -1:] * self.data - sums[..., :-1])

    def cumulants(self, probe: Tensor, *, third: bool) -> tuple[Tensor, Tensor | None]:
        """v − C₂v and, if `third`, C₃(v, v, ·), for probes (K, B, *) and of their shape."""
        half = len(self.weights) // 2
        if half and len(probe) * self.weights.numel() > LARGEST.get(probe.device.type, ELSEWHERE):
            parts = slice(None, half), slice(half, None)
            halves = [self.at(part).cumulants(probe[:, part], third=third) for part in parts]
            v_minus_C2v, C3v = zip(*halves, strict=True)
            return torch.cat(v_minus_C2v, 1), torch.cat(C3v, 1) if third else None
        v = probe.detach().reshape(*probe.shape[:2], -1).to(self.data.dtype)
        along = (v * (self.scale * self.data - self.mean)).sum(-1, keepdim=True)
        # (ε_j − ε̄)·v, (K, B, R + 1); that of the own sample is not needed.
        slope = torch.cat([-self.scale * v, along], -1) @ self.points.T
        weighted = self.weights * slope
        C2v = self.sum_of(weighted)
        v_minus_C2v = probe - C2v.reshape(probe.shape).to(probe.dtype)
        if not third:
            return v_minus_C2v, None
        C3v = self.sum_of(weighted.mul_(slope)) - (v * C2v).sum(-1, keepdim=True) * self.mean
        return v_minus_C2v, C3v.reshape(probe.shape).to(probe.dtype)


Targets = AveragedTargets | Tensor | None


def check_targets(targets: object, *, tensor: bool) -> Targets:
    """Return the targets if they are AveragedTargets, None or, if `tensor`, a tensor."""
    is_tensor = isinstance(targets, Tensor)
    if targets is None or isinstance(targets, AveragedTargets) or (is_tensor and tensor):
        return targets
    expected = "AveragedTargets(...) or None; in a call of a loss of order one a tensor as well"
    raise TypeError(error_message("targets", expected, targets))


def check_conditions(targets: Targets, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if averaged targets would mix samples of different conditions."""
    paths: list[str] = []
    if isinstance(targets, AveragedTargets) and targets.same is None:
        per_sample(kwargs, lambda path, _: paths.append(path))
    if paths:
        raise ValueError(
            f"targets: expected AveragedTargets(same=...), as {paths[0]} belongs to the samples; "
            "got none: same=lambda kwargs: kwargs['y'][:, None] == labels. Or it is Shared(...)."
        )
