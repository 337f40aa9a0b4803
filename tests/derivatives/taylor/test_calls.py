"""Random calls of every operator with a rule, and random networks made of them.

The values, types and shapes are PyTorch's; the derivatives are those of nested torch.func.jvp.
"""

from random import Random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hosm_losses.derivatives import engines
from hosm_losses.derivatives.primitive_mode import safe_primitives
from hosm_losses.derivatives.taylor import carried, in_place, properties
from hosm_losses.derivatives.taylor.table import RULES, WITHOUT_RULE, every
from tests.derivatives.taylor import table_of_formulas, table_of_moves  # noqa: F401
from tests.derivatives.taylor.checks import along, close, name
from tests.derivatives.taylor.table import GENERATORS
from tests.derivatives.taylor.table_of_others import CALLS
from tests.versions import OLD

REFUSALS = (properties._strided,)
# Refused by Jet.make, and for another machine.
ELSEWHERE = every("cfloat", "cdouble", "chalf", "cuda")
# With tests of their own, in test_in_place.py.
CHANGES = [each for name in in_place._names for each in in_place._homes(name)]
CHANGES += [Tensor.__setitem__, Tensor.retain_grad]
CALLED = [each for each, found in RULES.items() if found.function not in REFUSALS]
CALLED = [each for each in CALLED if each not in (*ELSEWHERE, *CHANGES, WITHOUT_RULE)]
X, V, U = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SEEDS = st.integers(0, 2**32 - 1)


