"""What random calls do not draw: the edges of domains, short types, masks and statistics."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hosm_losses.taylor import TaylorError, propagate
from hosm_losses.taylor.jets import result_type
from tests.cases import gradients
from tests.taylor.checks import check, expected

SHORT = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
POWERS = {
    "of whole numbers": lambda x: x[..., None] ** torch.arange(5),
    "in float64": lambda x: torch.float_power(x[..., None], torch.arange(5)),
    "in place": lambda x: x[..., None].repeat(1, 1, 5).pow_(torch.arange(5)),
    "of a single one": lambda x: x ** torch.tensor(2),
}


def stack_of(function, x, pairs="none"):
    """The stack along ones."""
    return propagate(function, x, torch.ones_like(x).unsqueeze(0), pairs)


# ------------------------------------------------------------------------------------ domains
@pytest.mark.parametrize("name", POWERS)
def test_a_power_by_a_tensor_is_refused(name):
    """PyTorch's forward derivative is differentiated in the exponent too, whose log is NaN."""
    with pytest.raises(TaylorError, match="pow"):
        stack_of(POWERS[name], torch.tensor([[-1.0, 0.0, 2.0]]))


SLOPE = 1 / (1 + math.exp(-6))  # of softplus at 3, with beta 2
# A function, a row x, and by hand the value, the slope and the second derivative along v.
BY_HAND = {
    "a root": (torch.sqrt, [0.0], lambda v: (0, math.inf * v, -math.inf * v * v)),
    "powers": (lambda x: x**3 + x**2, [0.0], lambda v: (0, 0, 2 * v * v)),
    # Constant there, as in PyTorch.
    "a length": (lambda x: x.norm(dim=1), [0.0, 0.0], lambda v: (0, 0, 0)),
    "a distance": (lambda x: torch.cdist(x, torch.ones(1, 2)), [1.0, 1.0], lambda v: (0, 0, 0)),
    "a spread": (lambda x: x.std(1), [1.0, 1.0], lambda v: (0, 0, 0)),
    "below eps": (F.normalize, [1e-14] * 3, lambda v: (0.01, 1e12 * v, 0)),
    # PyTorch's gradient is not that of its value, in which a length below eps counts as eps.
    "an angle below eps": (
        lambda x: F.cosine_similarity(x, torch.tensor([[3.0, 4.0]]), eps=1.0),
        [0.1, 0.2],
        lambda v: (0.22, v @ torch.tensor([0.6, 0.8]), 0),
    ),
    "where a Huber loss gets straight": (
        lambda x: F.huber_loss(x, torch.zeros(1, 1), reduction="none", delta=2.0),
        [-2.0],
        lambda v: (2, -2 * v, 0),
    ),
    "a product with two zeros": (
        lambda x: x.prod(1),
        [0.0, 3.0, 0.0],
        lambda v: (0, 0, 6 * v[0, 0] * v[0, 2]),
    ),
    "softplus": (
        lambda x: F.softplus(x, 2, threshold=8),
        [3.0],
        lambda v: (3 - math.log(SLOPE) / 2, SLOPE * v, 2 * SLOPE * (1 - SLOPE) * v * v),
    ),
    "softplus, straight": (
        lambda x: F.softplus(x, 2, threshold=8),
        [5.0],
        lambda v: (5, v, 0),
    ),
    **{
        f"{size} equal numbers": (
            lambda x: F.layer_norm(x, x.shape[1:]),
            [1e6] * size,
            lambda v: (0, (v - v.mean()) / 1e-5**0.5, 0),
        )
        for size in (3, 6, 10, 48)
    },
}


@pytest.mark.parametrize("name", BY_HAND)
def test_derivatives_at_the_edge_of_a_domain_by_hand(name):
    function, x, by_hand = BY_HAND[name]
    v = torch.rand(1, len(x)) - 0.3
    got = propagate(function, torch.tensor([x]), v[None], "squares")
    for part, right in zip(got, by_hand(v), strict=True):
        torch.testing.assert_close(part, torch.zeros_like(part) + right, rtol=1e-9, atol=0)


def test_hardsigmoid_whose_second_derivative_pytorch_lacks():
    check(lambda x: F.hardsigmoid(4 * x), (5,), reference=lambda x: F.relu6(4 * x + 3) / 6)


# --------------------------------------------------------------------------- digits and types
# Their powers are out of range where what they are multiplied by is zero.
SMALL = {
    "num / (den + 1e-15)": lambda den: 3 * den / (den + 1e-15),
    "1e-15 / (den + 1e-15)": lambda den: torch.full_like(den, 1e-15) / (den + 1e-15),
    "a number": lambda den: 1e-15 / (den + 1e-15),
    "reciprocal": lambda den: den * (den + 1e-15).reciprocal(),
    "rsqrt": lambda den: den * torch.rsqrt(den * den + 1e-14),
}
SMOOTH = [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), torch.tanh, F.mish]
SINGLE = [
    *((lambda x, f=f: f(torch.relu(x)), [-1.0, 0.5], 1e-5) for f in SMALL.values()),
    # Also where the function is nearly straight, as at 5. Some units in the last place of 8.
    *((function, torch.linspace(-8, 8, 4001), 4e-6) for function in SMOOTH),
]


