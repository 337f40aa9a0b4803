"""Functions of one number, with three derivatives each."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from hosm_losses.derivatives.taylor import carried
from hosm_losses.derivatives.taylor.pointwise import pointwise
from hosm_losses.derivatives.taylor.table import every
from tests.derivatives.taylor.checks import check

FUNCTIONS = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "sigmoid method": torch.Tensor.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "softplus, steep": lambda x: F.softplus(x, beta=3.0),
    "softplus, of a tensor": lambda x: F.softplus(x, torch.tensor(2.0), torch.tensor(9)),
    "mish": F.mish,
    "clamp": lambda x: x.clamp(-0.3, 0.5) * x.sin(),
    "relu": F.relu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "exp": torch.exp,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": abs,
    "square": torch.square,
    "x x": lambda x: x * x,
    "cube": lambda x: x**3,
    "reciprocal": lambda x: 1 / (2 + x.sin()),
}
POSITIVE = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "power": lambda x: x**-1.5,
    "power function": lambda x: torch.pow(x, 2.5),
}


@pytest.mark.parametrize("pairs", ["none", "squares"])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu tanh", "tanh", "mish"])
def test_float32_keeps_its_digits(name, pairs):
    """Also where the function is nearly straight, as at 5."""

    def numbers(x):
        x = x.requires_grad_()
        stack = carried(FUNCTIONS[name], x, torch.ones_like(x).unsqueeze(0), pairs)
        return *stack.detach(), *torch.autograd.grad(stack[-1].sum(), x)

    x = torch.linspace(-8, 8, 4001)[:, None]
    exact = numbers(x.double())
    for one, other in zip(numbers(x), exact, strict=True):
        assert (one - other).abs().max() < 1e-6


@pytest.mark.parametrize("name", FUNCTIONS)
def test_anywhere(name):
    check(FUNCTIONS[name], (2, 3))


def test_a_hardsigmoid_of_which_pytorch_has_one_derivative():
    check(lambda x: F.hardsigmoid(4 * x), (2, 3), reference=lambda x: F.relu6(4 * x + 3) / 6)


def test_softplus_is_straight_where_pytorch_takes_it_for_x():
    x = torch.tensor([[3.0, 5.0]])
    stack = carried(lambda x: F.softplus(x, 2, threshold=8), x, torch.ones(1, 1, 2), "squares")
    slope = torch.sigmoid(2 * x)
    expected = [F.softplus(x, 2, threshold=8), slope, 2 * slope * (1 - slope)]
    assert torch.equal(stack[:, 0, 1], torch.tensor([5.0, 1.0, 0.0]))
    torch.testing.assert_close(stack[:, 0, 0], torch.cat(expected)[:, 0])


def test_mish_far_from_zero_is_finite():
    """Where the second derivative of PyTorch's own is NaN."""
    x = torch.tensor([[-200.0, 200.0]], dtype=torch.float32).requires_grad_()
    stack = carried(F.mish, x, torch.ones(1, 1, 2, dtype=torch.float32), "squares")
    (gradient,) = torch.autograd.grad(stack.sum(), x)
    assert torch.equal(stack[:2, 0], torch.tensor([[0.0, 200.0], [0.0, 1.0]]).float())
    assert torch.equal(torch.stack([stack[2, 0], gradient[0]]).detach()[0], torch.zeros(2).float())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", POSITIVE)
def test_where_it_is_positive(name):
    check(POSITIVE[name], (4,), positive=True)


def test_a_power_at_zero_has_no_nan():
    x = torch.zeros(1, 2)

    def third(x):
        return x**3 + x**2

    found = carried(third, x, torch.ones(1, 1, 2), "squares")
    torch.testing.assert_close(found[2], torch.full((1, 2), 2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types_are_computed_in_float32_and_rounded_once(dtype):
    x, v = torch.randn(2, 5, 40).to(dtype)
    got = carried(F.silu, x, v.unsqueeze(0))
    expected = carried(F.silu, x.float(), v.float().unsqueeze(0))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=0, atol=0)


def test_a_new_activation_takes_ten_lines():
    @pointwise(*every("erf"))
    def _erf(x):
        yield torch.erf(x)
        slope = 2 * torch.exp(-x * x) / torch.pi**0.5
        yield slope
        yield -2 * x * slope
        yield (4 * x * x - 2) * slope

    check(torch.erf, (3,))
