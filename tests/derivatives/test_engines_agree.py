"""The engines against dense derivatives, and against each other where they once disagreed."""

import copy
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives import quadratic_forms
from hosm_losses.model import bind_model
from hosm_losses.taylor.registry import ChangedGradientError
from tests.cases import (
    ENGINES,
    VP,
    Around,
    OfX,
    assert_same,
    gradients,
    loss_and_gradients,
    networks,
)
from tests.oracles import dense_derivatives
from tests.versions import tells_hooks

pytestmark = pytest.mark.filterwarnings("ignore:engine='auto'", "ignore:network.*jumps")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "linear"])
def test_derivatives_and_their_gradients_are_the_dense_ones(name, engine):
    network, shape = (networks() | {"linear": (OfX(nn.Linear(3, 3)), (3,))})[name]
    t, x, w = torch.tensor([0.2, 0.7]), torch.randn(2, *shape), torch.randn(3, 2, *shape)
    bound = bind_model(hosm.ScoreModel(network, VP), 2, t=t)
    leaves = [x.requires_grad_(), *network.parameters()]
    found = [bound.derive(x, w, order=order, engine=engine) for order in (2, 3)]
    value, forms = (-part for part in quadratic_forms(bound, x, w.split([1, 2])))
    assert found[0].third is None
    with torch.no_grad():
        for order, parts in ((2, found[0][:2]), (3, found[1])):
            again = bound.derive(x, w, order=order, engine=engine)[:order]
            assert_same(again, parts, 1e-13)
            assert not any(part.requires_grad for part in again)
    network.by_hand = True  # its norms and attention written out
    for row in range(2):

        def function(point, row=row):
            return -network(point[None], t[row : row + 1])[0]

        f, jacobian, second = dense_derivatives(function, x[row])
        v = w[:, row].flatten(1)
        slopes, bends = v @ jacobian.mT, torch.einsum("ijk,ni,nj->nk", second, v, v)
        parts = [(value[row].flatten(), f), (forms[:, row], (slopes * v).sum(1))]
        for derived in found:
            parts += [(each[row].flatten(), f) for each in derived.value]
            parts.append((derived.directional[:, row].flatten(1), slopes))
        parts.append((found[1].third[:, row].flatten(1), bends))
        for mine, dense in parts:
            assert_same(mine, dense, 1e-10)
            one, other = (gradients(each.sin().sum(), leaves) for each in (mine, dense))
            assert_same(one, other)


def losses(function, engine="auto", order=3, **options):
    """The loss and its gradients of a network with a function in its middle."""
    network = function if isinstance(function, nn.Module) else Around(function)
    return loss_and_gradients(network, (4, 2), order, engine=engine, **options)


def agree(function, engine="auto", **options):
    """An engine agrees with reverse mode; "auto" may be reverse mode."""
    assert_same(losses(function, engine, **options), losses(function, "reverse", **options))


def matrix(h):
    return h.view(-1, 3, 3)


def changed(view):
    """Change in place what a function returns, which PyTorch makes a view or its argument."""

    def function(h):
        view(h).mul_(2)
        return h.cos()

    return function


def data_of_what_was_cloned(h):
    before = h.clone()
    h.data.clamp_(-0.1, 0.1)
    return h.sin() + before


def of_a_list(h):
    out = torch.zeros(4, 9)
    torch._foreach_add_([out], [h])
    return out.cos() + h


def through_data(h):
    out = torch.zeros(4, 9)
    out.data.copy_(h)
    return h * (1 + out)


def of_what_was_detached(h):
    out = torch.zeros(4, 9)
    seen = out.detach()
    out[:, :4] = h[:, :4]
    return h * (1 + seen)


