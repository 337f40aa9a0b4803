"""Operators that PyTorch does not differentiate: an error in both engines, and never a constant.

What makes a new tensor, draws, rounds or detaches is a constant on purpose, and passes.
"""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import hosm_losses as hosm
from hosm_losses import taylor
from hosm_losses.derivatives import derive
from hosm_losses.model import bind_model
from tests.cases import ENGINES, VP, assert_same, loss_and_gradients
from tests.versions import CONSTANT

SPECIAL = {
    name: function
    for name, function in vars(torch.special).items()
    if name[0] != "_" and callable(function) and not isinstance(function, type)
}
FORMS = {
    "f(x)": lambda f, x: f(x),
    "f(x, 2)": lambda f, x: f(x, 2),
    "f(2, x)": lambda f, x: f(2, x),
    "f(x, twos)": lambda f, x: f(x, torch.full_like(x, 2.0)),
    "f(twos, x)": lambda f, x: f(torch.full_like(x, 2.0), x),
    "f(x, dim=1)": lambda f, x: f(x, dim=1),
}
X = torch.tensor([[0.6, 0.8], [0.65, 0.9], [0.7, 0.75]], dtype=torch.float64)
STEP = 1e-5


def along_ones(function, engine):
    """The derivative along ones of a function of X, by `taylor.jet` or in reverse mode."""
    ones = torch.ones(1, *X.shape)
    if engine == "taylor":
        return taylor.jet(function, X, ones)[1][0]
    bound = bind_model(hosm.ScoreModel(lambda x, t: function(x), VP), 3, t=torch.full((3,), 0.5))
    return derive(bound, X, ones, order=2, engine=engine).directional[0]


@pytest.mark.filterwarnings("ignore:network.*whose derivative jumps")  # of i0e at 0
@pytest.mark.parametrize("engine", ["taylor", "reverse"])
@pytest.mark.parametrize("name", SPECIAL)
def test_every_function_of_torch_special_is_right_or_an_error(name, engine):
    taken = 0
    for form in FORMS.values():

        def function(x, form=form):
            value = form(SPECIAL[name], x)
            return value.reshape(len(x), -1).sum(1, keepdim=True) + 0 * x

        try:
            difference = (function(X + STEP) - function(X - STEP)) / (2 * STEP)
        except (TypeError, RuntimeError, IndexError):  # no such form of this function
            continue
        taken += 1
        differentiable = form(SPECIAL[name], X.clone().requires_grad_()).requires_grad
        if not differentiable:
            with pytest.raises(hosm.DerivativeError, match=f"got {SPECIAL[name].__name__},"):
                along_ones(function, engine)
            continue
        try:
            got = along_ones(function, engine)
        except (taylor.TaylorError, RuntimeError, ValueError):
            continue
        finite = difference.isfinite()
        torch.testing.assert_close(got[finite], difference[finite], rtol=1e-6, atol=1e-6)
    assert taken


