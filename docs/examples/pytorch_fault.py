"""PyTorch's gradient of a loss on a second derivative through a layer norm is wrong.

python docs/examples/pytorch_fault.py
"""

import torch
from torch import Tensor, nn

from hosm_losses import taylor

torch.manual_seed(4)
network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1)).double()
x, bias = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), network[0].bias
axis = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 5, 2)


def loss(moved: float = 0.0) -> Tensor:
    """Return the mean square of ∂²f/∂x₁², with the first bias shifted."""
    bias.data[0] += moved
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
    bias.data[0] -= moved
    return second[:, 0].square().mean()


ours = taylor.jet(network, x.detach(), axis, "squares")[2].square().mean()
print(f"differences: {float((loss(1e-4) - loss(-1e-4)).detach()) / 2e-4:.3f}")
print(f"hosm_losses: {torch.autograd.grad(ours, bias)[0][0]:.3f}")
print(f"autograd, PyTorch {torch.__version__}: {torch.autograd.grad(loss(), bias)[0][0]:.3f}")
