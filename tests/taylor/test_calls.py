"""Calls of every operator with a rule, and of some without.

Values, types and shapes are PyTorch's, and so is what is refused; derivatives are those of
reverse mode.
"""

import warnings
from random import Random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from hosm_losses.taylor import jets, propagate
from hosm_losses.taylor.registry import RULES
from tests.cases import assert_same, gradients
from tests.taylor import table
from tests.taylor.checks import KINDS, check, close, name
from tests.taylor.table import TABLE, WEIGHT, call, functions

# In files of their own: changes in place, casts that round, and what is refused.
ELSEWHERE = "hardsigmoid float half bfloat16 cfloat cdouble chalf cuda __setitem__ retain_grad"
ELSEWHERE += " as_strided as_strided_copy as_strided_scatter"
ENTRIES = {function: entry for names, entry in TABLE.items() for function in functions(names)}
X, V = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X.requires_grad_()


def in_place(function):
    name = function.__name__
    return name.startswith("__i") if name.endswith("__") else name.endswith("_")


def removed(function):
    """Whether PyTorch keeps a function only to name its successor."""
    try:
        with warnings.catch_warnings(action="ignore"):
            call(ENTRIES[function], function, lambda _: 0)(X)
    except Exception as error:
        return "is now removed" in str(error)
    return False


def test_every_rule_has_an_entry():
    known = {*functions(ELSEWHERE), *ENTRIES}
    assert [name(each) for each in RULES if each not in known and not in_place(each)] == []


def compared(called, *, curved=True, kinds=KINDS[2:3]):
    """Whether PyTorch takes a call; all of it is compared, and what it refuses is refused."""

    def of_x(x):  # without second derivatives of its own, or with
        return called(x + x.sin() / 2 if curved else x)

    try:
        value = of_x(X)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017
            propagate(of_x, X, V.unsqueeze(0))
        return False
    got = propagate(of_x, X, V.unsqueeze(0))
    assert got.dtype == value.dtype
    close(got[0], value)
    check(of_x, (8,), WEIGHT, kinds=kinds)
    return True


