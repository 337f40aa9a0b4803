"""The loss modules compile to one graph, with the loss and the gradients of eager mode."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from benchmarks.networks import DiT, UNet
from torch import nn

import hosm_losses as hosm
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
@pytest.mark.parametrize("order", [2, 3])
def test_forward_mode_compiles_with_the_gradients_of_eager_mode(order):
    network, shape = networks()["mlp"]
    module = MODULES[order](hosm.ScoreModel(network, hosm.VPSchedule()), derivative="forward")
    x0 = torch.randn(2, *shape)
    inputs = {"t": torch.tensor([0.3, 0.6]), "noise": torch.randn_like(x0)}
    inputs["probe"] = torch.randn_like(x0)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = []
    for each in (module, compiled):
        loss = each(x0, **inputs)
        found.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("third", ["laplacian", "sliced"])
def test_nested_forward_mode_is_evaluated_by_a_compiled_loss(third):
    """As it stands: PyTorch's own does not compile through a product with the time."""
    network, shape = networks()["mlp"]
    model = hosm.ScoreModel(network, hosm.VPSchedule(), call=lambda n, x, t: n(t[:, None] * x, t))
    module = hosm.ThirdOrderDSM(model, derivative="forward", third=third)
    x0 = torch.randn(2, *shape)
    inputs = {"t": torch.tensor([0.3, 0.6]), "noise": torch.randn_like(x0)}
    inputs["probe"] = torch.randn_like(x0)
    torch._dynamo.reset()
    found = []
    for each in (module, torch.compile(module, backend="aot_eager")):
        torch.manual_seed(0)
        loss = each(x0, **inputs)
        found.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"third": "laplacian"}, {"third": "sliced"}], ids=str)
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
        for engine in ("auto", "taylor", "forward", "reverse"):
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
    with pytest.raises(hosm.DerivativeError, match="derivative='auto' or 'forward'"):
        compiled(torch.randn(2, *shape))
