r"""Regression targets that replace the drawn noise: less noisy targets, or a user's tensor.

Purpose:
    The usual targets depend on the one ε that was drawn for x = α x₀ + σ ε. However, any other
    data point x_j may have produced the same x, with the noise ε_j = (x − α x_j)/σ. Averaging the
    targets over all x_j removes the noise that the random choice of x₀ adds to the targets of
    every order. It requires no call to the network. If the score g = ∇log p₀ of the data is known
    at x₀, a control variate reduces this noise without any reference data.

Formula for averaged targets:
    Let j run over the references and the sample itself (for which ε_j = ε), and define:
        w_j ∝ exp(−‖ε_j‖²/2), Σ w_j = 1
        ε̄ = Σ w_j ε_j      C₂ = Σ w_j (ε_j − ε̄)(ε_j − ε̄)ᵀ
        C₃(v, v, ·) = Σ w_j ((ε_j − ε̄)·v)² (ε_j − ε̄)

    Averaging the residuals of `terms` with the weights w replaces ε with ε̄ and adds C₂ and C₃.
    With ℓ = ε̄ + f and D held fixed as in `terms`, the averaged residuals are:
        r1 = f + ε̄
        r2 = D + v − C₂v − (ℓ·v) ℓ
        rt = v·(D + v − C₂v) − (ℓ·v)²
        r3 = G + C₃(v, v, ·) + (ℓ·v)² ℓ − v·(D + v − C₂v) ℓ − 2 (ℓ·v) (D + v − C₂v)

    If all the weight is on the sample itself, C₂ and C₃ are zero, and the averaged residuals are
    the paper's residuals. If the reference contains every data point, the averaged residuals are
    exactly zero at the true score. Because the weights are normalised by their own sum, the
    targets have a bias of O(1/R) for R references.

Formula for targets from scores:
    Let g_j = ∇log p₀(x_j) be the scores of the data, let σ̂ = σ/α, and define:
        z_j = ε_j + σ̂ g_j      e_j = ε_j − C z_j      C = (I + σ̂² F)⁻¹      F = E g gᵀ

    The score of x₀ given x is z/σ̂, so integration by parts gives E[z h(ε) | x] = E[∇h(ε) | x] for
    any function h. Therefore, the residuals below have the same conditional means given x as the
    paper's residuals. This is true for every symmetric C and all values of f, D and G. With
    ℓ = e + f and c = C z, the residuals are:
        r1 = f + e
        r2 = D + v − C v − ½ [(ℓ·v) (ℓ + c) + ((ℓ + c)·v) ℓ]
        rt = v·(D + v − C v) − (ℓ·v) ((ℓ + c)·v)
        r3 = G + [((ℓ + c)·v)² − v·(D + v)] ℓ − 2 (ℓ·v) (D + v − C v)

    If C = 0, they are the paper's residuals. C = (I + σ̂² F)⁻¹ minimises the noise in e. With this
    C, e has no noise if the data are Gaussian.

    The averages of these residuals, weighted by w, follow from the formulas for averaged targets
    by three replacements. The first replaces ε̄ with ē, so ℓ = ē + f. With c = C z̄, the other two
    replace C₂v with
        C v + ½ [(ℓ·v) c + (c·v) ℓ + p + q]
    and C₃(v, v, ·) with
        [(c·v)² − v·C v + Var(ε·v) − Cov(ε·v, e·v)] ℓ − (ℓ·v)² c + (ℓ·v + 2 c·v) q − (ℓ·v) p
            + κ₃(ε·v, ε·v, e)

    Here p = Cov(ε, e·v) and q = Cov(e, ε·v). The variance, the covariances and the third cumulant
    κ₃ are computed with the weights w; without references, they are 0.

Targets of another kind:
    Subclass `AveragedTargets` and override `posterior`. `posterior` must return an object with the
    attributes `mean`, `at` and `along`, as in `NoiseMoments`, and `weights`, a tensor with one row
    per noisy sample. Only the size and the dtype of `weights` are used.

Shapes:
    The weights have the shape (B, R + 1), and ε̄ has the shape (B, *). C₂v and C₃(v, v, ·) have
    the shape of the probes, (K, B, *).

Precision:
    All moments are expressed in terms of δ_j = ε_j − ε = α/σ (x₀ − x_j). δ_j is zero for the
    sample itself, so the moments are exactly zero if every reference has zero weight. A weighted
    sum of the δ_j is computed as a difference of matrix products. This difference loses digits as
    σ/α → 0. The products are therefore computed in float64, unaffected by autocast and TF32. At
    α/σ = 1e4, eight digits of the difference remain correct. On devices without float64, the
    products are computed in float32. The differences ε − c and v − C v vanish as σ̂ → 0, so they
    are computed in the dtype of the matrix products.

Source:
    Averaged targets at order one: Xu, Tong and Jaakkola, "Stable Target Field for Reduced Variance
    Score Estimation in Diffusion Models", ICLR 2023. Targets from scores at order one: De Bortoli
    et al., "Target Score Matching", arXiv 2402.08667. The formulas for orders two and three were
    derived for this library.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses._checks import (
    can_read_values,
    check_finite,
    check_flag,
    check_like,
    check_sample_batch,
    check_whole,
    error_message,
    shown,
    widest_dtype,
)
from hosm_losses._torch_internals import leave_inference_mode
from hosm_losses.losses.score_check import check_scores
from hosm_losses.model import per_sample

# A tensor over probes, samples and references is split if it has more elements than this. On the
# CPU, small tensors are faster because they reuse memory.
LARGEST = {"cpu": 2**18}
ELSEWHERE = 2**24


def as_rows(tensor: Tensor) -> Tensor:
    """Return the detached tensor as rows (B, n), in the dtype in which targets are computed."""
    return tensor.detach().reshape(len(tensor), -1).to(widest_dtype(tensor))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product along the last dimension, keeping that dimension with size 1."""
    return (a * b).sum(-1, keepdim=True)


