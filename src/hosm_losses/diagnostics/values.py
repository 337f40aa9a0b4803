r"""What has to hold of a network's values before its derivatives can be compared with differences.

What:
    The network can be called, its output is finite and depends on its arguments and the seed
    alone, and it is known in which precision it is computed. That is the least precise of the
    dtypes of everything that depends on x or on a trained parameter, as PyTorch's functions see
    it. A network that casts float64 data to float32 works in float32. A table in float32 that
    depends on neither lowers nothing.
"""

__all__ = ["check_values", "evaluate"]

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosm_losses._checks import DerivativeError
from hosm_losses.diagnostics.differences import STEP, reseed
from hosm_losses.diagnostics.module_fields import recorded, tensors_in
from hosm_losses.model import NetworkField, NoiseField

IN_FLOAT32 = (
    "Check a float32 copy, copy.deepcopy(model).float(), with its own switches to half precision "
    "off (convert_to_fp32(), no autocast in its forward), and train the original."
)


def evaluate(field: NoiseField, x: Tensor, seed: int = 0) -> Tensor:
    """What the network predicts at x, without a graph, by PyTorch's own operators."""
    reseed(x, seed)
    with torch.no_grad():
        return NetworkField(field).native(x.clone()).detach().clone()


def check_values(field: NoiseField, x: Tensor) -> torch.dtype:
    """Check the values of a network, and return the precision in which it works.

    Raises:
        TypeError: where it works in half precision.
        DerivativeError: where its output is not finite, or not the same for the same input.
    """
    _check_finite(evaluate(field, x), field, x)
    _check_deterministic(field, x)
    precision = _precision(field, x)
    if precision not in STEP:
        where = _first_module(field, x, lambda tensor: tensor.dtype == precision)
        raise TypeError(
            "network: expected one that works in float32 or float64, in which differences mean "
            f"something; got {precision}, in {where}. {IN_FLOAT32}"
        )
    return precision


def _check_finite(value: Tensor, field: NoiseField, x: Tensor) -> None:
    bad = int((~torch.isfinite(value)).sum())
    if not bad:
        return
    where = _first_module(field, x, lambda tensor: not bool(torch.isfinite(tensor).all()))
    raise DerivativeError(
        f"network: expected finite values; got {bad} NaN or infinite of {value.numel()}, first in "
        f"{where}. Check its weights, and the range of x0, t and model_kwargs."
    )


def _first_module(field: NoiseField, x: Tensor, has: Any) -> str:
    """The first module that returns a tensor of which this holds."""
    for call in recorded(field.model.network, lambda: evaluate(field, x)):
        if any(map(has, tensors_in(call.returned))):
            return call.where
    return "its own forward"


def _check_deterministic(field: NoiseField, x: Tensor) -> None:
    """Raise where the same input, seed and parameters do not give the same output."""
    network: object = field.model.network
    buffers = dict(network.named_buffers()) if isinstance(network, nn.Module) else {}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    first, second = evaluate(field, x), evaluate(field, x)
    if torch.equal(first, second):
        return
    changed = [name for name, buffer in buffers.items() if not torch.equal(buffer, before[name])]
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(before[name])
    if changed and torch.equal(evaluate(field, x), first):
        raise DerivativeError(
            "network: expected an output that depends on x, t and the parameters alone; got "
            f"one that changes with the buffers {', '.join(changed)}, which every call "
            "updates. Freeze them (module.eval(), or the module's own switch) while you train "
            "with orders two and three."
        )
    if float((first - second).abs().max()) > 1e-3 * float(first.abs().max()):
        raise DerivativeError(
            "network: expected the same output for the same input and seed; got another. Make it "
            "draw from torch's generators only, and use deterministic operators."
        )


class _Dtypes(TorchFunctionMode):
    """Collects the dtypes of what carries a graph, and of what is computed without one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in tensors_in((args, kwargs, returned)):
            # A custom autograd.Function computes with gradients off.
            if tensor.requires_grad or not torch.is_grad_enabled():
                self.found.add(tensor.dtype)
        return returned


def _precision(field: NoiseField, x: Tensor) -> torch.dtype:
    reseed(x)
    dtypes = _Dtypes()
    with dtypes:
        value = NetworkField(field).native(x.clone().requires_grad_())
    return max({x.dtype, value.dtype} | dtypes.found, key=lambda dtype: torch.finfo(dtype).eps)
