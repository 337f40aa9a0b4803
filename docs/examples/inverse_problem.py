"""A linear inverse problem with a known posterior: y = A x + noise, with x from six Gaussians.

A conditional network is trained with order one, and then with either order one or order two for
the same processor time. KL is from the posterior p(x | y) to the density of the ODE, averaged over
24 observations. The variances are the posterior variances of clean x, given a noisy x and y.

    python docs/examples/inverse_problem.py [--seconds 20]
"""

import argparse
import copy
import math

import checkerboard
import torch
from mixture_1d import waves
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import hosm_losses as hosm

SCHEDULE, STD, NOISE = hosm.VESchedule(sigma_max=20.0), 0.25, 0.3
ANGLES = math.pi / 3 * torch.arange(6)
COUNT, LOSSES = 24, {"order one": hosm.FirstOrderDSM, "then order two": hosm.SecondOrderDSM}
CENTRES, A = torch.stack([ANGLES.cos(), ANGLES.sin()], 1), torch.tensor([[0.8, 0.6]])


class Network(nn.Module):
    """An MLP for ε̂(x, t, y)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (2 + 1 + 9, 96), (96, 96), (96, 96), (96, 2)
        layers = [part for pair in sizes for part in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise in x (B, 2) at t (B,) for y (B, 1)."""
        sigma = SCHEDULE.sigma(t)[:, None]
        size = (0.5 + sigma**2).sqrt()
        inputs = torch.cat([x / size, y, waves(sigma.log() / 4, 4)], 1)
        return sigma / size**2 * x + self.layers(inputs)


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Draw pairs of x (count, 2) and y (count, 1)."""
    x = CENTRES[torch.randint(6, (count,))] + STD * torch.randn(count, 2)
    return x, x @ A.T + NOISE * torch.randn(count, 1)


def given(prior: MixtureSameFamily, rows: Tensor, noise: Tensor, y: Tensor) -> MixtureSameFamily:
    """Return the posterior of x for a mixture prior (M,) and data y = rows x + noise, (M, n)."""
    parts = prior.component_distribution
    covariance = rows @ parts.covariance_matrix @ rows.mT + noise.square() * torch.eye(len(rows))
    logits = prior.mixture_distribution.logits
    seen = MultivariateNormal(parts.loc @ rows.mT, covariance)
    gain = parts.covariance_matrix @ rows.mT @ covariance.inverse()
    loc = parts.loc + (gain @ (y.unsqueeze(-2) - seen.loc)[..., None])[..., 0]
    covariance = parts.covariance_matrix - gain @ rows @ parts.covariance_matrix
    mixture = Categorical(logits=logits + seen.log_prob(y.unsqueeze(-2)))
    return MixtureSameFamily(mixture, MultivariateNormal(loc, (covariance + covariance.mT) / 2))


def train(kind: type, model: hosm.ScoreModel, seconds: float, rate: float) -> str:
    """Train with a loss; return the number of steps and the time taken."""
    objective = kind(model)

    def loss() -> Tensor:
        x, y = draw(256)
        return objective(x, model_kwargs={"y": y})

    return checkerboard.train(model, loss, seconds=seconds, rate=rate)


def main() -> None:
    """Train with both losses, and compare both models with the exact posterior."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of the second training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = MultivariateNormal(CENTRES.expand(COUNT, 6, 2), STD**2 * torch.eye(2))
    prior, y = MixtureSameFamily(Categorical(torch.ones(COUNT, 6)), parts), draw(COUNT)[1]
    exact = given(prior, A, torch.tensor(NOISE), y)
    x, sigma = exact.sample((20,)), torch.tensor(0.3)
    noised = x + sigma * torch.randn(x.shape)
    variance = given(exact.expand((20, COUNT)), torch.eye(2), sigma, noised).variance.flatten(0, 1)
    at_noised = noised.flatten(0, 1), SCHEDULE.time(sigma.log()).expand(20 * COUNT)
    first = hosm.ScoreModel(Network(), SCHEDULE)
    train(hosm.FirstOrderDSM, first, options.seconds, rate=2e-3)
    for name, kind in LOSSES.items():
        model = copy.deepcopy(first)
        cost = train(kind, model, options.seconds, rate=3e-4)
        q = hosm.ODEDistribution(model, (2,), model_kwargs={"y": y}, batch_shape=(COUNT,))
        with torch.no_grad():
            ratio = exact.log_prob(x) - q.log_prob(x)
        denoised = hosm.denoising_posterior(model, *at_noised, model_kwargs={"y": y.repeat(20, 1)})
        found = denoised.covariance.diagonal()
        off = (found - variance).norm() / variance.norm()
        kl = (ratio + (-ratio).exp() - 1).mean(0)  # less noisy than the mean of the ratio
        error = kl.std() / COUNT**0.5
        print(f"{name}, {cost}: KL {kl.mean():.4f} ± {error:.4f} nats, variances off by {off:.1%}")


if __name__ == "__main__":
    main()
