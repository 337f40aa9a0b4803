r"""
Reweight samples to a known energy
==================================

Train a model on samples from the distribution exp(−energy)/Z in eight dimensions. From the model,
draw samples together with their densities, and reweight these samples to that distribution. The
weights also yield the effective sample size and an estimate of log Z.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from hosm_losses import (
    AveragedTargets,
    FirstOrderDSM,
    FixedGrid,
    ScoreModel,
    VESchedule,
    importance_weights,
    ode_nll,
    ode_sample,
)

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# Each of four pairs (a, b) of coordinates adds a double well in a and a parabola in b to the
# energy. Each of the four double wells doubles the number of modes, so the distribution has
# sixteen. Quadrature yields Z.
axis = torch.linspace(-4, 4, 4001, dtype=torch.float64)
well = 6 * axis**2 + axis / 2 - axis**4
log_z = 4 * (float(well.logsumexp(0)) + math.log(8 / 4000) + math.log(2 * math.pi) / 2)


def log_target(x):
    a, b = x[:, ::2].double(), x[:, 1::2].double()
    return (6 * a**2 + a / 2 - a**4 - b**2 / 2).sum(1)


def draw(count):
    rows = torch.multinomial(well.softmax(0), 4 * count, replacement=True)
    return torch.stack([axis[rows].float(), torch.randn(4 * count)], 1).reshape(count, 8)


data = draw(4096)
mean, std = data.mean(0), data.std(0)

# %%
# The network receives log σ̂, and x standardised by its mean and standard deviation at that noise
# level.


class Network(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, width) for n in (8, width, width))
        self.times = nn.ModuleList(nn.Linear(16, 2 * width) for _ in self.layers)
        self.last = nn.Linear(width, 8)

    def forward(self, x, sigma):
        sigma = sigma[:, None]
        size = (std**2 + sigma**2).sqrt()
        z = (x - mean) / size
        level = sigma.log() * torch.arange(1, 9) / 4
        level, h = torch.cat([level.sin(), level.cos()], 1), 2 * z
        for layer, times in zip(self.layers, self.times, strict=True):
            scale, shift = times(level).chunk(2, 1)
            h = nn.functional.silu(layer(h) * (1 + scale) + shift)
        return sigma / size * z + self.last(h)


schedule = VESchedule(sigma_min=0.02, sigma_max=20.0)
model = ScoreModel(Network(), schedule, time=schedule.sigma)
objective = FirstOrderDSM(model, targets=AveragedTargets())
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
steps = 4000
for step in range(steps):
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
    optimizer.zero_grad()
    objective(draw(256)).backward()
    optimizer.step()

# %%
# With an exact divergence, the samples' densities have no probe error.
solver = FixedGrid(64, data_mean=mean, data_std=std)
drawn = ode_sample(model, (500, 8), solver=solver, divergence="exact")
weights = importance_weights(drawn, log_target)
print(weights)
print(f"log Z {weights.log_z:.3f} ± {weights.log_z_error:.3f}, exactly {log_z:.3f}")

# %%
# The weights do not reveal a mode that no sample reaches. Points from the target do: the mean of
# log π − log q over these points is an upper bound on log Z, and a missed mode raises this bound.
points = draw(500)
given = ode_nll(model, points, solver=solver, divergence="exact")
bounds = weights.sandwich(points, given)
print(f"{bounds.lower:.3f} ≤ log Z ≤ {bounds.upper:.3f}, exactly {log_z:.3f}")

# %%
# If the weights are nearly equal, the model is accurate near its samples. Weights far to the left
# indicate regions where the model places too many samples. Weights far to the right indicate
# regions where it places too few samples.
figure, ax = plt.subplots(figsize=(9.3, 3.5), layout="constrained")
ax.hist((weights.log_weights - weights.log_z).clamp(-4, 4), 40, histtype="step")
share = weights.effective_sample_size / 500
ax.set(xlabel="log weight, nats", ylabel="samples")
ax.set_title(f"The samples are worth {share:.0%} as many of the energy itself")

# %%
# ``weights.expectation`` returns means under the target distribution, with standard errors.
# ``weights.resample`` returns samples from it: see :doc:`/energies`.