@pytest.mark.parametrize("pairs", ["none", "squares", "sum"])
@pytest.mark.parametrize(("function", "x", "near"), SINGLE)
def test_float32_keeps_its_digits(function, x, near, pairs):
    def numbers(x):
        x = x[:, None].requires_grad_()
        stack = propagate(function, x, torch.ones(2, *x.shape, dtype=x.dtype), pairs)
        (slope,) = gradients(stack.sum(), [x], create_graph=True)
        # Of pairs no loss takes two passes back.
        return stack, slope, *(gradients(slope.sum(), [x]) if pairs == "none" else ())

    x = torch.as_tensor(x, dtype=torch.float32)
    for one, other in zip(numbers(x), numbers(x.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=near, atol=near)


@SHORT
def test_short_types_are_computed_in_float32_and_rounded_once(dtype):
    x, v = torch.randn(2, 5, 40).to(dtype)
    for cast in (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float, F.silu):
        got = propagate(cast, x, v.unsqueeze(0))
        exact = propagate(cast, x.float(), v.float().unsqueeze(0))
        assert got.dtype == cast(x).dtype
        torch.testing.assert_close(got, exact.to(got.dtype), rtol=0, atol=0)


EQUAL = torch.full((2, 4), 1e-4)


@SHORT
@pytest.mark.parametrize(
    ("function", "x"),
    [
        (F.normalize, EQUAL),
        (lambda x: x / x.norm(dim=1, keepdim=True), EQUAL),
        (lambda x: x / (x * 1e-2), 10 * EQUAL),
        (lambda x: F.rms_norm(x, (4,)), torch.linspace(-1e-3, 2e-3, 8).reshape(2, 4)),
    ],
)
def test_short_types_do_not_underflow(function, x, dtype):
    """Nor is another eps added than PyTorch adds."""
    got = stack_of(function, x.to(dtype))
    torch.testing.assert_close(got[0], function(x.to(dtype)), rtol=1e-2, atol=1e-3)
    assert got.isfinite().all()


def test_short_types_take_softmax_in_float32():
    q = torch.randn(2, 8, 4).to(torch.bfloat16)
    got, exact = (
        stack_of(lambda x: F.scaled_dot_product_attention(x, x, x), x) for x in (q, q.double())
    )
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=3e-2, atol=3e-2)


def one_layer():
    return nn.Linear(8, 8)


def convolutions():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3))


@SHORT
@pytest.mark.parametrize(("make", "shape"), [(one_layer, (3, 8)), (convolutions, (3, 2, 8, 8))])
def test_autocast_rounds_every_component_and_keeps_the_short_type_alone(make, shape, dtype):
    """Of what is kept for the backward passes, as PyTorch does."""
    network, x, kept = make().float(), torch.randn(shape, dtype=torch.float32), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.autocast("cpu", dtype):
        native = network(x)
        with hooks:
            found = propagate(network, x, x.unsqueeze(0))
    assert found.dtype == dtype
    torch.testing.assert_close(found[0], native, rtol=1e-2, atol=1e-2)
    weights = {each.data_ptr() for each in network.parameters()}
    assert {each.dtype for each in kept if each.data_ptr() not in weights} == {dtype}
    found.float().square().sum().backward()
    exact = expected(network, x.clone().requires_grad_(), x.unsqueeze(0), "none")
    exact = gradients(exact.square().sum(), network)
    for mine, theirs in zip(network.parameters(), exact, strict=True):
        assert mine.grad.dtype == torch.float32
        largest = float(theirs.abs().max())
        torch.testing.assert_close(mine.grad, theirs, rtol=0.05, atol=0.05 * largest)


