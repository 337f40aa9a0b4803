r"""Which probes estimate a trace, a Frobenius norm or the third order's term with least variance?

python -m benchmarks estimator_variance

On the exact Jacobian of Gaussian mixtures and on networks trained here, at five noise levels.
Variances that are known in closed form have to come out, to five standard errors.

Formula:
    At x = α x₀ + σ ε, with f = σ s, ℓ = ε + f and A = σ ∂f/∂x:
        trace       vᵀ A v            of tr A; the likelihood's
        Frobenius   ‖M v‖²            of ‖M‖²_F, M = A + I − ℓ ℓᵀ; order two's
        third       r3(v)             of R₃, r3(v)_k = vᵀ T_k v; order three's
    All three are quadratic forms in v, of A, of Mᵀ M and of every T_k.

    A is D along all unit vectors; where d is small T comes from r3 along the sums of two of them,
    by polarisation. Of the exact score of a mixture a test compares both with closed forms.

    The variance of vᵀ B v with S = (B + Bᵀ)/2 is
        rademacher   Σ_{i<j} (B_ij + B_ji)²
        gaussian     2 ‖S‖²_F
        sphere       2 d/(d + 2) (‖S‖²_F − (tr S)²/d)
        dct          that of signs, of Q S Qᵀ
        unit vectors, times √d   d² Var_i(B_ii)

Source:
    Lu et al., arXiv 2206.08265; the mixture of `tests.oracles`; Avron and Toledo, "Randomized
    algorithms for estimating the trace of an implicit symmetric positive semi-definite matrix".
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from tests.oracles import anisotropic, ring
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks.experiment import Choose, seeded
from benchmarks.intervals import Array, Estimate, mean_variance, ratio_of_variances
from benchmarks.trained import exact, trained
from hosm_losses.losses.terms import higher_residuals
from hosm_losses.model import bind_model
from hosm_losses.probes import DISTRIBUTIONS, Hutchinson

CASES = ("ring", "mixture", "digits", "images", "large images")
TERMS = ("trace", "Frobenius", "third")
STANDARD_ERRORS, IN_INTERVAL = 5.0, 2 * 1.96
MIXTURES = {"ring": ring, "mixture": anisotropic}
UNITS = "unit vectors"
SAMPLERS = (*DISTRIBUTIONS, UNITS)
LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # σ̂ over the data's standard deviation
CHUNK_ELEMENTS = 2**16  # of a batch of probes that is sent through a network at once
CHUNK_PROBES = 256  # whose products with all forms are held at once
DENSE = 64  # up to which d all T_k are built


class Point:
    """What is estimated of a network at one point, from one row of the data.

    Attributes:
        jacobian, second: A and M, (d, d).
        third: v (n, d) → r3 (n, d).
        thirds: T symmetrised in its last two, (d, d, d); None where d is too large.
    """

    def __init__(
        self, model: hosm.ScoreModel, row: Tensor, sigma_hat: float, generator: torch.Generator
    ) -> None:
        self.shape, d = row.shape, row.numel()
        noise = torch.randn(row.shape, generator=generator, dtype=row.dtype)[None]
        level = torch.tensor([sigma_hat], dtype=torch.float64).log()
        t = model.schedule.time(level).to(row.dtype)
        alpha, sigma = (float(part) for part in model.schedule(t))
        x, bound = alpha * row[None] + sigma * noise, bind_model(model, 1, t=t)

        def derive(v: Tensor, order: int) -> tuple[Tensor, ...]:
            """f, D and G along v (n, d)."""
            with torch.no_grad():
                return bound.derive(x, sigma * v.to(x.dtype).reshape(-1, *x.shape), order=order)

        def in_chunks(function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
            parts = v.split(max(1, CHUNK_ELEMENTS // d))
            return torch.cat([function(part).flatten(1) for part in parts])

        def residual(v: Tensor) -> Tensor:
            value, directional, gradient = derive(v, 3)
            probes = v.to(x.dtype).reshape(directional.shape)
            *_, target = higher_residuals(value + noise, directional + probes, probes)
            return gradient - target

        self.jacobian = in_chunks(lambda v: derive(v, 2)[1], torch.eye(d)).T.double()
        with torch.no_grad():
            ell = (noise + bound.f(x)).flatten().double()
        eye = torch.eye(d, dtype=torch.float64)
        self.second = self.jacobian + eye - torch.outer(ell, ell)
        self.third, self.thirds = partial(in_chunks, residual), None
        if d <= DENSE:
            self.thirds = polarised(self.third, d)
            self.third = along(self.thirds)

    def estimates(self, term: str, probes: Tensor) -> Tensor:
        """What each of the probes (n, d) estimates of a term, (n, m)."""
        if term == "third":
            return self.third(probes).double()
        if term == "trace":
            return (probes * (probes @ self.jacobian.T.float())).sum(1, keepdim=True).double()
        return (probes @ self.second.T.float()).square().sum(1, keepdim=True).double()

    def forms(self, term: str) -> Tensor | None:
        """The symmetric forms (m, d, d) of a term, None where they are not built."""
        if term == "third":
            return self.thirds
        matrix = self.second.T @ self.second if term == "Frobenius" else self.jacobian
        return symmetric(matrix)[None]


def symmetric(forms: Tensor) -> Tensor:
    """The part that a quadratic form sees."""
    return (forms + forms.transpose(-1, -2)) / 2


def polarised(quadratic: Callable[[Tensor], Tensor], d: int) -> Tensor:
    """The symmetric forms (m, d, d) of a quadratic map v (n, d) → (n, m)."""
    eye = torch.eye(d)
    rows, columns = torch.triu_indices(d, d)
    singles = quadratic(eye).double()
    pairs = quadratic(eye[rows] + eye[columns]).double() - singles[rows] - singles[columns]
    forms = pairs.new_empty(pairs.shape[1], d, d)
    forms[:, rows, columns] = forms[:, columns, rows] = pairs.T / 2
    return forms


def along(forms: Tensor) -> Callable[[Tensor], Tensor]:
    """The quadratic map v (n, d) → (n, m) of forms (m, d, d)."""
    m, d, _ = forms.shape
    flat = forms.reshape(m * d, d)

    def quadratic(v: Tensor) -> Tensor:
        parts = v.to(forms.dtype).split(CHUNK_PROBES)
        return torch.cat([((v @ flat.T).view(-1, m, d) @ v[:, :, None])[..., 0] for v in parts])

    return quadratic


def draw(name: str, count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent probes (count, d) of a sampler, in float32."""
    if name in DISTRIBUTIONS:
        return Hutchinson(1, name).draw(torch.empty(count, *shape), generator)[0].flatten(1)
    elements = torch.Size(shape).numel()
    chosen = torch.randint(elements, (count,), generator=generator)
    return torch.nn.functional.one_hot(chosen, elements).float() * elements**0.5


