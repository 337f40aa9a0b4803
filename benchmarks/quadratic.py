"""Which loss is best without an optimizer? Each is minimised exactly, and judged by the ODE's KL.

    python -m benchmarks.quadratic [--elements 8 16] [--seeds N] [--smoke]

The network is what is exact for Gaussian data plus 64 random features at each of 33 noise levels.
Every loss is then a quadratic in the output weights of a level, whose minimum solves a linear
system. Means are over 4096 draws of q_t, with the closed forms of a mixture for what the noise of
denoising averages out to. What is detached in the targets is that of the solution before, from
that of order one on.

With A = σ ∂f/∂x, the truth f*, A*, G*, and δ = f − f*, E = A − A* detached, in nats:
    first      ‖f − f*‖²
    second     ‖A − A* − δδᵀ‖²
    trace      (tr A − tr A* − ‖δ‖²)²
    third      ‖G − G* + ‖δ‖²δ − (tr E) δ − 2 E δ‖²
    rate       (tr A − tr A* + f*·(f − f*))², the rate at which the ODE's log-density goes wrong
"""

from functools import cached_property
from typing import Any

import torch
from tests.oracles import GaussianMixture, anisotropic
from torch import Tensor, nn
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import experiment, results

FILE = results.DIRECTORY / "worth.json"
FEATURES, LEVELS, DRAWS, POINTS, ROUNDS, RIDGE = 64, 33, 4096, 4000, 3, 1e-8
SCHEDULE = hosm.VESchedule(sigma_max=20.0)
TRIED = (0.1, 0.3, 1.0, 3.0)


def losses(d: int) -> dict[str, dict[str, float]]:
    """Weights of the terms. The paper's 0.5 and 0.1 count d times less, and as much, in nats."""
    return {
        "order one": {},
        "order two, as in the paper": {"second": 0.5 / d},
        "order three, as in the paper": {"second": 0.5 / d, "third": 0.1},
        **{f"trace, weight {weight:g}": {"trace": weight} for weight in TRIED},
        **{f"rate, weight {weight:g}": {"rate": weight} for weight in TRIED},
    }


