"""Averaged targets: the paper's with the own sample alone, and without noise with all of the data.

In between `test_random_options` compares them with sums over the reference, one by one.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import (
    FUNCTIONS,
    MLP,
    SCHEDULES,
    VP,
    assert_same,
    given,
    randomise,
    with_gradients,
)
from tests.oracles import PREDICTIONS_OF_ORACLE

D = 2
ATOMS = torch.tensor([[0.3, -1.0], [1.1, 0.4], [-0.8, 0.2]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
CASES = [
    ("vp", "epsilon"),
    ("ve", "score"),
    ("edm", "x0"),
    ("cosine", "v"),
]
PAIRED, EXACT = {"probes": hosm.Paired()}, {"probes": "exact"}
LOSSES = [
    (FUNCTIONS[1], {}),
    (FUNCTIONS[2], {"probes": 3, "engine": "reverse"}),
    *((FUNCTIONS[2], each) for each in (PAIRED, EXACT)),
    *((FUNCTIONS[3], each) for each in ({}, PAIRED, EXACT)),
]


class Exact(nn.Module):
    """The exact prediction for the atoms, plus `size` = 0 times what a small network adds."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.size, self.network = nn.Parameter(torch.tensor(0.0)), MLP(D)
        randomise(self.network)

    def forward(self, x, t):
        alpha, sigma = (part[:, None] for part in self.schedule(t))
        noise = (x[:, None] - alpha[:, None] * ATOMS) / sigma[:, None]
        p = (SHARES.log() - 0.5 * noise.square().sum(-1)).softmax(1)
        eps = (p[..., None] * noise).sum(1) + self.size * self.network(x, t)
        rates = [part[:, None] for part in self.schedule.rates(t)]
        return PREDICTIONS_OF_ORACLE[self.prediction](eps, x, alpha, sigma, rates)


def setting(batch=5):
    """A model, and x0, t and noise where the weights of a batch are neither 1 nor equal."""
    network = MLP(D)
    randomise(network)
    x0, inputs = given((batch, D))
    return hosm.ScoreModel(network, VP), x0, inputs | {"t": torch.linspace(0.2, 0.6, batch)}


def draws(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("loss", "options"), LOSSES)
def test_the_own_sample_alone_gives_the_papers_loss(loss, options):
    model, x0, inputs = setting()
    far = hosm.AveragedTargets(torch.full((3, D), 1e3))
    others = hosm.AveragedTargets(x0.flip(0), own=False, same=lambda _: torch.zeros(5, 5) > 0)
    found = [
        with_gradients(loss(model, x0, **inputs, **options, generator=draws(), **chosen), model)
        for chosen in ({}, {"targets": far}, {"targets": others})
    ]
    for each in found[1:]:
        assert all(map(torch.equal, each, found[0]))


@pytest.mark.parametrize(("loss", "options"), LOSSES)
@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_with_all_data_the_true_score_has_no_residual_and_is_stationary(
    name, prediction, loss, options
):
    """At every x and for every probe, where one noise has residuals that vanish in the mean."""
    schedule = SCHEDULES[name]
    model = hosm.ScoreModel(Exact(schedule, prediction), schedule, prediction)
    reference = ATOMS.repeat_interleave((10 * SHARES).round().long(), 0)
    span = min(schedule.t_max, 1.0) - schedule.t_min
    inputs = {"t": schedule.t_min + span * torch.tensor([0.3, 0.5, 0.7]), "generator": draws()}
    targets = hosm.AveragedTargets(reference, own=False)
    value = loss(model, ATOMS, **inputs, **options, targets=targets, reduction="none")
    plain = loss(model, ATOMS, **inputs, **options)
    assert float(value.detach().abs().max()) < 1e-12
    assert float(plain.detach()) > 1e-4
    (gradient,) = torch.autograd.grad(value.sum(), model.network.size)
    assert abs(float(gradient)) < 1e-12


def test_samples_of_other_conditions_are_left_out():
    model, x0, inputs = setting(6)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    model.call = lambda network, x, t, y: network(x + y[:, None], t)
    kwargs = {"model_kwargs": {"y": labels}}
    batch = hosm.AveragedTargets()
    for unaware in (batch, hosm.TargetScores(-x0, averaged=batch)):
        with pytest.raises(ValueError, match=r"targets: .*same=.*model_kwargs\['y'\].*Shared"):
            hosm.third_order_dsm(model, x0, **inputs, **kwargs, targets=unaware)
    same = hosm.AveragedTargets(same=lambda kwargs: kwargs["y"][:, None] == kwargs["y"])
    inputs |= {"probe": torch.randn(6, D), "reduction": "none"}
    found = hosm.third_order_dsm(model, x0, **inputs, **kwargs, targets=same)
    for label in (0, 1):
        rows = labels == label
        part = {k: each[rows] for k, each in inputs.items() if k != "reduction"}
        part |= {"model_kwargs": {"y": hosm.Shared(labels[rows])}, "reduction": "none"}
        alone = hosm.third_order_dsm(model, x0[rows], **part, targets=hosm.AveragedTargets())
        assert_same(alone, found[rows], 1e-12)