@dataclass(frozen=True, eq=False, repr=False)
class AveragedTargets:
    """Targets averaged over all data points that may have produced x, weighted by likelihood.

    Averaging removes the noise that the random choice of x₀ adds to the targets. It requires a few
    matrix products, but no call to the network. Order one uses ε̄ = Σ w_j ε_j in place of ε, where
    ε_j = (x − α x_j)/σ and w_j ∝ exp(−‖ε_j‖²/2). Here j runs over the reference and the sample's
    own x₀. The averages ε̄ are the stable targets of Xu, Tong and Jaakkola (ICLR 2023). To our
    knowledge, this library is the first to use second and third moments for orders two and three.

    If the reference is dense at the scale of the noise, the targets are not random. If the
    reference is sparse, the targets are the paper's targets. Between these extremes, the targets
    have a bias that falls as 1/R, where R is the number of references.

    No gradient flows through the targets.

    Args:
        reference: data (R, *), with the dtype and device of x₀. If None, the batch itself is the
            reference. Under DDP, each process then uses its own batch. To average over all
            processes, pass `dataclasses.replace(targets, reference=gathered, own=False)` as the
            `targets` of each call.
        own: whether each sample's own x₀ is added to the references of that sample. Use False if
            the reference already contains every x₀ unchanged, so that no x₀ counts twice. One such
            reference is the whole training set, if no flips, crops or dequantization noise are
            applied. If own=False and an x₀ is missing from the reference, the targets are wrong. A
            loss then raises ValueError on the CPU. On an accelerator, this is not checked.
        same: a callable model_kwargs → mask (B, R). The mask must be True where a reference has
            the same condition as a sample, so that the sample may use this reference. `same` is
            required if `model_kwargs` contains a per-sample tensor. If the mask excludes all
            references for a sample, only its own x₀ is used.

    Raises:
        TypeError: if `reference` is not a floating-point tensor, if `own` is not a bool, or if
            `same` is not callable.
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
        if self.reference is not None:
            check_sample_batch("reference", self.reference)
        check_flag("own", self.own)
        if not (self.same is None or callable(self.same)):
            raise TypeError(error_message("same", "a callable of model_kwargs or None", self.same))

    def __repr__(self) -> str:
        reference, same = shown(self.reference), shown(self.same)
        return f"AveragedTargets(reference={reference}, own={self.own}, same={same})"

    def posterior(
        self,
        x0: Tensor,
        noise: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        kwargs: dict[str, Any],
    ) -> "NoiseMoments":
        """Return the posterior moments of the noise in x = α x₀ + σ ε.

        x₀ (B, *) is a single batch. ε (nB, *), α (nB,) and σ (nB,) contain the values of n
        perturbations of this batch, concatenated.
        """
        data, eps, alpha, sigma = map(as_rows, (x0, noise, alpha, sigma))
        dtype, reference, scale = data.dtype, data, alpha / sigma
        count = len(eps) // len(data)
        if self.reference is not None:
            shape = (len(self.reference), *x0.shape[1:])
            reference = check_like(
                "targets.reference", self.reference, shape, x0.dtype, x0.device, "x0"
            )
            reference = as_rows(reference)
        # Only differences of data matter, and squaring data far from zero would lose digits.
        origin = reference.mean(0)
        data, reference = (data - origin).repeat(count, 1), reference - origin
        # One matrix product gives ‖ε‖²/2 − ‖ε_j‖²/2; for the sample itself, this is zero.
        scaled, half = scale * (eps + scale * data), scale.square() / 2  # α/σ times x/σ
        itself = (half * data.square() - scaled * data).sum(1, keepdim=True)
        squares = reference.square().sum(1, keepdim=True)
        points = F.pad(torch.cat([squares, reference, torch.ones_like(squares)], 1), (0, 0, 0, 1))
        logits = torch.cat([-half, scaled, itself], 1) @ points.T
        if self.same is not None:
            like = (len(x0), len(reference)), torch.bool, x0.device, "batch and reference"
            mask = check_like("targets.same(model_kwargs)", self.same(kwargs), *like)
            logits[:, :-1].masked_fill_(~mask.repeat(count, 1), -torch.inf)
        if self.reference is None:
            logits.unflatten(0, (count, -1)).diagonal(0, 1, 2).fill_(-torch.inf)
        elif not self.own:
            if can_read_values(logits):
                # x₀ itself has logit 0 up to rounding; −∞ means that `same` allows no reference.
                best, slack = logits[:, :-1].amax(1), 1 + 1e-12 * (scale * data).square().sum(1)
                outside = int(((best < -slack) & ~best.isneginf()).sum())
                if outside:
                    raise ValueError(
                        "targets: expected samples that the reference of "
                        f"AveragedTargets(own=False) contains; got {outside} of {len(best)} that "
                        "it does not contain, for example after a flip or with added noise. Set "
                        "own=True, or pass x0 unchanged from the reference."
                    )
            logits[:, -1] = torch.finfo(dtype).min  # only used if no reference is allowed
        weights = logits.sub_(logits.amax(1, keepdim=True)).exp_()
        weights.div_(weights.sum(1, keepdim=True))
        return moments_of(weights, scale, data, points[:, 1:])


class NoiseMoments(NamedTuple):
    """Moments of δ_j = ε_j − ε over data that may have produced x; the sample itself has δ = 0."""

    weights: Tensor  # of the references and of the sample itself, (B, R + 1)
    scale: Tensor  # α/σ, (B, 1)
    data: Tensor  # x₀, (B, d)
    mean: Tensor  # ε̄ − ε, (B, d)
    points: Tensor  # the references with a column of ones, then a row of zeros, (R + 1, d + 1)

    def at(self, index: Tensor | slice) -> "NoiseMoments":
        """Return the rows at `index`."""
        return self._make([*(part[index] for part in self[:4]), self.points])

    def sum_of(self, weights: Tensor) -> Tensor:
        """Return Σ_j weights_j δ_j, (*, B, d), for weights (*, B, R + 1)."""
        sums = weights @ self.points
        return self.scale * (sums[..., -1:] * self.data - sums[..., :-1])

    def slopes(self, v: Tensor) -> Tensor:
        """Return (ε_j − ε̄)·v, (K, B, R + 1), for vectors v (K, B, d)."""
        along = (v * (self.scale * self.data - self.mean)).sum(-1, keepdim=True)
        return torch.cat([-self.scale * v, along], -1) @ self.points.T

    def along(self, v: Tensor, _ell: Tensor, *, third: bool) -> tuple[Tensor, Tensor | None]:
        """Return C₂v and, if `third` is True, C₃(v, v, ·), for vectors v (K, B, d)."""
        slope = self.slopes(v)  # the entry of the sample itself has no effect
        weighted = self.weights * slope
        C2v = self.sum_of(weighted)
        if not third:
            return C2v, None
        return C2v, self.sum_of(weighted.mul_(slope)) - inner(v, C2v) * self.mean


def moments_of(weights: Tensor, scale: Tensor, data: Tensor, points: Tensor) -> NoiseMoments:
    """Compute the mean of δ_j, and return all the moments."""
    mean = NoiseMoments(weights, scale, data, data, points).sum_of(weights)
    return NoiseMoments(weights, scale, data, mean, points)


class ControlledMoments(NamedTuple):
    """Moments of e_j = ε_j − C z_j over data that may have produced x, where z_j = ε_j + σ̂ g_j."""

    noises: NoiseMoments
    scores: NoiseMoments  # moments of σ̂ g_j − σ̂ g in place of ε_j − ε
    control: Tensor  # the eigenvalues of C, (B, 1 or d)
    basis: Tensor | None  # the eigenvectors of C, (d, d); None for the unit vectors
    c: Tensor  # C z̄, (B, d)
    mean: Tensor  # ē − ε, (B, d)

    @property
    def weights(self) -> Tensor:
        """The weights of the references and of the sample itself, (B, R + 1)."""
        return self.noises.weights

    def at(self, index: Tensor | slice) -> "ControlledMoments":
        """Return the rows at `index`."""
        noises, scores = self.noises.at(index), self.scores.at(index)
        control, c, mean = (part[index] for part in (self.control, self.c, self.mean))
        return ControlledMoments(noises, scores, control, self.basis, c, mean)

    def times_control(self, v: Tensor) -> Tensor:
        """Return C v for vectors v (*, B, d)."""
        return times(self.control, self.basis, v)

    def along(self, v: Tensor, ell: Tensor, *, third: bool) -> tuple[Tensor, Tensor | None]:
        """Return the replacements for C₂v and, if `third` is True, for C₃(v, v, ·)."""
        noises, c = self.noises, self.c
        Cv, ell_v, c_v = self.times_control(v), inner(ell, v), inner(c, v)
        slope = noises.slopes(v)  # (ε_j − ε̄)·v
        slope_of_e = noises.slopes(v - Cv) - self.scores.slopes(Cv)  # (e_j − ē)·v
        weighted = self.weights * slope
        covariance = noises.sum_of(weighted)  # Cov(ε, ε·v)
        p, q = noises.sum_of(self.weights * slope_of_e), self._less_control(covariance, weighted)
        C2v = Cv + (ell_v * c + c_v * ell + p + q) / 2
        if not third:
            return C2v, None
        of_ell = c_v.square() - inner(v, Cv) + inner(v, covariance) - inner(v, p)
        C3v = of_ell * ell - ell_v.square() * c + (ell_v + 2 * c_v) * q - ell_v * p
        mean = self._less_control(noises.mean, self.weights)  # ē − e
        squares = weighted * slope
        kappa3 = self._less_control(noises.sum_of(squares), squares)
        return C2v, C3v + kappa3 - inner(v, covariance) * mean

    def _less_control(self, sums: Tensor, weights: Tensor) -> Tensor:
        """Return Σ_j weights_j (e_j − e), given `sums` = Σ_j weights_j (ε_j − ε)."""
        return sums - self.times_control(sums + self.scores.sum_of(weights))


def times(eigenvalues: Tensor, basis: Tensor | None, v: Tensor) -> Tensor:
    """Multiply v (*, B, d) by matrices with eigenvalues (B, 1 or d) and eigenvectors `basis`."""
    return eigenvalues * v if basis is None else (eigenvalues * (v @ basis)) @ basis.T


def cumulants(
    moments: NoiseMoments | ControlledMoments, probe: Tensor, ell: Tensor, *, third: bool
) -> tuple[Tensor, Tensor | None]:
    """Return v − C₂v and, if `third`, C₃(v, v, ·), each with the shape of the probes (K, B, *)."""
    half, most = len(moments.weights) // 2, LARGEST.get(probe.device.type, ELSEWHERE)
    if half and len(probe) * moments.weights.numel() > most:
        parts = slice(None, half), slice(half, None)
        halves = [cumulants(moments.at(i), probe[:, i], ell[:, i], third=third) for i in parts]
        v_minus_C2v, C3v = zip(*halves, strict=True)
        return torch.cat(v_minus_C2v, 1), torch.cat(C3v, 1) if third else None
    v, flat_ell = (
        part.detach().reshape(*part.shape[:2], -1).to(moments.weights.dtype)
        for part in (probe, ell)
    )
    C2v, C3v = moments.along(v, flat_ell, third=third)
    v_minus_C2v = (v - C2v).reshape(probe.shape).to(probe.dtype)
    return v_minus_C2v, None if C3v is None else C3v.reshape(probe.shape).to(probe.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class TargetScores:
    """Targets with less noise than ε, for data whose score ∇log p₀ is known at x₀.

    Examples of such scores are molecular forces divided by kT, and log-density gradients computed
    by a simulator. Let g = ∇log p₀(x₀), σ̂ = σ/α and C = (I + σ̂² F)⁻¹. Order one uses e = ε − C
    (ε + σ̂ g) in place of ε. This is target score matching (De Bortoli et al., arXiv 2402.08667):
    e is a weighted mean of ε and −σ̂ g. C minimises the noise in e. The extension to orders two
    and three is our own, and needs neither Hessians nor additional network calls. The expected
    gradient is unchanged, because each residual keeps its conditional mean given x, whatever the
    model. For Gaussian data, e has no noise.

    The density of the data must be continuous and vanish at the edge of its support. For uniform,
    clipped, padded or rounded data, the targets would be wrong. `information_of` tests whether the
    data and the scores meet this condition.

    Args:
        scores: the score g, as a callable that maps data (N, *) to their scores, or as a tensor
            with the shape of x₀. A tensor is valid for one call to a loss, so a module's
            constructor accepts only a callable. The scores are detached from any graph.
        information: F = E g gᵀ, where the mean is over the data. C is computed from F.
            `information` is a number from 0 to math.inf, a tensor with the shape of a sample (one
            number per element), or a matrix (d, d). With math.inf, the targets are the paper's
            targets. The eigenvectors of a matrix are computed once, in the constructor. A 0-dim
            tensor counts as a number. If `information` is None, F is estimated for each sample as
            the elementwise mean of g² over the other samples of the batch. Under DDP, these are
            the other samples in the same process. If there are no other samples, the targets are
            the paper's targets. The same is true along directions in which the information is
            zero, such as the direction of a constant coordinate. An eigenvalue of a matrix counts
            as zero if it is below 1.2e-7 · d times the largest eigenvalue. The factor 1.2e-7 is
            replaced by a larger one if x₀ or the matrix is in half precision.
        averaged: an `AveragedTargets`, to also average the targets over all data that may have
            produced x. If `averaged` has a reference, `scores` must be a callable, because the
            scores of the reference are needed as well.

    Raises:
        TypeError: if `scores` is neither a floating-point tensor nor a callable, if it is a
            tensor and `averaged` has a reference, or if another argument has the wrong type.
        ValueError: if `scores` or a tensor `information` is not finite, or if `information` is a
            number that is negative or NaN, a sample-shaped tensor with a negative element, or a
            matrix that is not symmetric and positive semidefinite. A loss also raises ValueError
            if `scores` or `information` does not match the batch.

    Example:
        >>> import torch
        >>> from hosm_losses import ScoreModel, VPSchedule, third_order_dsm
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> x0 = torch.randn(8, 2)
        >>> third_order_dsm(model, x0, targets=TargetScores(-x0)).shape
        torch.Size([])
        >>> data = torch.randn(40_000, 2)
        >>> TargetScores(-x0, TargetScores.information_of(data, -data))
        TargetScores(scores=<(8, 2)>, information=<(2,)>, averaged=None)
    """

    scores: Tensor | Callable[[Tensor], Tensor]
    information: float | Tensor | None = None
    averaged: AveragedTargets | None = None
    _eigen: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Check every argument, and compute the eigenvectors if `information` is a matrix."""
        if not callable(self.scores):
            check_sample_batch("scores", self.scores, images=False)
        averaged: object = self.averaged
        if not (averaged is None or isinstance(averaged, AveragedTargets)):
            raise TypeError(error_message("averaged", "AveragedTargets(...) or None", averaged))
        if averaged is not None and averaged.reference is not None and not callable(self.scores):
            expected = "a callable if there is a reference, whose scores are also needed"
            raise TypeError(error_message("scores", expected, self.scores))
        given: object = self.information
        if isinstance(given, Tensor) and given.ndim == 0 and can_read_values(given):
            given = given.item()
            object.__setattr__(self, "information", given)
        if isinstance(given, Tensor):
            check_sample_batch("information", given[None], images=False)
            if given.ndim == 2 and given.shape[0] == given.shape[1]:
                matrix = leave_inference_mode(given).detach().to(widest_dtype(given))
                object.__setattr__(self, "_eigen", tuple(torch.linalg.eigh(matrix)))
            if isinstance(self.scores, Tensor):
                self._check_information("information", given, self.scores)
        elif given is not None:
            expected = "a number from 0 to math.inf, a tensor or None"
            if isinstance(given, bool) or not isinstance(given, Real):
                raise TypeError(error_message("information", expected, given))
            if not float(given) >= 0:
                raise ValueError(error_message("information", expected, given))

    def __repr__(self) -> str:
        names = ("scores", "information", "averaged")
        return f"TargetScores({', '.join(f'{n}={shown(getattr(self, n))}' for n in names)})"

    @staticmethod
    def information_of(
        data: Tensor, scores: Tensor, *, matrix: bool = False, particles: int | None = None
    ) -> Tensor:
        """Return E g gᵀ for the scores g of data, as one number per element or as a matrix.

        For correct scores, the mean of −(x − x̄)·g equals the dimension of the data, as
        integration by parts shows. A warning is issued if the sample mean differs from the
        dimension by more than five standard errors, because the scores or the density then violate
        the conditions of `TargetScores`. Another warning is issued if five standard errors exceed
        10 % of the expected mean, because a relative error of 10 % in the scores may then go
        unnoticed. The standard errors account for the correlation between samples of a simulation,
        provided that the samples are in the order in which the simulation produced them and that
        the simulation is at least a hundred times as long as the correlation time.

        Args:
            data: samples x (N, *), from the whole data set rather than from a batch.
            scores: ∇log p₀ at each sample, as a tensor with the shape of `data`.
            matrix: whether to return the matrix (d, d) rather than one number per element.
                Compared with one number per element, the matrix reduces the mean of ‖e‖²,
                integrated over log σ̂, by ½ log(∏ F_ii / det F).
            particles: the number n of particles if samples are positions (n, D). The scores are
                then also checked on pairs of particles, mainly on the stiffest pairs, such as
                bonds. For correct scores and ℓ = log|x_i − x_j|, the mean of
                −(ℓ − ℓ̄) (½ (x_i − x_j)·(g_i − g_j) + D) is 1. For molecules, the standard error of
                this mean is far smaller than that of the mean of −(x − x̄)·g.

        Returns:
            F, in units of 1/x², as float64 on devices that support float64, otherwise as float32.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if the tensors do not match or are not finite, if `particles` is below 2 or
                does not divide d, or if a matrix is requested from fewer than 4 d samples.

        Example:
            >>> import torch
            >>> x = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)) / 2
            >>> TargetScores.information_of(x, -4 * x, matrix=True).diagonal().round()
            tensor([4., 4., 4.], dtype=torch.float64)
        """
        data = check_sample_batch("data", data)
        like = tuple(data.shape), data.dtype, data.device, "data"
        check_finite("scores", check_like("scores", scores, *like))
        check_flag("matrix", matrix)
        count, d = len(data), data[0].numel()
        if particles is not None and d % check_whole("particles", particles, 2):
            expected = f"a divisor of d = {d}, the elements of a sample"
            raise ValueError(error_message("particles", expected, particles))
        if matrix and count < 4 * d:
            expected, remedy = f"4 d = {4 * d} samples or more for a matrix", "Set matrix=False."
            raise ValueError(error_message("data", expected, data, remedy, got=f"{count}"))
        x, g = (part.detach().reshape(count, d).to(widest_dtype(part)) for part in (data, scores))
        if count > 1:
            rounding = max(1e-6, torch.finfo(data.dtype).eps)
            check_scores(x, g, matrix=matrix, particles=particles, rounding=rounding)
        return g.T @ g / count if matrix else g.square().mean(0).reshape(data.shape[1:])

    def posterior(
        self,
        x0: Tensor,
        noise: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        kwargs: dict[str, Any],
    ) -> ControlledMoments:
        """Return the moments of e, which replaces ε in the targets at x = α x₀ + σ ε.

        The arguments are those of `AveragedTargets.posterior`.
        """
        own = self._scores_at(x0)
        eps, alpha, sigma = map(as_rows, (noise, alpha, sigma))
        count = len(eps) // len(x0)
        g = own.repeat(count, 1)
        if self.averaged is None:  # the average is only over the sample itself
            weight, zero = torch.ones_like(alpha), torch.zeros_like(g)
            noises = moments_of(weight, alpha / sigma, zero, g.new_zeros(1, g.shape[1] + 1))
            others = g[:0]
        else:
            noises = self.averaged.posterior(x0, noise, alpha[:, 0], sigma[:, 0], kwargs)
            reference = self.averaged.reference
            others = own if reference is None else self._scores_at(reference)
        points = F.pad(F.pad(others, (0, 1), value=1.0), (0, 0, 0, 1))
        sigma_hat = sigma / alpha
        scores = moments_of(noises.weights, -sigma_hat, g, points)
        information, basis = self._information_for(own, x0)
        # Along a direction of zero information, the target is the paper's.
        information = torch.where(information > 0, information, math.inf)
        squares = sigma_hat.square().unflatten(0, (count, -1))
        control = (1 / (1 + squares * information)).flatten(0, 1)
        c = times(control, basis, eps + noises.mean + sigma_hat * g + scores.mean)
        return ControlledMoments(noises, scores, control, basis, c, noises.mean - c)

    def _scores_at(self, data: Tensor) -> Tensor:
        """Return ∇log p₀ at data (N, *), as (N, d)."""
        scores: Any = self.scores
        if callable(scores):
            # In full precision, and with gradients enabled because the callable may differentiate
            # an energy.
            kind = "cuda" if data.is_cuda else "cpu"
            with torch.enable_grad(), torch.autocast(kind, enabled=False):
                scores = scores(data.detach().clone())  # a copy, which the callable may overwrite
        like = tuple(data.shape), data.dtype, data.device, "the data"
        scores = check_like("targets.scores", scores, *like).detach()
        check_finite("targets.scores", scores)
        return scores.to(widest_dtype(data)).reshape(len(data), -1)

    def _information_for(self, g: Tensor, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return F or, if F is a matrix, its eigenvalues and eigenvectors; g (B, d) are scores."""
        information, (count, d) = self.information, g.shape
        if information is None:
            # Only from the other samples, so that C does not depend on the sample itself.
            squares = g.square()
            return (squares.sum(0) - squares) / max(count - 1, 1), None
        if not isinstance(information, Tensor):
            return g.new_full((), float(information)), None
        self._check_information("targets.information", information, x0)
        if self._eigen is None or information.shape == x0.shape[1:]:
            return leave_inference_mode(information).detach().reshape(1, -1).to(g.dtype), None
        # Rounding errors in the squared scores or in F make zero information slightly positive, so
        # that the target would be 0 instead of ε. Tensors in float64 may have been computed in
        # float32. Too high a threshold only leaves noise, since the paper's target is never wrong.
        eigenvalues, basis = self._eigen
        of_scores, of_F = (torch.finfo(each.dtype).eps for each in (x0, information))
        eps = max(of_scores**2, of_F, torch.finfo(torch.float32).eps)
        return torch.where(eigenvalues > d * eps * eigenvalues[-1], eigenvalues, 0.0), basis

    def _check_information(self, name: str, information: Tensor, samples: Tensor) -> None:
        shape, d = tuple(samples.shape[1:]), samples[0].numel()
        is_matrix = information.shape == (d, d) != shape
        like = (d, d) if is_matrix else information.shape and shape  # () is a number
        check_like(
            name, information, like, information.dtype, samples.device, "a sample, or (d, d)"
        )
        if not can_read_values(information):
            return
        if not is_matrix or self._eigen is None:
            if not bool((information >= 0).all()):
                raise ValueError(error_message(name, "numbers of at least 0", information))
            return
        least, largest = (float(self._eigen[0][i]) for i in (0, -1))
        skew = float((information - information.mT).abs().amax())
        slack = max(1e-5, d * torch.finfo(information.dtype).eps)
        if least < -slack * largest or skew > slack * float(information.abs().amax()):
            expected = "a symmetric, positive semidefinite matrix"
            got = f"a least eigenvalue of {least:.3g} and an asymmetry of {skew:.3g}"
            remedy = "TargetScores.information_of(..., matrix=True) computes one in float64."
            raise ValueError(error_message(name, expected, information, remedy, got=got))


Targets = AveragedTargets | TargetScores | Tensor | None
"""Regression targets; None means the drawn noise. Only order one accepts a tensor (B, *)."""


def check_targets(targets: object, *, tensor: bool) -> Targets:
    """Return `targets`, after checking its type; a tensor is allowed only if `tensor` is True."""
    if targets is None or isinstance(targets, (AveragedTargets, TargetScores)):
        return targets
    if tensor and isinstance(targets, Tensor):
        return targets
    expected = (
        "AveragedTargets(...), TargetScores(...) or None; a call of a loss of order one also "
        "accepts a tensor"
    )
    raise TypeError(error_message("targets", expected, targets))


def check_conditions(targets: Targets, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if averaged targets would mix samples with different conditions."""
    found: list[tuple[str, Tensor]] = []
    averaged = targets.averaged if isinstance(targets, TargetScores) else targets
    if isinstance(averaged, AveragedTargets) and averaged.same is None:
        per_sample(kwargs, lambda path, tensor: found.append((path, tensor)))
    for path, tensor in found[:1]:
        remedy = "Set, for example, same=lambda kwargs: kwargs['y'][:, None] == labels,"
        if tensor.is_floating_point():
            remedy = "If no two samples have the same condition, leave out averaged targets,"
        raise ValueError(
            f"targets: expected AveragedTargets(same=...), since {path} differs by sample; "
            f"got same=None. {remedy} or mark the tensor as Shared(...)."
        )
