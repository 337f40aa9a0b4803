"""Networks on which the engines once disagreed, and nothing was said."""

import copy
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives.hooks import ChangedGradientError
from tests.versions import tells_hooks

pytestmark = pytest.mark.filterwarnings("ignore:derivative='auto'")
VP = hosm.VPSchedule()
LOSSES = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}


class Around(nn.Module):
    """A function of two layers: a first one, and one that comes after it."""

    def __init__(self, function, width=9):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.inner, self.outer = function, nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, x, t):
        return self.outer(self.function(torch.sin(self.inner(x)) + t[:, None]))


def found(network, order, derivative, **options):
    """The loss and its gradients."""
    torch.manual_seed(1)
    x0, noise, probe = torch.randn(3, 4, 2).unbind()
    given = {"t": torch.tensor([0.2, 0.4, 0.6, 0.8]), "noise": noise, "probe": probe}
    model = hosm.ScoreModel(network, VP)
    loss = LOSSES[order](model, x0, derivative=derivative, **(given | options))
    return loss, *torch.autograd.grad(loss, list(network.parameters()))


def agree(function, order, derivative="auto"):
    network = Around(function)
    got, expected = (found(network, order, engine) for engine in (derivative, "reverse"))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)


def matrix(h):
    return h.view(-1, 3, 3)


def changed(view):
    """Change in place what a function returns, which PyTorch makes a view or its argument."""

    def function(h):
        view(h).mul_(2)
        return h.cos()

    return function


def clone_and_detach(h):
    gate = h.clone().detach()
    gate.clamp_(-0.1, 0.1)
    return h * gate


def contiguous_and_detach(h):
    gate = matrix(h).mT.contiguous().detach()
    gate.clamp_(-0.1, 0.1)
    return h * gate.flatten(1)


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
    "a copy that is detached": clone_and_detach,
    "a contiguous copy that is detached": contiguous_and_detach,
    "the data of what was copied": data_of_what_was_cloned,
    "plain tensors in a list": of_a_list,
    "a diagonal by einsum": changed(lambda h: torch.einsum("bii->bi", matrix(h))),
    "a transposition by einsum": changed(lambda h: torch.einsum("bij->bji", matrix(h))),
    "linalg.diagonal": changed(lambda h: torch.linalg.diagonal(matrix(h))),
    "alpha dropout": changed(nn.AlphaDropout(0.2).eval()),
    "dropout of torch": changed(lambda h: torch.dropout(h, 0.2, False)),
    "feature dropout": changed(lambda h: F.feature_alpha_dropout(h, 0.2, False)),
    "real": changed(torch.real),
    "sum to its size": changed(lambda h: h.sum_to_size(h.shape)),
    "a slice of aten": changed(lambda h: torch.ops.aten.slice(h, 1, 0, 4)),
}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", SHARED)
def test_what_shares_memory(name, order):
    agree(SHARED[name], order)


@pytest.mark.parametrize("name", ["unsafe_chunk", "unsafe_split"])
def test_what_autograd_does_not_take_for_a_view_follows_pytorchs_values(name):
    def function(h):
        getattr(torch, name)(h, 3, 1)[0].mul_(2)
        return h.cos()

    network, x = Around(function), torch.randn(4, 2)
    model = hosm.ScoreModel(network, VP)
    t, noise = torch.full((4,), 0.5), torch.randn(4, 2)
    first = hosm.first_order_dsm(model, x, t=t, noise=noise)
    terms = hosm.dsm_terms(model, x, t=t, noise=noise, order=2)
    torch.testing.assert_close(terms.first.mean(), first)


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
    "a sign": own(torch.sign, lambda x, g: g * (1 - torch.tanh(x) ** 2)),
    "a spike": own(lambda x: (x > 0).to(x.dtype), lambda x, g: g * torch.exp(-x * x)),
    "detached": own(lambda x: x.detach(), lambda x, g: g * 0.5),
    "itself": own(lambda x: x, lambda x, g: g * 0.5),
    "copied": own(torch.clone, lambda x, g: g * 0.5),
    "by NumPy": own(
        lambda x: torch.from_numpy(np.sin(x.detach().numpy())), lambda x, g: g * torch.cos(x)
    ),
}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_custom_functions_are_left_to_the_reverse_engine(name, order):
    agree(FUNCTIONS[name], order)
    with pytest.raises(hosm.DerivativeError, match=r"custom autograd\.Function"):
        found(Around(FUNCTIONS[name]), order, "taylor")


