r"""
A posterior you can trust
=========================

Train a conditional model on a simulator. Check its posterior as if the exact posterior were
unknown: by the ranks of the true parameters and the coverage of credible regions. Here, the exact
posterior is known and shows what such checks miss.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.distributions import Normal

from hosm_losses import FirstOrderDSM, FixedGrid, ODEDistribution, ScoreModel, VESchedule

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# The simulator is the two-moons problem of `Greenberg et al. (2019)
# <https://arxiv.org/abs/1905.07488>`_. The observation y is a point on a thin crescent whose
# position depends on θ. The prior on θ is uniform on [−1, 1]². The simulator uses only the
# absolute value of θ₁ + θ₂, so the posterior of θ consists of two moons.


def rotated(theta):
    a, b = theta.unbind(-1)
    return (a + b) / 2**0.5, (b - a) / 2**0.5


def simulate(theta):
    along, across = rotated(theta)
    angle = math.pi * (torch.rand(along.shape) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(along.shape)
    place = radius * angle.cos() + 0.25 - along.abs(), radius * angle.sin() + across
    return torch.stack(place, -1)


def draw(count):
    theta = 2 * torch.rand(count, 2) - 1
    return theta, simulate(theta)


# %%
# The network predicts the noise in θ, with y as an additional input. Sines of the inputs help to
# resolve crescents that are 0.01 thick.


def waves(x, frequencies):
    angles = (x[..., None] * frequencies).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1)


class Network(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, width) for n in (36, width, width))
        self.times = nn.ModuleList(nn.Linear(16, 2 * width) for _ in self.layers)
        self.last = nn.Linear(width, 2)

    def forward(self, theta, sigma, y):
        sigma = sigma[:, None]
        size = (1 / 3 + sigma**2).sqrt()  # std of θ; the prior has variance 1/3
        level = waves(sigma.log() / 4, torch.arange(1, 9))
        inputs = torch.cat([theta / size, y], 1)
        h = torch.cat([inputs, waves(inputs, math.pi / 2 * 2 ** torch.arange(4))], 1)
        for layer, times in zip(self.layers, self.times, strict=True):
            scale, shift = times(level).chunk(2, 1)
            h = nn.functional.silu(layer(h) * (1 + scale) + shift)
        return sigma / size**2 * theta + self.last(h)


# %%
# Every step uses new simulations. If simulations are expensive, keep some for the checks below.
# The targets are the drawn noise, because ``AveragedTargets`` would average over θ that belong to
# different y.
schedule = VESchedule(sigma_min=0.003, sigma_max=10.0)
model = ScoreModel(Network(), schedule, time=schedule.sigma)
objective = FirstOrderDSM(model)
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
steps = 14000
for step in range(steps):
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
    optimizer.zero_grad()
    theta, y = draw(256)
    objective(theta, model_kwargs={"y": y}).backward()
    optimizer.step()

# %%
# Make one distribution for each of 300 new observations. A single solve draws 99 samples, with
# their densities, from each posterior. A second solve computes the density of the true parameters.
count = 300
theta, y = draw(count)
solver = FixedGrid(data_std=0.58)
q = ODEDistribution(model, (2,), solver=solver, model_kwargs={"y": y}, batch_shape=(count,))
with torch.no_grad():
    samples, log_q_samples = q.rsample_and_log_prob((99,))
    log_q = q.log_prob(theta)

# %%
# Now apply simulation-based calibration (`Talts et al. <https://arxiv.org/abs/1804.06788>`_). If
# the posterior is right, the true parameters are distributed like one more sample from it. The
# rank of each true parameter among the 99 samples is then uniformly distributed from 0 to 99, and
# so is the rank of the density at the true parameters. The number of samples with a higher density
# than the true parameters determines the smallest highest-density region that contains these
# parameters. 90% regions should contain the true parameters for 90% of the observations. If they
# do so less often, the regions are too small.
ranks = (samples < theta).sum(0)
denser = (log_q_samples > log_q).sum(0)
nominal = torch.arange(101) / 100
coverage = (denser[:, None] < torch.arange(101)).float().mean(0)
error = (nominal * (1 - nominal) / count).sqrt()
for percent in (50, 90):
    print(f"regions of {percent}% hold {coverage[percent]:.1%} ± {error[percent]:.1%}")

figure, axes = plt.subplots(1, 3, figsize=(9.3, 3.3), layout="constrained")
expected, spread = count / 10, (count * 0.1 * 0.9) ** 0.5
for ax, rank, name in zip(axes, ranks.T, ("θ₁", "θ₂"), strict=False):
    ax.hist(rank, bins=10, range=(0, 100), histtype="step")
    ax.axhspan(expected - 2 * spread, expected + 2 * spread, color="gray", alpha=0.3, lw=0)
    ax.set(xlabel=f"rank of {name}", ylabel="observations", ylim=(0, 2 * expected))
low, high = nominal - 2 * error, nominal + 2 * error
axes[2].fill_between(nominal, low, high, color="gray", alpha=0.3, lw=0)
axes[2].plot(nominal, coverage)
axes[2].set(xlabel="nominal coverage", ylabel="empirical coverage")
figure.suptitle(f"Regions of 50% hold {coverage[50]:.0%}; grey is twice the binomial error")

# %%
# Now compute the exact posterior. The likelihood is the density of the point on the crescent. Its
# integral over the prior's box is computed as a mean over a grid of radii and angles. For each
# radius and angle, two values of θ could have produced y. Only values inside the box are counted.


def log_posterior(theta, y):
    theta, y = theta.double(), y.double()
    along, across = rotated(theta)
    first, second = y[..., 0] - 0.25 + along.abs(), y[..., 1] - across
    radius = torch.hypot(first, second)
    log_likelihood = Normal(0.1, 0.01).log_prob(radius) - (math.pi * radius).log()
    possible = (first > 0) & (theta.abs() <= 1).all(-1)

    angle = math.pi * ((torch.arange(400) + 0.5) / 400 - 0.5).double()
    radius = Normal(0.1, 0.01).icdf((torch.arange(20) + 0.5).double() / 20)[:, None]
    along = radius * angle.cos() + 0.25 - y[..., :1, None]
    across = y[..., 1:, None] - radius * angle.sin()
    roots = torch.stack([along - across, along + across, -along - across, across - along]) / 2**0.5
    inside = (roots.abs() <= 1).unflatten(0, (2, 2)).all(1).sum(0) * (along > 0)
    evidence = inside.double().mean((-2, -1))
    return log_likelihood.where(possible, -math.inf) - evidence.log()


# %%
# The ranks do not show two important quantities. The first is the KL divergence from the exact
# posterior to the ODE's, averaged over y: the mean difference between the two log-densities at the
# true parameters. The second is the share of the ODE's probability that lies outside the box. An
# ODE's density is smooth even at the edge of the prior, so some probability lies beyond the edge,
# especially if the edge cuts through a moon. The largest differences between the log-densities
# also occur near the edge.
log_p = log_posterior(theta, y)
kl, kl_error = float((log_p - log_q).mean()), float((log_p - log_q).std()) / count**0.5
outside = (samples.abs() > 1).any(-1).double().mean(0)
print(f"log-density: prior {-math.log(4):.2f}, ODE {log_q.mean():.2f}, exact {log_p.mean():.2f}")
print(f"KL {kl:.3f} ± {kl_error:.3f} nats")
print(f"outside of the box: {outside.mean():.1%} of the samples, {outside.max():.0%} for one y")

# %%
# Finally, plot one posterior on a grid. The colours span twelve nats. Every continuous map from a
# normal distribution to two moons leaves bridges between the moons. Here, the bridges contain
# little mass.
observed, half = torch.zeros(2), 0.45
axis = (torch.arange(100) + 0.5) / 100 * 2 * half - half
grid = torch.cartesian_prod(axis, axis)
one = ODEDistribution(model, (2,), solver=solver, model_kwargs={"y": observed})
with torch.no_grad():
    log_densities = {"exact posterior": log_posterior(grid, observed), "ODE": one.log_prob(grid)}
largest = float(log_densities["exact posterior"].max())
figure, axes = plt.subplots(1, 3, figsize=(9.3, 3.5), layout="constrained")
for ax, (name, values) in zip(axes, log_densities.items(), strict=False):
    shown = values.clamp(min=largest - 12).reshape(100, 100).T
    ax.imshow(shown, origin="lower", extent=(-half, half, -half, half), vmax=largest)
    mass = float(values.exp().sum()) * (2 * half / 100) ** 2
    ax.set(title=f"{name}, mass {mass:.2f}", xlabel="θ₁", ylabel="θ₂")
axes[2].plot(log_p, log_q, ".", ms=3)
axes[2].axline((0, 0), slope=1, color="gray", lw=1)
axes[2].set(xlabel="log p(θ | y), nats", ylabel="log q(θ | y), nats")
figure.suptitle(f"Log-densities for y = 0, and at the true parameters: KL {kl:.2f} nats")

# %%
# Calibration checks miss two faults. A model that ignored y and returned the prior would pass,
# because the true parameters are samples from the prior as well. The checks also average over y:
# regions that are too wide for some observations compensate for regions that are too narrow for
# others, perhaps for yours.
#
# Both faults lower the mean of log q over pairs of θ and y. Two models can be compared by this
# mean even if the exact posterior is unknown. A useful model's mean must exceed the prior's. To
# handle the edge, reject samples outside the box and divide the density by the share of samples
# inside. Alternatively, map the box to the plane, train there, and add the log-determinant of the
# map's Jacobian to the log-density. :doc:`/densities` describes such distributions.