def products(x, pairs="none"):
    """A convolution and products of what depends on x, between curved functions."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 2, 3, padding=1, dtype=x.dtype)

    def function(x):
        h = layer(x.sin()).sin().flatten(2)
        return (h @ h.mT.cos() @ h).sin()

    return list(layer.parameters()), stack_of(function, x, pairs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("pairs", ["none", "squares"])
def test_several_gradients_in_one_pass(pairs):
    parameters, stack = products(torch.randn(2, 1, 3, 3), pairs)

    def back(cotangent, **batched):
        return torch.autograd.grad(stack, parameters, cotangent, retain_graph=True, **batched)

    cotangents = torch.stack([stack, stack.cos()]).detach()
    one_by_one = [torch.stack(each) for each in zip(*map(back, cotangents), strict=True)]
    for got in (torch.func.vmap(back)(cotangents), back(cotangents, is_grads_batched=True)):
        torch.testing.assert_close(list(got), one_by_one, rtol=1e-11, atol=1e-12)


def test_autocast_around_a_backward_pass_changes_nothing():
    x, found = torch.randn(2, 1, 3, 3, dtype=torch.float32), []
    for around in (False, True):
        (weight, _), stack = products(x)  # which autocast rounds
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            (slope,) = torch.autograd.grad(stack.sum(), [weight], create_graph=True)
            found.append(torch.autograd.grad(slope.square().sum(), weight)[0])
    assert torch.equal(*found)


class Own(torch.Tensor):
    """A tensor with a meaning of its own, as of an integer or a sharded weight."""


def test_a_weight_of_a_subclass_is_left_to_pytorch():
    weight, bias = nn.Parameter(torch.randn(2, 1, 3, 3)), nn.Parameter(torch.randn(2))
    x = torch.randn(2, 1, 4, 4)
    plain, own = (
        stack_of(lambda x, kernel=kernel: F.conv2d(x.sin(), kernel, bias), x)
        for kernel in (weight, weight.as_subclass(Own))
    )
    torch.testing.assert_close(own.as_subclass(torch.Tensor), plain)


TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPERATIONS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "where": lambda a, b: torch.where(torch.tensor([True, False, True, False]), a, b),
    "addcmul": lambda a, b: torch.addcmul(a, b, b),
}
OPERANDS = {
    "rows": lambda x: x,
    "number": lambda x: x.mean(),
    "plain": lambda x: torch.full((4,), 1.5),
    "plain number": lambda x: torch.tensor(1.5),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_types_are_promoted_as_pytorch_does(name):
    """Though the stack of a number has an axis, and so would widen what the number does not."""
    x = (torch.rand(3, 4) + 0.5).requires_grad_()
    pairs = [("rows", each) for each in OPERANDS] + [("number", each) for each in OPERANDS]
    for (first, second), one, other in itertools.product(pairs, TYPES, TYPES):

        def function(x, first=first, second=second, one=one, other=other):
            a, b = OPERANDS[first](x).to(one), OPERANDS[second](x.cos()).to(other)
            return (
                OPERATIONS[name](a, b)
                if TYPES.index(one) < TYPES.index(other)
                else OPERATIONS[name](b, a)
            )

        try:
            value = function(x)
        except RuntimeError:  # PyTorch's own limits, which are not the engine's
            continue
        got = stack_of(function, x)
        assert (got.dtype, got.shape[1:]) == (value.dtype, value.shape)
        tolerance = 0.2 if {one, other} & set(TYPES[:2]) else 4e-5
        right = expected(function, x, torch.ones(1, 3, 4), "none")
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_type_of_a_result_without_torch_result_type(default):
    """Which torch.compile does not trace."""
    torch.set_default_dtype(default)
    dtypes = (torch.bool, torch.uint8, torch.int32, torch.int64, *TYPES)
    tensors = [torch.ones(shape, dtype=each) for each in dtypes for shape in ((), (2,))]
    for pair in itertools.product([*tensors, True, 2, 2.5], repeat=2):
        assert result_type(*pair) == torch.result_type(*pair), pair


# -------------------------------------------------------------------------------------- norms
def test_a_mean_that_is_large_costs_no_digits_that_the_native_norm_keeps():
    x = torch.randn(2, 4, 64, dtype=torch.float32) + 100
    got, exact = (stack_of(lambda x: F.group_norm(x, 2), each) for each in (x, x.double()))
    native = F.group_norm(x, 2)
    assert (got[0] - exact[0]).abs().max() < 3 * (native - exact[0]).abs().max() + 1e-6
    assert (got[1] - exact[1]).abs().max() < 1e-4


# ------------------------------------------------------------------------------------- dropout
@pytest.mark.parametrize("dropout", [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d])
def test_one_mask_for_value_and_derivatives(dropout):
    """PyTorch's, of whole channels where it has one for those."""
    axes = {"1": 1, "2": 2, "3": 3}.get(dropout.__name__[-2], 0)
    x, *directions = torch.rand(3, 3, 8, *[4] * axes) + 1
    torch.manual_seed(0)
    found = propagate(lambda x: dropout(x, 0.5, True), x, torch.stack(directions))
    torch.manual_seed(0)
    native = dropout(x, 0.5, True)
    torch.testing.assert_close(found[0], native)
    assert ((found != 0) == (native != 0)).all()
    assert 0 < (native != 0).sum() < native.numel()


def test_one_mask_in_attention():
    def function(x):
        return F.scaled_dot_product_attention(x, x, torch.eye(3).expand(2, 3, 3), dropout_p=0.5)

    found = propagate(function, torch.randn(2, 3, 4), torch.randn(2, 2, 3, 4))
    dropped = found[0] == 0
    assert 0 < dropped.sum() < dropped.numel()
    assert ((found[1:] == 0) == dropped).all()
