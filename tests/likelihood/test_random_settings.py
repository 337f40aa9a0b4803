"""Likelihoods under settings that are drawn together, against what is exactly known of them."""

import dataclasses
import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

import hosm_losses as hosm
from hosm_losses._checks import expand_right
from hosm_losses.likelihood import multistep
from hosm_losses.probes import DISTRIBUTIONS, Hutchinson
from tests.cases import MLP, PREDICTIONS, SCHEDULES, AttentionNet, ConvNet, assert_same, gradients
from tests.likelihood.problems import gaussian, marginals, total

pytestmark = pytest.mark.filterwarnings("ignore:schedule. expected")
PROBES = st.builds(hosm.Hutchinson, st.integers(1, 5), st.sampled_from(list(DISTRIBUTIONS)))
EXACT = "exact"
OWN = "a function of the user's"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise_of_probes(span, std, own, steps, batch_size, probes, generator):
    """What random probes add to the log-density of a Gaussian, and its standard error, by hand.

    The Jacobian of the noise is diagonal: a probe's form is a sum of squares times known shares.
    `own` is the std that the coordinates are told.
    """
    count, means, variances = probes.count, [], []
    for rows in std.split(batch_size or len(std)):

        def forms(share, rows=rows):
            """Those of fresh probes (K, n), less what they are in the mean."""
            v = Hutchinson(count, probes.distribution).draw(rows, generator)
            return torch.stack([total(each.square() * share - share) for each in v])

        if steps is None:  # the same probes along the whole path
            low, high = (rows.square() + math.exp(2 * u) for u in sorted(span))
            weights, seen = torch.ones(1, 1), forms((high / low).log() / 2)[None]
        else:
            ends = [475 / 1440, 1902 / 1440, 1104 / 1440, 1586 / 1440, 1413 / 1440]
            weights = torch.tensor([*ends, *[1.0] * (steps - 9), *ends[::-1]])[:, None] / steps
            centre = (own.square().mean().log() / 2).clamp(min(span), max(span))
            s = torch.linspace(0, 1, steps + 1)
            u, rates = multistep.mesh_points(span, s, centre)
            squares, rates = (2 * u).exp(), rates.abs()[:, None, None]
            seen = rates * torch.stack([forms(w / (rows.square() + w)) for w in squares])
        means.append((weights * seen.mean(1)).sum(0))
        if count > 1 or steps is None:
            variance = seen.var(1, correction=min(1, count - 1)) / count
        else:  # from three neighbours, of which the exact part is no line
            smooth = [total(w / (rows.square() + w) - w / (own**2 + w)) for w in squares]
            q = seen[:, 0] + rates[:, 0] * torch.stack(smooth)
            variance = (q[:-2] - 2 * q[1:-1] + q[2:]).square() / 6
            variance = torch.cat([variance[:1], variance, variance[-1:]])
        variances.append((weights**2 * variance).sum(0))
    return torch.cat(means), torch.cat(variances).sqrt()


