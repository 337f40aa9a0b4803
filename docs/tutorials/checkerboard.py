r"""
Train a better density
======================

Train small networks on a checkerboard with score matching of orders one, two and three. All orders
use the same number of network evaluations. Compare the density and score of each network's ODE
with the true ones.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from hosm_losses import (
    AveragedTargets,
    FirstOrderDSM,
    FixedGrid,
    ScoreModel,
    SecondOrderDSM,
    ThirdOrderDSM,
    VESchedule,
    check_derivatives,
    ode_nll,
)

torch.set_num_threads(1)
schedule = VESchedule(sigma_min=0.02, sigma_max=10.0)

# %%
# The data are uniform on half of the squares of a 4×4 board. Because the board has sharp edges,
# the network's inputs include sines and cosines of the position. Sines and cosines also encode the
# noise level. The activations are smooth, because the higher-order losses differentiate them.


def draw(count):
    row = torch.randint(4, (count,))
    column = 2 * torch.randint(2, (count,)) + row % 2
    return (torch.stack([row, column], 1) + torch.rand(count, 2)) / 2 - 1


def waves(x, count):
    return torch.cat([f(k * x) for k in range(1, count + 1) for f in (torch.sin, torch.cos)], 1)


class Network(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, width) for n in (18, width, width))
        self.times = nn.ModuleList(nn.Linear(16, 2 * width) for _ in self.layers)
        self.last = nn.Linear(width, 2)

    def forward(self, x, sigma):
        sigma = sigma[:, None]
        size = (0.35 + sigma**2).sqrt()  # std of x; the data have variance 0.35
        level, h = waves(sigma.log() / 4, 8), torch.cat([x / size, waves(2 * x / size, 4)], 1)
        for layer, times in zip(self.layers, self.times, strict=True):
            scale, shift = times(level).chunk(2, 1)
            h = nn.functional.silu(layer(h) * (1 + scale) + shift)
        return sigma / size**2 * x + self.last(h)


# %%
# A score model combines a network with its noise schedule. This network receives the noise level
# instead of t. ``check_derivatives`` reports whether the losses can differentiate the network.


def new_model():
    torch.manual_seed(0)
    return ScoreModel(Network(), schedule, time=schedule.sigma)


print(check_derivatives(new_model(), draw(8)))

# %%
# Per sample, a step requires three network evaluations at order one (a backward pass counts as
# two), six at order two and twelve at order three. Therefore, the runs at higher orders take fewer
# steps. In each sample's target, ``AveragedTargets`` replaces the noise with an average over the
# batch. This requires no further network evaluations, and helps if the batch is dense at the scale
# of the noise.


def train(objective, steps, rate):
    optimizer = torch.optim.Adam(objective.parameters(), rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(draw(256)).backward()
        optimizer.step()
        decay.step()


models = {}
for name, loss, steps, rate in (
    ("order one", FirstOrderDSM, 3000, 3e-3),
    ("order two", SecondOrderDSM, 1500, 1e-2),
    ("order three", ThirdOrderDSM, 750, 1e-2),
):
    models[name] = new_model()
    train(loss(models[name], targets=AveragedTargets()), steps, rate)

# %%
# At the smallest noise level, where the ODE ends, the true density and its score are known. A sum
# over a grid yields the KL divergence from this density to each ODE's. ``ode_nll`` returns
# negative log-densities under the ODE; ``enable_grad`` makes them differentiable. In two
# dimensions, the field's exact divergence is cheap.


def log_density(x):
    edges = torch.linspace(-1, 1, 5)
    strips = torch.special.ndtr((x[..., None] - edges) / schedule.sigma_min).diff(dim=-1).neg()
    return strips.unflatten(-1, (2, 2)).sum(-2).prod(-2).sum(-1).div(2).log()


def slope(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


options = {"solver": FixedGrid(40, data_std=0.6), "divergence": "exact"}
axis = (torch.arange(64) + 0.5) / 64 * 2.4 - 1.2
grid, area = torch.cartesian_prod(axis, axis), (2.4 / 64) ** 2
data = draw(400) + schedule.sigma_min * torch.randn(400, 2)
log_q, truth = log_density(grid), slope(log_density, data)
density, kl, error = {"data": log_q.exp()}, {}, {}
for name, model in models.items():
    log_p = -ode_nll(model, grid, **options).nll
    density[name] = log_p.exp()
    kl[name] = float((log_q.exp() * (log_q - log_p))[log_q > -14].sum() * area)
    score = slope(lambda x, m=model: -ode_nll(m, x, enable_grad=True, **options).nll, data)
    error[name] = float((score - truth).square().sum(1).log().mean().exp())
    print(f"{name}: KL {kl[name]:.4f} nats, squared error of the score {error[name]:.2f}")

# %%
# All three models reproduce the squares. They differ in how uniform the density is inside the
# squares, and even more in the score, the gradient of the log-density.
figure, axes = plt.subplots(1, 4, figsize=(9.3, 3.3), layout="constrained")
for ax, (name, values) in zip(axes, density.items(), strict=True):
    shown = values.reshape(64, 64).T
    ax.imshow(shown, origin="lower", vmin=0, vmax=0.8, extent=(-1.2, 1.2, -1.2, 1.2))
    title = f"{name}\nKL {kl[name]:.3f}, score {error[name]:.1f}" if name in kl else name
    ax.set(title=title, xticks=[], yticks=[])
two, three = kl["order two"] / kl["order one"], error["order three"] / error["order one"]
figure.suptitle(
    f"Over order one: KL of order two {two:.0%}, score error of order three {three:.0%}"
)

# %%
# The ODE's density depends on the divergence of the field along the whole path. The density's
# score depends on the gradient of that divergence. Order one controls neither: see
# :ref:`Theory <why>`. These results are from one seed. :doc:`/worth` reports the full study, and
# :doc:`/paper_losses` says when a higher order is worth its cost.
