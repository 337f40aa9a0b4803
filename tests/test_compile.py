"""The loss modules compile to one graph, with the loss and the gradients of eager mode."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from benchmarks.networks import DiT, UNet
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives.select import _choice
from tests.oracles import networks
from tests.versions import OLD, compiles_higher_orders

MODULES = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}


def assert_one_graph(module, network, x0, inputs):
    """The compiled loss and its gradients are those of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = list(network.parameters())
    losses = [each(x0, **inputs) for each in (module, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
    for compiled_one, eager in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(compiled_one, eager, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "order", [1, *(pytest.param(n, marks=compiles_higher_orders) for n in (2, 3))]
)
@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_one_graph_with_the_gradients_of_eager_mode(name, order):
    network, shape = networks()[name]
    module = MODULES[order](hosm.ScoreModel(network, hosm.VPSchedule()))
    x0 = torch.randn(2, *shape)
    inputs = {"t": torch.tensor([0.3, 0.6]), "noise": torch.randn_like(x0)}
    if order > 1:
        inputs["probe"] = torch.randn(2, *x0.shape)
    assert_one_graph(module, network, x0, inputs)


TWO_PROBES = {
    "order two": lambda model: hosm.SecondOrderDSM(model, estimator="paired"),
    "the trace alone": lambda model: hosm.SecondOrderDSM(
        model, estimator="paired", weights=(1, 0, 0.3)
    ),
    "order three": lambda model: hosm.ThirdOrderDSM(model, estimator="paired"),
    "laplacian": lambda model: hosm.ThirdOrderDSM(
        model, estimator="paired", third="laplacian", weights="balanced"
    ),
    "stein": lambda model: hosm.SteinDSM(model, weight=0.5),
}


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", TWO_PROBES)
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_products_of_two_probes_are_one_graph(name, loss):
    network, shape = networks()[name]
    module = TWO_PROBES[loss](hosm.ScoreModel(network, hosm.VPSchedule())).eval()
    x0 = torch.randn(2, *shape)
    inputs = {"t": torch.tensor([0.3, 0.6]), "noise": torch.randn_like(x0)}
    inputs["probe"] = torch.randn(2, *x0.shape)
    assert_one_graph(module, network, x0, inputs)


class InPlace(nn.Module):
    """Changes in place of activations, of views, and next to a reshape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x, t):
        h = self.a(x)
        h += t[:, None]
        h = F.silu(h, inplace=True).mul_(0.7)
        h[:, :3] *= 1.5
        h[:, 3].add_(h[:, 4])
        y = self.b(h).reshape(len(h), 2, 3) * 2
        y += h.reshape(len(h), 2, 3)
        return self.c(y.flatten(1).tanh_())


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [2, 3])
def test_changes_in_place_are_one_graph(order):
    network = InPlace()
    module = MODULES[order](hosm.ScoreModel(network, hosm.VPSchedule()))
    x0, noise, probe = torch.randn(3, 2, 4).unbind()
    inputs = {"t": torch.tensor([0.3, 0.6]), "noise": noise, "probe": probe}
    torch._dynamo.reset()
    found = []
    for each in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        loss = each(x0, **inputs)
        found.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"third": "laplacian"}], ids=str)
@pytest.mark.parametrize("make", [lambda: UNet(width=8), lambda: DiT(size=16, width=16, heads=2)])
def test_a_unet_and_a_transformer_of_images_are_one_graph(make, options):
    """With time embeddings, skips, resampling, attention at 8 × 8 and modulated norms."""
    torch.manual_seed(0)
    network, x0 = make(), torch.randn(2, 3, 16, 16)
    module = hosm.ThirdOrderDSM(hosm.ScoreModel(network, hosm.VPSchedule()), **options)
    inputs = {"t": torch.tensor([0.3, 0.6]), "noise": torch.randn_like(x0)}
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for each in (module, compiled):
        torch.manual_seed(1)
        loss = each(x0, **inputs)
        found.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("schedule", [hosm.VPSchedule(), hosm.EDMSchedule()], ids=["vp", "edm"])
@pytest.mark.parametrize("weighting", ["noise", "native", "likelihood"])
def test_every_weighting_draws_its_own_times_in_the_graph(weighting, schedule):
    network, shape = networks()["mlp"]
    module = hosm.ThirdOrderDSM(hosm.ScoreModel(network, schedule), weighting=weighting)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    losses = []
    for each in (module, compiled):
        torch.manual_seed(0)
        losses.append(each(torch.ones(3, *shape)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)


def compiled_parts():
    """Networks compiled as a whole or in part, as users compile them."""
    whole = networks()["mlp"][0]
    block, in_place, function = (networks()["mlp"][0] for _ in range(3))
    block.middle = torch.compile(block.middle, backend="aot_eager")
    in_place.middle.compile(backend="aot_eager")
    function.middle.forward = torch.compile(function.middle.forward, backend="aot_eager")
    return {
        "whole": torch.compile(whole, backend="aot_eager"),
        "block": block,
        "in place": in_place,
        "function": function,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["whole", "block", "in place", "function"])
def test_what_is_compiled_by_itself_is_refused_above_order_one(name, order):
    torch._dynamo.reset()
    model = hosm.ScoreModel(compiled_parts()[name], hosm.VPSchedule())
    x0 = torch.randn(2, *networks()["mlp"][1])
    hosm.first_order_dsm(model, x0)
    function = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}[order]
    if name == "function":  # which only a derivative shows
        with pytest.raises(hosm.DerivativeError, match="Compile the loss module"):
            function(model, x0, derivative="reverse")
        if OLD:  # where the taylor engine cannot pass it and goes on to the reverse one
            with pytest.raises(hosm.DerivativeError, match="Compile the loss module"):
                function(model, x0)
        elif order == 2:  # that of the taylor engine is once in reverse mode
            function(model, x0).backward()
        else:
            with pytest.raises(RuntimeError, match="not currently support double backward"):
                function(model, x0).backward()
    else:
        for engine in ("auto", "taylor", "reverse"):
            with pytest.raises(TypeError, match=r"network: .* Compile the loss module"):
                function(model, x0, derivative=engine)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [2, 3])
def test_the_reverse_engine_does_not_compile_and_says_so(order):
    network, shape = networks()["mlp"]
    module = MODULES[order](hosm.ScoreModel(network, hosm.VPSchedule()), derivative="reverse")
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(hosm.DerivativeError, match="with derivative='auto'"):
        compiled(torch.randn(2, *shape))


class Around(nn.Module):
    """Two layers, and a function between them; see `inputs_of`."""

    def __init__(self, function, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)
        self.function, self.norm = function, nn.Identity() if norm is None else norm

    def forward(self, x, t):
        hidden = self.first(torch.cat([x, t[:, None]], 1)).tanh()
        return self.last(self.function(self.norm(hidden)))


def around(function, order, norm=None):
    """The loss module of such a network, and its inputs."""
    module = MODULES[order](hosm.ScoreModel(Around(function, norm), hosm.VPSchedule()))
    inputs = {"t": torch.rand(4) * 0.8 + 0.1, "noise": torch.randn(4, 4)}
    return module, torch.randn(4, 4), inputs | {"probe": torch.randn(4, 4)}


def compiled_and_eager(module, x0, inputs, **options):
    """The loss and its gradients, of the compiled module first."""
    torch._dynamo.reset()
    found = []
    for each in (torch.compile(module, backend="aot_eager", **options), module):
        loss = each(x0, **inputs)
        found.append((loss, *torch.autograd.grad(loss, list(module.parameters()))))
    return found


def cut_by_a_block(h):
    with torch.no_grad():
        gate = h.sin()
    return h * gate + h


def cut_by_a_switch(h):
    torch.set_grad_enabled(False)
    gate = h.sin()
    torch.set_grad_enabled(True)
    return h * gate + h


class Straight(torch.autograd.Function):
    """Rounded, with the gradient of what was not."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1


CUTS = {
    "no_grad": cut_by_a_block,
    "a switch": cut_by_a_switch,
    "detach_": lambda h: h * (h * 2).detach_().sin(),
    "a custom Function": lambda h: h * Straight.apply(h),
}


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_is_evaluated_in_eager_mode(cut, order):
    """Without fullgraph=True the loss is evaluated in eager mode, by the reverse engine."""
    module, x0, inputs = around(CUTS[cut], order)
    torch.testing.assert_close(*compiled_and_eager(module, x0, inputs), rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Write \.detach\(\) in place"):
        whole(x0, **inputs)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "function",
    [
        lambda h: h * h.data.sin() + h,
        lambda h: (lambda z: (z.data.mul_(0.5), z.sin())[1])(h.clone()),
    ],
    ids=["read", "changed"],
)
def test_the_data_of_a_tensor_are_detached_in_one_graph(function, order):
    module, x0, inputs = around(function, order)
    assert_one_graph(module, module.model.network, x0, inputs)


def resampled(h):
    """Of a network in one dimension."""
    rows = h[:, None]
    small = F.avg_pool1d(rows, 2)
    up = F.interpolate(small, size=6) * F.interpolate(small, scale_factor=2.0, mode="linear")
    return (up + F.pixel_shuffle(h.reshape(-1, 6, 1, 1).repeat(1, 4, 1, 1), 2)[:, :, 0, :1].mT)[
        :, 0
    ]


def mixed(h):
    """Masks, integers and tensors without axes among what depends on x."""
    h = torch.where(h > 0, h**2, torch.expm1(h)) + torch.where(h > 0.1, h.sin(), 0.0)
    h = h * (h > 0) + h * (torch.arange(6) > 2) + h * torch.arange(6)
    return (h + torch.arange(6)) / torch.tensor(3) * torch.tensor(3.0, dtype=torch.float32)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("function", [mixed, resampled])
def test_operands_of_several_types_and_sequences_are_one_graph(function, order):
    module, x0, inputs = around(function, order)
    assert_one_graph(module, module.model.network, x0, inputs)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [2, 3])
def test_a_residual_under_autocast_is_one_graph(order):
    layer, norm = nn.Linear(6, 6), nn.LayerNorm(6)
    module, x0, inputs = around(lambda h: h.float() + layer(F.silu(norm(h))), order)
    module, layer, norm = module.float(), layer.float(), norm.float()
    inputs = {name: each.float() for name, each in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiled_and_eager(module, x0.float(), inputs, fullgraph=True)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    gradients = [torch.cat([each.flatten() for each in one[1:]]) for one in found]
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def broken(h):
    torch._dynamo.graph_break()
    return h**2 + h.sin()


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore", "error:derivative='auto'")
@pytest.mark.parametrize("options", [{}, {"estimator": "paired"}], ids=str)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("derivative", ["auto", "taylor"])
def test_a_network_that_breaks_the_graph_keeps_its_engine(derivative, order, options):
    """The engines run in eager mode; torch.compile is kept from what they call there."""
    module, x0, inputs = around(broken, order)
    module = MODULES[order](module.model, derivative=derivative, **options)
    if options:
        inputs["probe"] = torch.randn(2, 4, 4)
    torch.testing.assert_close(*compiled_and_eager(module, x0, inputs), rtol=1e-9, atol=1e-12)
    assert _choice(module.model.network).refused == {}


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [2, 3])
def test_an_operator_for_reverse_mode_alone_is_evaluated_in_eager_mode(order):
    def function(h):
        matrices = torch.eye(2) * 2 + h[:, :4].reshape(-1, 2, 2)
        return h * torch.linalg.det(matrices)[:, None]

    module, x0, inputs = around(function, order)
    torch.testing.assert_close(*compiled_and_eager(module, x0, inputs), rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="forward mode is not differentiated rightly"
    ):
        whole(x0, **inputs)


def filled(h):
    out = torch.zeros_like(h)
    out[:, :3] = h[:, 3:].sin()
    return out * h


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "function", [filled, lambda h: torch.fft.irfft(torch.fft.rfft(h).square(), n=6)]
)
def test_the_laplacian_without_the_taylor_engine_is_evaluated_in_eager_mode(function):
    """By the engine of eager mode, which may be another: exact for complex numbers."""
    module, x0, inputs = around(function, 3)
    module = hosm.ThirdOrderDSM(module.model, third="laplacian")
    torch.testing.assert_close(*compiled_and_eager(module, x0, inputs), rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph=True"):
        whole(x0, **inputs)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
def test_running_statistics_compile_but_at_exact_order_three():
    for options in ({}, {"third": "laplacian"}):
        module, x0, inputs = around(torch.sin, 3 if options else 2, nn.BatchNorm1d(6))
        module = type(module)(module.model, **options)
        assert_one_graph(module, module.model.network, x0, inputs)
    module, x0, inputs = around(torch.sin, 3, nn.BatchNorm1d(6))
    torch.testing.assert_close(*compiled_and_eager(module, x0, inputs), rtol=1e-9, atol=1e-12)
    assert module.model.network.norm.num_batches_tracked == 2
    for derivative in ("auto", "taylor"):
        torch._dynamo.reset()
        exact = hosm.ThirdOrderDSM(module.model, derivative=derivative)
        whole = torch.compile(exact, backend="aot_eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="got BatchNorm1d"):
            whole(x0, **inputs)
    module.model.network.norm.eval()
    assert_one_graph(module, module.model.network, x0, inputs)
