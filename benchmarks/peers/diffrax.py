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
from benchmarks.peers.jax_networks import Parameters, parameters_of, twin_of
from benchmarks.peers.score_sde import signs

MAX_STEPS = 10_000


def _solver(network: nn.Module, exact: bool) -> Callable[..., tuple[Array, Array, Array]]:
    """A function (parameters, x, probes, tolerance) → latents, integrals and steps."""
    twin, schedule = twin_of(network), network.schedule
    rate = math.log(schedule.sigma_max / schedule.sigma_min)  # σ = σ_min exp(rate t)

    def one(p: Parameters, x: Array, probe: Array, tolerance: Array):
        def velocity(x: Array, t: Array) -> Array:
            noise = twin(p, x[None], t[None])[0]
            return rate * schedule.sigma_min * jnp.exp(rate * t) * noise

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
