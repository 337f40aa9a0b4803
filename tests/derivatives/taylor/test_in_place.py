"""Changes in place: every method against PyTorch's own, and programs with views among them.

PyTorch's forward mode follows a change in place through views, which makes it the reference.
"""

from random import Random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import hosm_losses as hosm
from hosm_losses.derivatives import engines
from hosm_losses.derivatives.taylor import TaylorError, carried, in_place
from tests.derivatives.taylor.checks import along, check, close, name
from tests.versions import tells_hooks

X, V, U = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROW = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
MASK = torch.arange(24).reshape(3, 8) % 3 == 0
PLACES = torch.tensor([2, 0, 5])


def arguments(name, x):
    """What a method is called with besides its object: of x, or None if it draws numbers."""
    rows = x.cos()
    square = x.sin() @ x.cos().T @ x
    index = PLACES.expand(3, 3)
    table = {
        "addbmm": (x.reshape(3, 1, 8).mT[:, :3], rows.reshape(3, 1, 8)),
        "addmm": (x @ x.T, rows),
        "addmv": (),
        "addr": (x[:, 0], rows[0]),
        "addcdiv": (x, rows + 2),
        "addcmul": (x, rows),
        "clamp": (-0.5, 0.5),
        "clamp_max": (0.5,),
        "clamp_min": (0.5,),
        "clip": (-0.5, 0.5),
        "copy": (square[:1],),
        "cumsum": (1,),
        "dropout": (0.0, True),
        "feature_dropout": (0.0, True),
        "feature_alpha_dropout": (0.0, True),
        "alpha_dropout": (0.0, True),
        "fill": (x[0, 0],),
        "fill_diagonal": (2.0,),
        "hardtanh": (-0.4, 0.6),
        "index_add": (1, PLACES, rows[:, :3]),
        "index_copy": (1, PLACES, rows[:, :3]),
        "index_fill": (1, PLACES, 2.0),
        "index_put": ((torch.tensor([0, 1, 2]), PLACES), rows[0, :3]),
        "ldexp": (torch.tensor(2),),
        "leaky_relu": (0.3,),
        "lerp": (rows, 0.3),
        "masked_fill": (MASK, 0.5),
        "masked_scatter": (MASK, rows),
        "nan_to_num": (),
        "put": (PLACES, rows[0, :3]),
        "scatter": (1, index, rows[:, :3]),
        "scatter_add": (1, index, rows[:, :3]),
        "threshold": (0.1, 0.2),
        "tril": (),
        "triu": (1,),
        "polygamma": (1,),
    }
    unary = [
        "abs",
        "absolute",
        "acos",
        "acosh",
        "arccos",
        "arccosh",
        "arcsin",
        "arcsinh",
        "arctan",
        "arctanh",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "ceil",
        "celu",
        "conj_physical",
        "cos",
        "cosh",
        "deg2rad",
        "digamma",
        "elu",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "exp2",
        "expm1",
        "fix",
        "floor",
        "frac",
        "lgamma",
        "log",
        "log10",
        "log1p",
        "log2",
        "logit",
        "neg",
        "negative",
        "rad2deg",
        "reciprocal",
        "relu",
        "round",
        "rsqrt",
        "selu",
        "sgn",
        "sigmoid",
        "sign",
        "sin",
        "sinc",
        "sinh",
        "sqrt",
        "square",
        "tan",
        "tanh",
        "trunc",
        "zero",
    ]
    if name in table:
        return table[name]
    return () if name in unary else (rows,)


# Those that draw numbers, for which nothing is to compare; those that PyTorch has no nested forward
# derivative of; those of other kinds of tensors; those that are refused.
RANDOM = [
    "bernoulli",
    "cauchy",
    "exponential",
    "geometric",
    "log_normal",
    "normal",
    "random",
    "uniform",
    "rrelu",
]
ELSEWHERE = ["embedding_renorm", "igamma", "igammac", "resize_as_sparse", "sparse_resize"]
ELSEWHERE += ["acosh", "arccosh", "sparse_resize_and_clear", "requires_grad"]
REFUSED = [name.removesuffix("_") for name in in_place.REFUSED.split()] + ["as_strided"]
REFUSED += ["copysign", "renorm"]  # which forward mode gets wrong; tests/derivatives has them
METHODS = [
    change
    for name, plain in in_place._names.items()
    if plain not in (*RANDOM, *ELSEWHERE, *REFUSED)
    for change in in_place._homes(name)
]


