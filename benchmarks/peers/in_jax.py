"""The losses and the networks once more in JAX.

The losses are as a user of JAX would write them: with one probe a sample, and what they hold fixed
is what ours detach. A network is what PyTorch computes, operator by operator: PyTorch traces it
for the shape of its input, without values, and JAX compiles the counterparts anew. `OPERATORS`
holds those of the benchmarks whose name or whose arguments are others than in Python's `operator`
and in `jax.numpy`.

A fair comparison has one thread on both sides. XLA reads its number of threads from NPROC when
JAX starts, so it has to be set for a new process, as `benchmarks.results.ONE_THREAD` does. The
flags that are often named for it change nothing (jaxlib 0.10).
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array, lax
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

stop = lax.stop_gradient
Parameters = dict[str, Array]
Network = Callable[[Parameters, Array, Array], Array]


def convolution(x: Array, weight: Array, bias: Array, stride: list[int], padding: list[int], *_):
    """A convolution of (B, C, H, W) as in PyTorch, neither dilated nor transposed."""
    names, around = ("NCHW", "OIHW", "NCHW"), [(size, size) for size in padding]
    out = lax.conv_general_dilated(x, weight, stride, around, dimension_numbers=names)
    return out + bias[:, None, None]


def standardise(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """Zero mean and unit variance over some dimensions."""
    centred = x - x.mean(axes, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(axes, keepdims=True) + eps)


def group_norm(x: Array, weight: Array, bias: Array, *sizes: Any) -> tuple[Array]:
    *_, groups, eps = sizes
    standard = standardise(x.reshape(len(x), groups, -1), (2,), eps).reshape(x.shape)
    return (standard * weight[:, None, None] + bias[:, None, None],)


def layer_norm(x: Array, shape: list[int], weight: Array, bias: Array, eps: float) -> tuple[Array]:
    standard = standardise(x, tuple(range(-len(shape), 0)), eps)
    return (standard if weight is None else standard * weight + bias,)


def doubled(x: Array, *_: Any) -> Array:
    return jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)


OPERATORS: dict[str, Callable[..., Any]] = {
    "_safe_softmax": jax.nn.softmax,
    "_softmax": lambda x, dim, _: jax.nn.softmax(x, dim),
    "_unsafe_view": jnp.reshape,
    "addmm": lambda bias, x, weight: bias + x @ weight,
    "arange": lambda end, **_: jnp.arange(end),
    "bmm": operator.matmul,
    "cat": jnp.concatenate,
    "clamp": jnp.clip,
    "clone": lambda x, **_: x,
    "convolution": convolution,
    "div": operator.truediv,
    "expand": jnp.broadcast_to,
    "gelu": lambda x, approximate: jax.nn.gelu(x, approximate == "tanh"),
    "native_group_norm": group_norm,
    "native_layer_norm": layer_norm,
    "ones_like": lambda x, **_: jnp.ones_like(x),
    "permute": jnp.transpose,
    "rsub": lambda x, other, *_: other - x,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "split": lambda x, size, dim=0: jnp.split(x, x.shape[dim] // size, axis=dim),
    "t": jnp.transpose,
    "transpose": jnp.swapaxes,
    "unbind": lambda x, dim=0: [*jnp.moveaxis(x, dim, 0)],
    "unsqueeze": jnp.expand_dims,
    "upsample_nearest2d": doubled,
    "view": jnp.reshape,
    "zeros_like": lambda x, **_: jnp.zeros_like(x),
}


class InJax(torch.fx.Interpreter):
    """Runs a graph of PyTorch's operators on arrays of JAX."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = target.__name__.partition(".")[0]
        found = OPERATORS.get(name) or getattr(operator, name, None) or getattr(jnp, name)
        return found(*args, **kwargs)


def parameters_of(network: nn.Module) -> Parameters:
    """The parameters of a module; those in float64 stay so where JAX's x64 mode is on."""
    return {key: jnp.asarray(value.numpy()) for key, value in network.state_dict().items()}


def twin_of(network: nn.Module) -> Network:
    """The network as a function of its parameters, x (B, *) and t (B,)."""
    state = network.state_dict()

    def apply(state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return functional_call(network, state, (x, t))

    def twin(p: Parameters, x: Array, t: Array) -> Array:
        dtype = getattr(torch, str(x.dtype))
        like = torch.zeros(x.shape, dtype=dtype), torch.full(t.shape, 0.5, dtype=dtype)
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            graph = make_fx(apply, tracing_mode="fake")(state, *like)
        graph.graph.eliminate_dead_code()  # the moments that PyTorch's norms return as well
        return InJax(graph).run(*(p[key] for key in state), x, t)

    return twin


def vp_schedule(t: Array, beta_min: float = 0.1, beta_max: float = 20.0) -> tuple[Array, Array]:
    """(α, σ) of the VP schedule."""
    b = t * (beta_min + 0.5 * (beta_max - beta_min) * t)
    return jnp.exp(-0.5 * b), jnp.sqrt(-jnp.expm1(-b))


def _inner(a: Array, b: Array) -> Array:
    """Inner product of every sample, kept as (B, 1, ...)."""
    return (a * b).sum(range(1, a.ndim), keepdims=True)


def loss(network: Network, order: int, parameters: Parameters, *drawn: Array) -> Array:
    """The mean loss of order one, two or three over a batch, all weights 1.

    With v = probe and w = σ v, order three has G = ∇_x (wᵀ ∂f/∂x w).
    """
    x0, t, noise, probe = drawn
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
    else:
        gradient, (value, directional) = jax.grad(form, has_aux=True)(x)
    ell, shifted = stop(value + noise), directional + probe
    slope = _inner(ell, probe)
    first = _inner(value + noise, value + noise) / d
    residual = shifted - slope * ell
    trace = _inner(probe, shifted) - slope**2
    total = first + (_inner(residual, residual) + trace**2) / d**2
    if order == 3:
        held = stop(shifted)
        target = (_inner(probe, held) - slope**2) * ell + 2 * slope * held
        total = total + _inner(gradient - target, gradient - target) / d**3
    return total.mean()


def training_step(network: nn.Module, order: int) -> Callable[..., tuple[Array, Parameters]]:
    """A compiled function (x0, t, noise, probe) → (loss, gradients in the parameters).

    The parameters are an argument of what is compiled, as in training, and not a constant of it.
    """
    step = jax.jit(jax.value_and_grad(partial(loss, twin_of(network), order)))
    return partial(step, parameters_of(network))
