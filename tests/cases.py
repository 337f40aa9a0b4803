"""What many tests share: schedules, losses by order, and how numbers are compared.

Networks, closed forms and counters are in `oracles`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import hosm_losses as hosm

VP = hosm.VPSchedule()
SCHEDULES = {
    "vp": VP,
    "ve": hosm.VESchedule(),
    "subvp": hosm.SubVPSchedule(),
    "cosine": hosm.CosineSchedule(),
    "edm": hosm.EDMSchedule(t_max=3.0),
    "flow": hosm.LinearFlowSchedule(),
    "discrete": hosm.DiscreteSchedule(torch.linspace(0.99, 0.01, 20)),
}
PREDICTIONS = ("epsilon", "score", "sample", "v_prediction", "flow_prediction")
ENGINES = ("auto", "taylor", "reverse")
FUNCTIONS = {1: hosm.first_order_dsm, 2: hosm.second_order_dsm, 3: hosm.third_order_dsm}
MODULES = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}


def given(shape: tuple[int, ...], order: int = 1, probes: int = 1, schedule=VP):
    """x0, and the inputs that leave a loss of this order nothing to draw: t, noise and probe."""
    inputs = {"t": schedule.t_min + (schedule.t_max - schedule.t_min) * torch.rand(shape[0])}
    inputs["noise"] = torch.randn(shape)
    if order > 1:
        inputs["probe"] = torch.randn(probes, *shape)
    return torch.randn(shape), inputs


def gradients(value: Tensor, leaves: nn.Module | Iterable[Tensor], **options) -> list[Tensor]:
    """The gradients of a number, zero where it does not depend on a leaf; the graph is kept."""
    leaves = leaves.parameters() if isinstance(leaves, nn.Module) else leaves
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    options = {"retain_graph": True, "materialize_grads": True} | options
    return list(torch.autograd.grad(value, leaves, **options))


def with_gradients(loss: Tensor, leaves: nn.Module | Iterable[Tensor], **options) -> list[Tensor]:
    """A loss, and its gradients."""
    return [loss, *gradients(loss, leaves, **options)]


def loss_and_gradients(
    network: nn.Module, shape: tuple[int, ...], order: int = 3, seed: int = 1, **options
) -> list[Tensor]:
    """The loss of a network on data and inputs that the seed alone decides, and its gradients."""
    model = network if isinstance(network, hosm.ScoreModel) else hosm.ScoreModel(network, VP)
    torch.manual_seed(seed)
    x0, inputs = given(shape, order)
    return with_gradients(FUNCTIONS[order](model, x0, **inputs | options), model)


class Around(nn.Module):
    """A function of (B, 9) between two layers, as a network of x (B, 2)."""

    def __init__(self, function, width: int = 9):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.inner, self.outer = function, nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, x, t):
        return self.outer(self.function(torch.sin(self.inner(x)) + t[:, None]))


def assert_same(found, expected, tolerance: float = 1e-9, least: float = 1e-3):
    """Tensors, or sequences of them, agree to `tolerance` of the largest element (or `least`)."""
    if isinstance(expected, Tensor):
        found, expected = [found], [expected]
    for one, other in zip(found, expected, strict=True):
        largest = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(largest, least))