def right(function, pick, **options):
    """Compare one call of a function, drawn by `pick`."""
    return compared(call(ENTRIES[function], function, pick), **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", ENTRIES, ids=name)
def test_every_name(function, monkeypatch):
    """The first choices go by the rule, and not by that for all functions; others are random."""
    if function is torch.asarray and not function(torch.ones(1, requires_grad=True)).requires_grad:
        pytest.skip("PyTorch 2.6 does not differentiate it, so nothing is there to compare with")
    along, calls = jets.along, []
    monkeypatch.setattr(jets, "along", lambda *given: calls.append(1) or along(*given))
    taken = right(function, lambda _: 0)
    assert (taken and not calls) or function not in RULES or removed(function)
    right(function, Random(0).randrange, curved=False, kinds=KINDS[4:5])


# One name for each rule, with the number of its calls where it takes many kinds.
MANY = {"__getitem__": 60, "einsum": 40, "multi_head_attention_forward": 30, "conv2d": 40}
MANY |= {"scaled_dot_product_attention": 30, "conv_transpose2d": 30, "matmul": 30, "add": 20}
ONE_NAME = {}
for function, entry in ENTRIES.items():
    if function in RULES and not removed(function):
        found = RULES[function].function
        found = getattr(found, "func", getattr(found, "__wrapped__", found))
        ONE_NAME.setdefault((entry, found), function)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", ONE_NAME.values(), ids=name)
def test_random_calls(function):
    @settings(max_examples=MANY.get(function.__name__, 8))
    @given(st.data(), st.booleans(), st.sampled_from(KINDS))
    def random_calls(data, curved, kind):
        pick = lambda count: data.draw(st.integers(0, count - 1))  # noqa: E731
        right(function, pick, curved=curved, kinds=[kind])

    random_calls()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", ONE_NAME.values(), ids=name)
def test_three_directions_at_once_in_float32_and_autocast(function, monkeypatch):
    """Kernels of the CPU may refuse shapes that broadcast in these types alone."""
    plain = {each: getattr(table, each) for each in ("WEIGHT", "OTHER", "ROW")}
    found = []
    for dtype, autocast in ((torch.float32, True), (torch.float32, False), (X.dtype, False)):
        for each, value in plain.items():
            monkeypatch.setattr(table, each, value.to(dtype))
        torch.set_default_dtype(dtype)
        x = X.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            called = call(ENTRIES[function], function, lambda _: 0)
            stack = propagate(called, x, torch.stack([V, X.detach(), X.cos().detach()]).to(dtype))
            assert stack.dtype == called(x).dtype
        gradient = gradients(stack.square().sum(), [x], create_graph=True)[0]
        found.append([stack, gradient, gradients(gradient.square().sum(), [x])[0]])
    for one, near in zip(found, (0.2, 1e-3), strict=False):
        assert_same([each.double() for each in one], [each.double() for each in found[-1]], near)


# What a rule does not take, and other spellings of what it takes; then what PyTorch refuses.
TAKEN = {
    "sum by names": lambda x: torch.sum(input=x, axis=1, keepdims=True),
    "flatten by names": lambda x: torch.flatten(input=x, start_dim=0),
    "softmax by name": lambda x: torch.softmax(x, dim=1, dtype=torch.float64),
    "linear by names": lambda x: F.linear(x, bias=WEIGHT[0], weight=WEIGHT),
    "convolution by names": lambda x: F.conv1d(
        x[:, None], WEIGHT[None, :1, :2], padding="same", dilation=2
    ),
    "cat by names": lambda x: torch.cat(tensors=(x, x.cos()), axis=-1),
    "where by names": lambda x: torch.where(condition=x > 0, input=x, other=x.cos()),
    "not in place": lambda x: F.silu(x, inplace=False) + F.leaky_relu(x, 0.3, False),
    "no dropout": lambda x: torch.dropout(x, 0.5, False) + torch.alpha_dropout(x, 0.5, False),
    "a power that depends on x": lambda x: x.abs() ** x.sin(),
    "the largest divides": lambda x: F.normalize(x, float("inf")),
    "the length by the largest": lambda x: torch.linalg.vector_norm(x, float("inf"), 1),
    "a product of all elements": lambda x: x[0].prod() * x,
    "roll of all elements": lambda x: x.roll(3),
    "t of one axis": lambda x: x[0].t() * x,
    "einsum of several batches": lambda x: torch.einsum("...i,...i->...", x[None], x),
}
REFUSED = {
    "a power by truth": lambda x: x ** (WEIGHT > 0),
    "cat of several ndim": lambda x: torch.cat([x, x[0]]),
    "where between integers": lambda x: torch.where((WEIGHT > 0).long(), x, 0.0),
    "masked_fill with an axis": lambda x: x.masked_fill(WEIGHT > 0, x.new_ones(1)),
    "gather of fewer axes": lambda x: x.gather(0, torch.tensor([0])),
    "repeat of fewer axes": lambda x: x.repeat(2),
    "a sum of integers": lambda x: x.sum(1, dtype=torch.long),
    "softmax of integers": lambda x: x.softmax(1, dtype=torch.long),
    "pad of more axes": lambda x: F.pad(x, (1, 1, 1, 1, 1, 1)),
    "a number has no rows": lambda x: torch.stack([*x.sum()]),
    "bmm of several ndim": lambda x: x[None].bmm(x),
    "a GELU that is not known": lambda x: F.gelu(x, approximate="erf"),
    "heads that divide no query": lambda x: F.scaled_dot_product_attention(
        x[None, :, None], x[None, :2, None], x[None, :2, None], enable_gqa=True
    ),
    "batch norm of one axis": lambda x: F.batch_norm(x[0], WEIGHT[0, :3], WEIGHT[0, :3].exp()),
    "batch norm without statistics": lambda x: F.batch_norm(x, None, None),
    "group norm of one axis": lambda x: F.group_norm(x[0], 1),
    "dim twice": lambda x: x.sum(1, dim=1),
    "no such dim": lambda x: x.sum(2),
    "a mask that is subtracted": lambda x: x - (x > 0),
    "less than truth": lambda x: True - x,
    "layer norm of another shape": lambda x: F.layer_norm(x, (3,)),
    "groups that divide no channels": lambda x: F.group_norm(x, 3),
    "distances of rows of another length": lambda x: torch.cdist(x, WEIGHT[:, :1]),
    "distances of a vector": lambda x: torch.cdist(x[0], WEIGHT),
    "a loss that is curved nowhere": lambda x: F.huber_loss(x, x.sin(), delta=0.0),
    "an odd gate": lambda x: F.glu(x[:, :3]),
    "same with strides": lambda x: F.conv1d(
        x[:, None], WEIGHT[None, :1, :3], stride=2, padding="same"
    ),
    "a padding that is not known": lambda x: F.conv1d(
        x[:, None], WEIGHT[None, :1, :3], padding="full"
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKEN | REFUSED)
def test_what_a_rule_leaves(name):
    assert compared((TAKEN | REFUSED)[name]) == (name in TAKEN)
