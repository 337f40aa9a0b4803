"""What this PyTorch cannot do: 2.6 is the oldest that is declared, and `.ci/oldest` runs on it.

Where a version decides, 2.6 cannot, and 2.13 and 2.15 can; the versions between were not tried.
"""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)

# torch.compile ends in an internal error: at `tensor.as_subclass(Jet)`, and past it elsewhere.
compiles_higher_orders = pytest.mark.skipif(OLD, reason="this torch.compile knows order one alone")
makes_modules = pytest.mark.skipif(OLD, reason="this torch.compile makes no module of a function")
SHARDS_ON_CPU = not OLD  # fully_shard asks a CPU for a stream with events
# Nothing tells which saved-tensor hooks are on.
tells_hooks = pytest.mark.skipif(OLD, reason="this PyTorch does not tell which hooks are on")


def times_differentiable(function):
    """How often autograd differentiates a function of (2, 3): 0, 1, or 2 for more."""
    x = torch.full((2, 3), 0.5, requires_grad=True)
    value, times = function(x), 0
    while times < 2 and value.requires_grad:
        try:
            (value,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        except RuntimeError:
            break
        times += 1
    return times


def in_bags(x):
    return F.embedding_bag(torch.arange(len(x))[:, None], x, mode="sum")


def margins(x):
    return x * F.multi_margin_loss(x, torch.zeros(len(x), dtype=torch.long))


# PyTorch is asked, as later versions differentiate what earlier ones do not.
CONSTANT = next(
    function
    for function in (torch.special.bessel_j0, torch.special.airy_ai)
    if times_differentiable(function) == 0
)
DIFFERENTIABLE_ONCE = next(f for f in (in_bags, margins) if times_differentiable(f) == 1)


def _slope_of_layer_norm(norm):
    """The gradient in a weight of a loss on a Jacobian-vector product through a layer norm."""
    x, v = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(2, 2, 3).unbind()
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    _, along = torch.func.jvp(lambda x: norm(x.square() @ weight).sin(), (x,), (v,))
    return torch.autograd.grad(along.square().sum(), weight)[0]


def _by_hand(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


RIGHT = torch.allclose(
    _slope_of_layer_norm(lambda x: F.layer_norm(x, (3,))), _slope_of_layer_norm(_by_hand)
)
# pytorch issues 175754, 186256, 196699 and 196700: later versions may be right.
layer_norm_is_wrong = pytest.mark.skipif(
    RIGHT, reason="this PyTorch differentiates its layer norm rightly"
)