def own_divergence(network):
    """Of a network that is linear in each element by itself: its slope is a difference."""

    def divergence(x, t, gain):
        value = network(x, t, gain)
        return value, total(network(x + 1, t, gain) - value)

    return divergence


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(SCHEDULES)),
    prediction=st.sampled_from(PREDICTIONS),
    shape=st.sampled_from([(3,), (), (2, 2)]),
    steps=st.sampled_from([24, 25, None]),
    divergence=st.sampled_from([EXACT, OWN]) | PROBES,
    batch_size=st.sampled_from([None, 2]),
    known=st.booleans(),
    own_prior=st.booleans(),
    enable_grad=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_gaussian_has_its_closed_form_to_its_latent_and_back(
    name, prediction, shape, steps, divergence, batch_size, known, own_prior, enable_grad, seed
):
    torch.manual_seed(seed)
    schedule, (mean, spread) = SCHEDULES[name], torch.rand(2, *shape) + 0.2
    inner = gaussian(schedule, mean, spread, prediction).network

    def network(x, t, gain):
        return inner(x, t / 4, gain)

    model = hosm.ScoreModel(network, schedule, prediction, time=4)
    gain = torch.ones(3) if known else 0.5 + torch.rand(3)
    std = spread * gain.reshape(3, *[1] * len(shape))
    start, end = marginals(schedule, mean, std)
    x = start.sample().requires_grad_(enable_grad)
    latent = end.mean + end.stddev / start.stddev * (x - start.mean)
    law = Normal(0.3, 1.7) if own_prior else Normal(0.0, schedule.prior_std)
    exact = total(start.log_prob(x) - end.log_prob(latent) + law.log_prob(latent))
    # In coordinates of its own moments Gaussian data does not move: any steps will do.
    moments = {"data_mean": mean.numpy(), "data_std": spread} if known else {"data_std": 0.4}
    tolerance = 1e-9 if known and steps else 2e-3
    solver = hosm.Adaptive(1e-4, **moments)
    if steps is not None:
        solver = hosm.FixedGrid(steps if known else 3 * steps, **moments)
    options = {"solver": solver, "divergence": divergence, "batch_size": batch_size}
    if divergence == OWN:
        divergence, options["divergence"] = EXACT, own_divergence(network)
    prior = (lambda latent: total(law.log_prob(latent))) if own_prior else None
    given = {**options, "log_prior": prior, "model_kwargs": {"gain": gain}}
    given["enable_grad"] = enable_grad

    def check(found, span, widening):
        noise = error = torch.zeros(3)
        if divergence != EXACT:
            own = torch.as_tensor(moments["data_std"]).expand(shape)
            count = None if found.steps is None else int(found.steps[0])
            how = count, batch_size, divergence
            noise, error = noise_of_probes(span, std, own, *how, seeded(seed))
        assert_same(found.nll, -exact - noise, tolerance)
        assert not bool(found.failed.any())
        if divergence != EXACT and divergence.count < 4 and not steps:
            assert found.standard_error is None
        else:
            assert_same(found.standard_error, widening * error, tolerance)

    span = schedule.log_sigma_hat_range
    found = hosm.ode_nll(model, x, generator=seeded(seed), **given)
    assert_same(found.latent, latent, tolerance)
    check(found, span, found.widening)
    if divergence == EXACT and not own_prior:
        assert bool(((found.nll + exact).abs() <= found.solver_error + 1e-9).all())
    if enable_grad:
        assert_same(gradients(found.nll.sum(), [x]), gradients(-exact.sum(), [x]), tolerance)
    drawn = hosm.ode_sample(model, latent, generator=seeded(seed), **given)
    assert_same(drawn.x, x, tolerance)
    check(drawn, span[::-1], found.widening)
    if enable_grad:
        slopes = gradients(drawn.nll.sum(), [x])  # through the latent, which was made of x
        assert_same(slopes, gradients(-exact.sum(), [x]), tolerance)


NETWORKS = {
    "mlp": (lambda: MLP(3), (3,)),
    "conv": (ConvNet, (2, 2, 1)),
    "attention": (lambda: AttentionNet(2), (2, 2)),
}
SOLVERS = [
    partial(hosm.FixedGrid, 16, companion=True),
    partial(hosm.FixedGrid, np.int64(9)),
    partial(hosm.FixedGrid, 4),
    partial(hosm.Adaptive, np.float32(10)),
    partial(hosm.ToTolerance, 1e9, companion=False),
    2,  # samples of the bound
    np.int64(24),
]


@st.composite
def combined(draw):
    """Options of a likelihood that go together; what it refuses is not among them."""
    solver, images = draw(st.sampled_from(SOLVERS)), draw(st.booleans())
    options = {"dequantization": hosm.Uniform()} if images else {}
    options |= {"batch_size": draw(st.sampled_from([None, np.int64(2)]))}
    options["data_mean"] = draw(st.sampled_from([0.0, None]))  # a tensor
    options["log_prior"] = draw(st.sampled_from([None, lambda z: -total(z.abs())]))
    if not callable(solver):
        return options | {"samples": solver}
    options |= {"solver": solver, "divergence": draw(st.just(EXACT) | PROBES)}
    options |= {name: draw(st.booleans()) for name in ("clean", "enable_grad")}
    if images and options["divergence"] == EXACT:
        options["dequantization"] = hosm.Uniform(draw(st.sampled_from([1, np.int64(2)])))
    return options


def conditions(labels):
    """Those of samples, and a table that is as long as the whole batch."""
    return {"label": labels, "table": hosm.Shared(torch.tensor([0.1, 0.0, -0.2]))}


def noised(model, x, labels, generator):
    """Points at t_min, and what the bound for clean data adds to their nll."""
    t = torch.full((len(x),), model.schedule.t_min)
    alpha, sigma = model.schedule(t[0])
    noise = torch.randn(x.shape, generator=generator)
    points = alpha * x + sigma * noise
    error = model.noise(points, t, label=labels, table=conditions(labels)["table"].value) - noise
    return points, total(error**2 - noise**2) / 2 - x[0].numel() * alpha.log()


def moments(options):
    return {"data_mean": options["solver"].data_mean} if "solver" in options else {}