SHARED = {
    "the data of a plain tensor": through_data,
    "a plain tensor that was detached": of_what_was_detached,
    "the data of what was copied": data_of_what_was_cloned,
    "plain tensors in a list": of_a_list,
    "a diagonal by einsum": changed(lambda h: torch.einsum("bii->bi", matrix(h))),
    "linalg.diagonal": changed(lambda h: torch.linalg.diagonal(matrix(h))),
    "dropout of torch": changed(lambda h: torch.dropout(h, 0.2, False)),
    "real": changed(torch.real),
    "a slice of aten": changed(lambda h: torch.ops.aten.slice(h, 1, 0, 4)),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_memory(name):
    agree(SHARED[name])


def own(forward, backward):
    """A custom autograd.Function by its two parts."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, cotangent):
            return backward(*ctx.saved_tensors, cotangent)

    return lambda h: h + Own.apply(3 * h) * h


FUNCTIONS = {
    "straight through": own(torch.round, lambda x, g: g),
    "detached": own(lambda x: x.detach(), lambda x, g: g * 0.5),
    "itself": own(lambda x: x, lambda x, g: g * 0.5),
    "copied": own(torch.clone, lambda x, g: g * 0.5),
    "by NumPy": own(
        lambda x: torch.from_numpy(np.sin(x.detach().numpy())), lambda x, g: g * torch.cos(x)
    ),
}


def shifted(h):
    return matrix(h) + 3 * torch.eye(3)


def symmetric(h):
    return matrix(h) + matrix(h).mT + torch.diag(torch.arange(3.0)) * 20


PLACES = torch.tensor([[0, 0, 1, 1, 2, 3, 4, 5, 6]] * 4)
WRONG_FORWARD = {
    "solve_ex": lambda h: torch.linalg.solve_ex(shifted(h), matrix(h))[0].flatten(1),
    "cumprod": lambda h: torch.cumprod(F.relu(h), 1),
    "scatter_reduce": lambda h: torch.zeros(4, 9).scatter_reduce(
        1, PLACES, h + 2, "prod", include_self=False
    ),
    "scatter_reduce_": lambda h: (h * h).scatter_reduce_(1, PLACES, h + 2, "prod"),
    "eigh": lambda h: (torch.linalg.eigh(symmetric(h))[1] ** 2 * matrix(h)).flatten(1),
    "eigvalsh": lambda h: h * torch.linalg.eigvalsh(symmetric(h)).repeat(1, 3),
    "copysign": lambda h: torch.copysign(h * h, h),
    "renorm_": lambda h: (h * h).renorm_(2, 0, 0.5),
    "cholesky_inverse": lambda h: torch.cholesky_inverse(shifted(h).tril()).flatten(1),
    "aten.linalg_det": lambda h: h * torch.ops.aten.linalg_det.default(shifted(h))[:, None],
    "cosine_embedding_loss": lambda h: (
        h * F.cosine_embedding_loss(h, h.cos(), torch.ones(4), reduction="none")[:, None]
    ),
}


@torch.library.custom_op("hosm_tests::sine", mutates_args=())
def sine(x: torch.Tensor) -> torch.Tensor:
    """A package's own operator, of whose derivatives reverse mode alone is told."""
    return torch.sin(x)


sine.register_autograd(
    lambda ctx, cotangent: cotangent * torch.cos(ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


LEFT_TO_REVERSE = FUNCTIONS | WRONG_FORWARD
LEFT_TO_REVERSE |= {"own": sine, "own by its name": torch.ops.hosm_tests.sine}


@pytest.mark.parametrize("name", LEFT_TO_REVERSE)
def test_what_goes_to_the_reverse_engine(name):
    """Custom Functions, and operators with a wrong forward mode: zero, of a package's own."""
    function = LEFT_TO_REVERSE[name]
    agree(function)
    for options in ({"order": 2}, {}):
        with pytest.raises(hosm.DerivativeError):
            losses(function, "taylor", **options)


ATEN = torch.ops.aten
BELOW = {
    "layer_norm": (
        lambda h: ATEN.layer_norm.default(h, [9], h.new_ones(9)),
        lambda h: F.layer_norm(h, (9,)),
    ),
    "a packet": (lambda h: ATEN.group_norm(h, 3), lambda h: F.group_norm(h, 3)),
}


@pytest.mark.parametrize("engine", ["taylor", "reverse"])
@pytest.mark.parametrize("name", BELOW)
def test_norms_of_exported_programs(name, engine):
    """They call the operators below the functions."""
    own, function = BELOW[name]
    assert_same(losses(own, engine), losses(function, "taylor"))


@pytest.mark.parametrize("engine", ENGINES)
def test_native_norms_are_refused(engine):
    for below in (torch.native_layer_norm, ATEN.native_layer_norm, ATEN.native_layer_norm.default):
        with pytest.raises(hosm.DerivativeError, match=r"F\.layer_norm"):
            losses(lambda h, below=below: below(h, [9], None, None, 1e-5)[0], engine)
    given = None, None, None, None, True, 0.1, 1e-5, False
    for below in (torch.batch_norm, ATEN.batch_norm.default):
        with pytest.raises(hosm.DerivativeError, match=r"F\.batch_norm"):
            losses(lambda h, below=below: below(h, *given), engine)


def filled(fill):
    """The number that fills is made of x, what is filled is not."""
    places = torch.tensor([1, 3])
    return lambda h: torch.stack([fill(torch.ones(9), 0, places, row.sum()) for row in h]) * h


ALONG_SEVERAL = {
    "index_fill": filled(torch.index_fill),
    "Tensor.index_fill": filled(torch.Tensor.index_fill),
    "Tensor.index_fill_": filled(torch.Tensor.index_fill_),
    "select_scatter": lambda h: torch.select_scatter(torch.ones_like(h), h[:, 0] ** 2, 1, 2) * h,
    "Tensor.select_scatter": lambda h: h.select_scatter(h[:, 0] ** 2, dim=-1, index=-1),
}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ALONG_SEVERAL)
def test_several_directions_through_a_vmap(name, order):
    agree(ALONG_SEVERAL[name], "taylor", order=order, probe=torch.randn(3, 4, 2))


def test_an_operator_without_a_rule_on_what_is_expanded():
    def function(h):
        return -F.logsigmoid(-h[:, None].expand(-1, 3, -1)).sum(1)

    expected = losses(lambda h: 3 * torch.log(1 + torch.exp(h)), "taylor")
    assert_same(losses(function, "taylor"), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h / h.norm(dim=1, keepdim=True),
        lambda h: F.normalize(h, eps=1e-20),
        lambda h: h / h.std(1, keepdim=True),
    ],
)
def test_lengths_of_short_vectors_in_float32(function):
    """What does not depend on a length has the derivatives of a longer vector."""
    torch.set_default_dtype(torch.float32)
    expected = losses(lambda h: h + function(h), "taylor")
    for size in (1e-4, 1e-8):
        found = losses(lambda h, size=size: h + function(h * size), "taylor")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Keeps(nn.Module):
    """Keeps what it computes: an activation, its output, and a running mean with its graph."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.kept = {}

    def forward(self, x, t):
        h = self.layer(x)
        self.mean = 0.9 * self.mean.detach() + 0.1 * h.mean(0)
        self.kept = {"hidden": h, "row": h[0], "output": torch.sin(h) * t[:, None]}
        return self.kept["output"]


@tells_hooks
def test_tensors_that_a_network_keeps_are_ordinary_afterwards(tmp_path):
    network, other = Keeps(), Keeps()
    for order in (2, 3):
        assert_same(losses(network, "taylor", order), losses(other, "reverse", order))
    kept = network.kept
    for each in (network.mean, *kept.values()):
        assert type(each) is torch.Tensor
    torch.save(kept["hidden"], tmp_path / "hidden.pt")
    assert_same([kept["row"], network.mean], [kept["hidden"][0], other.mean])
    copy.deepcopy(network.layer)
    # With its graph, as after a call of the network itself.
    (gradient,) = torch.autograd.grad(kept["hidden"].sum(), network.layer.bias)
    assert gradient.abs().min() > 0


@tells_hooks
def test_so_are_those_of_a_call_that_fails():
    network = Keeps()
    network.layer.register_forward_hook(lambda module, args, output: network.kept.update(a=output))

    def failing(x, t):
        network.layer(x)
        raise KeyError("later")

    model = hosm.ScoreModel(failing, VP)
    with pytest.raises(KeyError, match="later"):
        hosm.second_order_dsm(model, torch.randn(4, 2), engine="taylor")
    gc.collect()
    assert type(network.kept["a"]) is torch.Tensor


def hooked(register, hook):
    """A network with a hook on a tensor, or on a module."""

    def function(h):
        if register == "register_hook" and h.requires_grad:
            h.register_hook(hook)
        return h.cos()

    network = Around(function)
    if register != "register_hook":
        getattr(network.outer, register)(hook)
    return network


CHANGING = (
    ("register_hook", lambda gradient: gradient * 0.5),
    ("register_hook", lambda gradient: (gradient.mul_(0.5), None)[1]),
    ("register_full_backward_hook", lambda module, inputs, outputs: (inputs[0] * 0.5,)),
    ("register_full_backward_pre_hook", lambda module, outputs: (outputs[0] * 0.5,)),
)
LOOKING = (
    ("register_hook", lambda gradient: gradient),
    ("register_full_backward_hook", lambda module, inputs, outputs: None),
)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ["auto", "reverse"])
def test_hooks_may_look_at_gradients_and_not_change_them(engine, order):
    for register, hook in CHANGING:
        with pytest.raises(ChangedGradientError):
            losses(hooked(register, hook), engine, order)
    expected = losses(torch.cos, order=order)
    for register, hook in LOOKING:
        assert_same(losses(hooked(register, hook), engine, order), expected)