CHANGES = {
    "flipped": lambda x0: x0.flip(-1),
    "dequantized": lambda x0: x0 + (torch.rand_like(x0) - 0.5) / 128,
    "one of them": lambda x0: torch.cat([x0[:-1], -x0[-1:]]),
    "in the mask of none": lambda x0: x0,
}


@pytest.mark.parametrize("change", CHANGES)
def test_samples_outside_a_reference_that_should_contain_them_are_refused(change):
    """A network that knows the noise would have a loss of 3.53 where x0 was flipped."""
    reference = torch.rand(16, 1, 8, 8) * 2 - 1
    x0, noise, t = reference[:8], torch.randn(8, 1, 8, 8), torch.full((8,), 0.001)
    model = hosm.ScoreModel(lambda x, t: noise, VP)
    given = {"t": t, "noise": noise}
    exact = hosm.AveragedTargets(reference, own=False)
    assert float(hosm.first_order_dsm(model, x0, **given, targets=exact)) < 1e-12
    masked = change == "in the mask of none"
    others = ~torch.eye(8, 16, dtype=torch.bool) | (not masked)
    targets, changed = replace(exact, same=lambda kwargs: others), CHANGES[change](x0)
    hosm.first_order_dsm(model, changed, **given, targets=replace(targets, own=True))
    count = 1 if change == "one of them" else "[1-8]"
    refusal = rf"own=False.*; got {count} of 8 that it does not contain.*own=True"
    with pytest.raises(ValueError, match=refusal):
        hosm.first_order_dsm(model, changed, **given, targets=targets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 1e-3), (1e3, 1), (30, 1e3), (0, 1e6)])
def test_samples_of_the_reference_are_never_refused(dtype, offset, size):
    """At the least noise, where logits are differences of the largest numbers."""
    if dtype == torch.float16:
        size = min(size, 1e3)
    schedule = hosm.EDMSchedule()
    model = hosm.ScoreModel(lambda x, t: 0 * x, schedule)
    reference = (offset + size * torch.randn(200, 3, 16, 16)).to(dtype)
    targets = hosm.AveragedTargets(reference, own=False)
    t = torch.full((32,), schedule.t_min, dtype=torch.promote_types(dtype, torch.float32))
    assert hosm.first_order_dsm(model, reference[::7][:32], t=t[:29], targets=targets) > 0


def test_data_far_from_zero_lose_no_digits():
    """Against differences one by one, of data whose squares are 1e12 times those of distances'."""
    schedule = hosm.EDMSchedule()
    model = hosm.ScoreModel(lambda x, t: 0 * x, schedule)
    x0 = (1e3 + 0.0005 * torch.randn(40, 64, dtype=torch.float64)).float()
    noise, t = torch.randn(40, 64, dtype=torch.float32), torch.full((40,), 0.002).float()
    found = hosm.dsm_terms(model, x0, order=1, t=t, noise=noise, targets=hosm.AveragedTargets())
    apart = noise[:, None].double() + (x0[:, None].double() - x0) / schedule.sigma(t.double())[0]
    weights = (-apart.square().sum(-1) / 2).softmax(1)
    assert_same(found.first.double(), (weights[..., None] * apart).sum(1).square().mean(1), 1e-6)


class GaussianMoments(NamedTuple):
    """Those of ε given x, for data with the variance 0.3 in each direction."""

    weights: torch.Tensor  # of which only the size and the dtype count, (B, 1)
    mean: torch.Tensor  # E[ε | x] − ε, (B, d)
    variance: torch.Tensor  # (B, 1)

    def at(self, index):
        return GaussianMoments(*(part[index] for part in self))

    def along(self, v, ell, *, third):
        return self.variance * v, torch.zeros_like(v) if third else None


class OfGaussians(hosm.AveragedTargets):
    """Targets of the user's own."""

    def posterior(self, x0, noise, alpha, sigma, kwargs):
        alpha, sigma = alpha[:, None], sigma[:, None]
        x0 = x0.repeat(len(noise) // len(x0), 1)
        whole = 0.3 * alpha.square() + sigma.square()
        mean = sigma * (alpha * x0 + sigma * noise) / whole - noise
        return GaussianMoments(torch.ones_like(alpha), mean, 0.3 * alpha.square() / whole)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("loss", "options"), LOSSES)
def test_targets_of_ones_own_leave_no_noise_at_the_true_score(loss, options, antithetic):
    def network(x, t):
        alpha, sigma = (part[:, None] for part in VP(t))
        return sigma * x / (0.3 * alpha.square() + sigma.square())

    x0 = 0.3**0.5 * torch.randn(16, D)
    model = hosm.ScoreModel(network, VP)
    value = loss(model, x0, targets=OfGaussians(), antithetic=antithetic, **options)
    assert abs(float(value)) < 1e-20
    assert float(loss(model, x0, antithetic=antithetic, **options)) > 1e-3