def test_a_mask_under_no_grad_is_no_custom_function():
    def function(h):
        with torch.no_grad():
            mask = h > 0
            scale = h.detach().abs().mean()
        return h * mask * scale

    agree(function, 3, "taylor")


def shifted(h):
    return matrix(h) + 3 * torch.eye(3)


def symmetric(h):
    return matrix(h) + matrix(h).mT + torch.diag(torch.arange(3.0)) * 20


PLACES = torch.tensor([[0, 0, 1, 1, 2, 3, 4, 5, 6]] * 4)
WRONG_FORWARD = {
    "solve": lambda h: torch.linalg.solve(shifted(h), matrix(h)).flatten(1),
    "solve_ex": lambda h: torch.linalg.solve_ex(shifted(h), matrix(h))[0].flatten(1),
    "det": lambda h: h * torch.linalg.det(shifted(h))[:, None],
    "Tensor.det": lambda h: h * shifted(h).det()[:, None],
    "slogdet": lambda h: h * torch.linalg.slogdet(shifted(h))[1][:, None],
    "logdet": lambda h: h * torch.logdet(shifted(h))[:, None],
    "cumprod": lambda h: torch.cumprod(F.relu(h), 1),
    "scatter_reduce": lambda h: torch.zeros(4, 9).scatter_reduce(
        1, PLACES, h + 2, "prod", include_self=False
    ),
    "scatter_reduce with itself": lambda h: (h * h).scatter_reduce(
        1, PLACES, h + 2, reduce="prod"
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


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", WRONG_FORWARD)
def test_what_forward_mode_gets_wrong_is_left_to_the_reverse_engine(name, order):
    agree(WRONG_FORWARD[name], order)
    with pytest.raises(hosm.DerivativeError, match="forward mode is not differentiated"):
        found(Around(WRONG_FORWARD[name]), order, "taylor")


@pytest.mark.parametrize("name", ["eigvalsh", "copysign", "renorm_", "cosine_embedding_loss"])
def test_and_its_second_derivatives_neither(name):
    with pytest.raises(hosm.DerivativeError, match="forward mode is not differentiated"):
        found(Around(WRONG_FORWARD[name]), 3, "taylor", third="laplacian")


@torch.library.custom_op("hosm_tests::sine", mutates_args=())
def sine(x: torch.Tensor) -> torch.Tensor:
    """A package's own operator, of whose derivatives reverse mode alone is told."""
    return torch.sin(x)


sine.register_autograd(
    lambda ctx, cotangent: cotangent * torch.cos(ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("function", [sine, torch.ops.hosm_tests.sine])
@pytest.mark.parametrize("order", [2, 3])
def test_an_operator_of_a_package_is_left_to_the_reverse_engine(function, order):
    """Forward mode takes its derivative for zero."""
    network = Around(function)
    expected = found(Around(torch.sin), order, "auto")
    torch.testing.assert_close(found(network, order, "auto"), expected, rtol=1e-8, atol=1e-11)
    with pytest.raises(hosm.DerivativeError, match="forward mode is not differentiated"):
        found(network, order, "taylor")


ATEN = torch.ops.aten
BELOW = {
    "layer_norm": (
        lambda h: ATEN.layer_norm.default(h, [9], h.new_ones(9)),
        lambda h: F.layer_norm(h, (9,)),
    ),
    "a packet": (lambda h: ATEN.group_norm(h, 3), lambda h: F.group_norm(h, 3)),
    "batch_norm": (
        lambda h: ATEN.batch_norm.default(h, None, None, None, None, True, 0.1, 1e-5, False),
        lambda h: F.batch_norm(h, None, None, training=True),
    ),
}


@pytest.mark.parametrize("engine", ["auto", "taylor", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", BELOW)
def test_norms_of_exported_programs(name, order, engine):
    """They call the operators below the functions."""
    own, function = BELOW[name]
    got, expected = found(Around(own), order, engine), found(Around(function), order, "taylor")
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)


def test_what_is_below_norms_is_refused_there_too():
    for below in (ATEN.native_layer_norm, ATEN.native_layer_norm.default):
        with pytest.raises(hosm.DerivativeError, match="expected norms as functions"):
            found(Around(lambda h, below=below: below(h, [9], None, None, 1e-5)[0]), 2, "auto")


FILLS = {
    "method": torch.Tensor.index_fill,
    "function": torch.index_fill,
    "in place": torch.Tensor.index_fill_,
}


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_index_fill_along_several_directions(fill):
    """PyTorch's through a vmap is wrong, where the number that fills is made of x alone."""
    places = torch.tensor([1, 3])

    def function(h):
        return torch.stack([fill(torch.ones(9), 0, places, row.sum()) for row in h]) * h

    network, probe = Around(function), torch.randn(3, 4, 2)
    expected = found(network, 2, "reverse", probe=probe)
    got = found(network, 2, "taylor", probe=probe)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)


def scattered(method):
    """Another row in the place of the third, by select_scatter."""

    def function(h):
        if method:
            return h.select_scatter(h[:, 0] ** 2, dim=-1, index=2)
        return torch.select_scatter(torch.ones_like(h), h[:, 0] ** 2, 1, 2) * h

    return function


@pytest.mark.parametrize("method", [True, False])
def test_select_scatter_along_several_directions(method):
    """PyTorch's gradient through a vmap of it is wrong."""
    network, probe = Around(scattered(method)), torch.randn(3, 4, 2)
    for order in (2, 3):
        expected = found(network, order, "reverse", probe=probe)
        got = found(network, order, "taylor", probe=probe)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)
    with pytest.raises(IndexError):
        found(Around(lambda h: h.select_scatter(h[:, 0], 1, 9)), 2, "taylor")


def test_an_operator_without_a_rule_on_what_is_expanded():
    def function(h):
        return F.softplus(h[:, None].expand(-1, 3, -1)).sum(1)

    def written_out(h):
        return 3 * torch.log(1 + torch.exp(h))

    for third in ("exact", "laplacian"):
        got, expected = (
            found(Around(each), 3, "taylor", third=third) for each in (function, written_out)
        )
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("engine", ["auto", "reverse", "taylor"])
def test_norms_below_their_functions_are_refused(engine):
    network = Around(lambda h: torch.native_layer_norm(h, (9,), None, None, 1e-5)[0])
    with pytest.raises(hosm.DerivativeError, match=r"F\.layer_norm"):
        found(network, 2, engine)


def root(x):
    return x.sum(1, keepdim=True).sqrt()


def unit(h):
    return h / root(h * h)


LENGTHS = {
    "std": (
        lambda h: h / h.std(1, keepdim=True),
        lambda h: h / (root((h - h.mean(1, keepdim=True)) ** 2) / 8**0.5),
    ),
    "linalg.norm": (lambda h: h / torch.linalg.norm(h, dim=1, keepdim=True), unit),
    "a norm of three": (
        lambda h: h / torch.linalg.vector_norm(h, 3, 1, keepdim=True),
        lambda h: h / (h.abs() ** 3).sum(1, keepdim=True) ** (1 / 3),
    ),
    "cosine_similarity": (
        lambda h: h * F.cosine_similarity(h, h.cos())[:, None],
        lambda h: h * (unit(h) * unit(h.cos())).sum(1, keepdim=True),
    ),
    "pairwise_distance": (
        lambda h: h * F.pairwise_distance(h, h.cos())[:, None],
        lambda h: h * root((h - h.cos() + 1e-6) ** 2),
    ),
}


@pytest.mark.parametrize("third", ["exact", "laplacian"])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_are_differentiated_as_when_written_out(name, third):
    """PyTorch's own forward derivatives of them end in an error in the pass back."""
    got, expected = (
        found(
            Around(function),
            3,
            "taylor",
            third=third,
            generator=torch.Generator().manual_seed(2),
        )
        for function in LENGTHS[name]
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


SIGNATURES = {
    "cosine of what is broadcast": lambda h: h * F.cosine_similarity(h[:, :1], h.exp())[:, None],
    "cosine with a vector": lambda h: h * F.cosine_similarity(h, torch.arange(9.0))[:, None],
    "a norm of one axis in a tuple": lambda h: h / torch.linalg.norm(h, 2, (1,), keepdim=True),
    "a norm in another type": lambda h: h / h.norm(dim=1, keepdim=True, dtype=torch.float64),
    "normalize by three": lambda h: F.normalize(h, p=3),
    "unbiased in the place of dim": lambda h: h * h.std(False),
    "std_mean": lambda h: torch.std_mean(h, False)[0] * h + torch.std_mean(h, 1)[1][:, None],
    "dist": lambda h: h * torch.dist(h[:, :4], h[:, 5:]),
}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", SIGNATURES)
def test_lengths_in_every_spelling(name, order):
    agree(SIGNATURES[name], order, "taylor")


@pytest.mark.parametrize("name", SIGNATURES)
def test_and_their_second_derivatives_have_a_gradient(name):
    network = Around(SIGNATURES[name])
    loss, *gradients = found(network, 3, "taylor", third="laplacian")
    assert loss.isfinite()
    assert all(each.isfinite().all() for each in gradients)


@pytest.mark.parametrize("size", [1e-4, 1e-8])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "function",
    [
        lambda h: h / h.norm(dim=1, keepdim=True),
        lambda h: F.normalize(h, eps=1e-20),
        lambda h: h / h.std(1, keepdim=True),
    ],
)
def test_lengths_of_short_vectors_in_float32(function, order, size):
    """What does not depend on a length has the derivatives of a longer vector."""
    losses = []
    for factor in (size, 1.0):
        network = Around(lambda h, factor=factor: h + function(h * factor)).float()
        torch.manual_seed(1)
        x0, noise, probe = torch.randn(3, 4, 2, dtype=torch.float32).unbind()
        t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float32)
        model = hosm.ScoreModel(network, VP)
        loss = LOSSES[order](model, x0, t=t, noise=noise, probe=probe, derivative="taylor")
        losses.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


class Time(hosm.Schedule):
    """A schedule with a parameter, of variance exploding."""

    t_min, t_max = 0.01, 0.99

    def __init__(self):
        self.rate = torch.tensor(0.7, requires_grad=True)

    def alpha(self, t):
        return torch.cos(self.rate * t)

    def sigma(self, t):
        return torch.sin(self.rate * t)


@pytest.mark.parametrize("estimator", ["hutchinson", "paired"])
@pytest.mark.parametrize("order", [2, 3])
def test_gradients_in_what_sigma_is_made_of(order, estimator):
    """In t, and in the parameter of a schedule."""
    found = []
    for engine in ("taylor", "reverse", "auto"):
        torch.manual_seed(1)
        network, schedule = Around(torch.cos), Time()
        x0, noise, one, other = torch.randn(4, 4, 2).unbind()
        t = torch.tensor([0.2, 0.4, 0.6, 0.8], requires_grad=True)
        model = hosm.ScoreModel(lambda x, t, network=network: network(x, t.detach()), schedule)
        loss = LOSSES[order](
            model,
            x0,
            t=t,
            noise=noise,
            probe=torch.stack([one, other]),
            estimator=estimator,
            derivative=engine,
        )
        found.append(torch.autograd.grad(loss, [t, schedule.rate]))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-9, atol=1e-11)


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
@pytest.mark.parametrize("order", [2, 3])
def test_what_a_network_keeps_are_ordinary_tensors_afterwards(order, tmp_path):
    network, other = Keeps(), Keeps()
    for _ in range(2):
        torch.testing.assert_close(found(network, order, "taylor"), found(other, order, "reverse"))
    for each in (network.mean, *network.kept.values()):
        assert type(each) is torch.Tensor
    with torch.no_grad():
        assert network.kept["hidden"].mean().isfinite()
    torch.save(network.kept["hidden"], tmp_path / "hidden.pt")
    torch.testing.assert_close(network.kept["row"], network.kept["hidden"][0])
    torch.testing.assert_close(network.mean, other.mean)
    copy.deepcopy(network.layer)
    # With its graph, as after a call of the network itself.
    (gradient,) = torch.autograd.grad(network.kept["hidden"].sum(), network.layer.bias)
    assert gradient.abs().min() > 0


@tells_hooks
def test_what_is_kept_by_a_call_that_fails_is_ordinary_too():
    network = Keeps()
    network.layer.register_forward_hook(lambda module, args, output: network.kept.update(a=output))

    def failing(x, t):
        network.layer(x)
        raise KeyError("later")

    model = hosm.ScoreModel(failing, VP)
    with pytest.raises(KeyError, match="later"):
        hosm.second_order_dsm(model, torch.randn(4, 2), derivative="taylor")
    gc.collect()
    assert type(network.kept["a"]) is torch.Tensor


TENSOR_HOOKS = {
    "changes": lambda gradient: gradient * 0.5,
    "changes in place": lambda gradient: (gradient.mul_(0.5), None)[1],
    "returns it": lambda gradient: gradient,
}


def hooked(kind):
    def function(h):
        if kind in TENSOR_HOOKS and h.requires_grad:
            h.register_hook(TENSOR_HOOKS[kind])
        return h.cos()

    network = Around(function)
    hooks = {
        "inputs of a module": lambda module, inputs, outputs: (inputs[0] * 0.5,),
        "looks": lambda module, inputs, outputs: None,
    }
    if kind in hooks:
        network.outer.register_full_backward_hook(hooks[kind])
    if kind == "outputs of a module":
        network.outer.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 0.5,))
    return network


