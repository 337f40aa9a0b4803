"""Changes in place: every method against reverse mode, plain tensors, and what is refused.

Random programs with views among them are in `test_random_programs`.
"""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import hosm_losses as hosm
from hosm_losses.taylor import TaylorError, propagate
from tests.taylor.checks import check, close, expected
from tests.taylor.table import several
from tests.versions import tells_hooks

X, V = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ONE = V.unsqueeze(0)
ROW = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
MASK = torch.arange(24).reshape(3, 8) % 3 == 0
PLACES = torch.tensor([2, 0, 5])
METHODS = {each for each in dir(Tensor) if each.endswith("_") and not each.startswith("_")}
METHODS |= {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "mod", "pow")}
# No method may read a number as the source of a copy, and none resizes.
METHODS -= {"copy_", "resize_as_"}
# Those that change more than values, and those that forward mode gets wrong.
REFUSED = {"detach_", "share_memory_", "squeeze_", "unsqueeze_", "copysign_", "cumprod_"}
REFUSED |= {"float_power_"}


def arguments(x):
    """Of which a method takes some."""
    rows, table = x.cos(), PLACES.expand(3, 3)
    return [
        *((), (rows,), (0.3,), (1,), (rows + 2, 0.3), (-0.4, 0.6), (rows, rows + 1), (0.0, True)),
        *((1, PLACES, rows[:, :3]), (1, PLACES, 2.0), (1, table, rows[:, :3]), (MASK, 0.5)),
        *((MASK, rows), (PLACES, rows[0, :3]), ((PLACES % 3, PLACES), rows[0, :3])),
        *((x[:, 0], rows[0]), (x @ x.T, rows), (x.reshape(3, 8, 1)[:, :3], rows[:, None])),
    ]


def method(name, place):
    """A function of x that calls a method, inside the domains of nearly all."""

    def function(x):
        x = x.sin() / 3 + 0.5
        y = x * 1
        found = getattr(y, name)(*arguments(x)[place])
        assert found is y or name[-1] != "_"
        return torch.cat([several(found).flatten(), (y + x).flatten()])

    return function


def right(function):
    """Whether PyTorch has derivatives, which are compared, of what draws no numbers."""
    x = X.clone().requires_grad_()
    try:
        value = function(x)
        found = expected(function, x, ONE, "squares")
    except Exception:
        return False
    if not torch.equal(value, function(X)):
        return False
    close(propagate(function, x, ONE, "squares"), found)
    return True


@pytest.mark.filterwarnings("ignore")
def test_every_method_and_its_twin_that_is_not_in_place():
    compared, refused = set(), set()
    for name in sorted(METHODS):
        for one in {name, name.removesuffix("_")} if name[0] != "_" else {name}:
            for place in range(len(arguments(X))):
                try:
                    compared |= {one} if right(method(one, place)) else set()
                except TaylorError:
                    refused.add(name)
                except Exception as error:
                    raise AssertionError(f"{one}, with the arguments {place}") from error
    assert refused <= REFUSED
    assert len(compared) > 200


CHANGES = {
    "relu": lambda y: F.relu(y, inplace=True),
    "silu by a module": nn.SiLU(inplace=True),
    "silu by place": lambda y: F.silu(y, True),
    "threshold": lambda y: F.threshold(y, 0.1, 0.2, inplace=True),
    "dropout": lambda y: F.dropout(y, 0.5, False, True),
    "leaky relu by name": lambda y: F.leaky_relu_(input=y, negative_slope=0.2),
    "a number": lambda y: y.fill_(2.0).add_(ROW),
    "a row": lambda y: y.copy_(ROW),
    "one of its rows": lambda y: y.copy_(y[:1] * 2),
    "a product with itself": lambda y: y.mul_(y),
}


@pytest.mark.parametrize("name", CHANGES)
def test_functions_that_change_their_argument(name):
    def function(x):
        y = scale * x.sin()
        assert CHANGES[name](y) is y
        return (y + x).sin()

    scale = torch.linspace(0.5, 1.5, 8).requires_grad_()
    # Reverse mode takes nothing for the derivative of this product, forward mode twice of it.
    square = (lambda x: ((scale * x.sin()) ** 2 + x).sin()) if "itself" in name else None
    check(function, (8,), scale, reference=square, kinds=[("none", 1), ("squares", 1)])


