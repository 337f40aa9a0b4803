"""What makes the likelihood of a network random: its training mode, or draws by its own code."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states

from hosm_losses._checks import warn
from hosm_losses._torch_internals import traced
from hosm_losses.derivatives import Snapshot

TRAINING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
TRAINING += (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
TRAINING += (nn.FeatureAlphaDropout, nn.RReLU, nn.MultiheadAttention)
COMPARED = 16  # values with a first one, of a network that draws


@contextmanager
def buffers_restored(modules: Mapping[str, nn.Module], x: Tensor) -> Iterator[None]:
    """A block after which the buffers of a network, such as running statistics, are as before."""
    may_change = any(part.training and part._buffers for part in modules.values())
    before = Snapshot(modules[""], x) if may_change and not traced() else None
    try:
        yield
    finally:
        if before is not None:
            before.restore(generators=False)


def warn_of_training_mode(modules: Mapping[str, nn.Module]) -> bool:
    """Warn of a part whose training mode changes a likelihood, and say whether there is one."""
    for name, part in modules.items():
        if not part.training or not isinstance(part, TRAINING):
            continue
        # The probability of a dropout, or of that inside an attention.
        if getattr(part, "p", getattr(part, "dropout", 1)) > 0:
            warn(
                f"network: expected evaluation mode, as after model.eval(); got {name or 'it'}, a "
                f"{type(part).__name__} in training mode. The numbers are random, or depend on "
                "what else is in the batch."
            )
            return True
    return False


class Watch:
    """Looks at the first evaluation of a network, and warns if its output is random.

    No list of layers is complete: a network may drop labels, layers or words by code of its own.
    Drawing moves torch's generators, and only then values are compared: several, because what is
    dropped in one call of ten is rarely dropped in the first two.
    """

    def __init__(self, due: bool) -> None:
        self.due = due

    def before(self, x: Tensor) -> list[Tensor]:
        """The states of torch's generators on the devices of x; none unless this is due."""
        # Inside a CUDA graph the states cannot be asked for.
        if not self.due or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return []
        return [torch.get_rng_state(), *get_device_states(x)[1]]

    def compare(self, before: list[Tensor], value: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Compare values at x (B, *) if the first evaluation moved the generators."""
        after, self.due = self.before(x), False
        if all(map(torch.equal, before, after)):
            return
        state = Snapshot(None, x)
        with torch.no_grad():
            one = value(x)
            same = partial(torch.allclose, one, rtol=1e-3, atol=0, equal_nan=True)
            random = not all(same(value(x)) for _ in range(COMPARED))
        state.restore()
        if random:
            warn(
                "network: expected the same output for the same input; got one that draws random "
                "numbers, as dropout does in training mode. Call model.eval() first, and look for "
                "what draws where its mode is not asked."
            )
