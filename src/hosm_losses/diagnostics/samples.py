r"""Whether a network treats every sample alone, and which tensors go with the samples.

What:
    One sample is kept and the others, with their times, are replaced: its output has to stay. So
    the batch keeps its size, and dropout with the same seed its mask. Then the samples are
    permuted with all that is taken to belong to them: the outputs have to follow. A network that
    draws random numbers draws them by place, and is not permuted.
"""

__all__ = ["check_samples"]

from collections.abc import Collection
from dataclasses import replace
from itertools import combinations, islice

import torch
from torch import Tensor, nn

from hosm_losses._checks import DerivativeError
from hosm_losses.diagnostics.differences import size_of
from hosm_losses.diagnostics.module_fields import Call, recorded, tensors_in
from hosm_losses.diagnostics.values import evaluate
from hosm_losses.model import NoiseField, per_sample

# Of the size of an output, what sums in another order may change.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
ATTEMPTS = 64
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BATCH_NORM = (
    "Batch norm in training takes its statistics over the samples: use GroupNorm or LayerNorm in "
    "its place, or freeze its statistics with .eval() on it."
)
ALONE = (
    "Take no mean, norm or attention over the first dimension, which is the samples' "
    "(nn.MultiheadAttention and recurrent layers want batch_first=True)."
)


def check_samples(field: NoiseField, x: Tensor, precision: torch.dtype) -> None:
    """Raise where samples see each other, or do not go with what is taken to belong to them.

    A batch of one sample says nothing.

    Raises:
        DerivativeError: naming the module, or the tensor among the network's arguments.
    """
    if len(x) < 2:
        return
    rounding = ROUNDING[precision]
    value = evaluate(field, x)
    for kept in (0, len(x) - 1):
        others, around = _with_others(field, x, kept)
        if _same(evaluate(others, around)[kept], value[kept], rounding):
            continue
        call = _first_difference(field, x, others, around, kept, rounding)
        batch_norm = call is not None and isinstance(call.module, BATCH_NORMS)
        where = "its own forward" if call is None else call.where
        raise DerivativeError(
            "network: expected every sample to be treated alone; got an output that changes with "
            f"the other samples of the batch, in {where}. {BATCH_NORM if batch_norm else ALONE}"
        )
    if torch.equal(evaluate(field, x, seed=1), value):
        _check_permuted(field, x, value, rounding)


def _with_others(field: NoiseField, x: Tensor, kept: int) -> tuple[NoiseField, Tensor]:
    """The field and x with every sample but one replaced, and their times."""
    generator = torch.Generator(x.device).manual_seed(2)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    around, t = x + size_of(x) * noise, field.t.roll(1, 0)
    around[kept], t[kept] = x[kept], field.t[kept]
    return replace(field, t=t), around


def _same(one: Tensor, other: Tensor, rounding: float) -> bool:
    size = max(float(one.double().norm()), float(other.double().norm()))
    return float((one.double() - other.double()).norm()) <= rounding * size


def _first_difference(
    field: NoiseField, x: Tensor, others: NoiseField, around: Tensor, kept: int, rounding: float
) -> Call | None:
    """The innermost module that was given the same for the kept sample and returned another."""

    def same(one: object, other: object) -> bool:
        pairs = zip(tensors_in(one), tensors_in(other), strict=False)
        return all(_same(_row(a), _row(b), rounding) for a, b in pairs)

    def _row(tensor: Tensor) -> Tensor:
        own = tensor.ndim and len(tensor) % len(x) == 0 and tensor.numel()
        return tensor.reshape(len(x), -1)[kept] if own else tensor

    network = field.model.network
    before = recorded(network, lambda: evaluate(field, x))
    after = recorded(network, lambda: evaluate(others, around))
    for one, other in zip(before, after, strict=False):
        if one.name != other.name:
            break
        if same(one.arguments, other.arguments) and not same(one.returned, other.returned):
            return one
    return None


def _check_permuted(field: NoiseField, x: Tensor, value: Tensor, rounding: float) -> None:
    order = torch.arange(len(x), device=x.device).roll(1)

    def follows(left: Collection[str]) -> bool:
        """Whether the outputs follow, if the tensors at these paths are left as they are."""
        kwargs = per_sample(
            field.kwargs, lambda path, tensor: tensor if path in left else tensor[order]
        )
        try:
            moved = evaluate(replace(field, t=field.t[order], kwargs=kwargs), x[order])
        except (RuntimeError, ValueError, LookupError):
            return False
        return _same(moved, value[order], rounding)

    if follows(()):
        return
    paths: list[str] = []
    per_sample(field.kwargs, lambda path, tensor: paths.append(path) or tensor)
    some = (each for count in range(1, len(paths) + 1) for each in combinations(paths, count))
    for left in islice(some, ATTEMPTS):
        if follows(left):
            raise DerivativeError(
                f"{' and '.join(left)}: expected a tensor that belongs to the samples, as its "
                f"first dimension is their number, {len(x)}; got one that does not move with "
                "them. Mark what all samples share: hosm_losses.Shared(tensor) in its place."
            )
    raise DerivativeError(
        "network: expected outputs that follow their samples when the batch is permuted; got "
        "others. Something depends on the place in the batch: code in the network, a tensor of "
        "model_kwargs that belongs to the samples without having their number as its first "
        "dimension, or one that is marked Shared."
    )
