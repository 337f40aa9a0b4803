r"""
The likelihood of an image model
================================

Train a small convolutional network on 8×8 digits. Measure the likelihood of held-out digits in
bits per dimension, with error bars. Check the error bars against an exact result, and draw
samples together with their densities.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from hosm_losses import (
    FirstOrderDSM,
    FixedGrid,
    Hutchinson,
    ScoreModel,
    VPSchedule,
    check_wrapping,
    ode_nll,
    ode_sample,
)

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# The pixels are integers from 0 to 16. Uniform noise within each level makes the pixels
# continuous, and the images are scaled to [−1, 1].
levels = torch.as_tensor(load_digits().images, dtype=torch.float32)[torch.randperm(1797), None]


def dequantize(k):
    return 2 * (k + torch.rand(k.shape)) / 17 - 1


train_set, held_out = levels[:1600], dequantize(levels[1600:1664])

# %%
# Any network will do. This network predicts the noise, and adds an embedding of log σ̂ in every
# block.


class Network(nn.Module):
    def __init__(self, schedule, width=32):
        super().__init__()
        self.schedule = schedule
        self.first, self.last = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, 1, 3, padding=1),
        )
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(4))
        self.times = nn.ModuleList(nn.Linear(16, width) for _ in range(4))

    def forward(self, x, t):
        level = (
            self.schedule.log_sigma_hat(t)[:, None] / 2 * torch.arange(1, 9, device=x.device) / 4
        )
        level = torch.cat([level.sin(), level.cos()], 1)
        place = torch.linspace(-1, 1, 8).expand(len(x), 1, 8, 8)
        h = self.first(torch.cat([x, place, place.mT], 1))
        for conv, norm, times in zip(self.convs, self.norms, self.times, strict=True):
            h = h + conv(nn.functional.silu(norm(h + times(level)[:, :, None, None])))
        return self.last(nn.functional.silu(h))


schedule = VPSchedule()
network = Network(schedule)
model = ScoreModel(network, schedule, prediction="epsilon")

objective = FirstOrderDSM(model, time_sampler="log_sigma_hat", weighting="likelihood")
optimizer = torch.optim.Adam(network.parameters(), 2e-3)
steps = 1000
for step in range(steps):
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
    optimizer.zero_grad()
    objective(dequantize(train_set[torch.randint(1600, (64,))])).backward()
    optimizer.step()

# %%
# First, is the network wrapped correctly? If the network had been trained with a schedule or
# prediction type other than the model's, every number below would silently be wrong.
report = check_wrapping(model, held_out)
print(report)

# %%
# Now measure the likelihood. Each image's standard error is estimated from two random probes at
# each solver node. With ``levels=17``, ``summary`` reports bits per dimension of the integer
# pixels.
moments = {"data_mean": float(held_out.mean()), "data_std": float(held_out.std())}
solver = FixedGrid(64, **moments)
with torch.no_grad():
    result = ode_nll(model, held_out, solver=solver, divergence=Hutchinson(2))
print(result.summary(levels=17))

# %%
# The summary shows three errors. The first is the standard error of the mean over images. The
# second is the part of the first that is due to the probes; it decreases with more probes or
# steps. The third, the solver's error, decreases with more steps. Are the reported errors
# accurate? With d = 64, the exact divergence is affordable for a few images:
few = 32
exact = ode_nll(model, held_out[:few], solver=FixedGrid(40, **moments), divergence="exact")
error, claimed = result.nll[:few] - exact.nll, 2 * result.standard_error[:few]
covered = (error.abs() < claimed).double().mean()
print(f"within twice the standard error: {covered:.0%} of {len(error)} images")

figure, ax = plt.subplots(figsize=(9.3, 3.5), layout="constrained")
order = exact.nll.argsort()
ax.errorbar(range(few), error[order], claimed[order], fmt="o", ms=4, lw=1)
ax.axhline(0, color="gray", lw=1)
ax.set(xlabel="images, from the most to the least likely", ylabel="nats, random − exact")
ax.set_title(f"Twice the standard error covers {covered:.0%} of the images")

# %%
# These are the most and the least likely images:
figure, axes = plt.subplots(2, 8, figsize=(9.3, 2.8), layout="constrained")
for ax, index in zip(axes.flat, [*order[:8], *order[-8:]], strict=True):
    ax.imshow(held_out[index, 0], cmap="gray_r", vmin=-1, vmax=1)
    ax.axis("off")
bits = exact.bits_per_dim(levels=17)[order]
figure.suptitle(
    f"The likeliest (above) take {bits[:8].mean():.1f} bits/dim, the others {bits[-8:].mean():.1f}"
)

# %%
# Solved in the other direction, the same ODE produces samples, each with its density. ``denoise``
# removes the noise that is left at t_min.
drawn = ode_sample(model, (16, 1, 8, 8), solver=solver, divergence=Hutchinson(2))
print(drawn.summary(levels=17))
t = torch.full((16,), schedule.t_min)
clean = model.denoise(drawn.x, t).detach()
figure, axes = plt.subplots(2, 8, figsize=(9.3, 2.8), layout="constrained")
for ax, image in zip(axes.flat, clean[drawn.nll.argsort(), 0], strict=True):
    ax.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
    ax.axis("off")
bits, given = (each.bits_per_dim(levels=17).mean() for each in (drawn, result))
figure.suptitle(f"Samples take {bits:.2f} bits/dim, held-out images {given:.2f}")

# %%
# Continue with :doc:`/likelihood`, or choose a loss to train with: :doc:`/which_loss`.
