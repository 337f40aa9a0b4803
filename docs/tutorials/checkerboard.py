r"""
From order one to order two
===========================

Train a small network on a checkerboard with the ordinary loss, then continue with order one and
with order two for the same processor time, and look at the densities of the two ODEs.
"""

import copy
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

from hosm_losses import (
    AveragedTargets,
    FirstOrderDSM,
    FixedGrid,
    ScoreModel,
    SecondOrderDSM,
    VESchedule,
    check_derivatives,
    ode_nll,
)

torch.manual_seed(0)
torch.set_num_threads(1)
schedule = VESchedule(sigma_min=0.02, sigma_max=10.0)

# %%
# The data are uniform on half of the squares of a 4×4 board. The network gets sines of the
# position, because the board has sharp edges, and of the noise level. Its activations are smooth:
# order two differentiates them.


def draw(count):
    row = torch.randint(4, (count,))
    column = 2 * torch.randint(2, (count,)) + row % 2
    return (torch.stack([row, column], 1) + torch.rand(count, 2)) / 2 - 1


def waves(x, count):
    return torch.cat([f(k * x) for k in range(1, count + 1) for f in (torch.sin, torch.cos)], 1)


class Network(nn.Module):
    def __init__(self, width=96):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, width) for n in (18, width, width))
        self.times = nn.ModuleList(nn.Linear(16, 2 * width) for _ in self.layers)
        self.last = nn.Linear(width, 2)

    def forward(self, x, sigma):
        sigma = sigma[:, None]
        size = (0.35 + sigma**2).sqrt()  # of x, whose data have the variance 0.35
        level, h = waves(sigma.log() / 4, 8), torch.cat([x / size, waves(2 * x / size, 4)], 1)
        for layer, times in zip(self.layers, self.times, strict=True):
            scale, shift = times(level).chunk(2, 1)
            h = nn.functional.silu(layer(h) * (1 + scale) + shift)
        return sigma / size**2 * x + self.last(h)


# %%
# A score model is the network with its schedule. This network wants the noise level in the place
# of t.
model = ScoreModel(Network(), schedule, time=schedule.sigma)
print(check_derivatives(model, draw(8)))

# %%
# Order one first. ``AveragedTargets`` replaces each drawn noise by its average over the batch,
# which costs no call of the network and helps whenever a batch is dense at the scale of the noise.


def train(objective, seconds, rate):
    optimizer = torch.optim.Adam(objective.parameters(), rate)
    start, steps = time.process_time(), 0
    while (part := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * (1 - part)
        optimizer.zero_grad()
        objective(draw(512)).backward()
        optimizer.step()
        steps += 1
    return steps


steps = train(FirstOrderDSM(model, targets=AveragedTargets()), seconds=15, rate=3e-3)
print(f"order one: {steps} steps")

# %%
# Continue from these weights with either loss, for the same time. A step of order two is dearer,
# so it gets fewer of them.
models = {}
for name, loss in {"order one": FirstOrderDSM, "order two": SecondOrderDSM}.items():
    models[name] = copy.deepcopy(model)
    objective = loss(models[name], targets=AveragedTargets())
    print(f"{name}: {train(objective, seconds=15, rate=1e-3)} steps")

# %%
# ``ode_nll`` gives the density of the ODE at every point of a grid. In two dimensions the exact
# divergence is cheap.
axis = (torch.arange(64) + 0.5) / 64 * 2.4 - 1.2
points = torch.cartesian_prod(axis, axis)
solver = FixedGrid(40, data_std=0.6)
density = {}
for name, each in models.items():
    result = ode_nll(each, points, solver=solver, divergence="exact")
    density[name] = (-result.nll).exp().reshape(64, 64)

# %%
# The density of the data is known, so the KL divergence to each ODE is a sum over the grid.
edges = torch.linspace(-1, 1, 5)
strips = torch.special.ndtr((axis[:, None] - edges) / schedule.sigma_min).diff(dim=1).neg()
even, odd = strips[:, 0::2].sum(1), strips[:, 1::2].sum(1)
density["data"] = (even[:, None] * even + odd[:, None] * odd) / 2
area = (2.4 / 64) ** 2
inside = density["data"] > 1e-6
kl = {}
figure, axes = plt.subplots(1, 3, figsize=(9.3, 3.7), layout="constrained")
for ax, (name, values) in zip(axes, density.items(), strict=True):
    ax.imshow(values.T, origin="lower", vmin=0, vmax=0.8, extent=(-1.2, 1.2, -1.2, 1.2))
    log_ratio = (density["data"][inside] / values[inside]).log()
    kl[name] = float((density["data"][inside] * log_ratio).sum() * area)
    title = name if name == "data" else f"{name}: KL {kl[name]:.3f} nats"
    ax.set(title=title, xticks=[], yticks=[])
    print(f"{name}: KL {kl[name]:.4f} nats, total mass {float(values.sum() * area):.3f}")
ratio = kl["order two"] / kl["order one"]
figure.suptitle(f"In the same time, order two comes to {ratio:.0%} of order one's KL divergence")

# %%
# Both know the squares. What differs is how even the density is inside them. That depends on the
# divergence of the field along the whole path, which order two trains and order one does not:
# :ref:`Theory <why>`. This is one seed; :doc:`/worth` has the study, and :doc:`/which_loss` says
# when a higher order is worth its price.