def known_variance(name: str, forms: Tensor, shape: tuple[int, ...]) -> float:
    """Variance of vᵀ B_k v over probes v of a sampler, summed over k; B symmetric, (m, d, d).

    "dct" knows about the shape of a sample.
    """
    if name == "dct":
        return known_variance("rademacher", _rotated(forms, shape), shape)
    d, diagonal = forms.shape[-1], forms.diagonal(dim1=-2, dim2=-1)
    square, traces = forms.square().sum(), diagonal.sum(1).square().sum()
    variances = {
        "rademacher": 2 * (square - diagonal.square().sum()),
        "gaussian": 2 * square,
        "sphere": 2 * d / (d + 2) * (square - traces / d),
        UNITS: d**2 * diagonal.var(1, correction=0).sum(),
    }
    return float(variances[name])


def _rotated(forms: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Q B Qᵀ, with Q from scipy's own transform and not the library's."""
    from scipy.fft import dctn

    def along(array: Tensor) -> Tensor:
        rows = array.reshape(-1, *shape).numpy()
        axes = tuple(range(1, rows.ndim))
        return torch.from_numpy(dctn(rows, axes=axes, norm="ortho")).reshape(array.shape)

    return along(along(forms).transpose(-1, -2).contiguous()).transpose(-1, -2)


class Measured:
    """Estimates by probes of a kind, at several points, and their variance.

    Attributes:
        rows: the estimates, (points · m, repeats).
        variance: summed over the m elements of an estimate, averaged over points.
        known: whether the variance in closed form lies in the interval; None where there is none.
    """

    def __init__(self, points: list[Point], term: str, name: str, repeats: int):
        generator, shape = seeded(1), points[0].shape
        found, known = [], []
        for point in points:
            probes = draw(name, repeats, shape, generator)
            found.append(point.estimates(term, probes).T)
            forms = point.forms(term)
            if forms is not None:
                known.append(known_variance(name, forms, shape))
        self.rows: Array = torch.cat(found).numpy()
        self.variance = Estimate(*(len(found[0]) * each for each in mean_variance(self.rows)))
        self.known: bool | None = None
        if any(known):
            expected, (value, low, high) = float(np.mean(known)), self.variance
            error = max((high - low) / IN_INTERVAL, 1e-9)
            assert abs(value - expected) < STANDARD_ERRORS * error, (term, name, expected)
            self.known = low <= expected <= high


def over_signs(levels: dict[str, dict[str, Measured]], name: str) -> dict[str, object]:
    """Variances of a sampler over those of signs, by level and in sum."""
    rows = {level: (each[name], each["rademacher"]) for level, each in levels.items()}
    sums = [sum(pair[k].variance.value for pair in rows.values()) for k in range(2)]
    ratios = {level: ratio_of_variances(a.rows, b.rows) for level, (a, b) in rows.items()}
    return {**ratios, "sum": sums[0] / sums[1]}


def answer(name: str, choose: Choose) -> dict:
    """Variances on one kind of data, over those of signs."""
    large = "images" in name
    count = choose(1, 2 if large else 4)
    repeats = choose(400, 1000 if large else 2000)
    of_term = dict.fromkeys(TERMS, repeats) | {"third": choose(16, 256) if large else repeats}
    generator = seeded(0)
    if name in MIXTURES:
        mixture = MIXTURES[name]()
        std = float(mixture.sample(4096, generator).std())
        problem = exact(mixture)
    else:
        problem = trained(name, choose(5, None))
        mixture, std = None, problem.std
    levels: dict[str, dict[str, dict[str, Measured]]] = {term: {} for term in TERMS}
    for level in tqdm(LEVELS[:: choose(2, 1)], name, leave=False):
        rows = mixture.sample(count, generator) if mixture else problem.data[:count]
        points = [Point(problem.model, row, level * std, generator) for row in rows]
        for term, times in of_term.items():
            levels[term][f"{level:g} std"] = {
                sampler: Measured(points, term, sampler, times) for sampler in SAMPLERS
            }
    every = [row for each in levels.values() for rows in each.values() for row in rows.values()]
    known = [row.known for row in every if row.known is not None]
    signs = {
        term: {level: rows["rademacher"].variance.value for level, rows in each.items()}
        for term, each in levels.items()
    }
    over = {
        sampler: {term: over_signs(levels[term], sampler) for term in TERMS}
        for sampler in SAMPLERS
    }
    return {
        name: {
            "elements": problem.data[0].numel(),
            "known": {"inside": sum(known), "all": len(known)},
            "over signs": {"rademacher, absolute": signs, **over},
        }
    }
