"""How good an ensemble of networks is: the likelihood, score and samples of its ODE.

The KL divergence is the mean of r = log q − log p over draws of q, and not that of
r + exp(−r) − 1, whose mean over q is the same and whose terms vary less where p is close to q. The
mean of exp(−r) is the mass of p. Much of it can lie where p is many times q and no draw falls: the
sample mean then misses it, misses more of it the worse a network is, and its standard error does
not tell. The mean of r is free of this. Its noise, of variance near 2 KL, is kept small by Sobol
points, and most of it cancels between networks judged at the same points.

A seed has lost a mode where more than LOST_SHARE of the draws of q have r > LOST_RATIO. It is
counted, and left out of ratios: one such seed is most of any mean.

Values are kept by member and block of points, (S, BLOCKS). Differences between any two rows are
then paired by seed and by points, and so are log-ratios of score errors.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks.experiment import Row, seeded
from benchmarks.intervals import Estimate, over_seeds
from benchmarks.worth_problems import BLOCKS, Cell, Digits, Lattice

OWN = ", own rate"  # ends the name of a row whose rate is chosen in its cell
ROWS = 8192  # of a batch, over the elements of a sample; larger ones cost more than they save
LOST_RATIO, LOST_SHARE = 5.0, 0.01


def judge(cell: Cell, model: hosm.ScoreModel, members: int) -> Row:
    """All quantities: `kl` and `log_score` (S, BLOCKS), the others (S,).

    Of digits, whose density is not known, `kl` is the negative log-likelihood of the test split.

    Raises:
        ValueError: where one is not finite.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # no graph of theirs beside that of x
    ratios = finite(log_ratio(cell, model, members))
    row = {"kl": by_block(ratios).tolist()}
    if isinstance(cell.density, Digits):
        return row | {"lost": [0.0] * members}
    row |= {"lost": (ratios > LOST_RATIO).double().mean(1).tolist()}
    return row | score(cell, model, members) | samples(cell, model, members)


def judge_briefly(cell: Cell, model: hosm.ScoreModel, members: int) -> Row:
    """The KL divergence of each member, None where it is not finite."""
    means = log_ratio(cell, model, members, validation=True).mean(1)
    return {"kl": [float(mean) if mean.isfinite() else None for mean in means]}


def by_rate(row: Row, rates: Sequence[float]) -> dict[float, float]:
    """The mean KL divergence over the spare seeds at each rate.

    Rates at which a seed failed are left out; all are, of a row that failed.
    """
    if "kl" not in row:
        return {}
    means = np.reshape(np.array(row["kl"], float), (len(rates), -1)).mean(1).tolist()
    return {rate: mean for rate, mean in zip(rates, means, strict=True) if not np.isnan(mean)}


def by_block(values: Tensor) -> Tensor:
    """Means of (S, N) over the points of each block, (S, BLOCKS)."""
    return values.reshape(len(values), BLOCKS, -1).mean(2)


def by_member(values: Tensor, members: int) -> Tensor:
    """(N·S,), whose rows take turns, as (S, N)."""
    return values.reshape(-1, members).T


def finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise ValueError(
            f"expected finite likelihoods; got {bad} of {values.numel()} that are not"
        )
    return values


