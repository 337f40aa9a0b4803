r"""`AdaptiveTimes`, a sampler of t that learns at which times a loss needs the most samples.

Formula:
    Let u = log σ̂ range over [u₀, u₁]. The objective weights u by the base density b(u), which is
    uniform if weighting="likelihood" and otherwise the schedule's own. `AdaptiveTimes` divides the
    range into 32 bins of equal width. Let M_k be the mass of bin k under b. The sampler draws
    bin k with probability
        P_k = M_k (φ + (1 − φ) m_k/Σ_j M_j m_j),   φ = 0.15.
    Then it draws u uniformly within the bin, so the density of u is P_k/width. Every term is
    multiplied by b(u) and divided by this density. The mean of the term is therefore the same for
    any m, and for any M that is positive where b is positive.

    If the schedule is a table, each entry belongs to the bin that contains its log σ̂. Once bin k
    is drawn, entry i of this bin is drawn with probability b_i/M_k. Here, b_i is the probability
    of the entry under b.

    For φ = 0, the variance of the gradient is smallest if m_k² is proportional to V_k. Here, V_k
    is the squared norm of the gradient of the loss of one sample (or one antithetic pair),
    averaged over the times in bin k. With Adam, the squared norm is replaced by
    Σ_θ g_θ²/(√v_θ + eps), where v_θ is Adam's running mean of squared gradients.

Source:
    Importance sampling of t for likelihoods is from Song et al., arXiv 2101.09258; a learned
    version is from Zheng et al., arXiv 2305.03935, appendix. Nichol and Dhariwal, arXiv
    2102.09672, sample t in proportion to the square root of the second moment of the loss.
    `AdaptiveTimes` uses the second moment of the gradient instead. Sampling in proportion to its
    square root minimises the variance of the gradient, even if losses and gradients depend
    differently on the noise level.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hosm_losses._checks import (
    can_read_values,
    check_sample_batch,
    check_whole,
    error_message,
    fork_rng,
    generator_kwargs,
    widest_dtype,
)
from hosm_losses._torch_internals import outside_inference_mode
from hosm_losses.derivatives import NetworkState
from hosm_losses.schedules import Schedule

BINS, FLOOR, DECAY = 32, 0.15, 0.9  # the number of bins, φ, and the part of m² kept by `learn`
NODES = 8  # of the quadrature for a bin's mass
SMALL = 100_000  # number of parameters up to which vmap is faster for gradients of single samples
CHUNK = 2**25  # number of gradient elements that vmap computes at once


def ends_of(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return u₀ and u₁ − u₀ as 0-dim tensors, so that torch.compile need not read their values."""
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64, device="cpu")
    low, high = schedule.log_sigma_hat(ends).unbind()
    return low, high - low


def rate_of(schedule: Schedule, time: Tensor, *, indices: bool) -> Tensor:
    """Return du/dt = g²/(2σ²) or, for a table, the length w_i of each entry's interval of u."""
    if indices:
        above, below = (schedule.clip(time + half) for half in (0.5, -0.5))
        return schedule.log_sigma_hat(above) - schedule.log_sigma_hat(below)
    return schedule.squared_diffusion(time) / (2 * schedule.sigma(time).square())


