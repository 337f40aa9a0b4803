"""Calls in every spelling that PyTorch takes, and the type and shape of what comes back."""

import itertools
import operator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from hosm_losses.derivatives.primitive_mode import safe_primitives
from hosm_losses.derivatives.taylor import TaylorError, carried
from tests.derivatives.taylor.checks import along, check

ROWS = torch.tensor([[1.5, -0.5, 2.0, 1.0]], dtype=torch.float64)
SPELLINGS = {
    "axis and keepdims": lambda x: x.sum(axis=1, keepdims=True) + x.mean(axis=(0, 1)),
    "a list of dimensions": lambda x: torch.sum(x, dim=[0, -1]) + torch.mean(x, [1, 2], True),
    "no dimensions": lambda x: x.sum(dim=()) + x.mean(dim=[]) + torch.sum(x, []),
    "all dimensions kept": lambda x: x.sum(None, True) + x.mean(dim=None, keepdim=True),
    "a type": lambda x: x.sum(1, dtype=torch.float64) + torch.mean(x, 1, dtype=torch.float64),
    "input": lambda x: torch.sum(input=x, axis=1) + torch.flatten(input=x, start_dim=0)[:4],
    "a number": lambda x: x.mean().sum(-1) + x.mean().mean(0) + x.mean().flatten(),
    "squeeze": lambda x: x[:, :1].squeeze(dim=1) + torch.squeeze(x[:, :1], (-2, 0)),
    "transpose": lambda x: x.transpose(dim0=1, dim1=-1).swapaxes(axis0=0, axis1=1),
    "flatten": lambda x: x.flatten(start_dim=1) + x.flatten(end_dim=1).reshape(3, 8),
    "shapes": lambda x: x.view(size=(3, 8)).reshape(shape=(3, 2, 4)).permute(dims=(0, 2, 1)),
    "tile": lambda x: x.tile(2) + torch.tile(x, dims=(1, 2)),
    "split": lambda x: x.split(split_size=2, dim=-1)[0] + torch.split(x, [1, 3], dim=2)[0],
    "repeat interleave": lambda x: x.repeat_interleave(2) + x.repeat_interleave(2, dim=None),
    "softmax": lambda x: torch.softmax(x, 1, torch.float64) + F.softmax(x, -1, dtype=x.dtype),
    "softmax over the batch": lambda x: x.softmax(dim=0) + torch.softmax(x, -3),
    "softmax of a number": lambda x: torch.softmax(x.mean(), 0) + x,
    "stack": lambda x: torch.stack(tensors=(x, x.cos()), dim=-1),
    "chunk": lambda x: torch.chunk(x, chunks=2, dim=-1)[1] + x.chunk(2, -1)[0],
    "unflatten": lambda x: torch.unflatten(x, dim=-1, sizes=(2, -1)),
    "scaled difference": lambda x: torch.rsub(x, ROWS, alpha=2) + torch.sub(2, x, alpha=3),
    "an addcmul with a plain sum": lambda x: torch.addcmul(ROWS, x, x.sin(), value=-0.5),
    "baddbmm of a plain product": lambda x: torch.baddbmm(
        x[..., :2], torch.ones(3, 2, 4), torch.ones(3, 4, 2), beta=2
    ),
    "a pad of the batch": lambda x: F.pad(x, (1, 0, 0, 1, 2, 0)),
    "an einsum of lists": lambda x: torch.einsum(x, [0, 1, 2], x.sin(), [0, 1, 3], [0, 2, 3]),
    "an einsum with an implied result": lambda x: torch.einsum("abc, abd", x, x.sin()),
    "an einsum of a diagonal": lambda x: torch.einsum("bii->bi", x[..., :2]),
    "pooling of one sample": lambda x: F.avg_pool1d(x[0], 2) + F.adaptive_avg_pool1d(x[0], 2),
    "a pool with places": lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
    "pixels of one sample": lambda x: F.pixel_shuffle(x.reshape(12, 2, 1), 2),
    "norm of a sample": lambda x: F.layer_norm(x[0], (2, 4)) + F.layer_norm(x[:, 0], [4])[:2],
    "in place off": lambda x: F.leaky_relu(x, 0.3, False) + F.silu(x, inplace=False),
    "a bias by name": lambda x: F.linear(x, bias=ROWS[0, :2], weight=ROWS.expand(2, 4)),
    "a weight of one axis": lambda x: F.linear(x, ROWS[0]),
    "logical numbers": lambda x: x * True + x**True,
    "dropout off": lambda x: F.dropout(x, training=False) + torch.dropout(x, 0.5, False),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_between_curved_functions(name):
    def function(x):
        return SPELLINGS[name](x.sin() + x).sin()

    def reference(x):
        with safe_primitives():
            return function(x)

    check(function, (2, 4), reference=reference)


TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPERATIONS = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv")},
    "where": lambda a, b: torch.where(torch.tensor([True, False, True, False]), a, b),
    "addcmul": lambda a, b: torch.addcmul(a, b, b),
}
TAKEN = {"rows": lambda x: x, "number": lambda x: x.mean()}


def types_of(function, x):
    try:
        return function(x).dtype
    except RuntimeError:
        return None


