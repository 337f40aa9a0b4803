"""How good an ensemble of networks is: the likelihood, score and samples of its ODE.

The KL divergence is the mean of r = log q − log p over draws of q, and not that of
r + exp(−r) − 1, whose mean over q is the same and whose terms vary less where p is close to q. The
mean of exp(−r) is the mass of p. Much of it can lie where p is many times q and no draw falls: the
sample mean then misses it, misses more of it the worse a network is, and its standard error does
not tell. The mean of r is free of this. Its noise, of variance near 2 KL, is kept small by Sobol
points, and most of it cancels between networks judged at the same points.

Values are kept by member and block of points, (S, BLOCKS). Differences between any two rows are
then paired by seed and by points, and so are log-ratios of score errors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks.intervals import Estimate, over_seeds
from benchmarks.worth_problems import BLOCKS, Cell

ROWS = 8192  # of a batch, over the elements of a sample; larger ones cost more than they save
Row = dict[str, Any]
LOW = -5.0  # log-weights below it are of samples where the model has far too much mass


def judge(cell: Cell, model: hosm.ScoreModel, members: int) -> Row:
    """All quantities: `kl` and `log_score` (S, BLOCKS), the others (S,).

    Raises:
        ValueError: where one is not finite.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # no graph of theirs beside that of x
    row = {"kl": by_block(finite(log_ratio(cell, model, members))).tolist()}
    return row | score(cell, model, members) | samples(cell, model, members)


def judge_briefly(cell: Cell, model: hosm.ScoreModel, members: int) -> Row:
    """The KL divergence of each member, None where it is not finite."""
    means = log_ratio(cell, model, members).mean(1)
    return {"kl": [float(mean) if mean.isfinite() else None for mean in means]}


def by_rate(row: Row, key: str, rates: Sequence[float]) -> dict[float, float]:
    """The mean over the spare seeds at each rate, of a row with all seeds of one after the other.

    Rates at which a seed failed are left out; all are, of a row that failed.
    """
    if key not in row:
        return {}
    means = np.reshape(np.array(row[key], float), (len(rates), -1)).mean(1).tolist()
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


def log_ratio(cell: Cell, model: hosm.ScoreModel, members: int) -> Tensor:
    """r = log q − log p at draws of q, (S, N)."""
    points = cell.at_t_min
    x = points.x.float().repeat_interleave(members, 0)
    nll = hosm.ode_nll(model, x, **options(cell, members)).nll
    return points.log_q + by_member(nll, members)


def score(cell: Cell, model: hosm.ScoreModel, members: int) -> Row:
    """Errors of the score of the ODE, ‖∇log p − ∇log q‖² at t_min, and J_SM in nats.

    J_SM = ∫ E‖ε̂ + σ∇log q‖² du, u = log σ̂, is that of the network's own score at all levels.
    """
    points, errors = cell.at_t_min, []
    rows = torch.arange(len(points.x)).reshape(BLOCKS, -1)[:, : cell.scored].flatten()
    for part in rows.split(max(1, ROWS // 16 // members // cell.density.elements)):
        x = points.x[part].float().repeat_interleave(members, 0).requires_grad_()
        given = options(cell, members) | {"batch_size": None}
        nll = hosm.ode_nll(model, x, enable_grad=True, **given).nll
        (slope,) = torch.autograd.grad(nll.sum(), x)
        truth = points.score[part].repeat_interleave(members, 0)
        errors.append((slope + truth).square().sum(1))
    error = finite(by_member(torch.cat(errors), members))
    x, t, noise = (each.repeat_interleave(members, 0) for each in cell.at_all_levels)
    with torch.no_grad():
        off = (model.noise(x.float(), t.float()).double() - noise).square().sum(1)
    low, high = cell.schedule.log_sigma_hat_range
    return {
        "log_score": by_block(error.log()).tolist(),
        "score_mean": error.mean(1).tolist(),
        "score_median": error.median(1).values.tolist(),
        "j_sm": ((high - low) * by_member(off, members).mean(1)).tolist(),
    }


def samples(cell: Cell, model: hosm.ScoreModel, members: int) -> Row:
    """Of draws of the ODE, from latents that all networks share."""
    mean, std = cell.prior
    latent = mean + std * torch.special.ndtri(cell.sobol(len(std), 3 * BLOCKS))
    latent = latent.float().repeat_interleave(members, 0)
    drawn = hosm.ode_sample(model, latent, **options(cell, members))
    assert drawn.nll is not None
    count = (len(drawn.x),)
    levels = cell.schedule(torch.full((1,), cell.schedule.t_min, dtype=torch.float64))
    alpha, sigma = (each.expand(count) for each in levels)
    log_q, _ = cell.density.diffuse(drawn.x.double(), alpha, sigma)
    return weights(finite(by_member(log_q + drawn.nll, members)))


def weights(log_w: Tensor) -> Row:
    """Importance sampling with weights log w = log q − log p (S, N) at draws of p.

    The weights have mean 1, so the log of their mean is the error of log Z.
    """
    total = log_w.logsumexp(1)
    size = (2 * total - (2 * log_w).logsumexp(1)).exp() / log_w.shape[1]
    return {
        "effective_size": size.tolist(),  # over the number of samples
        "reverse_kl": (-log_w.mean(1)).tolist(),
        "low_share": (log_w < LOW).double().mean(1).tolist(),
        "log_z_error": (total - torch.tensor(log_w.shape[1]).log()).tolist(),
    }


def compare(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Estimate]:
    """A row over another of the same seeds: the ratios of KL divergences and of score errors.

    Both are geometric means with the interval of log-ratios. Those of KL are of seeds, over all
    points: a mean over a block may be below 0. The chance of the points, which all seeds share, is
    not in it. Those of the score are of single points. NaN where a KL divergence is not above 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        of_kl = np.log(np.mean(row["kl"], 1) / np.mean(base["kl"], 1))
    of_score = np.subtract(row["log_score"], base["log_score"])
    return {
        name: Estimate(*(float(np.exp(each)) for each in over_seeds(log_ratios)))
        for name, log_ratios in (("kl", of_kl[:, None]), ("score", of_score))
    }
