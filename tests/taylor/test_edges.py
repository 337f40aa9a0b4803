"""What random calls do not draw: the edges of domains, short types, masks and statistics."""

import itertools

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


SMALL = {
    "num / (den + 1e-15)": lambda den: 3 * den / (den + 1e-15),
    "1e-15 / (den + 1e-15)": lambda den: torch.full_like(den, 1e-15) / (den + 1e-15),
    "a number": lambda den: 1e-15 / (den + 1e-15),
    "reciprocal": lambda den: den * (den + 1e-15).reciprocal(),
    "rsqrt": lambda den: den * torch.rsqrt(den * den + 1e-14),
}


@pytest.mark.parametrize("pairs", ["none", "squares", "sum"])
@pytest.mark.parametrize("name", SMALL)
def test_inverses_of_the_smallest_numbers_in_float32(name, pairs):
    """Their powers are out of range where what they are multiplied by is zero."""

    def found(dtype):
        x, weight = torch.tensor([[-1.0, 0.5]], dtype=dtype), torch.ones(2, dtype=dtype)
        weight.requires_grad_()
        directions = torch.ones(2, 1, 2, dtype=dtype)
        stack = propagate(lambda x: SMALL[name](torch.relu(weight * x)), x, directions, pairs)
        (slope,) = gradients(stack.sum(), [weight], create_graph=True)
        # Of pairs no loss takes two passes back.
        return stack, slope, *(gradients(slope.sum(), [weight]) if pairs == "none" else ())

    for short, exact in zip(found(torch.float32), found(torch.float64), strict=True):
        torch.testing.assert_close(short.double(), exact.double(), rtol=1e-5, atol=1e-6)


def test_a_root_at_zero_has_no_derivative_and_a_power_has():
    x = torch.zeros(1, 2)
    assert not stack_of(torch.sqrt, x).isfinite().all()
    assert not propagate(torch.sqrt, x, torch.zeros(1, 1, 2)).isfinite().all()
    assert stack_of(lambda x: x**3 + x**2, x, "squares")[:, 0, 0].tolist() == [0.0, 0.0, 2.0]


def test_a_length_of_zero_is_constant_as_in_pytorch():
    x = torch.zeros(2, 3)
    x[1] = 1
    for function in (lambda x: x.norm(dim=1), lambda x: x.std(1)):
        got = stack_of(function, x, "squares")
        assert got[1:, 0].tolist() == [0, 0]
        assert got.isfinite().all()


def test_a_vector_whose_length_is_below_eps_is_divided_by_eps():
    found = stack_of(F.normalize, torch.full((1, 3), 1e-14), "squares")
    torch.testing.assert_close(found[1], torch.full((1, 3), 1e12))
    assert torch.equal(found[2], torch.zeros(1, 3))


def test_softplus_is_straight_where_pytorch_takes_it_for_x():
    x = torch.tensor([[3.0, 5.0]])
    stack = stack_of(lambda x: F.softplus(x, 2, threshold=8), x, "squares")
    slope = torch.sigmoid(2 * x)
    by_hand = torch.cat([F.softplus(x, 2, threshold=8), slope, 2 * slope * (1 - slope)])
    assert stack[:, 0, 1].tolist() == [5.0, 1.0, 0.0]
    torch.testing.assert_close(stack[:, 0, 0], by_hand[:, 0])


def test_hardsigmoid_whose_second_derivative_pytorch_lacks():
    check(lambda x: F.hardsigmoid(4 * x), (5,), reference=lambda x: F.relu6(4 * x + 3) / 6)


@pytest.mark.parametrize(
    "sizes", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)], ids=str
)
def test_empty_matrices(sizes):
    batch, m, k, n = sizes

    def function(x):
        h = x.sin().sum(-1)[..., None, None]
        return (h.expand(-1, m, k) @ h.cos().expand(-1, k, n)).flatten(1)

    found = stack_of(function, torch.ones(batch, 3))
    assert found.shape == (2, batch, m * n)
    assert not found.any() or k


# --------------------------------------------------------------------------- digits and types
@pytest.mark.parametrize("pairs", ["none", "squares"])
@pytest.mark.parametrize(
    "function", [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), torch.tanh, F.mish]
)
def test_float32_keeps_its_digits(function, pairs):
    """Also where the function is nearly straight, as at 5."""

    def numbers(x):
        stack = stack_of(function, x.requires_grad_(), pairs)
        return *stack.detach(), *gradients(stack[-1].sum(), [x])

    # Four units in the last place of 8.
    x = torch.linspace(-8, 8, 4001, dtype=torch.float32)[:, None]
    for one, other in zip(numbers(x), numbers(x.double()), strict=True):
        assert (one - other).abs().max() < 2e-6