def set_items(x):
    y = x.sin()
    y[0] = 1.0
    y[:, 2:4] = x[:, :2] * x[:, :2]
    y[MASK] = 0.3
    y[:, [1, 3]] *= 2
    y[:, PLACES] = x[:, :3].cos()
    y[..., -1] = ROW[:3]
    y[torch.tensor([0, 1]), torch.tensor([2, 3])] = x[0, :2]
    y[MASK] = x.cos()[MASK]
    y[1:, None, 5:] = x[1:, None, 5:]
    y[2] = x[:1, :].exp()
    return y.sin()


def filled(x):
    out = torch.empty(3, 8)
    out[:, ::2] = x[:, :4].sin()
    out[:, 1::2] = x[:, 4:].cos()
    more = torch.zeros_like(x)
    more += x.sin() * out
    third = torch.ones(3, 8)
    third.addcmul_(x, more, value=0.3)
    return third + more


@pytest.mark.parametrize("function", [set_items, filled])
def test_items_and_fresh_tensors(function):
    check(function, (8,), kinds=[("none", 1), ("squares", 2)])


def embedded(x):
    """As a network adds what it knows of places."""
    h = x.sin().reshape(3, 2, 4)
    h = h.flatten(2).transpose(1, 2)
    h += ROW[:2]
    for row in (ROW[:2], ROW[2:4]):
        h = h[:, None].expand(3, 1, 4, 2).squeeze(1)
        h = h.contiguous()
        h.mul_(row)
    first = h[:, 0]
    first = first * 2
    return h.relu_().flatten(1).add(first.mean())


def test_a_change_is_followed_where_no_other_tensor_of_the_memory_is_in_use():
    check(embedded, (8,), kinds=[("none", 1), ("squares", 1)])


def test_a_plain_tensor_is_plain_again_after_the_call():
    kept, dropped = torch.zeros(3, 8), []

    def function(x):
        kept[:] = x.sin()
        other = torch.zeros(3, 8)
        other[:] = x
        dropped.append(other)
        return kept * other

    found = propagate(function, X.clone().requires_grad_(), ONE)
    close(found[1], X.cos() * V * X + X.sin() * V)
    assert type(kept) is type(dropped[0]) is Tensor
    torch.testing.assert_close(kept, X.sin())
    assert kept.grad_fn is not None


def test_a_plain_tensor_is_as_before_where_the_call_fails():
    kept = torch.zeros(3, 8)

    def function(x):
        kept[:] = x
        return torch.fft.fft(x)

    with pytest.raises(TaylorError):
        propagate(function, X, ONE)
    assert type(kept) is Tensor
    assert torch.equal(kept, torch.zeros(3, 8))


def changed(y, detached, view):
    before, found = detached(y), view(y)
    before.clamp_(-0.2, 0.2)
    return found