@pytest.mark.parametrize("engine", ["auto", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "kind", ["changes", "changes in place", "inputs of a module", "outputs of a module"]
)
def test_hooks_that_change_gradients_are_refused(kind, order, engine):
    with pytest.raises(ChangedGradientError, match="hooks that look at gradients"):
        found(hooked(kind), order, engine)


@pytest.mark.parametrize("engine", ["auto", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("kind", ["looks", "returns it"])
def test_hooks_that_look_are_not(kind, order, engine):
    expected = found(hooked("none"), order, engine)
    torch.testing.assert_close(found(hooked(kind), order, engine), expected)


class Ema(nn.Module):
    """A running mean that is moved on under no_grad, and a table that is read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("table", torch.ones(2))

    def forward(self, x, t):
        h = torch.tanh(self.layer(x))
        with torch.no_grad():
            self.mean.lerp_(h.detach().mean(0), 0.1)
        return h * self.table


def test_another_loss_may_have_kept_the_buffers():
    network = Ema()
    x0, t = torch.randn(4, 2), torch.full((4,), 0.5)
    other = network(x0, t).square().mean()
    loss = hosm.third_order_dsm(hosm.ScoreModel(network, VP), x0)
    (other + loss).backward()
    assert network.layer.weight.grad.isfinite().all()
