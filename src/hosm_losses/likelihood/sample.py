"""Samples of the probability-flow ODE, with the density of each.

What:
    The paths of `ode` from a latent at t_max to a point at t_min. The log-density is gathered on
    the way by the same quadrature, so it is that of `ode_nll` at the sample, at no second solve.
    Without a divergence a node is one evaluation of the network, and nothing is differentiated.

Source:
    Song et al., arXiv 2011.13456, for the sampler; the density is that of `ode`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hosm_losses._checks import check_choice, check_flag, check_generator, check_whole, complaint
from hosm_losses.likelihood.inputs import evaluate
from hosm_losses.likelihood.ode import Divergence, Method, check_probes, solver
from hosm_losses.likelihood.paths import Batch, Paths, followed
from hosm_losses.likelihood.result import NLLResult
from hosm_losses.model import ScoreModel, check_model
from hosm_losses.probes import Distribution


@dataclass(frozen=True)
class SampleResult:
    """Samples with their density.

    Attributes:
        x: the samples at t_min, (B, *).
        latent: what they were made from, at t_max, (B, *).
        nll: −log p(x) in nats, (B,); None where no divergence was asked for.
        nfe: network evaluations, (B,).
        standard_error: of nll, from random probes, (B,); None where it is not known.
        solver_error: estimate of what the solver's error does to nll, in nats, as in `NLLResult`,
            (B,); None with nll.
        failed: where there is nothing to use, (B,): a number was not finite, the path did not
            arrive, or solver_error is too large; nll is NaN there. `failures` says why.
        steps: of the fixed grid; None with the adaptive method.
    """

    x: Tensor
    latent: Tensor
    nll: Tensor | None
    nfe: Tensor
    standard_error: Tensor | None
    solver_error: Tensor | None
    failed: Tensor
    steps: int | None = None

    def failures(self) -> dict[int, str]:
        """Why each sample that failed did, and what to do, by its row.

        Example:
            >>> one = torch.ones(1)
            >>> drawn = SampleResult(torch.zeros(1, 3), one, one, one, None, one * 2000, one > 0)
            >>> print(drawn.failures()[0])  # doctest: +ELLIPSIS
            its solver_error of 2e+03 nats is above 1000: take more steps...
        """
        error = torch.zeros_like(self.nfe) if self.solver_error is None else self.solver_error
        return NLLResult(error, self.x, self.nfe, None, error, self.failed).failures()


def ode_sample(
    model: ScoreModel,
    latent: Tensor | Sequence[int],
    *,
    method: Method = "fixed",
    steps: int | None = 64,
    divergence: Divergence | None = "hutchinson",
    probes: int = 1,
    distribution: Distribution = "rademacher",
    tolerance: float | None = None,
    group: "dist.ProcessGroup | None" = None,
    data_mean: float | Tensor = 0.0,
    data_std: float | Tensor = 0.5,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    enable_grad: bool = False,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> SampleResult:
    """Solve the probability-flow ODE from noise to data, with the density of what comes out.

    No training mode is changed: call `model.eval()` first if the network has dropout. For guidance
    give a network that wraps yours; the density is then that of the guided ODE.

    Args:
        model: the score model.
        latent: points at t_max, (B, *), in the coordinates of x; or a shape (B, *), for which they
            are drawn from N(0, prior_std² I) in the dtype and on the device of the network's first
            parameter.
        method: "fixed" or "adaptive", as in `ode_nll`, which says what the other options do.
        steps: of the fixed grid, 4 or more, with steps + 10 evaluations; or None.
        divergence: "hutchinson" or "exact", or None for samples without their density, which
            differentiates nothing.
        probes: K, the number of probes a sample.
        distribution: of the probes.
        tolerance: of the adaptive method, nats a step; with steps=None, nats of `solver_error`; as
            in `ode_nll`.
        group: with steps=None, the processes that have to take the same steps.
        data_mean: mean of the data.
        data_std: standard deviation of the data.
        log_prior: log-density at t_max, latent (B, *) → (B,), of the latents that are given.
        batch_size: samples solved at a time, all if None.
        progress: whether to show a progress bar, for which tqdm has to be installed.
        enable_grad: whether the result carries a graph, for gradients through it; as in `ode_nll`.
        generator: the source of the latents and the probes; the global one if None.
        model_kwargs: keyword arguments of the network.

    Returns:
        The samples, at the schedule's t_min, where they carry noise of σ(t_min).

    Raises:
        TypeError: for tensors, containers, flags and other objects of a wrong type or dtype.
        ValueError: for a wrong shape, device, name or number, also one of a wrong type.
        DerivativeError: where the network's output does not depend on its input differentiably.
        ImportError: for a progress bar without tqdm.

    Example:
        >>> from hosm_losses import VESchedule
        >>> schedule = VESchedule(sigma_max=200.0)
        >>> def standard_normal(x, t):
        ...     return schedule.sigma(t)[:, None] * x / (1 + schedule.sigma(t)[:, None] ** 2)
        >>> model = ScoreModel(standard_normal, schedule)
        >>> latent = torch.zeros(1, 2)
        >>> drawn = ode_sample(model, latent, divergence="exact", data_std=1.0)
        >>> print(drawn.x, f"{drawn.nll.item():.3f} nats")
        tensor([[0., 0.]]) 1.838 nats
    """
    if divergence is not None:
        check_choice("divergence (or None)", divergence, get_args(Divergence))
    solve = solver(method, steps, tolerance, group)
    kind = check_probes(probes, distribution, divergence)
    check_flag("enable_grad", enable_grad)
    given = isinstance(latent, Tensor)
    if not given and log_prior is not None:
        raise ValueError(
            "latent: expected latents drawn from the prior of log_prior; got a shape, for which "
            "they would be drawn from N(0, prior_std²)."
        )
    start = latent if given else _drawn(check_model(model), latent, generator)

    def sampled(batch: Batch) -> NLLResult:
        return followed(Paths(batch, kind, distribution), solve, backwards=True)

    shared = (data_mean, data_std, log_prior, None, batch_size, progress, generator)
    options: dict[str, Any] = {"name": "latent", "of_prior": not given}
    found = evaluate(
        sampled, model, start, *shared, model_kwargs, enable_grad=enable_grad, **options
    )
    return SampleResult(
        x=found.latent,
        latent=start,
        nll=None if divergence is None else found.nll,
        nfe=found.nfe,
        standard_error=found.standard_error,
        solver_error=None if divergence is None else found.solver_error,
        failed=found.failed,
        steps=found.steps,
    )


def _drawn(model: ScoreModel, shape: object, generator: torch.Generator | None) -> Tensor:
    """Latents of a shape, of the prior."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        expected = "a tensor (B, *) at t_max, or its shape, which begins with B"
        raise TypeError(complaint("latent", expected, shape))
    sizes = [check_whole("latent's shape", size, 1) for size in shape]
    parameters = model.network.parameters() if isinstance(model.network, nn.Module) else ()
    like = next((each for each in parameters if each.is_floating_point()), torch.empty(0))
    source = check_generator(generator, like.device)
    noise = torch.randn(sizes, generator=source, dtype=like.dtype, device=like.device)
    return model.schedule.prior_std * noise
