"""The networks and the losses once more in JAX, as a user of JAX would write them.

The networks are functions of a dict of parameters, the state_dict of the module in PyTorch. The
losses take one probe a sample; what they hold fixed is what our residuals detach.

A fair comparison has one thread on both sides. XLA reads its number of threads from NPROC when
JAX starts, so it is set for a new process: `subprocess.run(..., env=one_thread())`. The flags that
are often named for it, xla_cpu_multi_thread_eigen and intra_op_parallelism_threads, do not change
it (jaxlib 0.10: 1.5 of two cores with them, 1.0 with NPROC).
"""

import math
import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from torch import nn

ONE_THREAD = {"OMP_NUM_THREADS": "1", "NPROC": "1"}
Parameters = dict[str, Array]
Network = Callable[[Parameters, Array, Array], Array]
stop = lax.stop_gradient


def one_thread() -> dict[str, str]:
    """The environment of this process with one thread for PyTorch and for XLA."""
    return {**os.environ, **ONE_THREAD}


def parameters_of(network: nn.Module) -> Parameters:
    """The parameters of a module; those in float64 stay so where JAX's x64 mode is on."""
    return {key: jnp.asarray(value.numpy()) for key, value in network.state_dict().items()}


def linear(p: Parameters, name: str, x: Array) -> Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def conv(p: Parameters, name: str, x: Array, *, stride: int = 1, padding: int = 0) -> Array:
    """A convolution of (B, C, H, W) as in PyTorch."""
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    names = ("NCHW", "OIHW", "NCHW")
    out = lax.conv_general_dilated(
        x, weight, (stride, stride), [(padding, padding)] * 2, dimension_numbers=names
    )
    return out + bias[:, None, None]


