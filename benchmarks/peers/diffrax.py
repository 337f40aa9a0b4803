"""The likelihood by diffrax, as continuous normalising flows use it, on the networks in JAX.

One solve for each sample, by Tsit5 in t with the steps of a PID controller, all under `vmap` in
one compiled function. The divergence is that of one Rademacher probe kept along the path, or the
trace from all unit vectors. Needs diffrax, and JAX with one thread, see
`benchmarks.peers.jax_losses`.

Evaluations: 6 a step and 3 before the first, for as many steps as the slowest sample takes, since
a loop under `vmap` goes on for every sample until the last is done.
"""

import math
import time
from collections.abc import Callable
from functools import lru_cache, partial

import diffrax
import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks.likelihood_problems import RoundMixture
from benchmarks.peers.jax_losses import (
    Parameters,
    conv,
    group_norm,
    linear,
    parameters_of,
    standardise,
)
from benchmarks.peers.score_sde import signs
from benchmarks.trained import Convolutional, Dense

Twin = Callable[[nn.Module, Parameters, Array, Array], Array]
MAX_STEPS = 10_000


def log_sigma(schedule: hosm.VESchedule, t: Array) -> Array:
    """log σ of the VE schedule."""
    return math.log(schedule.sigma_min) + t * math.log(schedule.sigma_max / schedule.sigma_min)


def _seen(network: nn.Module, x: Array, t: Array) -> tuple[Array, Array]:
    level = log_sigma(network.schedule, t)
    size = jnp.sqrt(network.std**2 + jnp.exp(2 * level)).reshape(-1, *(1,) * (x.ndim - 1))
    return x / size, jnp.stack([level / 4, jnp.sin(math.pi * level / 4)], 1)


def dense(network: nn.Module, p: Parameters, x: Array, t: Array) -> Array:
    hidden = linear(p, "inner", jnp.concatenate(_seen(network, x, t), 1))
    for block in range(len(network.blocks)):
        name = f"blocks.{block}"
        inside = standardise(hidden, 1e-5) * p[f"{name}.0.weight"] + p[f"{name}.0.bias"]
        inside = jax.nn.silu(linear(p, f"{name}.1", inside))
        hidden = hidden + linear(p, f"{name}.3", inside)
    return linear(p, "outer", jax.nn.silu(hidden))


def convolutional(network: nn.Module, p: Parameters, x: Array, t: Array) -> Array:
    scaled, features = _seen(network, x, t)
    level = linear(p, "level.2", jax.nn.silu(linear(p, "level.0", features)))
    hidden = conv(p, "inner", scaled, padding=1) + level[:, :, None, None]
    for block in range(len(network.blocks)):
        inside = hidden
        for norm in (0, 3):
            name = f"blocks.{block}"
            inside = jax.nn.silu(group_norm(p, f"{name}.{norm}", inside))
            inside = conv(p, f"{name}.{norm + 2}", inside, padding=1)
        hidden = hidden + inside
    return conv(p, "outer", jax.nn.silu(hidden), padding=1)


def round_mixture(network: nn.Module, p: Parameters, x: Array, t: Array) -> Array:
    sigma = jnp.exp(log_sigma(network.schedule, t))[:, None]
    variance = p["variance"] + sigma**2
    away = ((x[:, None] - p["means"]) ** 2).sum(2)
    mean = jax.nn.softmax(-away / (2 * variance), 1) @ p["means"]
    return sigma * (x - mean) / variance


TWINS: dict[type[nn.Module], Twin] = {
    Convolutional: convolutional,
    Dense: dense,
    RoundMixture: round_mixture,
}


def twin_of(network: nn.Module) -> Callable[[Parameters, Array, Array], Array]:
    """The network as a function of its parameters, x (B, *) and t (B,)."""
    return partial(TWINS[type(network)], network)


def _solver(network: nn.Module, exact: bool) -> Callable[..., tuple[Array, Array, Array]]:
    """A function (parameters, x, probes, tolerance) → latents, integrals and steps."""
    twin, schedule = twin_of(network), network.schedule

    def one(p: Parameters, x: Array, probe: Array, tolerance: Array):
        def velocity(x: Array, t: Array) -> Array:
            rate = math.log(schedule.sigma_max / schedule.sigma_min)
            noise = twin(p, x[None], t[None])[0]
            return rate * jnp.exp(log_sigma(schedule, t)) * noise

        def right_side(t: Array, state: tuple[Array, Array], _: None) -> tuple[Array, Array]:
            moved, pull = jax.vjp(lambda x: velocity(x, t), state[0])
            if exact:
                units = jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
                rows = jax.vmap(lambda unit: pull(unit)[0])(units)
                return moved, (rows * units).sum()
            return moved, (pull(probe)[0] * probe).sum()

        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(right_side),
            diffrax.Tsit5(),
            jnp.asarray(schedule.t_min, x.dtype),
            jnp.asarray(schedule.t_max, x.dtype),
            None,
            (x, jnp.zeros((), x.dtype)),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=MAX_STEPS,
        )
        return solved.ys[0][0], solved.ys[1][0], solved.stats["num_steps"]

    return jax.vmap(one, (None, 0, 0, None))


@lru_cache
def compiled(network: nn.Module, shape: torch.Size, dtype: torch.dtype, exact: bool):
    """The compiled function of (x, probes, tolerance), and the seconds that compiling took."""
    with jax.enable_x64(dtype == torch.float64):
        parameters = parameters_of(network)
        x = jnp.zeros(shape, str(dtype).removeprefix("torch."))
        start = time.perf_counter()
        tolerance = jnp.asarray(1e-3, x.dtype)
        function = jax.jit(_solver(network, exact)).lower(parameters, x, x, tolerance).compile()
        return partial(function, parameters), time.perf_counter() - start


def nll(
    model: hosm.ScoreModel, x: Tensor, seed: int, tolerance: float, *, exact: bool = False
) -> tuple[Tensor, int]:
    """−log p(x) in nats, (B,), and the network's evaluations."""
    function, _ = compiled(model.network, x.shape, x.dtype, exact)
    with jax.enable_x64(x.dtype == torch.float64):
        point, probe = jnp.asarray(x.numpy()), jnp.asarray(signs(x, seed).numpy())
        latent, gain, steps = function(point, probe, jnp.asarray(tolerance, point.dtype))
        std = model.schedule.prior_std
        squares = (latent / std) ** 2 + math.log(2 * math.pi * std**2)
        found = 0.5 * squares.reshape(len(x), -1).sum(1) - gain
        return torch.tensor(jax.device_get(found)), 6 * int(steps.max()) + 3