def same(function, x=X):
    """Value and derivatives of PyTorch, or an error where it has one."""
    try:
        expected = torch.stack(along(function, x, V, U))
    except Exception:
        with pytest.raises(Exception):  # noqa: B017
            carried(function, x, V.unsqueeze(0))
        return False
    value, by_v, by_u, squared, mixed = expected
    two = torch.stack([V, U])
    close(carried(function, x, two, "halves"), torch.stack([value, by_v, by_u, mixed]))
    close(carried(function, x, V.unsqueeze(0), "squares")[-1], squared)
    return True


def changed(change):
    """A function of x that changes what depends on it, inside the domains of all but acosh."""
    name = change.__name__.removesuffix("_").removeprefix("__i").removesuffix("__")

    def function(x):
        x = x.sin() / 3 + 0.5
        y = x * 1
        assert change(y, *arguments(name, x)) is y
        return y.sin() + x

    return function


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", METHODS, ids=name)
def test_every_method(change):
    function = changed(change)
    same(function)


@pytest.mark.filterwarnings("ignore")
def test_most_methods_have_derivatives_to_compare():
    compared = [change for change in METHODS if has_derivatives(changed(change))]
    assert len(compared) > 150


def has_derivatives(function):
    try:
        along(function, X, V, U)
    except Exception:
        return False
    return True


