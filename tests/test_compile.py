"""The loss modules compile to one graph, with the loss and the gradients of eager mode."""

import pytest
import torch

import hosm_losses as hosm
from tests.oracles import networks

MODULES = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", MODULES)
@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_one_graph_with_the_gradients_of_eager_mode(name, order):
    network, shape = networks()[name]
    module = MODULES[order](hosm.ScoreModel(network, hosm.VPSchedule()))
    x0 = torch.randn(2, *shape)
    inputs = {"t": torch.tensor([0.3, 0.6]), "noise": torch.randn_like(x0)}
    if order > 1:
        inputs["probe"] = torch.randn(2, *x0.shape)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = list(network.parameters())
    losses = [each(x0, **inputs) for each in (module, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
    for compiled_one, eager in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(compiled_one, eager, rtol=1e-9, atol=1e-12)


def test_a_network_compiled_by_itself_is_refused_above_order_one():
    network, shape = networks()["mlp"]
    compiled = torch.compile(network, backend="eager")
    model = hosm.ScoreModel(compiled, hosm.VPSchedule())
    x0 = torch.randn(2, *shape)
    hosm.first_order_dsm(model, x0)
    for function in (hosm.second_order_dsm, hosm.third_order_dsm):
        with pytest.raises(TypeError, match=r"OptimizedModule.*Compile the loss module"):
            function(model, x0)
