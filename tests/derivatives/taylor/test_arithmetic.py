"""Sums and products of Jets, plain tensors and numbers, in either order."""

import operator

import pytest
import torch

from hosm_losses.derivatives.taylor import carried
from tests.derivatives.taylor.checks import check

CASES = {
    "number": lambda x: 3 - 2 * (x + 1) / 4 + 2 / (3 + x * x) - (-x),
    "sum of two": lambda x: x + x.sin(),
    "difference": lambda x: x.sin() - x,
    "scaled": lambda x: torch.sub(x.sin(), x, alpha=3),
    "scaled number": lambda x: torch.add(x, 2, alpha=3) + torch.sub(torch.ones(4), x, alpha=0.5),
    "product": lambda x: x * x.sin() * torch.cos(x),
    "short and long": lambda x: x + x * x + x.sin() * x,
    "quotient": lambda x: x / (1 + x * x),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x, value=2),
    "broadcast up": lambda x: (x.sum(-1, keepdim=True) * x).sin() + x[:, :1],
    "rows by columns": lambda x: x.unsqueeze(-1) * x.sin().unsqueeze(-2),
    "matrices": lambda x: (x.unsqueeze(-1) @ x.sin().unsqueeze(-2)) @ x.unsqueeze(-1),
    "bmm": lambda x: torch.bmm(x.unsqueeze(-1), x.cos().unsqueeze(-2)),
    "vector product": lambda x: x @ torch.ones(4),
    "einsum": lambda x: torch.einsum("bi,bj->bij", x, x.sin()),
    "einsum of one": lambda x: torch.einsum("bi->b", x * x),
    "einsum of a list": lambda x: torch.einsum("bi, bj -> ij", [x, x.cos()]),
    "einsum with dots": lambda x: torch.einsum("...i,...i->...", x, x.sin()),
    "power of a tensor": lambda x: (1 + x * x) ** torch.tensor(1.5),
    "baddbmm": lambda x: torch.baddbmm(
        torch.ones(3, 4, 4), x.unsqueeze(-1), x.sin().unsqueeze(-2), beta=0.5, alpha=2
    ),
    "of another length": lambda x: torch.maximum(x, x.sin()),
    "rounded": lambda x: torch.div(x, 0.3, rounding_mode="floor") + x,
}


@pytest.mark.parametrize("name", CASES)
def test_without_parameters(name):
    check(CASES[name], (4,))


POWERS = {
    "of whole numbers": lambda x: x[..., None] ** torch.arange(5),
    "of float32": lambda x: torch.pow(x[..., None], torch.arange(5.0, dtype=torch.float32)),
    "in float64": lambda x: torch.float_power(x[..., None], torch.arange(5)),
    "in place": lambda x: x[..., None].repeat(1, 1, 5).pow_(torch.arange(5)),
    "of single ones": lambda x: torch.stack([x ** torch.tensor(i) for i in range(5)], -1),
}


@pytest.mark.parametrize("name", POWERS)
def test_powers_by_a_tensor_of_what_is_below_zero(name):
    """PyTorch's forward derivative is differentiated in the exponent too, whose log is NaN."""

    def written_out(x):
        return torch.stack([torch.ones_like(x), x, x * x, x * x * x, x * x * x * x], -1)

    some = torch.tensor([1.0, 1.0, 0.0])  # and of zero
    check(
        lambda x: POWERS[name](some * x),
        (3,),
        reference=lambda x: written_out(some * x),
    )


def test_powers_by_a_tensor_of_a_wider_type():
    x = torch.tensor([[-1.0, -2.0, 3.0]], dtype=torch.float32, requires_grad=True)
    stack = carried(
        lambda x: x ** torch.tensor([2.0, 3.0, 0.0]), x, torch.ones(1, 1, 3).float(), "squares"
    )
    assert stack.dtype == torch.float64
    (gradient,) = torch.autograd.grad(stack.sum(), x)
    assert gradient.tolist() == [[0.0, 3 * 4 - 6 * 2 + 6, 0.0]]


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 1, 3, 1), (4,)])
def test_a_parameter_on_either_side(op, shape):
    parameter = (torch.randn(shape).abs() + 1).requires_grad_()
    check(lambda x: op(x.sin(), parameter) + op(parameter, 3 + x.cos()), (4,), parameter)


@pytest.mark.parametrize("shape", [(4, 2), (3, 4, 2), (5, 1, 4, 2)])
def test_matrix_product_with_a_parameter(shape):
    parameter = torch.randn(shape, requires_grad=True)
    check(lambda x: (x.sin() @ parameter).sin(), (3, 4), parameter)
    check(lambda x: (parameter.mT @ x.mT.sin()).sin(), (3, 4), parameter)


def test_einsum_with_a_parameter():
    parameter = torch.randn(4, 2, requires_grad=True)
    check(lambda x: torch.einsum("bi,ij->bj", x.sin(), parameter).sin(), (4,), parameter)


SMALL = {
    "num / (den + 1e-15)": lambda den: 3 * den / (den + 1e-15),
    "1e-15 / (den + 1e-15)": lambda den: torch.full_like(den, 1e-15) / (den + 1e-15),
    "a number": lambda den: 1e-15 / (den + 1e-15),
    "clamped": lambda den: den / den.clamp(min=1e-15),
    "reciprocal": lambda den: den * (den + 1e-15).reciprocal(),
    "rsqrt": lambda den: den * torch.rsqrt(den * den + 1e-14),
}


@pytest.mark.parametrize("pairs", ["none", "squares", "sum", "halves", "last"])
@pytest.mark.parametrize("name", SMALL)
def test_inverses_of_the_smallest_numbers_in_float32(name, pairs):
    """Their powers are out of range where what they are multiplied by is zero."""

    def found(dtype):
        x, weight = torch.tensor([[-1.0, 0.5]], dtype=dtype), torch.ones(2, dtype=dtype)
        weight.requires_grad_()
        stack = carried(
            lambda x: SMALL[name](torch.relu(weight * x)),
            x,
            torch.ones(2, 1, 2, dtype=dtype),
            pairs,
        )
        (slope,) = torch.autograd.grad(stack.sum(), weight, create_graph=True)
        if pairs != "none":  # of which no loss takes two passes back
            return stack, slope
        return stack, slope, torch.autograd.grad(slope.sum(), weight)[0]

    for short, exact in zip(found(torch.float32), found(torch.float64), strict=True):
        torch.testing.assert_close(short.double(), exact.double(), rtol=1e-5, atol=1e-6)


def test_a_root_at_zero_has_no_derivative():
    x = torch.zeros(1, 2).requires_grad_()
    assert not torch.isfinite(carried(torch.sqrt, x, torch.ones(1, 1, 2))).all()
    assert not torch.isfinite(carried(torch.sqrt, x, torch.zeros(1, 1, 2))).all()
