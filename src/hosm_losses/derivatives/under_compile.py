"""The engine "auto" under torch.compile, which cannot trace reverse mode."""

from torch import Tensor, nn

from hosm_losses._checks import DerivativeError
from hosm_losses.derivatives import engines
from hosm_losses.derivatives.engines import Derivatives, Field
from hosm_losses.derivatives.taylor import CutError, TaylorError

CUT = (
    "network: expected no torch.no_grad(), .detach_() or custom autograd.Function around what "
    "depends on x in a loss that torch.compile traces above order one; got {} Forward mode would "
    "differentiate through it, and reverse mode does not compile. Compute on x.detach() in place "
    "of torch.no_grad(), write .detach() in place of .detach_(), or leave the loss uncompiled."
)
STATISTICS = (
    "network: expected no running statistics in training, as of batch norm, in a loss of exact "
    "order three that torch.compile traces, for PyTorch lets no buffer change there; got {}. Call "
    ".eval() on it, take third='laplacian', or leave the loss uncompiled."
)
CURVED = (
    "network: expected operators that the engine 'taylor' follows, in a loss of third='laplacian' "
    "or 'sliced' that torch.compile traces; got {} Nested forward mode does not compile. Write it "
    "with other operators, take third='exact', or leave the loss uncompiled."
)


def compiled(
    field: Field,
    x: Tensor,
    direction: Tensor,
    order: int,
    second_direction: Tensor | None,
    summed: bool,
) -> Derivatives:
    """The taylor engine, and forward mode where that is right; DerivativeError where it is not."""
    refuse_statistics(field.owner, order, second_direction)
    given = (field, x, direction, order, second_direction, summed)
    try:
        return engines.taylor(*given)
    except CutError as error:
        raise DerivativeError(CUT.format(error.args[0])) from error
    except TaylorError as error:
        if second_direction is not None:
            raise DerivativeError(CURVED.format(error.args[0])) from error
    return engines.forward(*given)


def refuse_statistics(owner: object, order: int, second_direction: Tensor | None) -> None:
    """Raise where a network changes running statistics, which PyTorch refuses without a remedy."""
    if order == 2 or second_direction is not None or not isinstance(owner, nn.Module):
        return
    for part in owner.modules():
        if part.training and getattr(part, "track_running_stats", False):
            raise DerivativeError(STATISTICS.format(type(part).__name__))
