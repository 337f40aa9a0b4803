"""What many tests share: schedules, networks, losses by order, counters and comparisons.

Closed forms are in `oracles`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import hosm_losses as hosm
from tests.oracles import TARGETS, standardise_by_hand

VP = hosm.VPSchedule()
SCHEDULES = {
    "vp": VP,
    "ve": hosm.VESchedule(),
    "subvp": hosm.SubVPSchedule(),
    "cosine": hosm.CosineSchedule(),
    "edm": hosm.EDMSchedule(t_max=3.0),
    "flow": hosm.LinearFlowSchedule(),
    "discrete": hosm.DiscreteSchedule(torch.linspace(0.99, 0.01, 20)),
}
PREDICTIONS = tuple(TARGETS)
ENGINES = ("auto", "taylor", "reverse")
FUNCTIONS = {1: hosm.first_order_dsm, 2: hosm.second_order_dsm, 3: hosm.third_order_dsm}
MODULES = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}


def given(shape: tuple[int, ...], order: int = 1, probes: int = 1, schedule=VP):
    """x0, and the inputs that leave a loss of this order nothing to draw: t, noise and probe."""
    inputs = {"t": schedule.t_min + (schedule.t_max - schedule.t_min) * torch.rand(shape[0])}
    inputs["noise"] = torch.randn(shape)
    if order > 1:
        inputs["probe"] = torch.randn(probes, *shape)
    return torch.randn(shape), inputs


def gradients(value: Tensor, leaves: nn.Module | Iterable[Tensor], **options) -> list[Tensor]:
    """The gradients of a number, zero where it does not depend on a leaf; the graph is kept."""
    leaves = leaves.parameters() if isinstance(leaves, nn.Module) else leaves
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    options = {"retain_graph": True, "materialize_grads": True} | options
    return list(torch.autograd.grad(value, leaves, **options))


def with_gradients(loss: Tensor, leaves: nn.Module | Iterable[Tensor], **options) -> list[Tensor]:
    """A loss, and its gradients."""
    return [loss, *gradients(loss, leaves, **options)]


def loss_and_gradients(
    network: nn.Module, shape: tuple[int, ...], order: int = 3, seed: int = 1, **options
) -> list[Tensor]:
    """The loss of a network on data and inputs that the seed alone decides, and its gradients."""
    model = network if isinstance(network, hosm.ScoreModel) else hosm.ScoreModel(network, VP)
    torch.manual_seed(seed)
    x0, inputs = given(shape, order)
    return with_gradients(FUNCTIONS[order](model, x0, **inputs | options), model)


class Around(nn.Module):
    """A function of (B, 9) between two layers, as a network of x (B, 2)."""

    def __init__(self, function, width: int = 9):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.inner, self.outer = function, nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, x, t):
        return self.outer(self.function(torch.sin(self.inner(x)) + t[:, None]))


def assert_same(found, expected, tolerance: float = 1e-9, least: float = 1e-3):
    """Tensors, or sequences of them, agree to `tolerance` of the largest element (or `least`)."""
    if isinstance(expected, Tensor):
        found, expected = [found], [expected]
    for one, other in zip(found, expected, strict=True):
        largest = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(largest, least))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Networks make tensors of their own, in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def randomise(module: nn.Module) -> None:
    """Give a norm weights that are not 1 and 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


class MLP(nn.Module):
    """x (B, *) flattened through two hidden layers with features of t."""

    def __init__(self, elements: int, width: int = 12):
        super().__init__()
        self.inner = nn.Linear(elements + 2, width)
        self.middle = nn.Linear(width, width)
        self.outer = nn.Linear(width, elements)

    def forward(self, x, t):
        features = torch.stack([t, (3 * t).sin()], -1)
        hidden = torch.cat([x.reshape(len(x), -1), features], 1)
        hidden = F.silu(self.inner(hidden))
        return self.outer(torch.tanh(self.middle(hidden))).reshape(x.shape)