class Features(nn.Module):
    """ε̂(x, t) from output weights (LEVELS, d, FEATURES), which are linear in log σ̂ between levels.

    f_i = −(σ/size_i) z_i + Σ_j weights_ij tanh(w_j·z + b_j), z = (x − mean)/size.
    """

    def __init__(self, mixture: GaussianMixture, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        data = mixture.sample(2**15, generator)
        self.mean, self.std, d = data.mean(0), data.std(0), data.shape[1]
        self.directions = 2 * torch.randn((FEATURES, d), generator=generator).double() / d**0.5
        self.offsets = torch.randn(FEATURES, generator=generator).double()
        self.weights = torch.zeros(LEVELS, d, FEATURES).double()

    def parts(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The part of f for Gaussian data (B, d), tanh (B, FEATURES), and size (B, d)."""
        size = torch.sqrt(self.std**2 + sigma[:, None] ** 2)
        z = (x - self.mean) / size
        return -sigma[:, None] / size * z, torch.tanh(z @ self.directions.T + self.offsets), size

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        low, high = SCHEDULE.log_sigma_hat_range
        sigma = SCHEDULE.sigma(t)
        place = ((sigma.log() - low) / (high - low) * (LEVELS - 1)).clamp(0, LEVELS - 1 - 1e-9)
        # On the grid of the solver all rows have one place.
        below = int(place[0])
        part = (place[0] - below) * (self.weights[below + 1] - self.weights[below])
        gaussian, features, _ = self.parts(x, sigma)
        return -gaussian - features @ (self.weights[below] + part).T


class Level:
    """One noise level: the truth and the features at draws of q_t."""

    def __init__(self, network: Features, mixture: GaussianMixture, sigma: Tensor, seed: int):
        generator = torch.Generator().manual_seed(seed)
        clean = mixture.sample(DRAWS, generator)
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        x, sigmas = clean + sigma * noise, sigma.expand(DRAWS)
        split = [each.split(128) for each in (x, torch.ones_like(sigmas), sigmas)]
        parts = list(zip(*split, strict=True))
        self.f = sigma * torch.cat([mixture.score(*part) for part in parts])
        self.jacobian = sigma**2 * torch.cat([mixture.hessian(*part) for part in parts])
        thirds = [torch.einsum("biij->bj", mixture.third(*part)) for part in parts]
        self.third = sigma**3 * torch.cat(thirds)
        self.gaussian, self.values, size = network.parts(x, sigmas)
        self.scaled = sigma * network.directions / size[0]  # (FEATURES, d)
        self.gaussian_jacobian = -torch.diag(sigma**2 / size[0] ** 2)
        self.slopes = 1 - self.values**2
        self.bends = -2 * self.values * self.slopes

    def field(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """δ and E of output weights (d, FEATURES)."""
        change = torch.einsum("ij,bj,jl->bil", weights, self.slopes, self.scaled)
        jacobian = self.gaussian_jacobian + change
        return self.gaussian + self.values @ weights.T - self.f, jacobian - self.jacobian

    @cached_property
    def matrices(self) -> dict[str, Tensor]:
        """The matrix of the quadratic that each term is in the output weights, (d · FEATURES)²."""
        d, v, slopes, bends = self.f.shape[1], self.scaled, self.slopes, self.bends
        eye, rates = torch.eye(d, dtype=torch.float64), self.rates()

        def of_sum(gram: Tensor) -> Tensor:
            """The term depends on Σ_i weights_ij v_ji alone."""
            return torch.einsum("ji,jk,kl->ijlk", v, gram, v).reshape(2 * [d * FEATURES])

        return {
            "first": torch.kron(eye, self.values.T @ self.values) / DRAWS,
            "second": torch.kron(eye, slopes.T @ slopes * (v @ v.T)) / DRAWS,
            "trace": of_sum(slopes.T @ slopes) / DRAWS,
            "third": of_sum(bends.T @ bends * (v @ v.T)) / DRAWS,
            "rate": rates.T @ rates / DRAWS,
        }

    def rates(self) -> Tensor:
        """What each output weight adds to the rate, (DRAWS, d · FEATURES)."""
        of_trace = self.scaled.T * self.slopes[:, None, :]
        return (of_trace + self.f[:, :, None] * self.values[:, None, :]).flatten(1)

    def vectors(self, weights: Tensor) -> dict[str, Tensor]:
        """The vector of each quadratic, with δ and E of the given weights in the targets."""
        delta, error = self.field(weights)
        v, slopes, rest = self.scaled, self.slopes, self.f - self.gaussian
        square = delta.square().sum(1)
        missing = self.jacobian - self.gaussian_jacobian
        missing_trace = missing.diagonal(dim1=1, dim2=2).sum(1)
        second = missing + delta[:, :, None] * delta[:, None, :]
        excess = error.diagonal(dim1=1, dim2=2).sum(1) - square
        third = self.third + excess[:, None] * delta
        third = third + 2 * torch.einsum("bil,bl->bi", error, delta)
        rate = missing_trace + (self.f * rest).sum(1)
        sums = {
            "first": rest.T @ self.values,
            "second": torch.einsum("bij,bj->ij", second @ v.T, slopes),
            "trace": v.T * ((missing_trace + square) @ slopes),
            "third": v.T * (self.bends * (third @ v.T)).sum(0),
            "rate": rate @ self.rates(),
        }
        return {name: each.flatten() / DRAWS for name, each in sums.items()}

    def solution(self, weights: dict[str, float], held: Tensor) -> Tensor:
        """What minimises the first term plus the weighted others, `held` in the targets."""
        vectors, every = self.vectors(held), {"first": 1.0} | weights
        matrix = sum(weight * self.matrices[name] for name, weight in every.items())
        vector = sum(weight * vectors[name] for name, weight in every.items())
        ridge = RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
        return torch.linalg.solve(matrix + ridge, vector).reshape(held.shape)

    def solved(self, every: dict[str, dict[str, float]]) -> dict[str, Tensor]:
        """The output weights (d, FEATURES) that minimise each loss."""
        start = self.solution({}, torch.zeros(self.f.shape[1], FEATURES).double())
        found = {}
        for name, weights in every.items():
            found[name] = start
            for _ in range(ROUNDS if weights.keys() & {"second", "trace", "third"} else 1):
                found[name] = self.solution(weights, found[name])
        return found


def divergences(elements: int, seed: int) -> dict[str, tuple[float, float]]:
    """KL(q || p_ODE) of each loss, and the standard error of its difference to order one."""
    mixture, every = anisotropic(elements, 4), losses(elements)
    network = Features(mixture, seed)
    grid = torch.linspace(*SCHEDULE.log_sigma_hat_range, LEVELS, dtype=torch.float64).exp()
    levels = [
        Level(network, mixture, sigma, 100 * seed + i).solved(every)
        for i, sigma in enumerate(tqdm(grid, f"d = {elements}, levels", leave=False))
    ]
    generator = torch.Generator().manual_seed(seed)
    clean = mixture.sample(POINTS, generator)
    ends = torch.ones(POINTS).double(), grid[0].expand(POINTS)
    test = clean + grid[0] * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    log_q = mixture.log_density(test, *ends)
    model, values = hosm.ScoreModel(network, SCHEDULE), {}
    for name in tqdm(every, f"d = {elements}, likelihoods", leave=False):
        network.weights = torch.stack([level[name] for level in levels])
        solver = hosm.FixedGrid(data_mean=network.mean, data_std=network.std)
        options: dict[str, Any] = {"divergence": "exact", "batch_size": 500}
        ratio = log_q + hosm.ode_nll(model, test, solver=solver, **options).nll
        values[name] = ratio + torch.expm1(-ratio)
    base = values["order one"]
    return {
        name: (float(value.mean()), float((value - base).std() / POINTS**0.5))
        for name, value in values.items()
    }


def main() -> None:
    parser = experiment.parser(__doc__)
    parser.add_argument("--elements", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: results.Report = results.read(FILE).get("quadratic", {})
    elements, seeds = ([2], 1) if options.smoke else (options.elements, options.seeds)
    for d in elements:
        found = [divergences(d, seed) for seed in range(seeds)]
        rows = {name: [each[name] for each in found] for name in losses(d)}
        report[f"d = {d}"] = rows
        results.show(f"KL [nats] and error of the difference, by seed: d = {d}", rows)
        if not options.smoke:
            results.keep(FILE, {"quadratic": report})


if __name__ == "__main__":
    main()
