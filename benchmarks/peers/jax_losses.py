"""The losses once more in JAX, as a user of JAX would write them.

They take one probe a sample; what they hold fixed is what ours detach.

A fair comparison has one thread on both sides. XLA reads its number of threads from NPROC when
JAX starts, so it has to be set for a new process, as `benchmarks.environment.ONE_THREAD` does. The
flags that are often named for it change nothing (jaxlib 0.10).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from torch import nn

from benchmarks.peers.jax_networks import Network, Parameters, parameters_of, twin_of

stop = lax.stop_gradient


def vp_schedule(t: Array, beta_min: float = 0.1, beta_max: float = 20.0) -> tuple[Array, Array]:
    """(α, σ) of the VP schedule."""
    b = t * (beta_min + 0.5 * (beta_max - beta_min) * t)
    return jnp.exp(-0.5 * b), jnp.sqrt(-jnp.expm1(-b))


def _inner(a: Array, b: Array) -> Array:
    """Inner product of every sample, kept as (B, 1, ...)."""
    return (a * b).sum(range(1, a.ndim), keepdims=True)


def loss(
    network: Network,
    order: int,
    third: str,
    parameters: Parameters,
    x0: Array,
    t: Array,
    noise: Array,
    probe: Array,
    other: Array | None = None,
) -> Array:
    """The mean loss of order one, two or three over a batch, all weights 1.

    With v = probe and w = σ v, "exact" has G = ∇_x (wᵀ ∂f/∂x w), "laplacian" D²f[w, w] in its
    place, and "sliced" squares (uᵀ r3), with uᵀ G = wᵀ D²f[w, u] and u = other.
    """
    alpha, sigma = (part.reshape(-1, *(1,) * (x0.ndim - 1)) for part in vp_schedule(t))
    x, w, d = alpha * x0 + sigma * noise, sigma * probe, float(x0[0].size)

    def field(x: Array) -> Array:
        return -network(parameters, x, t)

    def second(x: Array) -> tuple[Array, Array]:
        return jax.jvp(field, (x,), (w,))

    def form(x: Array) -> tuple[Array, tuple[Array, Array]]:
        value, directional = second(x)
        return (w * directional).sum(), (value, directional)

    if order == 1:
        return ((field(x) + noise) ** 2).mean()
    if order == 2:
        value, directional = second(x)
    elif third == "exact":
        gradient, (value, directional) = jax.grad(form, has_aux=True)(x)
    else:
        along = w if third == "laplacian" else other
        (value, directional), (_, gradient) = jax.jvp(second, (x,), (along,))
    ell, shifted = stop(value + noise), directional + probe
    slope = _inner(ell, probe)
    first = _inner(value + noise, value + noise) / d
    residual = shifted - slope * ell
    trace = _inner(probe, shifted) - slope**2
    total = first + (_inner(residual, residual) + trace**2) / d**2
    if order == 3:
        held = stop(shifted)
        target = (_inner(probe, held) - slope**2) * ell + 2 * slope * held
        if third == "sliced":
            square = (_inner(w, gradient) - _inner(other, target)) ** 2
        else:
            square = _inner(gradient - target, gradient - target)
        total = total + square / d**3
    return total.mean()


def training_step(
    network: nn.Module, order: int, third: str = "exact"
) -> Callable[..., tuple[Array, Parameters]]:
    """A compiled function (x0, t, noise, probe[, other]) → (loss, gradients in the parameters).

    The parameters are an argument of what is compiled, as in training, and not a constant of it.
    """
    step = jax.jit(jax.value_and_grad(partial(loss, twin_of(network), order, third)))
    return partial(step, parameters_of(network))