def one_after_the_other(function, model, x, label, options, generator):
    """The same from calls without batch_size, dequantization, clean and companion."""
    options, draws = dict(options), []
    names = ("batch_size", "dequantization", "clean")
    size, images, clean = (options.pop(name, None) for name in names)
    size, count = int(size or len(x)), 1 if images is None else images.draws
    if options.get("solver") == hosm.FixedGrid(16, companion=True, **moments(options)):
        options["solver"] = hosm.FixedGrid(16, **moments(options))
    for _ in range(count):
        points, parts = x, []
        if images is not None:
            points = -1 + (x + torch.rand(x.shape, generator=generator)) / 128
        for part, labels in zip(points.split(size), label.split(size), strict=True):
            part, correction = noised(model, part, labels, generator) if clean else (part, 0)
            options |= {"model_kwargs": conditions(labels), "generator": generator}
            found = function(model, part, **options)
            nll, nfe = found.nll + correction, found.nfe + bool(clean)
            parts.append(dataclasses.replace(found, nll=nll, nfe=nfe))
        draws.append(hosm.NLLResult.cat(parts))
    densities = torch.stack([-each.nll for each in draws])
    weights = densities.detach().softmax(0) if count > 1 else 1
    bound = draws[0].products is None
    return dataclasses.replace(
        draws[0],
        nll=math.log(count) - densities.logsumexp(0),
        nfe=sum(each.nfe for each in draws),
        products=None if bound else sum(each.products for each in draws),
        failed=torch.stack([each.failed for each in draws]).any(0),
        solver_error=(weights * torch.stack([each.solver_error for each in draws])).sum(0),
        quantization=None if images is None else (256, -1.0, 1.0),
    )


class Watched(nn.Module):
    """A network times a number of each sample, and the times that it is asked for."""

    def __init__(self, network):
        super().__init__()
        self.network, self.times = network, []

    def forward(self, x, t, label, table):
        self.times.append(t)
        return expand_right(label, x) * self.network(x, t) + table.sum()


def through_a_file(result):
    file = io.BytesIO()
    torch.save(result.to_dict(), file)
    file.seek(0)
    return hosm.NLLResult.from_dict(torch.load(file, weights_only=True))


@given(
    options=combined(),
    network=st.sampled_from(list(NETWORKS)),
    schedule=st.sampled_from(list(SCHEDULES)),
    mode=st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]),
    seed=st.integers(0, 99),
)
def test_a_call_is_put_together_from_simpler_ones(options, network, schedule, mode, seed):
    torch.manual_seed(seed)
    schedule, (make, shape) = SCHEDULES[schedule], NETWORKS[network]
    model, function = hosm.ScoreModel(Watched(make()), schedule), hosm.ode_nll
    if "samples" in options:
        function = hosm.variational_nll
    x, label = torch.randn(3, *shape), (0.4 * torch.rand(3)).requires_grad_()
    leaves, images = [label, *model.parameters()], "dequantization" in options
    if images:
        x = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    else:
        leaves.append(x.requires_grad_())
    with mode():
        mean = options.pop("data_mean")
        mean = {"data_mean": torch.randn(shape) if mean is None else mean}
        options |= {"solver": options["solver"](**mean)} if "solver" in options else mean
    state, copy = torch.get_rng_state(), x.detach().clone()
    with torch.enable_grad() if options.get("enable_grad") else mode():
        given = {"model_kwargs": conditions(label), "generator": seeded(seed)}
        found = function(model, x, **given, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copy)
    times = torch.cat(model.network.times)
    assert bool(((times >= schedule.t_min) & (times <= schedule.t_max)).all())
    assert len(times) == int(found.nfe.sum())
    expected = one_after_the_other(function, model, x, label, options, seeded(seed))
    if getattr(options.get("solver"), "companion", False):
        draws = options["dequantization"].draws if images else 1
        middle = int(expected.nfe[0]) > 20 * draws  # a path starts there by Runge-Kutta steps
        extra = draws * (10 + 6 * middle)
        # Of its own is the error that it claims, by which a sample may fail.
        changes = {"solver_error": found.solver_error, "failed": found.failed}
        changes["nll"] = expected.nll.masked_fill(found.failed, math.nan)
        changes["products"] = expected.products // 18 * 28  # nodes, and with the companion's
        expected = dataclasses.replace(expected, nfe=expected.nfe + extra, **changes)
    close = partial(torch.testing.assert_close, equal_nan=True)
    close(vars(found), vars(expected), rtol=1e-8, atol=1e-8)
    assert not found.solver_error.requires_grad
    assert found.nll.requires_grad == options.get("enable_grad", False)
    if found.nll.requires_grad:
        good = ~found.failed
        mine, theirs = (gradients(each.nll[good].sum(), leaves) for each in (found, expected))
        assert_same(mine, theirs, 1e-7)
    bits = found.nll / (x[0].numel() * math.log(2)) + 7 * images
    close(found.bits_per_dim(), bits)
    close(vars(through_a_file(found)), vars(found), rtol=0, atol=0)