class Bins(NamedTuple):
    """The bins of log σ̂ for a schedule, with their masses under the base density."""

    schedule: Schedule
    low: Tensor  # u₀
    width: Tensor  # of a bin
    masses: Tensor  # M, (32,)
    entries: tuple[Tensor, Tensor] | None  # of a table: Σ_{j<i} b_j, (N + 1,), and bounds (33,)

    @classmethod
    def of(cls, schedule: Schedule, like: Tensor, *, uniform: bool) -> "Bins":
        """Return the bins, with tensors on the device of `like`."""
        low, span = ends_of(schedule)
        options = {"device": like.device, "dtype": widest_dtype(like)}
        if not schedule.integer_time:
            masses = torch.full((BINS,), 1 / BINS, **options)
            if not uniform:
                inside = torch.arange(0.5, BINS * NODES, **options) / (BINS * NODES)
                t = schedule.time(low + span * inside)
                density = schedule.time_density(t) / rate_of(schedule, t, indices=False)
                masses = density.reshape(BINS, NODES).mean(1)
                masses = masses / masses.sum()
            return cls(schedule, low, span / BINS, masses, None)
        index = torch.arange(schedule.t_max + 1, **options)
        ends = (index - 0.5).clamp_min(0)
        below = (schedule.log_sigma_hat(ends) - low) / span if uniform else index / len(index)
        below = torch.cat([below, below.new_ones(1)])
        edges = low + span * torch.arange(1, BINS, **options) / BINS
        inner = torch.searchsorted(schedule.log_sigma_hat(index), edges)
        bounds = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(index))])
        return cls(schedule, low, span / BINS, below[bounds].diff(), (below, bounds))

    def place(self, unit: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map uniform numbers to times; return the times, 1/(density of log σ̂), and the bins.

        Bin k is chosen with a probability proportional to M_k ratios_k. All results are (B,).
        For a table, the times are indices, and the density at an entry is the probability of the
        entry divided by the length w_i of its interval.
        """
        weights = self.masses * ratios
        # A product with a triangular matrix, since PyTorch's cumsum is not deterministic on CUDA.
        triangle = torch.ones(BINS, BINS, dtype=torch.bool, device=unit.device).tril()
        above = (weights * triangle).sum(1)
        total = above[-1]
        # Clamped for an m that is NaN on an accelerator: the loss is then NaN.
        bins = torch.searchsorted(above / total, unit, right=True).clamp(max=BINS - 1)
        inside = (1 - (above[bins] - total * unit) / weights[bins]).clamp(0, 1)
        if self.entries is None:
            t = self.schedule.time(self.low + self.width * (bins + inside))
            return t, self.width * total / weights[bins], bins
        below, bounds = self.entries
        start, stop = bounds[bins], bounds[bins + 1]
        index = torch.searchsorted(below, below[start] + inside * self.masses[bins], right=True)
        index = torch.minimum(torch.maximum(index - 1, start), stop - 1)
        width = rate_of(self.schedule, index.to(unit.dtype), indices=True)
        return index, width * total / (ratios[bins] * (below[index + 1] - below[index])), bins


class AdaptiveTimes(nn.Module):
    """A time sampler that learns at which noise levels a sample's gradient is largest.

    Pass the sampler to a loss as `time_sampler`. The sampler draws a time more often if per-sample
    gradients are large at that time. The terms are reweighted, so the mean of the loss is the same
    as with the default time sampler, but the gradient of the loss is less noisy. Logged terms are
    not reweighted. Times with large gradients are therefore overrepresented in the logged terms.

    The buffer `m` is initially 1 in every bin. A loss reads `m` but does not change it; to update
    `m`, call `learn` about every 50 training steps.

    Attributes:
        m: for each of the 32 bins of log σ̂, the root mean square of the per-sample gradients, up
            to a constant factor; a tensor of shape (32,), in float32 even after `.half()`.

    Example:
        >>> from hosm_losses import FirstOrderDSM, ScoreModel, VPSchedule
        >>> network = nn.Linear(2, 2)
        >>> model = ScoreModel(lambda x, t: network(x), VPSchedule())
        >>> objective = FirstOrderDSM(model, time_sampler=AdaptiveTimes())
        >>> optimizer = torch.optim.Adam(network.parameters())
        >>> objective.time_sampler.learn(objective, torch.randn(64, 2), optimizer)
        >>> bool((objective.time_sampler.m != 1).any())
        True
    """

    m: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("m", torch.ones(BINS, dtype=torch.float32))

    def extra_repr(self) -> str:
        """Return text with the range of m and the bin in which m is largest."""
        least, largest = (float(end) for end in self.m.detach().aminmax())
        where = int(self.m.argmax()) + 1
        return f"m from {least:.2g} to {largest:.2g}, largest in bin {where} of {BINS}"

    def draw(
        self, schedule: Schedule, like: Tensor, generator: torch.Generator | None, *, uniform: bool
    ) -> tuple[Tensor, Tensor]:
        """Draw times t; return t and the inverse density of log σ̂ at t, both (B,).

        If `uniform` is True, the base density is uniform in log σ̂. Otherwise, the base density is
        the schedule's own.
        """
        bins = Bins.of(schedule, like, uniform=uniform)
        options = {"device": like.device, "dtype": bins.masses.dtype}
        unit = torch.rand((len(like),), **options, **generator_kwargs(generator))
        t, spread, _ = bins.place(unit, self._ratios(bins.masses))
        return as_times(t, like), as_times(spread, like)

    def _ratios(self, masses: Tensor) -> Tensor:
        """Return P_k/M_k, (32,)."""
        if can_read_values(self.m):
            self._check()
        m = self.m.to(masses)
        return FLOOR + (1 - FLOOR) * m / (masses * m).sum()

    def _check(self) -> None:
        total = float(self.m.detach().sum())
        if not 0 < total < math.inf:
            expected, remedy = "finite numbers, not all 0", "Reset it: time_sampler.m.fill_(1.0)."
            message = error_message("time_sampler.m", expected, self.m, remedy, got=f"sum {total}")
            raise ValueError(message)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        m = self.m
        super()._apply(fn, recurse)
        # Half precision would round m, or overflow.
        self.m = (self.m if m.is_meta else m).to(self.m.device, torch.float32)
        return self

    def density(self, objective: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the bins' midpoints in log σ̂ and the sampling density there, for plotting.

        Both have shape (32,) and dtype float64 (float32 on devices without float64).

        Raises:
            TypeError: if `objective` is not the loss module that uses this sampler.

        Example:
            >>> from hosm_losses import FirstOrderDSM, ScoreModel, VPSchedule
            >>> model = ScoreModel(lambda x, t: 0 * x, VPSchedule())
            >>> objective = FirstOrderDSM(model, time_sampler=AdaptiveTimes())
            >>> log_sigma_hat, density = objective.time_sampler.density(objective)
            >>> log_sigma_hat.shape, density.shape
            (torch.Size([32]), torch.Size([32]))
        """
        loss = self._loss_of(objective)
        bins = Bins.of(loss.model.schedule, self.m, uniform=loss.options.is_uniform)
        with torch.no_grad():
            middles = torch.arange(0.5, BINS).to(bins.masses)
            weights = bins.masses * self._ratios(bins.masses)
            return bins.low + bins.width * middles, weights / weights.sum() / bins.width

    def learn(
        self,
        objective: nn.Module,
        x0: Tensor,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        rows: int = 64,
        targets: Any = None,
        weights: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Update `m` from per-sample gradients at times spread over the bins.

        The loss is differentiated separately for each of min(rows, B) samples of x0. Their targets
        are computed from the whole batch. The call does not change the network's parameters,
        gradients, buffers or training modes, nor the global random state. If you pass a generator,
        its state advances. During the call, batch norm is in evaluation mode, but dropout keeps
        its mode. The amount of computation is about that of min(rows, B) forward and backward
        passes, each on a single sample. Once `m` has settled, call `learn` less often.

        Under DDP, call `learn` in every process. At each forward pass, DDP broadcasts `m`, like
        any other buffer, from the first process. With broadcast_buffers=False, pass the same x0
        and identically seeded generators in all processes.

        Args:
            objective: the loss module that uses this sampler, possibly within DDP or
                torch.compile.
            x0: data (B, *).
            optimizer: if you pass an optimizer, only the gradients of its parameters are used. If
                the optimizer stores a running mean v of a parameter's squared gradients (as Adam
                does), the parameter's squared gradient is divided by √v + eps. Squared gradients
                of other parameters are divided by the mean of these divisors. An optimizer is
                required if the network is wrapped in a plain function.
            rows: the maximum number of samples whose gradients are computed.
            targets: as in a call to the objective.
            weights: as in a call to the objective, for orders two and three.
            model_kwargs: as in a call to the objective.
            generator: the random generator for times, noise and probes.

        Raises:
            TypeError: if `objective` is not the loss module that uses this sampler, or is sharded
                by FSDP.
            ValueError: if there are no parameters to train, if a gradient is not finite, or if `m`
                is not finite or all zero.
        """
        loss = self._loss_of(objective)
        self._check()
        x0, device = check_sample_batch("x0", x0), x0.device
        count = min(check_whole("rows", rows, 1), len(x0))
        trained = _trained(loss, optimizer)
        counting = [m for m in loss.modules() if getattr(m, "track_running_stats", False)]
        counting = [module for module in counting if module.training]
        with fork_rng(device), outside_inference_mode(), torch.enable_grad():
            rng = generator
            if rng is None:  # not the random numbers of the next step
                seed = int(torch.randint(2**62, (), device="cpu"))
                rng = torch.Generator(device).manual_seed(seed)
            bins = Bins.of(loss.model.schedule, x0, uniform=loss.options.is_uniform)
            # Each chosen sample has its own stratum, over the bins that have mass.
            order = torch.randperm(len(x0), device=device, generator=rng)
            unit = torch.rand(len(x0), device=device, dtype=bins.masses.dtype, generator=rng)
            unit[order[:count]] = (torch.arange(count, device=device) + unit[:count]) / count
            evenly = torch.where(bins.masses > 0, 1 / bins.masses, 0.0)
            times, _, places = bins.place(unit, evenly)
            chosen = order[:count]
            state = NetworkState(loss, x0)
            # Forced weight normalization changes the parameters in each forward pass.
            parameters = [(p, p.detach().clone()) for p, _ in trained]
            try:
                for module in counting:
                    module.training = False
                losses = loss._row_losses(
                    x0,
                    as_times(times, x0),
                    chosen,
                    targets=targets,
                    weights=weights,
                    generator=rng,
                    model_kwargs=model_kwargs,
                )
                squares = _squared_gradients(losses, trained, count, device)
            finally:
                for module in counting:
                    module.training = True
                state.restore(generators=False)
                for p, value in parameters:
                    p.data.copy_(value)  # .data, since a graph of the caller may have saved p
            self._update(places[chosen], squares)

    @torch.no_grad()
    def _update(self, places: Tensor, squares: Tensor) -> None:
        """Update m from the squared gradients (n,) of samples in the given bins (n,)."""
        if not bool(torch.isfinite(squares).all()):
            bad = int((~torch.isfinite(squares)).sum())
            raise ValueError(
                f"learn: expected finite gradients; got NaN or infinite ones for {bad} of "
                f"{len(squares)} samples, from which nothing is learnt. Check the parameters."
            )
        squares, places = squares.to(self.m), places.to(self.m.device)
        rows = (torch.arange(BINS, device=places.device)[:, None] == places).to(squares)
        counts = rows.sum(1)
        means, seen = (rows * squares).sum(1) / counts.clamp_min(1), counts > 0
        if not bool(means.any()):
            return
        updated = DECAY * self.m.square() + (1 - DECAY) * means / means[seen].mean()
        self.m.copy_(torch.where(seen, updated.sqrt(), self.m))

    def _loss_of(self, objective: nn.Module) -> Any:
        """Return the loss module inside the wrappers of DDP and torch.compile, if any."""
        loss: Any = objective
        while type(loss).__name__ in ("DistributedDataParallel", "OptimizedModule"):
            loss = loss.module if hasattr(loss, "module") else loss._orig_mod
        expected = "the module of a loss whose time_sampler is this sampler"
        if not isinstance(loss, nn.Module) or getattr(loss, "time_sampler", None) is not self:
            raise TypeError(error_message("objective", expected, objective))
        names = {base.__name__ for part in loss.modules() for base in type(part).__mro__}
        if names & {"FSDPModule", "FullyShardedDataParallel"}:
            raise TypeError(
                error_message(
                    "objective",
                    "whole parameters, of which the gradients of single samples are taken",
                    objective,
                    "Learn the times with a copy that is not sharded, and copy its buffer m.",
                    got="a module sharded by FSDP",
                )
            )
        return loss


def as_times(t: Tensor, like: Tensor) -> Tensor:
    """Return times in the dtype in which losses are computed; return indices unchanged."""
    return t.to(torch.promote_types(like.dtype, torch.float32)) if t.is_floating_point() else t


def _trained(
    loss: nn.Module, optimizer: torch.optim.Optimizer | None
) -> list[tuple[nn.Parameter, Tensor | None]]:
    """Return each trained parameter with a factor for its squared gradient; None means 1."""
    groups = [] if optimizer is None else optimizer.param_groups
    own = [p for p in loss.parameters() if p.requires_grad]
    eps = {p: group.get("eps") for group in groups for p in group["params"]}
    trained = own if optimizer is None else [p for p in own or eps if p in eps]
    trained = [p for p in trained if p.requires_grad]
    if not trained:
        expected = "parameters of the objective that are trained"
        got = "none" if optimizer is None else "an optimizer that holds none of them"
        remedy = "If the network is behind a plain function, pass the optimizer."
        raise ValueError(error_message("optimizer", expected, optimizer, remedy, got=got))
    state = {} if optimizer is None else optimizer.state
    roots: dict[nn.Parameter, Tensor] = {}
    for p in trained:
        v, small = state.get(p, {}).get("exp_avg_sq"), eps.get(p)
        # In some optimizers, v is a tuple or has another shape, and eps is a tuple.
        if isinstance(v, Tensor) and v.shape == p.shape and v.is_floating_point():
            small = small if isinstance(small, float) else 1e-8
            roots[p] = v.to(p.device, torch.float32).sqrt() + small
    if not roots:
        return [(p, None) for p in trained]
    # Every other parameter gets the mean scale of those with Adam's state.
    sums = torch.stack([root.sum() for root in roots.values()])
    mean = sums.sum() / sum(root.numel() for root in roots.values())
    return [(p, 1 / roots.get(p, mean.expand(p.shape))) for p in trained]


def _squared_gradients(
    losses: nn.Module,
    trained: list[tuple[nn.Parameter, Tensor | None]],
    count: int,
    device: torch.device,
) -> Tensor:
    """Return Σ_θ factor_θ g_θ² (n,), where g is the gradient of the loss of a single sample."""
    index = torch.arange(count, device=device)
    names = {p: name for name, p in losses.named_parameters()}
    size = sum(p.numel() for p, _ in trained)

    def square(gradients: Iterable[Tensor | None]) -> Tensor:
        total = torch.zeros((), device=device)
        for gradient, (_, factor) in zip(gradients, trained, strict=True):
            if gradient is not None:
                squares = gradient.float().square().flatten()
                total = total + (squares.sum() if factor is None else squares @ factor.flatten())
        return total

    def of_one(parameters: dict[str, Tensor], i: Tensor) -> Tensor:
        def loss(own: dict[str, Tensor]) -> Tensor:
            return functional_call(losses, own, (i[None],))

        gradients = grad(loss)(parameters)
        return square(gradients[names[p]] for p, _ in trained)

    def plainly(i: Tensor) -> Tensor:
        parameters = [p for p, _ in trained]
        return square(torch.autograd.grad(losses(i), parameters, allow_unused=True))

    # vmap does not get the first and the last sample. A network may store tensors: tables that it
    # computes only once then come from the first sample, and kept activations from the last one.
    # Tensors from inside vmap would be unusable afterwards.
    first, *middle = index.split(1)
    squares = [plainly(first)]
    if count > 2 and size <= SMALL and all(p in names for p, _ in trained):
        parameters = {names[p]: p.detach() for p, _ in trained}
        options = {"randomness": "different", "chunk_size": max(1, CHUNK // size)}
        try:
            squares += vmap(of_one, (None, 0), **options)(parameters, index[1:-1])
            middle = middle[-1:]
        except Exception:
            pass  # a network that vmap cannot batch; its own errors are raised again below
    return torch.stack(squares + [plainly(i) for i in middle])