class Through(nn.Module):
    """A function between two layers, of which the second sees its argument as well."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(2, 4), nn.Linear(4, 2)
        self.function = function

    def forward(self, x, t):
        h = self.inner(x)
        return self.outer(h.tanh() + self.function(h))


def hermite(h):
    return torch.ops.aten.special_hermite_polynomial_h.default(h, torch.full_like(h, 3.0))


WRONG = {
    "a special function": CONSTANT,
    "hermite by its operator": hermite,
    "a histogram": lambda h: torch.histc(h, 4),
}


@pytest.mark.parametrize("options", [{"order": 2}, {}, {"probes": hosm.Paired(), "probe": None}])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WRONG)
def test_losses_refuse_them_and_try_no_other_engine(name, engine, options):
    network, calls = Through(WRONG[name]), []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(hosm.DerivativeError, match=r"x\.detach\(\)"):
        loss_and_gradients(network, (4, 2), engine=engine, **options)
    assert len(calls) == 1


def test_reverse_mode_refuses_what_forward_mode_does_not_have():
    network = Through(lambda h: torch.linspace(h[0, 0], h[0, 1], 4))
    for engine in ("auto", "reverse"):
        with pytest.raises(hosm.DerivativeError, match=r"linspace.*x\.detach\(\)"):
            loss_and_gradients(network, (4, 2), engine=engine)


FEW = {"solver": hosm.FixedGrid(4)}
LIKELIHOODS = {
    "exact": {},
    "one probe": {"divergence": hosm.Hutchinson()},
    "with a graph": {"enable_grad": True},
}


@pytest.mark.parametrize("options", LIKELIHOODS.values(), ids=LIKELIHOODS)
@pytest.mark.parametrize("function", [hosm.ode_nll, hosm.ode_sample])
def test_likelihoods_refuse_them(function, options):
    model, given = hosm.ScoreModel(Through(CONSTANT), VP), torch.randn(3, 2)
    with pytest.raises(hosm.DerivativeError, match=CONSTANT.__name__):
        function(model, given, **FEW, **options)


def test_the_check_names_the_module():
    with pytest.raises(hosm.DerivativeError, match=CONSTANT.__name__):
        hosm.check_derivatives(hosm.ScoreModel(Through(CONSTANT), VP), torch.randn(3, 2))


def test_what_is_not_differentiated_is_not_looked_at():
    """Order one, a model without primitives, a constant on purpose and a sample."""
    network, x = Through(CONSTANT), torch.randn(4, 2)
    model = hosm.ScoreModel(network, VP)
    assert loss_and_gradients(network, (4, 2), 1)[0].isfinite()
    assert hosm.first_order_dsm(model, x[:1]).isfinite()
    native = hosm.ScoreModel(network, VP, primitives=False)
    assert loss_and_gradients(native, (4, 2), engine="reverse")[0].isfinite()
    assert hosm.ode_nll(native, x, **FEW).nll.isfinite().all()
    assert hosm.ode_sample(model, x, divergence=None, **FEW).x.isfinite().all()
    meant = Through(lambda h: CONSTANT(h.detach()))
    found = [loss_and_gradients(meant, (4, 2), engine=each) for each in ENGINES]
    assert_same(found[0], found[2])
    with torch.no_grad():
        assert CONSTANT(x).isfinite().all()


def seeded(function):
    """A function that draws the same whenever it is called."""

    def drawn(h):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return function(h)

    return drawn


WEIGHT = torch.tensor(0.3, requires_grad=True)
HARMLESS = {
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda h: torch.full_like(h, 0.3),
    "empty_like": lambda h: torch.empty_like(h).fill_(0.5),
    "new_zeros": lambda h: h.new_zeros(h.shape),
    "new_ones": lambda h: h.new_ones(4),
    "new_empty": lambda h: h.new_empty(4).fill_(1),
    "new_empty_strided": lambda h: h.new_empty_strided((4,), (1,)).fill_(1),
    "new_full": lambda h: h.new_full((4,), 0.2),
    "new_tensor": lambda h: h.new_tensor([0.1, 0.2, 0.3, 0.4]),
    "new": lambda h: h.new(4).fill_(1),
    "zeros_like by its operator": torch.ops.aten.zeros_like.default,
    "new_zeros by its operator": lambda h: torch.ops.aten.new_zeros.default(h, [4]),
    "detach by its operator": torch.ops.aten.detach.default,
    "type_as": lambda h: torch.arange(4).type_as(h),
    "to": lambda h: torch.eye(4)[0].to(h),
    "expand_as": lambda h: torch.ones(4).expand_as(h),
    "view_as": lambda h: torch.ones(4, h.numel() // 4).view_as(h),
    "reshape_as": lambda h: torch.ones(4, h.numel() // 4).reshape_as(h),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda h: torch.randint_like(h, 3),
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()),
    "poisson": lambda h: torch.poisson(h.square()),
    "normal": lambda h: torch.normal(h, 1.0),
    "a mask of dropout": lambda h: h * torch.empty_like(h).bernoulli_(0.5),
    "dropout": lambda h: F.dropout(h, 0.5),
    "noise in place": lambda h: torch.empty_like(h).normal_().exponential_(),
    "noise over x": lambda h: sum(
        change(h.clone())
        for change in (Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_)
    ),
    "over x": lambda h: h.clone().fill_(WEIGHT) + h.clone().zero_() + torch.fill(h, WEIGHT),
    "detach": Tensor.detach,
    "data": lambda h: h.data,
    "a function of what is detached": lambda h: CONSTANT(h.detach()),
    "a comparison": lambda h: (h > 0).to(h.dtype),
    "argmax": lambda h: h.argmax(1, keepdim=True).to(h.dtype),
    "one_hot": lambda h: F.one_hot(h.argmax(1), 4).to(h.dtype),
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "sign": torch.sign,
    "division rounded": lambda h: torch.div(h, 0.3, rounding_mode="floor"),
    "a part of a factorization": lambda h: torch.linalg.lu(h)[1].sum(1, keepdim=True) * h,
    "a number": lambda h: h.abs().max().item() * h,
}


@pytest.mark.filterwarnings("error:engine='auto'")
@pytest.mark.parametrize("name", HARMLESS)
def test_constants_on_purpose_pass_in_both_engines(name):
    network = Through(seeded(HARMLESS[name]))
    found = [loss_and_gradients(network, (4, 2), engine=each) for each in ENGINES]
    likelihood = hosm.ode_nll(hosm.ScoreModel(network, VP), torch.ones(4, 2), **FEW).nll
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])
    assert likelihood.shape == (4,)


def test_a_transform_around_a_loss_refuses_them_too():
    network = Through(CONSTANT)
    parameters = dict(network.named_parameters())

    def loss(parameters, engine):
        called = lambda x, t: torch.func.functional_call(network, parameters, (x, t))  # noqa: E731
        return loss_and_gradients_of(called, engine)

    def loss_and_gradients_of(called, engine):
        model = hosm.ScoreModel(called, VP)
        ones = torch.ones(2, 2)
        return hosm.second_order_dsm(model, ones, t=ones[0], noise=ones, probe=ones, engine=engine)

    for engine in ENGINES:
        with pytest.raises(hosm.DerivativeError, match=CONSTANT.__name__):
            torch.func.grad(lambda p, e=engine: loss(p, e))(parameters)