PARAMETER, SHARED = nn.Parameter(torch.zeros(3, 8)), torch.zeros(3, 8)
PART = SHARED[:, :4]
UNSURE = {
    "reshape": lambda y: (y.reshape(24), y.add_(1))[0],
    "detached before": lambda y: (y.detach(), y.add_(1))[0] + y,
    "detached by name": lambda y: (torch.detach(input=y), y.add_(1))[0] + y,
    "detached of a reshape": lambda y: (y, y.reshape(24).detach().mul_(2))[0],
    "a copy that is detached": lambda y: y.clone().detach().clamp_(-0.1, 0.1) * y,
    "a contiguous copy": lambda y: y.mT.contiguous().detach().clamp_(-0.1, 0.1).mT * y,
    "data before": lambda y: (y.data, y.add_(1))[0] + y,
    "a plain view": lambda y: PART.copy_(y[:, :4]),
    "a tensor with views": lambda y: SHARED.copy_(y),
    "a parameter": lambda y: PARAMETER.copy_(y),
    "another shape": lambda y: y.sum(1).add_(y),
    "a part": lambda y: y[:, :2].add_(1),
    "a part by name": lambda y: y[..., :4].copy_(y[..., 4:] * 1),
    "a part by a number that is a tensor": lambda y: y[:, PLACES[0]].mul_(3.0),
    "by a number of sixteen bits": lambda y: y[:, PLACES[0].to(torch.int16)].mul_(3.0),
    "a whole with views": lambda y: (y.chunk(2, 1), y.mul_(2))[0],
    "a view of a view": lambda y: (y.mT, y.mT.reshape(4, 6).add_(1))[0],
    "by its own view": lambda y: y.sub_(y[:, :1]),
    "a turn": lambda y: y.t_(),
    "a resize": lambda y: y.resize_(2, 2),
    "elsewhere": lambda y: torch.sin(y, out=torch.empty(3, 8)),
    "data": lambda y: setattr(y, "data", X),
    "a cut": lambda y: y.requires_grad_(False),
    "expanded": lambda y: y[:, :1].expand(3, 8).add_(y),
    "no gradients": lambda y: nn.init.zeros_(y),
    # What was detached before PyTorch's own view, which has no rule.
    "movedim": lambda y: changed(y, Tensor.detach, lambda y: y.movedim(1, 0)),
    "diagonal": lambda y: changed(y, Tensor.detach, Tensor.diagonal),
    "unfold": lambda y: changed(y, Tensor.detach, lambda y: y.unfold(1, 4, 1)),
    "tensor_split": lambda y: changed(y, Tensor.detach, lambda y: y.tensor_split(2, 1)[0]),
    "after such a view": lambda y: (y.movedim(1, 0), y.detach().clamp_(-0.2, 0.2))[0],
    "a change of the data": lambda y: changed(y, lambda y: y.data, lambda y: y.movedim(1, 0)),
}


@pytest.mark.parametrize("name", UNSURE)
def test_unsure_changes_are_refused(name):
    by_us = name == "a parameter"  # and not by PyTorch, after the fact
    with pytest.raises(TaylorError if by_us else (TaylorError, RuntimeError)):
        propagate(lambda x: UNSURE[name](x.sin()), X, ONE)


def test_a_plain_tensor_under_a_transform_is_refused():
    """Whether another tensor shares its memory is not known there."""

    def value(x):
        return propagate(lambda x: torch.ones(3, 8).mul_(x), x, torch.ones(1, 3, 8)).sum()

    with pytest.raises(TaylorError):
        torch.func.grad(value)(torch.ones(3, 8))


@pytest.mark.parametrize(
    "by",
    [pytest.param(torch_checkpoint, marks=tells_hooks), hosm.checkpoint],
    ids=["torch", "ours"],
)
def test_a_checkpoint_around_a_change_of_its_argument_is_refused(by):
    """It would be evaluated again with the changed argument, a wrong gradient in silence."""
    scale = torch.tensor(1.3, requires_grad=True)
    options = {} if by is hosm.checkpoint else {"use_reentrant": False}

    def network(x, before=lambda y: y):
        return by(lambda y: before(y).mul_(2).mul_(scale).sin(), (x * scale).sin(), **options)

    with pytest.raises(hosm.DerivativeError, match=r"Put \.clone\(\) before the change"):
        propagate(network, X, ONE).sum().backward()

    def without(x):
        return ((x * scale).sin() * 2 * scale).sin()

    check(lambda x: network(x, torch.clone), (8,), scale, reference=without)
    if by is hosm.checkpoint:
        with pytest.raises(hosm.DerivativeError, match="leaves its arguments"):
            network(X)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.mul_(ROW),
        lambda y: y.copy_(ROW),
        lambda y: y.__setitem__(0, ROW),
        lambda y: y.lerp_(y.clone(), 0.3),
    ],
)
def test_a_change_keeps_the_type(change):
    def function(x):
        y = x.sin().float()
        change(y)
        return y

    assert propagate(function, X, ONE).dtype == function(X).dtype == torch.float32
