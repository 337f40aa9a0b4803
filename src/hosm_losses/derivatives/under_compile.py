"""The engine "auto" under torch.compile, which cannot trace reverse mode.

An error that is raised here while PyTorch traces ends the graph, and the call is made again in
eager mode. With fullgraph=True it is the user's.
"""

from torch import Tensor, nn

from hosm_losses._checks import DerivativeError
from hosm_losses.derivatives import engines
from hosm_losses.derivatives.engines import Derivatives, Field
from hosm_losses.taylor import TaylorError

UNKNOWN = (
    "network: expected operators that the engine 'taylor' knows, in a loss of order two or three "
    "that torch.compile traces; got {} Write .detach() in place of .detach_() and of what is "
    "under torch.no_grad(), and the rest with other operators; or leave out fullgraph=True, and "
    "the loss is evaluated in reverse mode, uncompiled."
)
STATISTICS = (
    "network: expected no running statistics in training, as of batch norm, in a loss of exact "
    "order three that torch.compile traces, for PyTorch lets no buffer change there; got {}. Call "
    ".eval() on it, take third='laplacian', or leave the loss uncompiled."
)


def compiled(
    field: Field, x: Tensor, direction: Tensor, order: int, laplacian: bool, summed: bool
) -> Derivatives:
    """The taylor engine; a DerivativeError where it cannot differentiate the network."""
    refuse_statistics(field.owner, order, laplacian)
    try:
        return engines.taylor(field, x, direction, order, laplacian, summed)
    except TaylorError as error:
        raise DerivativeError(UNKNOWN.format(error.args[0])) from error


def refuse_statistics(owner: object, order: int, laplacian: bool) -> None:
    """Raise where a network changes running statistics, which PyTorch refuses without a remedy."""
    if order == 2 or laplacian or not isinstance(owner, nn.Module):
        return
    for part in owner.modules():
        if part.training and getattr(part, "track_running_stats", False):
            raise DerivativeError(STATISTICS.format(type(part).__name__))