def options(cell: Cell, members: int) -> dict[str, Any]:
    size = max(1, ROWS // members // cell.density.elements) * members
    return {**cell.ode(), "batch_size": size}


def log_ratio(
    cell: Cell, model: hosm.ScoreModel, members: int, *, validation: bool = False
) -> Tensor:
    """r = log q − log p at draws of q, (S, N); −log p of digits, of the test split if not told."""
    if isinstance(cell.density, Digits):
        rows = cell.density.validation if validation else cell.density.test
        points = cell.density.dequantize(rows, seeded(1))
        log_q = torch.zeros(len(points), dtype=torch.float64)
    else:
        points, log_q, _ = cell.at_t_min
    x = points.float().repeat_interleave(members, 0)
    return log_q + by_member(hosm.ode_nll(model, x, **options(cell, members)).nll, members)


def score(cell: Cell, model: hosm.ScoreModel, members: int) -> Row:
    """Errors of the score of the ODE, ‖∇log p − ∇log q‖² at t_min, and J_SM in nats.

    J_SM = ∫ E‖ε̂ + σ∇log q_t‖² du, u = log σ̂, is that of the network's own score at all levels;
    left out where q is known at t_min alone.
    """
    points, _, exact = cell.at_t_min
    errors = []
    rows = torch.arange(len(points)).reshape(BLOCKS, -1)[:, : cell.scored].flatten()
    for part in rows.split(max(1, ROWS // 16 // members // cell.density.elements)):
        x = points[part].float().repeat_interleave(members, 0).requires_grad_()
        how = options(cell, members) | {"batch_size": None}
        nll = hosm.ode_nll(model, x, enable_grad=True, **how).nll
        (slope,) = torch.autograd.grad(nll.sum(), x)
        truth = exact[part].repeat_interleave(members, 0)
        errors.append((slope + truth).square().sum(1))
    error = finite(by_member(torch.cat(errors), members))
    row = {"log_score": by_block(error.log()).tolist(), "score_mean": error.mean(1).tolist()}
    if isinstance(cell.density, Lattice):
        return row
    x, t, noise = (part.repeat_interleave(members, 0) for part in cell.at_all_levels[:3])
    with torch.no_grad():
        off = (model.noise(x.float(), t.float()).double() - noise).square().sum(1)
    low, high = cell.schedule.log_sigma_hat_range
    return row | {"j_sm": ((high - low) * by_member(off, members).mean(1)).tolist()}


def facts(cell: Cell) -> Row:
    """What the gain may depend on: the elements, and the noise of order one's targets in nats.

    The noise is ∫ E‖ε + σ∇log q_t‖² du, u = log σ̂: what order one's loss is for the true score.
    None where q is not known at every level.
    """
    known = {"elements": cell.density.elements, "noise": None}
    if isinstance(cell.density, Lattice | Digits):
        return known
    _, _, mean, drawn = cell.at_all_levels
    low, high = cell.schedule.log_sigma_hat_range
    return known | {"noise": (high - low) * float((drawn - mean).square().sum(1).mean())}


def samples(cell: Cell, model: hosm.ScoreModel, members: int) -> Row:
    """The effective size of draws of the ODE, weighted by q/p, over their number, (S,).

    The latents are those of all networks.
    """
    mean, std = cell.prior
    latent = mean + std * torch.special.ndtri(cell.sobol(len(std), 3 * BLOCKS))
    latent = latent.float().repeat_interleave(members, 0)
    drawn = hosm.ode_sample(model, latent, **options(cell, members))
    assert drawn.nll is not None
    levels = cell.schedule(torch.full((1,), cell.schedule.t_min, dtype=torch.float64))
    alpha, sigma = (level.expand(len(latent)) for level in levels)
    log_q, _ = cell.density.diffuse(drawn.x.double(), alpha, sigma)
    return {"effective_size": effective_size(finite(by_member(log_q + drawn.nll, members)))}


def effective_size(log_w: Tensor) -> list[float]:
    """(Σ w)²/(N Σ w²) of log-weights (S, N)."""
    size = (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp()
    return (size / log_w.shape[1]).tolist()


def lost(row: Mapping[str, Any]) -> np.ndarray:
    """Which seeds have lost a mode, (S,)."""
    return np.array(row["lost"]) > LOST_SHARE


def compare(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Estimate]:
    """A row over another of the same seeds: the ratios of KL divergences and of score errors.

    Both are geometric means with the interval of log-ratios, over the seeds that have lost no mode
    in either. Those of KL are of seeds, over all points: a mean over a block may be below 0. The
    chance of the points, which all seeds share, is not in it. Those of the score are of single
    points. NaN where fewer than two seeds are left, or a KL divergence is not above 0. Where the
    density is not known, the mean difference in nats is all there is.
    """
    whole = ~(lost(row) | lost(base))
    if "log_score" not in row:
        return {"difference": over_seeds(np.subtract(row["kl"], base["kl"])[whole])}
    log_ratios = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.log(np.mean(row["kl"], 1)) - np.log(np.mean(base["kl"], 1))
    log_ratios["kl"] = kl[whole, None]
    log_ratios["score"] = np.subtract(row["log_score"], base["log_score"])[whole]
    return {
        name: Estimate(*np.exp(over_seeds(values)).tolist())
        if len(values) > 1
        else Estimate(np.nan, np.nan, np.nan)
        for name, values in log_ratios.items()
    }


def base_of(name: str) -> str:
    """The row that a row is compared with, which differs from it in one respect.

    Targets are compared with plain order one, orders with order one under the same targets, quiet
    batches with the same targets as drawn, each of these at its own rate with the other at its
    own, a long training with one of a third of its steps, and second stages with order one
    continued.
    """
    if name.endswith(OWN) and name != "one" + OWN:
        return base_of(name.removesuffix(OWN)) + OWN
    if name.startswith("after"):
        return "after: one, averaged"
    if name == "long":
        return "a third of long"
    if name.startswith("one"):
        targets, *quiet = re.split(", pairs|, times", name, maxsplit=1)
        return targets if quiet else "one"
    return "one, scores, averaged" if "scores" in name else "one, averaged"


def ratios(report: Row, base_of: Callable[[str], str] = base_of) -> Row:
    """For each row of a cell: nats, the ratios to its base, and how many seeds lost a mode.

    Where the density is not known: nats, the difference from its base, and 0 lost modes.

    A ratio is None where fewer than two seeds kept all modes, or where a KL divergence, a mean
    over points, is not above 0: then "below" is 1. A row that could not be made says "failed".
    """
    rows = {name: row for name, row in report["rows"].items() if "lost" in row}
    found: Row = {}
    for name, row in report["rows"].items():
        if "failed" in row:
            found[name] = {"nats": "failed"}
        if name not in rows:
            continue
        found[name] = {"nats": float(np.mean(row["kl"])), "lost": int(lost(row).sum())}
        other = rows.get(base_of(name), row)
        if other is row:
            continue
        for key, estimate in compare(row, other).items():
            found[name][key] = None if np.isnan(estimate.value) else [*estimate]
        whole = np.sum(~lost(row) & ~lost(other))
        if "kl" in found[name] and found[name]["kl"] is None and whole > 1:
            found[name]["below"] = 1
    return found


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, equal values sharing their mean rank."""
    ranks = []
    for values in (x, y):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[places])
    with np.errstate(invalid="ignore"):  # NaN if all values are equal
        return float(np.corrcoef(*ranks)[0, 1])


def dependence(reports: Sequence[Row]) -> Row:
    """Rank correlations, over cells, of ratios with the number of elements and other facts.

    "gap" is KL − J_SM of plain order one. A correlation above 0 says that the gain is smaller
    where the fact is larger. A KL divergence that is not above 0 ranks lowest.
    """
    cells = []
    for report in reports:
        known, plain = dict(report.get("facts", {})), report["rows"].get("one", {})
        if "j_sm" in plain:
            known["gap"] = np.mean(plain["kl"]) - np.mean(plain["j_sm"])
        cells.append((ratios(report), known))
    found: Row = {}
    names = ("one, averaged", "one, scores, averaged", "two, averaged", "three, averaged")
    for name, key in product(names, ("kl", "score")):
        pairs = []
        for rows, known in cells:
            row = rows.get(name, {})
            if row.get(key) is not None:
                pairs.append((row[key][0], known))
            elif key == "kl" and "below" in row:
                pairs.append((0.0, known))
        if len(pairs) < 3:
            continue
        found[f"{name}: {key}"] = {"cells": len(pairs)}
        for fact in ("elements", "noise", "gap"):
            with_fact = [
                (ratio, known[fact]) for ratio, known in pairs if known.get(fact) is not None
            ]
            if with_fact:
                found[f"{name}: {key}"][fact] = rank_correlation(*zip(*with_fact, strict=True))
    return found