def standardise(x: Array, eps: float) -> Array:
    """Zero mean and unit variance over the last dimension."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps)


def group_norm(p: Parameters, name: str, x: Array, groups: int = 8) -> Array:
    standard = standardise(x.reshape(len(x), groups, -1), 1e-5).reshape(x.shape)
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return standard * weight[:, None, None] + bias[:, None, None]


def attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q kᵀ/√c) v of (B, heads, N, c)."""
    logits = jnp.einsum("bhnc,bhmc->bhnm", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bhmc->bhnc", jax.nn.softmax(logits), v)


def embedding(p: Parameters, t: Array, width: int) -> Array:
    """The embedding of t (B,): `networks.waves`, then `networks.time_layers`."""
    index = jnp.arange(width // 2, dtype=t.dtype)
    angles = 1000 * t[:, None] * jnp.exp(-math.log(1e4) * index / (width // 2))
    hidden = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)
    return jax.nn.silu(linear(p, "time.2", jax.nn.silu(linear(p, "time.0", hidden))))


def mlp(p: Parameters, x: Array, t: Array) -> Array:
    hidden = jnp.concatenate([x, t[:, None]], 1)
    for layer in ("layers.0", "layers.2", "layers.4"):
        hidden = jax.nn.silu(linear(p, layer, hidden))
    return linear(p, "layers.6", hidden)


def convolutional(p: Parameters, x: Array, t: Array) -> Array:
    hidden = conv(p, "inner", x, padding=1) + t[:, None, None, None]
    for block in range(4):
        inside = hidden
        for norm in (0, 3):
            inside = jax.nn.silu(group_norm(p, f"blocks.{block}.{norm}", inside))
            inside = conv(p, f"blocks.{block}.{norm + 2}", inside, padding=1)
        hidden = hidden + inside
    return conv(p, "outer", hidden, padding=1)


def _residual(p: Parameters, name: str, x: Array, condition: Array) -> Array:
    hidden = conv(p, f"{name}.conv1", jax.nn.silu(group_norm(p, f"{name}.norm1", x)), padding=1)
    parts = linear(p, f"{name}.time", condition)[:, :, None, None]
    scale, shift = jnp.split(parts, 2, axis=1)
    hidden = group_norm(p, f"{name}.norm2", hidden) * (1 + scale) + shift
    skip = conv(p, f"{name}.skip", x) if f"{name}.skip.weight" in p else x
    return skip + conv(p, f"{name}.conv2", jax.nn.silu(hidden), padding=1)


def _pixel_attention(p: Parameters, name: str, x: Array, heads: int = 4) -> Array:
    qkv = conv(p, f"{name}.qkv", group_norm(p, f"{name}.norm", x))
    qkv = qkv.reshape(len(x), 3, heads, x.shape[1] // heads, -1).swapaxes(-2, -1)
    mixed = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2]).swapaxes(-2, -1).reshape(x.shape)
    return x + conv(p, f"{name}.mix", mixed)


def unet(p: Parameters, x: Array, t: Array) -> Array:
    condition = embedding(p, t, len(p["inner.bias"]))
    hidden, skips = conv(p, "inner", x, padding=1), []
    for i in range(2):
        hidden = _residual(p, f"down.{i}", hidden, condition)
        skips.append(hidden)
    hidden = conv(p, "smaller", hidden, stride=2, padding=1)
    for i in range(2):
        hidden = _pixel_attention(p, f"attend.{i}", _residual(p, f"low.{i}", hidden, condition))
    larger = jnp.repeat(jnp.repeat(hidden, 2, axis=2), 2, axis=3)
    hidden = conv(p, "larger", larger, padding=1)
    for i in range(2):
        joined = jnp.concatenate([hidden, skips.pop()], 1)
        hidden = _residual(p, f"up.{i}", joined, condition)
    return conv(p, "outer", jax.nn.silu(group_norm(p, "norm", hidden)), padding=1)


def _dit_block(p: Parameters, name: str, x: Array, condition: Array, heads: int = 4) -> Array:
    parts = linear(p, f"{name}.modulation", condition)[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(parts, 6, axis=-1)
    qkv = linear(p, f"{name}.qkv", standardise(x, 1e-6) * (1 + scale1) + shift1)
    q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
    mixed = attention(q, k, v).swapaxes(1, 2).reshape(x.shape)
    x = x + gate1 * linear(p, f"{name}.mix", mixed)
    hidden = linear(p, f"{name}.feed.0", standardise(x, 1e-6) * (1 + scale2) + shift2)
    return x + gate2 * linear(p, f"{name}.feed.2", jax.nn.gelu(hidden, approximate=True))


def dit(p: Parameters, x: Array, t: Array) -> Array:
    width, channels, patch, _ = p["inner.weight"].shape
    batch, grid = len(x), x.shape[-1] // patch
    condition = embedding(p, t, width)
    tokens = conv(p, "inner", x, stride=patch).reshape(batch, width, -1).swapaxes(1, 2)
    hidden = tokens + p["places"]
    for block in range(4):
        hidden = _dit_block(p, f"blocks.{block}", hidden, condition)
    shift, scale = jnp.split(linear(p, "modulation", condition)[:, None], 2, axis=-1)
    patches = linear(p, "outer", standardise(hidden, 1e-6) * (1 + scale) + shift)
    patches = patches.reshape(batch, grid, grid, channels, patch, patch)
    return patches.transpose(0, 3, 1, 4, 2, 5).reshape(x.shape)


TWINS: dict[str, Network] = {
    "mlp": mlp,
    "convolutional": convolutional,
    "unet": unet,
    "dit": dit,
}
THIRDS = ("exact", "laplacian", "sliced")


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
    """The loss of order one, two or three, all weights 1.

    Args:
        network: one of TWINS.
        order: 1, 2 or 3.
        third: "exact" has G = ∇_x (wᵀ ∂f/∂x w) with w = σ v, "laplacian" D²f[w, w] in its place,
            and "sliced" squares (uᵀ r3), with uᵀ G = wᵀ D²f[w, u].
        parameters: of the network.
        x0: data (B, *).
        t: times (B,).
        noise: ε (B, *).
        probe: v (B, *).
        other: u (B, *), for "sliced" alone.

    Returns:
        The mean of the loss over the batch.
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
    elif third == "laplacian":
        (value, directional), (_, gradient) = jax.jvp(second, (x,), (w,))
    else:
        (value, directional), (_, mixed) = jax.jvp(second, (x,), (other,))
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
            square = (_inner(w, mixed) - _inner(other, target)) ** 2
        else:
            square = _inner(gradient - target, gradient - target)
        total = total + square / d**3
    return total.mean()


def training_step(
    name: str, parameters: Parameters, order: int, third: str = "exact"
) -> Callable[..., tuple[Array, Parameters]]:
    """A compiled function (x0, t, noise, probe[, other]) → (loss, gradients in the parameters).

    Args:
        name: of the network, one of TWINS.
        parameters: `parameters_of` the module in PyTorch; an argument of what is compiled, as in
            training, and not a constant of it.
        order: 1, 2 or 3.
        third: "exact", "laplacian" or "sliced", as in `loss`; the last wants `other`.

    Returns:
        The function.
    """
    if third not in THIRDS:
        raise ValueError(f"third: expected one of {THIRDS}; got {third!r}.")
    step = jax.jit(jax.value_and_grad(partial(loss, TWINS[name], order, third)))
    return partial(step, parameters)
