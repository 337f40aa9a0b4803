r"""
From forces to a free energy
============================

Simulate a molecule, train an equivariant network on its positions and forces, and sample new
positions. For a cluster, estimate a free energy difference, with its error, from weighted samples.
The full run takes about eleven minutes on one core:

.. code-block:: bash

   pip install -e ".[molecules,docs]"
   python docs/tutorials/molecule.py

On the website, this page ends with the pictures and output of such a run.
"""

import math
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from hosm_losses import (
    AdaptiveTimes,
    FirstOrderDSM,
    FixedGrid,
    OnSubspace,
    ScoreModel,
    TargetScores,
    VESchedule,
    importance_weights,
    ode_sample,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from alanine import Alanine
from equivariant import PairNetwork

torch.manual_seed(0)
torch.set_num_threads(1)
quick = "--quick" in sys.argv  # runs all of the code, without meaningful results

# %%
# Alanine dipeptide has 22 atoms. ``docs/examples/alanine.py`` simulates it in vacuum with OpenMM.
# The bonds are not rigid, because positions with rigid bonds have no density. At 800 K, the
# torsion angles cross their energy barriers. Each frame comes with its forces divided by kT, which
# are the score of the positions' density.
molecule = Alanine(kelvin=800.0)
frames, scores = molecule.simulate(400 if quick else 20_000)
backbone = {"φ": "ACE C, ALA N, ALA CA, ALA C", "ψ": "ALA N, ALA CA, ALA C, NME N"}


def block_error(values):
    """Return the standard error of the mean of correlated values, from forty blocks."""
    values = values.double()
    return float(values[: len(values) // 40 * 40].reshape(40, -1).mean(1).std()) / 40**0.5


for name, atoms in backbone.items():
    cosine = molecule.torsion(frames, atoms).cos()
    independent = float(cosine.var()) / block_error(cosine) ** 2
    print(f"frames: {len(frames)}, of which {independent:.0f} are independent by cos {name}")

# %%
# Wrong units, signs or temperatures bias the training. The loss does not reveal such errors, but a
# check on stiff bonds does. The first call below divides the forces by a kT that is 6% too high.
# The second call ignores the subspace in which the positions lie.
x, g = frames[:10_000], scores[:10_000]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    TargetScores.information_of(x, g / 1.06, matrix=True, particles=22)
    TargetScores.information_of(x, g)
for warning in caught:
    print(warning.message)

# %%
# Positions without their centre of mass span 63 of 66 dimensions. ``OnSubspace`` works in
# coordinates of this subspace. The matrix E g gᵀ determines how much of the targets' noise the
# scores remove. Without random orientations, it would depend on how the molecule rotated during
# the simulation.


def in_random_orientation(x, scores):
    normal = torch.randn(len(x), x.shape[2], x.shape[2], dtype=x.dtype)
    turn = torch.linalg.qr(normal).Q
    turn[:, :, 0] *= torch.linalg.det(turn).sign()[:, None]  # no mirror images
    return x @ turn, scores @ turn


class Particles:
    """A model of positions (n, D) without their centre of mass, and its data in the subspace."""

    def __init__(self, x, scores, types):
        x, scores = in_random_orientation(x, scores)
        self.schedule = VESchedule(sigma_min=0.01, sigma_max=30.0)
        network = PairNetwork(self.schedule, x, types)
        self.space = OnSubspace(network, lambda x: x - x.mean(1, keepdim=True), x.shape[1:])
        self.model = ScoreModel(self.space, self.schedule)
        self.y = self.space.reduce(x).float()
        self.scores = self.space.reduce(self.space.project(scores)).float()
        self.information = TargetScores.information_of(self.y, self.scores, matrix=True)

    def batch(self, count=64):
        rows = torch.randint(len(self.y), (count,))
        return self.y[rows], TargetScores(self.scores[rows], self.information)

    def train(self, steps, rate=5e-3):
        times = AdaptiveTimes()
        objective = FirstOrderDSM(self.model, time_sampler=times)
        optimizer = torch.optim.Adam(self.model.parameters())
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * math.cos(math.pi / 2 * step / steps) ** 2
            optimizer.zero_grad()
            y, targets = self.batch()
            objective(y, targets=targets).backward()
            optimizer.step()
            if step % 50 == 49:
                y, targets = self.batch()
                times.learn(objective, y, optimizer, targets=targets)

    def sample(self, count):
        solver = FixedGrid(8 if quick else 40, data_std=float(self.y.std()))
        shape = (count, self.space.dimensions)
        return ode_sample(self.model, shape, solver=solver, divergence="exact", batch_size=64)


# Each atom has its own type; otherwise, hydrogens of different groups would be interchangeable.
alanine = Particles(frames, scores, types=torch.arange(22))
alanine.train(20 if quick else 6000)

# %%
# The network is equivariant to rotations and reflections, so half of the samples have the wrong
# handedness. The sign of the volume spanned by three bonds at Cα identifies them. These samples x
# are replaced by −x before a torsion is computed. Otherwise, the two basins of φ could not be told
# apart. The molecule's density is split equally between the mirror images, hence −log 2.


def log_target(y):
    x = molecule.left_handed(alanine.space.expand(y))
    return molecule.log_target(x) - math.log(2)


drawn = alanine.sample(16 if quick else 256)
weights = importance_weights(drawn, log_target)
samples = molecule.left_handed(alanine.space.expand(drawn.x))
share = weights.effective_sample_size / len(samples)
low, high = weights.log_weights.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
print(f"alanine: the samples are worth {share:.2%} as many of the molecule itself")
print(f"alanine: log weights spread by {(high - low) / 1.35:.1f} nats; 2 nats would make it 2%")
right = {
    "simulation": molecule.torsion(frames, backbone["φ"]) > 0,
    "samples": molecule.torsion(samples, backbone["φ"]) > 0,
}
for name, values in right.items():
    p, error = float(values.double().mean()), block_error(values)
    print(f"alanine: {name} with φ > 0: {p:.1%} ± {error:.1%}")

figure, axes = plt.subplots(1, 3, figsize=(9.3, 3.3), layout="constrained")
both = {"simulation": frames[::10], "samples": samples}
for ax, (name, x) in zip(axes, both.items(), strict=False):
    angles = [molecule.torsion(x, atoms).rad2deg() for atoms in backbone.values()]
    ax.plot(*angles, ".", ms=2)
    ax.set(title=name, xlabel="φ, degrees", ylabel="ψ, degrees")
    ax.set(xlim=(-180, 180), ylim=(-180, 180))
energies = {name: -molecule.log_target(x) for name, x in both.items()}
low = float(energies["simulation"].min())
for name, values in energies.items():
    shown = (values - low).clamp(max=120)
    axes[2].hist(shown, 40, range=(0, 120), density=True, histtype="step", label=name)
axes[2].set(xlabel="energy above the least, kT", yticks=[])
axes[2].legend()
if not quick:
    figure.savefig("molecule_samples.svg")

# %%
# How much noise is left in the targets at each noise level? The network's output is used in place
# of the target's mean. The result is an upper bound, because it includes the network's error.
figure, ax = plt.subplots(figsize=(9.3, 3.3), layout="constrained")
levels = torch.logspace(-2, 1, 16)
rows = torch.randint(len(alanine.y), (32 if quick else 1000,))
left = {"drawn noise": [], "with scores": []}
for sigma in levels.expand(len(rows), -1).T:
    y, noise = alanine.y[rows], torch.randn_like(alanine.y[rows])
    t = alanine.schedule.time(sigma.log())
    with torch.no_grad():
        predicted = alanine.model.network(y + sigma[:, None] * noise, t)
    z = noise + sigma[:, None] * alanine.scores[rows]
    C = torch.linalg.inv(torch.eye(63) + sigma[0] ** 2 * alanine.information.float())
    for name, target in {"drawn noise": noise, "with scores": noise - z @ C}.items():
        left[name].append(float((target - predicted).square().mean()))
for name, values in left.items():
    ax.loglog(levels, values, label=name)
ax.set(xlabel="noise level, Å", ylabel="noise left in the targets")
ax.legend()
if not quick:
    figure.savefig("molecule_noise.svg")

# %%
# In 63 dimensions, importance weighting requires a better network than a few minutes of training
# on one core can produce. Here, nearly all of the weight falls on one or two samples. A
# weighted average, such as the free energy difference between the two basins of φ, would be
# meaningless. DW4 is small enough: four particles in the plane, with a double-well potential in
# each of the six distances.


def log_dw4(x):
    first, second = torch.triu_indices(4, 4, 1)
    off = (x[:, first] - x[:, second]).norm(dim=2) - 4
    return (4 * off**2 - 0.9 * off**4).sum(1)


def simulate_dw4(frames, chains=2000, step=0.1, before=1000):
    """Run Hamiltonian Monte Carlo; return positions after every tenth round, and their scores."""
    slope = torch.func.grad(lambda x: log_dw4(x).sum())
    square = 2.6 * torch.cartesian_prod(*[torch.tensor([-0.5, 0.5]).double()] * 2)
    x, found = square + 0.2 * torch.randn(chains, 4, 2, dtype=torch.float64), []
    for count in range(1, before + 10 * frames + 1):
        start = torch.randn_like(x)
        end, momentum = x, start + step / 2 * slope(x)
        for _ in range(9):
            end = end + step * momentum
            momentum = momentum + step * slope(end)
        end = end + step * momentum
        momentum = momentum + step / 2 * slope(end)
        gain = log_dw4(end) - log_dw4(x) - (momentum**2 - start**2).sum((1, 2)) / 2
        accepted = torch.rand(chains, dtype=x.dtype).log() < gain
        x = torch.where(accepted[:, None, None], end, x)
        x = x - x.mean(1, keepdim=True)
        if count > before and count % 10 == 0:
            found.append(x)
    x = torch.cat(found)
    return x, slope(x)


def is_open(x):
    """Return 1 where at least three of the six pairs are beyond the barrier between the wells."""
    first, second = torch.triu_indices(4, 4, 1)
    return (((x[:, first] - x[:, second]).norm(dim=2) > 4).sum(1) >= 3).double()


def free_energy(p, error):
    """Return F(open) − F(closed) in kT, and half the width of its 95% interval."""
    return math.log((1 - p) / p), 1.96 * error / (p * (1 - p))


x, scores = simulate_dw4(10, before=5 if quick else 1000)
dw4 = Particles(x, scores, types=torch.zeros(4, dtype=torch.long))
dw4.train(20 if quick else 8000)
drawn = dw4.sample(64 if quick else 2000)
weights = importance_weights(drawn, lambda y: log_dw4(dw4.space.expand(y).double()))
print(f"DW4: {weights}")
p, error = weights.expectation(lambda y: is_open(dw4.space.expand(y)))
difference, half = free_energy(float(p), float(error))
print(f"DW4: free energy difference {difference:.3f} ± {half:.3f} kT from weighted samples")
longer, _ = simulate_dw4(2 if quick else 100, before=5 if quick else 1000)
for name, data in {"same": x, "ten times longer": longer}.items():
    values = is_open(data).reshape(-1, 2000).mean(0)  # of each chain
    p, error = float(values.mean()), float(values.std()) / 2000**0.5
    difference, half = free_energy(p, error)
    print(
        f"DW4: free energy difference {difference:.3f} ± {half:.3f} kT from the {name} simulation"
    )

# %%
# The output and pictures of a full run:
#
# .. literalinclude:: /tutorials/molecule.txt
#    :language: text
#
# .. image:: /images/molecule_samples.svg
#
# .. image:: /images/molecule_noise.svg
#
# Alanine needs a better network than this one: most of the samples' energies lie outside
# the plotted range. Also, too many samples have φ > 0: the network's layers receive only
# distances, from which the sign of φ relative to the handedness at Cα is hard to infer. If log
# weights are normally distributed with a standard deviation of s nats, the effective sample size
# is a fraction exp(−s²) of the number of samples. A fraction of 2% requires s = 2. To reach 2%,
# train a larger network for longer. If the network also received the sign of the volume at Cα, no
# mirror images would be needed. For DW4, the effective sample size is about half the number of
# samples.