class Written(TorchFunctionMode):
    """Lengths and others written out, of which PyTorch has no nested forward derivative."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in LENGTHS and "input" in kwargs:
            args = (kwargs.pop("input"),)
        return LENGTHS.get(func, func)(*args, **kwargs)


def length(x, p=2, dim=None, keepdim=False, **named):
    dim = named.get("axis", dim)
    keepdim = named.get("keepdims", keepdim)
    p = p if isinstance(p, int | float) else 2
    powers = x.square() if p == 2 else x.abs() ** p
    return powers.sum(tuple(range(x.ndim)) if dim is None else dim, keepdim) ** (1 / p)


def linalg_length(x, *args, **named):
    named = {{"ord": "p"}.get(name, name): value for name, value in named.items()}
    return length(x, *args, **named)


def normalized(x, p=2.0, dim=1, eps=1e-12, out=None):
    return x / length(x, p, dim, True).clamp_min(eps)


def matrix_length(x, ord="fro", dim=(-2, -1), keepdim=False, **named):  # noqa: A002
    return length(x, 2, dim, keepdim, **named)


def spread_of(x, dim=None, unbiased=True, keepdim=False, *, correction=None):
    correction = int(unbiased) if correction is None else correction
    return x.var(dim, correction=correction, keepdim=keepdim).sqrt()


def angle(x, y, dim=1, eps=1e-8):
    return (normalized(x, 2, dim, eps) * normalized(y, 2, dim, eps)).sum(dim)


def distance(x, y, p=2.0, eps=1e-6, keepdim=False):
    return length(x - y + eps, p, -1, keepdim)


LENGTHS = {
    torch.norm: length,
    Tensor.norm: length,
    torch.linalg.norm: linalg_length,
    torch.linalg.matrix_norm: matrix_length,
    torch.linalg.vector_norm: linalg_length,
    F.normalize: normalized,
    F.hardsigmoid: lambda input, inplace=False: F.relu6(input + 3) / 6,  # noqa: A006
    torch.std: spread_of,
    Tensor.std: spread_of,
    torch.std_mean: lambda x, dim=None, *args, **named: (
        spread_of(x, dim, *args, **named),
        x.mean(dim, named.get("keepdim", False)),
    ),
    torch.dist: lambda x, y, p=2: length(x - y, p),
    Tensor.dist: lambda x, y, p=2: length(x - y, p),
    F.cosine_similarity: angle,
    F.pairwise_distance: distance,
}


def right(function):
    def reference(x):
        with safe_primitives(), Written():
            return function(x)

    return reference


def same(function):
    """Value, type and shape of PyTorch; first, second and third derivatives of the reference."""
    try:
        plain = function(X)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017
            carried(function, X, V.unsqueeze(0))
        return
    value, by_v, by_u, squared, mixed = along(right(function), X, V, U)
    got = carried(function, X, torch.stack([V, U]), "halves")
    assert got.dtype == plain.dtype
    assert got.shape[1:] == plain.shape
    close(got, torch.stack([value, by_v, by_u, mixed]))
    x = X.clone().requires_grad_()
    single = carried(function, x, V.unsqueeze(0))
    close(single[1], by_v)
    close(carried(function, X, V.unsqueeze(0), "squares")[2], squared)
    weight = torch.ones_like(by_v).cumsum(0)

    def form(point):
        return (weight * torch.func.jvp(right(function), (point,), (V,))[1]).sum()

    mine = (weight * single[1]).sum()
    theirs = torch.func.grad(form)(X)
    gradient = torch.zeros_like(X)
    if mine.requires_grad:
        (gradient,) = torch.autograd.grad(mine, x, materialize_grads=True)
    close(gradient, theirs)


def test_every_rule_has_a_generator():
    assert [name(each) for each in CALLED if each not in GENERATORS] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", CALLED, ids=name)
@settings(max_examples=5)
@given(seed=SEEDS)
def test_calls(function, seed):
    call = GENERATORS[function](Random(seed), function)
    # Of what bends, so that second derivatives are not zero.
    same(lambda x: call(x + x.sin() / 2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_calls_without_a_rule(name):
    CALLS[name](X)
    same(lambda x: CALLS[name](x + x.sin() / 2))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=80)
@given(seed=SEEDS)
def test_indices(seed):
    call = GENERATORS[Tensor.__getitem__](Random(seed), Tensor.__getitem__)
    same(lambda x: call(x + x.sin() / 2))


def layer(r):
    """A random call that PyTorch takes, made to return what it was given the shape of."""
    while True:
        function = r.choice(CALLED)
        if OLD and function is torch.asarray:  # which cut the graph in reverse mode
            continue
        call = GENERATORS[function](r, function)
        if r.random() < 0.3:
            call = CALLS[r.choice(list(CALLS))]
        try:
            call(X)
        except Exception:
            continue
        return lambda x: spread(call(x))


def spread(result):
    """The elements of a result as often as they are needed."""
    flat = result.reshape(-1)
    return torch.cat([flat] * (24 // max(1, len(flat)) + 1) or [flat])[:24].reshape(3, 8)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=50)
@given(seed=SEEDS)
def test_networks(seed):
    """Engines agree on value, directional and third derivative, and on the gradients of all."""
    r = Random(seed)
    layers = [layer(r) for _ in range(3)]
    scale = torch.linspace(0.5, 1.5, 8, requires_grad=True)

    def network(x):
        for each in layers:
            x = (scale * x + each(x + x.sin() / 2).tanh()).sin()
        return x

    def derivatives(engine, field, *others):
        point = X.clone().requires_grad_()
        found = engine(field, point, V.unsqueeze(0), 3, *others)
        weight = torch.linspace(-1, 1, 24).reshape(3, 8)
        number = sum((weight * part).sum() for part in found)
        return (*found, *torch.autograd.grad(number, (point, scale)))

    def nested(field, x, w, _):
        value, by_w, _, by_ww, _ = along(field, x, w[0], w[0])
        return [part.unsqueeze(0) for part in (value, by_w, by_ww)]

    pairs = (
        (derivatives(engines.taylor, network), derivatives(engines.reverse, right(network))),
        (derivatives(engines.taylor, network, True), derivatives(nested, right(network))),
    )
    for mine, theirs in pairs:
        for got, expected in zip(mine, theirs, strict=True):
            close(got, expected)
