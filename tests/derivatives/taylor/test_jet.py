"""The fallback, and what is refused: never a derivative that is wrong in silence."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives.taylor import TaylorError, carried
from tests.derivatives.taylor.checks import check

X = torch.rand(3, 4, dtype=torch.float64) + 0.5
W = torch.ones(1, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [F.mish, torch.erf, lambda x: torch.logcumsumexp(x, -1), lambda x: torch.logsumexp(x, -1)],
)
def test_a_function_without_a_rule(function):
    check(lambda x: function(x.sin() + 2).sin(), (4,))


def test_several_results_of_which_some_have_no_derivative():
    def function(x):
        values, places = x.sort(-1)
        assert type(places) is torch.Tensor
        mean, (low, high) = x.mean(), torch.var_mean(x, dim=-1)
        return values * (1 + places) + mean + (low + high)[:, None]

    check(function, (4,))


class Cubes(torch.autograd.Function):
    """With a backward of its own, which no rule knows."""

    @staticmethod
    def forward(ctx, x):
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_custom_function_is_refused():
    with pytest.raises(TaylorError, match=r"custom autograd\.Function"):
        carried(Cubes.apply, X, W)
    with torch.no_grad(), pytest.raises(TaylorError, match=r"custom autograd\.Function"):
        carried(Cubes.apply, X, W)


def test_a_part_without_gradients_is_refused():
    def function(x):
        with torch.no_grad():
            scale = x.abs().mean()
        return x * scale

    with pytest.raises(TaylorError, match=r"abs: called under torch\.no_grad"):
        carried(function, X, W)


@pytest.mark.filterwarnings("ignore")
def test_compiled_extensions_are_refused():
    scripted = torch.jit.script(lambda_free)
    with pytest.raises((TaylorError, RuntimeError)):
        carried(scripted, X, W)
    with pytest.raises((TaylorError, RuntimeError)):
        carried(lambda x: x.sum() * float(torch.from_numpy(x.numpy()).sum()), X, W)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [torch.jit.script, lambda norm: torch.jit.trace(norm, X)])
def test_modules_of_torchscript_are_left_to_no_engine(make):
    """A norm inside one has PyTorch's gradient, which no engine would notice to be wrong."""
    layer, norm = nn.Linear(4, 4).double(), make(nn.LayerNorm(4).double())
    model = hosm.ScoreModel(lambda x, t: norm(layer(x)), hosm.VPSchedule())
    for engine in ("auto", "taylor"):
        with pytest.raises(hosm.DerivativeError, match=r"one of torch\.jit.*that it was made of"):
            hosm.second_order_dsm(model, X, derivative=engine)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["auto", "taylor"])
def test_functions_of_torchscript_are_left_to_who_knows_them(engine):
    """A layer norm inside one made the gradient of "auto" 66 % wrong, by reverse mode."""
    layer, scripted = nn.Linear(4, 4).double(), torch.jit.script(normed)
    model = hosm.ScoreModel(lambda x, t: scripted(layer(x)), hosm.VPSchedule())
    for loss in (hosm.second_order_dsm, hosm.third_order_dsm):
        with pytest.raises(hosm.DerivativeError, match=r"one of torch\.jit.*that it was made of"):
            loss(model, X, derivative=engine)
    assert hosm.first_order_dsm(model, X).isfinite()
    assert hosm.second_order_dsm(model, X, derivative="reverse").isfinite()


def normed(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x, [4]).tanh()


def lambda_free(x: torch.Tensor) -> torch.Tensor:
    return x * x


@pytest.mark.parametrize("function", [lambda x: x.detach(), lambda x: X, lambda x: x.data, len])
def test_an_output_without_derivatives_is_refused(function):
    with pytest.raises(TaylorError, match="does not carry derivatives"):
        carried(function, X, W)


def test_nothing_is_kept_without_gradients():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        found = carried(layer, X, W)
    torch.testing.assert_close(found[1], W[0] @ layer.weight.T)
    assert not Cubes.apply(X).requires_grad


def test_a_linear_function_has_second_derivatives_of_zero():
    found = carried(lambda x: 2 * x + 1, X, W, "squares")
    assert torch.equal(found[2], torch.zeros(3, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.reshape(x, shape=(3, 2, 2)),
        lambda x: x.permute(dims=(1, 0)),
        lambda x: F.silu(input=x),
        lambda x: torch.sum(input=x, dim=1),
        lambda x: torch.mul(x, other=x.sin()),
        lambda x: torch.softmax(x, dim=1, dtype=torch.float64),
        lambda x: x.expand(size=(2, 3, 4)),
        lambda x: F.linear(x, weight=torch.eye(4), bias=torch.ones(4)),
    ],
)
def test_keywords_that_a_rule_does_not_know(function):
    check(lambda x: function(x.sin()).sin(), (4,))
