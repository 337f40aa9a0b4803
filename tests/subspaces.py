"""A model on a subspace, and the same one in coordinates of the subspace.

x = y Qᵀ with orthonormal columns Q. The network of x returns what that of y returns, carried over
by Q, and junk at right angles to the subspace; outside of it the network depends on x otherwise.
"""

import math

import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.likelihood import divergence
from tests.cases import SCHEDULES

PARTICLES = (3, 2)  # their number and dimensions
CASES = [  # of a schedule and a prediction
    ("vp", "epsilon"),
    ("ve", "score"),
    ("flow", "velocity"),
    ("vp", "v"),
    ("flow", "x0"),
    ("edm", "x0"),
]


def centred(x):
    """The projection of particles (n, 3, 2) that takes their centre of mass away."""
    return x - x.mean(1, keepdim=True)


def masked(x):
    """The projection of padded samples (n, 3, 2), whose last element is no data."""
    mask = torch.ones(PARTICLES, dtype=x.dtype, device=x.device)
    mask[2, 1] = 0
    return x * mask


def basis(project, shape):
    """Orthonormal columns Q (d, d − k) of the subspace of a projection."""
    d = math.prod(shape)
    matrix = project(torch.eye(d, dtype=torch.float64).reshape(d, *shape)).reshape(d, d)
    values, vectors = torch.linalg.eigh(matrix)
    return vectors[:, values > 0.5]


class Inside(nn.Module):
    """A smooth network of y (B, r), near the exact one for normal data, in any form."""

    def __init__(self, r, schedule, prediction, width=7):
        super().__init__()
        torch.manual_seed(0)
        self.schedule, self.prediction = schedule, prediction
        self.first, self.last = nn.Linear(r, width), nn.Linear(width, r)
        self.double()

    def forward(self, y, t):
        alpha, sigma = (part[:, None] for part in self.schedule(t))
        variance = 0.3 * alpha**2 + sigma**2
        bent = self.last(torch.tanh(self.first(y / variance.sqrt())))
        eps = sigma * (y / variance + 0.3 * bent / variance.sqrt())
        x0 = (y - sigma * eps) / alpha
        if self.prediction == "velocity":
            rates = (part[:, None] for part in self.schedule.rates(t))
            return sum(rate * part for rate, part in zip(rates, (x0, eps), strict=True))
        forms = {"epsilon": eps, "score": -eps / sigma, "v": alpha * eps - sigma * x0}
        return forms.get(self.prediction, x0)


class Outside(nn.Module):
    """The same network of x (B, *), with junk at right angles."""

    def __init__(self, inside, Q, project):
        super().__init__()
        self.inside, self.Q, self.project = inside, Q, project

    def forward(self, x, t):
        away = x - self.project(x)
        slopes = torch.arange(1.0, 1 + x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
        y = (x + torch.sin(away).sum(1, keepdim=True) * slopes).flatten(1) @ self.Q
        junk = torch.cos(x + 1).sum(1, keepdim=True) + x.square()
        value = (self.inside(y, t) @ self.Q.T).reshape(x.shape)
        return value + 3 * away + junk - self.project(junk)


def pair(schedule="vp", prediction="epsilon", project=centred, shape=PARTICLES, **options):
    """The model on the subspace, that in its coordinates, and Q."""
    Q = basis(project, shape)
    schedule = SCHEDULES[schedule]
    inside = Inside(Q.shape[1], schedule, prediction)
    whole = Outside(inside, Q, project)
    on_subspace = hosm.ScoreModel(whole, schedule, prediction, subspace=project, **options)
    return on_subspace, hosm.ScoreModel(inside, schedule, prediction, **options), Q


class Draws:
    """Normal draws and probes of a first call, which a second one has in the coordinates of Q."""

    def __init__(self, monkeypatch, Q):
        self.Q, self.drawn, self.is_first = Q, [], True
        self.randn, self.probes = torch.randn, divergence.draw_probes
        monkeypatch.setattr(torch, "randn", self.draw)
        monkeypatch.setattr(divergence, "draw_probes", self.draw_probes)

    def _next(self, make):
        if self.is_first:
            self.drawn.append(make(torch.Generator().manual_seed(len(self.drawn))))
            return self.drawn[-1]
        return self.drawn.pop(0).flatten(-len(PARTICLES)) @ self.Q

    def draw(self, *shape, **_):
        shape = shape[0] if len(shape) == 1 else shape
        return self._next(lambda rng: self.randn(shape, generator=rng, dtype=torch.float64))

    def draw_probes(self, like, count, distribution, _):
        return self._next(lambda rng: self.probes(like, count, distribution, rng))

    def both(self, first, second):
        """The results of both calls."""
        torch.manual_seed(0)
        result = first()
        self.is_first = False
        torch.manual_seed(0)
        results = result, second()
        assert not self.drawn
        self.is_first = True
        return results