FUNCTIONS = {
    "relu": lambda y: F.relu(y, inplace=True),
    "silu by a module": nn.SiLU(inplace=True),
    "silu by place": lambda y: F.silu(y, True),
    "hardtanh": lambda y: F.hardtanh(y, -0.4, 0.4, True),
    "threshold": lambda y: F.threshold(y, 0.1, 0.2, inplace=True),
    "dropout": lambda y: F.dropout(y, 0.5, False, True),
    "leaky relu by name": lambda y: F.leaky_relu_(input=y, negative_slope=0.2),
    "augmented": lambda y: y.__iadd__(ROW),
    "chained": lambda y: y.add_(ROW).mul_(0.7).clamp_(-0.4, 0.5),
    "masked": lambda y: y.masked_fill_(MASK, 0.5),
    "a number": lambda y: y.fill_(2.0).add_(ROW),
    "itself": lambda y: y.mul_(y.clone()).add_(y.clone()),
    "of a narrower type": lambda y: y.copy_(y.float()),
    "a row": lambda y: y.copy_(ROW),
    "one of its rows": lambda y: y.copy_(y[:1] * 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_with_every_gradient(name):
    scale = torch.linspace(0.5, 1.5, 8, dtype=torch.float64, requires_grad=True)

    def function(x):
        y = scale * x.sin()
        z = FUNCTIONS[name](y)
        assert z is y
        return (y + x).sin()

    if "narrower" in name:
        same(function)
    else:
        check(function, (8,), scale)


def test_a_product_with_itself():
    """Of which PyTorch's forward mode takes twice the derivative, and its reverse mode none."""

    def function(x):
        y = x.sin()
        return y.mul_(y)

    check(function, (8,), reference=lambda x: x.sin().square())


def set_items(x):
    y = x.sin()
    y[0] = 1.0
    y[:, 2:4] = x[:, :2] * x[:, :2]
    y[1, ::3] += ROW[::3]
    y[MASK] = 0.3
    y[:, [1, 3]] *= 2
    y[:, PLACES] = x[:, :3].cos()
    y[..., -1] = ROW[:3]
    y[torch.tensor([0, 1]), torch.tensor([2, 3])] = x[0, :2]
    y[MASK] = x.cos()[MASK]
    y[1:, None, 5:] = x[1:, None, 5:]
    y[2] = x[:1, :].exp()
    return y.sin()


def views(x):
    y = x.sin().reshape(3, 2, 4).clone()
    q, k = y[:, :1], y.narrow(1, 1, 1)
    q.mul_(k.clone())
    y.transpose(1, 2)[:, 1].add_(ROW[:2])
    for row in range(3):
        y[row].mul_(y[row].sum())
    k.squeeze(1).unsqueeze(-1)[..., 0].mul_(1.5)
    y.view(3, 8)[:, 3:].relu_()
    return (y + torch.cat([k, q], 1)).flatten(1)


def filled(x):
    out = torch.empty(3, 8)
    out[:, ::2] = x[:, :4].sin()
    out[:, 1::2] = x[:, 4:].cos()
    more = torch.zeros_like(x)
    more += x.sin() * out
    third = torch.ones(3, 8)
    third.addcmul_(x, more, value=0.3)
    return third + more


@pytest.mark.parametrize("function", [set_items, views, filled])
def test_items_views_and_fresh_tensors(function):
    assert same(function)
    check(function, (8,))


def test_a_plain_tensor_is_plain_again_after_the_call():
    kept = torch.zeros(3, 8)
    dropped = []

    def function(x):
        kept[:] = x.sin()
        other = torch.zeros(3, 8)
        other[:] = x
        dropped.append(other)
        return kept * other

    x = X.clone().requires_grad_()
    found = carried(function, x, V.unsqueeze(0))
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
        carried(function, X, V.unsqueeze(0))
    assert type(kept) is Tensor
    assert torch.equal(kept, torch.zeros(3, 8))


PARAMETER = nn.Parameter(torch.zeros(3, 8))
SHARED = torch.zeros(3, 8)
SHARED_PART = SHARED[:, :4]
AMBIGUOUS = {
    "a reshape": lambda y: y.reshape(24).add_(1).sum() + y,
    "what a reshape was made of": lambda y: (y.reshape(24), y.add_(1))[0],
    "contiguous": lambda y: (y.contiguous().mul_(2), y)[1],
    "a function without a rule": lambda y: (y.diagonal().mul_(2), y)[1],
    "a view of a reshape": lambda y: (y.reshape(6, 4)[0].mul_(2), y)[1],
    "detached before": lambda y: (y.detach(), y.add_(1))[0] + y,
    "data before": lambda y: (y.data, y.add_(1))[0] + y,
    "a plain view": lambda y: SHARED_PART.copy_(y[:, :4]),
    "a tensor with views": lambda y: SHARED.copy_(y),
    "a parameter": lambda y: PARAMETER.copy_(y),
    "no gradients": lambda y: nn.init.zeros_(y),
    "another shape": lambda y: y[0].add_(y),
    "a turn": lambda y: y.t_(),
    "a resize": lambda y: y.resize_(2, 2),
    "elsewhere": lambda y: torch.sin(y, out=torch.empty(3, 8)),
    "data": lambda y: setattr(y, "data", X),
    "a detach by name": lambda y: (torch.detach(input=y), y.add_(1))[0] + y,
    "a change of the data before": lambda y: _changed(y, lambda y: y.data),
    "a cut": lambda y: y.requires_grad_(False),
    "expanded": lambda y: y[:, :1].expand(3, 8).add_(y),
}


def _changed(y, detached, view=lambda y: y.movedim(1, 0)):
    before, found = detached(y), view(y)
    before.clamp_(-0.2, 0.2)
    return found


# What PyTorch returns as views, and the engine by a function without a rule.
VIEWS = {
    "movedim": lambda y: y.movedim(1, 0),
    "diagonal": Tensor.diagonal,
    "unfold": lambda y: y.unfold(1, 4, 1),
    "tensor_split": lambda y: y.tensor_split(2, 1)[0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_change_of_what_was_detached_before_a_view_is_refused(view):
    with pytest.raises(TaylorError, match="what was detached"):
        carried(lambda x: _changed(x.sin(), Tensor.detach, VIEWS[view]), X, V.unsqueeze(0))


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_would_be_unsure_is_refused(name):
    with pytest.raises((TaylorError, RuntimeError)) as error:
        carried(lambda x: AMBIGUOUS[name](x.sin()), X, V.unsqueeze(0))
    words = "in place", "no_grad", "single memory location", "out=", "cut the graph"
    assert any(each in str(error.value) for each in words), error.value


def test_a_plain_tensor_under_a_transform_is_refused_in_words():
    """Whether another tensor shares its memory is not known there."""

    def value(x):
        return carried(lambda x: torch.ones(3, 8).mul_(x), x, torch.ones(1, 3, 8)).sum()

    with pytest.raises(TaylorError, match="in place"):
        torch.func.grad(value)(torch.ones(3, 8))


def program(r, length=8):
    """A random function of x (3, 8) that makes tensors of that shape, views of them, and changes."""
    steps = [
        (r.random(), r.randrange(12), r.randrange(99), r.randrange(99)) for _ in range(length)
    ]

    def run(x):
        pool, parts = [x.sin(), x.cos() + 0.5], []
        for kind, what, one, two in steps:
            y, z = pool[one % len(pool)], pool[two % len(pool)]
            if kind < 0.25:
                new = (y * z, y + z, y.tanh(), y.clone(), y.reshape(3, 8) + 0, F.softplus(y))
                pool.append(new[what % len(new)])
            elif kind < 0.55 or not parts:
                new = (
                    y[:, 2:6], y.view(6, 4), y.t(), y.reshape(24), y.chunk(2, 1)[1], y[1], y.mT,
                    y.unsqueeze(1), y.select(1, 3), y.unflatten(1, (2, 4)), y.flatten(),
                    y.contiguous(),
                )  # fmt: skip
                parts.append(new[what])
                if kind > 0.5:
                    parts.append(parts[-1][..., ::2])
            else:
                part = parts[one % len(parts)]
                changes = (
                    lambda p: p.mul_(1.5), lambda p, z=z: p.add_(z.mean()), lambda p: p.tanh_(),
                    lambda p: p.mul_(p.clone()), lambda p, z=z: p.__setitem__(0, z.sum()),
                    lambda p: p.copy_(p.cos()), lambda p: F.silu(p, inplace=True),
                )  # fmt: skip
                changes[what % len(changes)](y if two % 3 == 0 else part)
        return sum(each.sin() for each in pool) + sum(each.sum() for each in parts)

    return run


OUTCOMES = []


@settings(max_examples=400)
@given(seed=st.integers(0, 2**32 - 1))
def test_programs(seed):
    """Right, or refused for what may share memory."""
    function = program(Random(seed))
    expected = torch.stack(along(function, X, V, U))
    try:
        got = carried(function, X, torch.stack([V, U]), "halves")
    except TaylorError as error:
        if "share memory" not in str(error):
            raise
        OUTCOMES.append(False)
        return
    value, by_v, by_u, _, mixed = expected
    close(got, torch.stack([value, by_v, by_u, mixed]))
    OUTCOMES.append(True)


def test_most_programs_are_followed():
    assert sum(OUTCOMES) > 0.4 * len(OUTCOMES), (sum(OUTCOMES), len(OUTCOMES))


def test_a_change_costs_what_the_function_costs():
    """The same operators, by engine and order, as of the network that changes nothing in place."""

    def calls(function, order):
        counted = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with counted:
            engines.taylor(Field(function), X.clone(), V.unsqueeze(0), order)
        return sum(event.count for event in counted.key_averages() if "aten" in event.key)

    class Field:
        def __init__(self, function):
            self.function = function

        def __call__(self, x):
            return self.function(x)

        def repeat(self, _count):
            return self

    for order in (2, 3):
        assert calls(lambda x: F.silu(x.sin(), inplace=True).add_(ROW), order) == calls(
            lambda x: F.silu(x.sin()) + ROW, order
        )


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
        carried(network, X, V.unsqueeze(0)).sum().backward()
    check(
        lambda x: network(x, torch.clone),
        (8,),
        scale,
        reference=lambda x: ((x * scale).sin() * 2 * scale).sin(),
    )
    if by is hosm.checkpoint:
        with pytest.raises(hosm.DerivativeError, match="leaves its arguments"):
            network(X)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.add_(ROW),
        lambda y: y.mul_(ROW),
        lambda y: y.copy_(ROW),
        lambda y: y.__setitem__(0, ROW),
        lambda y: y[:, 1:].div_(ROW[1:]),
        lambda y: y.lerp_(y.clone(), 0.3),
    ],
)
def test_a_change_keeps_the_type(change):
    def function(x):
        y = x.sin().float()
        change(y)
        return y

    assert carried(function, X, V.unsqueeze(0)).dtype == function(X).dtype == torch.float32