@pytest.mark.parametrize("first", TAKEN)
@pytest.mark.parametrize("second", [*TAKEN, "plain", "plain number"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_types_are_promoted_as_pytorch_does(name, first, second):
    """Though the stack of a number has an axis, and so would widen what the number does not."""
    x, v = torch.rand(2, 3, 4) + 0.5
    plain = {"plain": torch.rand(4) + 1, "plain number": torch.tensor(1.5)}
    for one, other in itertools.product(TYPES, repeat=2):

        def function(x, one=one, other=other):
            a = TAKEN[first](x).to(one)
            b = plain[second].to(other) if second in plain else TAKEN[second](x.cos()).to(other)
            return OPERATIONS[name](a, b)

        for swapped in (False, True):

            def turned(x, swapped=swapped, function=function, one=one, other=other):
                if not swapped or second not in plain:
                    return function(x)
                return OPERATIONS[name](plain[second].to(other), TAKEN[first](x).to(one))

            expected = types_of(turned, x)
            if expected is None:  # PyTorch's own limits, which are not the engine's
                continue
            value, by_v, *_ = along(turned, x, v, v)
            got = carried(turned, x, v.unsqueeze(0))
            assert got.dtype == expected
            assert got.shape[1:] == value.shape
            coarse = torch.bfloat16 in (one, other) or torch.float16 in (one, other)
            tolerance = 0.05 if coarse else 1e-5
            torch.testing.assert_close(got[0], value, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(got[1], by_v, rtol=4 * tolerance, atol=4 * tolerance)


def test_masks_are_not_subtracted_as_in_pytorch():
    x = torch.rand(3, 4)
    for function in (lambda x: x - (x > 0), lambda x: True - x):
        with pytest.raises(RuntimeError, match="bool"):
            carried(function, x, x.unsqueeze(0))


@pytest.mark.parametrize("function", [F.normalize, lambda x: x / x.norm(dim=1, keepdim=True)])
def test_lengths_of_short_types_do_not_underflow(function):
    x = torch.full((2, 4), 1e-4, dtype=torch.float16)
    got = carried(function, x, torch.ones_like(x).unsqueeze(0))
    assert got.dtype == torch.float16
    torch.testing.assert_close(got[0], torch.full_like(x, 0.5), rtol=1e-2, atol=0)
    assert got.isfinite().all()


def test_a_quotient_of_short_types_that_is_in_range_is_found():
    x = torch.full((1, 2), 1e-3, dtype=torch.float16)
    got = carried(lambda x: x / (x * 1e-2), x, x.unsqueeze(0))
    torch.testing.assert_close(got[0], (x / (x * 1e-2)), rtol=1e-2, atol=0)


def test_a_length_of_zero_is_constant_as_in_pytorch():
    x = torch.zeros(2, 3)
    x[1] = 1
    for function in (lambda x: x.norm(dim=1), lambda x: torch.linalg.vector_norm(x, dim=-1)):
        point = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(point).sum(), point)
        got = carried(function, x, torch.ones(1, 2, 3), "squares")
        torch.testing.assert_close(got[1], expected.sum(1))
        assert got[2, 0] == 0


def test_lengths_by_place_and_by_name():
    def reference(x):
        return (x * x).sum((1, 2)).sqrt()

    for function in (
        lambda x: x.norm(2, (1, 2), False, torch.float64),
        lambda x: torch.norm(x, "fro", (1, 2), False, None, torch.float64),
        lambda x: torch.norm(input=x, p=2, dim=[1, 2]),
        lambda x: torch.linalg.vector_norm(x, 2, axis=(1, 2)),
        lambda x: x.norm(p=None, dim=(-1, -2)),
    ):
        x, v = torch.rand(2, 3, 2, 4)
        expected = torch.func.jvp(reference, (x,), (v,))
        torch.testing.assert_close(carried(function, x, v.unsqueeze(0)), torch.stack(expected))


def test_a_result_elsewhere_is_refused():
    x = torch.rand(3, 4)
    for function in (
        lambda x: F.normalize(x, 2.0, 1, 1e-12, torch.empty(3, 4)),
        lambda x: torch.norm(x, 2, None, False, torch.empty(())),
    ):
        with pytest.raises(TaylorError, match="in place"):
            carried(function, x, x.unsqueeze(0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(-4),
        lambda x: x.permute(0, 1, 5),
        lambda x: x[0, 0].mT,
        lambda x: x.t(),
        lambda x: F.gelu(x, approximate="other"),
        lambda x: torch.mm(x, x),
        lambda x: x.sum(1, dim=1),
    ],
)
def test_what_pytorch_refuses_is_refused_in_its_words(function):
    x = torch.rand(3, 2, 4)
    with pytest.raises((RuntimeError, IndexError, TypeError)) as theirs:
        function(x)
    with pytest.raises(type(theirs.value)):
        carried(function, x, x.unsqueeze(0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.bincount(x.abs().long().flatten()).sum() * x,
        lambda x: x.sin() * torch.count_nonzero(x),
        lambda x: x.cos() * torch.searchsorted(torch.tensor([0.0, 1.0]), x.flatten()).sum(),
    ],
)
def test_functions_whose_results_are_whole_numbers(function):
    check(function, (4,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_rms_norm_of_a_short_type_adds_the_eps_that_pytorch_adds(dtype):
    x = torch.randn(3, 4).to(dtype) * 1e-3
    got = carried(lambda x: F.rms_norm(x, (4,)), x, x.unsqueeze(0))
    torch.testing.assert_close(got[0], F.rms_norm(x, (4,)), rtol=1e-2, atol=1e-3)


def test_a_baddbmm_under_autocast_has_the_type_of_its_product():
    x = torch.rand(3, 2, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):

        def function(x):
            return torch.baddbmm(torch.ones(3, 2, 2, dtype=torch.float32), x, x.mT)

        assert carried(function, x, x.unsqueeze(0)).dtype == function(x).dtype == torch.bfloat16
