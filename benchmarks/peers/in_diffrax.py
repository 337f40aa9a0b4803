"""A field's path by diffrax, as one compiled function that is kept for the next call."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from torch import Tensor, nn

from benchmarks.peers.in_jax import Parameters, parameters_of, twin_of

METHODS = {"tsit5": diffrax.Tsit5, "dopri5": diffrax.Dopri5, "dopri8": diffrax.Dopri8}
MOST = 1000  # steps; beyond, a time is no longer of interest
Ends = tuple[Tensor, Tensor]


def follower(field: nn.Module, method: str) -> Callable[[Tensor, Tensor, Tensor, float], Ends]:
    """`peers.likelihoods.follow` of (y, span, probes, tolerance), for a field as a module.

    Steps adapt to the batch as a whole, as in torchdiffeq. Values and products with the probes
    share a forward pass. What is compiled depends on the shapes alone.
    """
    twin, parameters = twin_of(field), parameters_of(field)

    @jax.jit
    def solved(p: Parameters, y: Array, span: Array, probes: Array, tolerance: float):
        def right_side(s: Array, state: tuple[Array, Array], _: None) -> tuple[Array, Array]:
            times = jnp.broadcast_to(s, (len(y),))
            slope, pull = jax.vjp(lambda point: twin(p, point, times), state[0])

            def form(probe: Array) -> Array:
                probe = jnp.broadcast_to(probe, y.shape)
                return (pull(probe)[0] * probe).reshape(len(y), -1).sum(1)

            return slope, jax.vmap(form)(probes).sum(0)

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(right_side),
            METHODS[method](),
            *span,
            None,
            (y, jnp.zeros(len(y), y.dtype)),
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=MOST,
            throw=False,
        )
        return [each[-1] for each in solution.ys]

    def follow(y: Tensor, span: Tensor, probes: Tensor, tolerance: float) -> Ends:
        given = (jnp.asarray(each.numpy()) for each in (y, span, probes))
        end, gain = solved(parameters, *given, tolerance)
        return torch.from_numpy(np.array(end)), torch.from_numpy(np.array(gain))

    return follow