@SHORT
def test_short_types_are_computed_in_float32_and_rounded_once(dtype):
    x, v = torch.randn(2, 5, 40).to(dtype)
    for cast in (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float, F.silu):
        got = propagate(cast, x, v.unsqueeze(0))
        exact = propagate(cast, x.float(), v.float().unsqueeze(0))
        assert got.dtype == cast(x).dtype
        torch.testing.assert_close(got, exact.to(got.dtype), rtol=0, atol=0)


@SHORT
def test_an_rms_norm_of_a_short_type_adds_the_eps_that_pytorch_adds(dtype):
    x = torch.randn(3, 4).to(dtype) * 1e-3
    got = stack_of(lambda x: F.rms_norm(x, (4,)), x)[0]
    torch.testing.assert_close(got, F.rms_norm(x, (4,)), rtol=1e-2, atol=1e-3)


def test_short_types_do_not_underflow():
    x = torch.full((2, 4), 1e-4, dtype=torch.float16)
    half = torch.full_like(x, 0.5)
    for function in (F.normalize, lambda x: x / x.norm(dim=1, keepdim=True)):
        got = stack_of(function, x)
        torch.testing.assert_close(got[0], half, rtol=1e-2, atol=0)
        assert got.isfinite().all()
    got = stack_of(lambda x: x / (x * 1e-2), 10 * x)[0]
    torch.testing.assert_close(got, 10 * x / (10 * x * 1e-2), rtol=1e-2, atol=0)


def test_short_types_take_softmax_in_float32():
    q = torch.randn(2, 8, 4).to(torch.bfloat16)
    got, exact = (
        stack_of(lambda x: F.scaled_dot_product_attention(x, x, x), x) for x in (q, q.double())
    )
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=3e-2, atol=3e-2)


@SHORT
def test_autocast_rounds_every_component_as_it_rounds_the_value(dtype):
    layer, x = nn.Linear(8, 8).float(), torch.randn(2, 3, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = propagate(lambda x: layer(x), x[0], x[1:])
        assert found.dtype == dtype
        torch.testing.assert_close(found[0], layer(x[0]), rtol=1e-2, atol=1e-2)
    found.float().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 3.0, dtype=torch.float32))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.einsum("bij,bkj->bijk", x.sin(), x.cos()),
        lambda x: torch.einsum("bij,bij->b", x.sin(), x.cos()),
        lambda x: torch.baddbmm(torch.ones(3, 2, 2, dtype=torch.float32), x, x.mT),
    ],
)
def test_a_product_has_the_type_of_pytorch_under_autocast(function):
    x = torch.rand(3, 2, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stack_of(function, x).dtype == function(x).dtype


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
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        dtypes = (torch.bool, torch.uint8, torch.int32, torch.int64, *TYPES)
        tensors = [torch.ones(shape, dtype=each) for each in dtypes for shape in ((), (2,))]
        for pair in itertools.product([*tensors, True, 2, 2.5], repeat=2):
            assert result_type(*pair) == torch.result_type(*pair), pair
    finally:
        torch.set_default_dtype(before)


# -------------------------------------------------------------------------------------- norms
def test_a_mean_that_is_large_costs_no_digits_that_the_native_norm_keeps():
    x = torch.randn(2, 4, 64, dtype=torch.float32) + 100
    got, exact = (stack_of(lambda x: F.group_norm(x, 2), each) for each in (x, x.double()))
    native = F.group_norm(x, 2)
    assert (got[0] - exact[0]).abs().max() < 3 * (native - exact[0]).abs().max() + 1e-6
    assert (got[1] - exact[1]).abs().max() < 1e-4


@pytest.mark.parametrize("size", [3, 6, 10, 48])
def test_rows_of_equal_numbers_have_no_residue(size):
    x, v = torch.full((2, size), 1e6), torch.randn(1, 2, size)
    value, slope, bend = propagate(lambda x: F.layer_norm(x, (size,)), x, v, "squares")
    assert torch.equal(value, torch.zeros_like(x))
    assert torch.equal(bend, torch.zeros_like(x))
    torch.testing.assert_close(slope, (v[0] - v[0].mean(1, keepdim=True)) / 1e-5**0.5)


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