class ConvNet(nn.Module):
    """Convolutions with a group norm, in its own words or by hand."""

    def __init__(self, channels: int = 2, width: int = 4):
        super().__init__()
        self.by_hand = False
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        randomise(self.norm)

    def forward(self, x, t):
        hidden = self.first(x) + t[:, None, None, None]
        if self.by_hand:
            grouped = hidden.reshape(len(x), 2, -1)
            flat = standardise_by_hand(grouped, (2,)).reshape(hidden.shape)
            hidden = flat * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
        else:
            hidden = self.norm(hidden)
        return self.last(F.silu(hidden))


class AttentionNet(nn.Module):
    """Tokens (B, n, c) through layer norm and attention, in its own words or by hand."""

    def __init__(self, channels: int = 3, width: int = 4):
        super().__init__()
        self.by_hand = False
        self.inner = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(width, channels)
        randomise(self.norm)

    def forward(self, x, t, label=None):
        hidden = self.inner(x) + t[:, None, None]
        if label is not None:
            hidden = hidden * label[:, None, None]
        if self.by_hand:
            normed = standardise_by_hand(hidden, (2,)) * self.norm.weight + self.norm.bias
        else:
            normed = self.norm(hidden)
        q, k, v = self.qkv(normed).chunk(3, -1)
        if self.by_hand:
            logits = torch.einsum("bic,bjc->bij", q, k) / math.sqrt(q.shape[-1])
            weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
            mixed = torch.einsum("bij,bjc->bic", weights, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.outer(torch.tanh(hidden + mixed))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """The three networks of the tests in float64, each with the shape of its sample."""
    torch.manual_seed(0)
    return {
        "mlp": (MLP(3).double(), (3,)),
        "conv": (ConvNet().double(), (2, 3, 2)),
        "attention": (AttentionNet().double(), (4, 3)),
    }


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class OfX(nn.Module):
    """A network that does not look at t."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        return self.network(x)


class Sine(torch.autograd.Function):
    """A custom Function that is right at all orders in reverse mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Detaches(torch.autograd.Function):
    """Cubes, with a backward that loses its graph."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return (3 * ctx.saved_tensors[0] ** 2 * grad).detach()


class OnceDifferentiable(Detaches):
    """Cubes with PyTorch's own mark, whose error torch.autograd.grad passes by."""

    backward = staticmethod(once_differentiable(Detaches.backward))


def margins(x: Tensor) -> Tensor:
    """A loss (B, 1) without a second derivative in PyTorch, in either mode."""
    first = torch.zeros(len(x), dtype=torch.long)
    return F.multi_margin_loss(x, first, p=2, reduction="none")[:, None]


class Cubes(nn.Module):
    """A network that no engine can differentiate twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t):
        return OnceDifferentiable.apply(self.layer(x))


class Spectral(nn.Module):
    """A network for reverse mode alone: its layer is seen through complex numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t):
        return torch.fft.ifft(torch.fft.fft(self.layer(x).sin())).real


class Learned(hosm.Schedule):
    """A variance-preserving schedule whose rate is trained."""

    t_min, t_max = 1e-3, 1.0

    def __init__(self, rate):
        self.rate = rate

    def alpha(self, t):
        return torch.exp(-0.5 * self.rate.to(t.dtype) * t)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-self.rate.to(t.dtype) * t))


class CountCalls(TorchDispatchMode):
    """How many operators are called."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


class CountFlops(TorchDispatchMode):
    """Counts the FLOPs of matrix products and convolutions, wherever they are called from."""

    def __init__(self):
        super().__init__()
        self.by_operator = Counter()

    @property
    def total(self):
        return self.by_operator.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in flop_registry:
            count = flop_registry[operator](*args, **(kwargs or {}), out_val=out)
            self.by_operator[operator] += count
        return out


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operator fills; a view is none."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                filled = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, filled)
        return result
