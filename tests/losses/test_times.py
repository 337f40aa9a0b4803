"""Learnt times: what they leave as it was, and what they learn."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

import hosm_losses as hosm
from hosm_losses.losses.times import BINS, FLOOR, Bins, _trained
from hosm_losses.losses.weighting import draw_time, time_factors
from tests.cases import MLP, MODULES, SCHEDULES, VP, OfX, assert_same, gradients

TABLES = {
    "ddpm": hosm.DiscreteSchedule.linear(),
    "cosine table": hosm.DiscreteSchedule.cosine(),
    "uneven": hosm.DiscreteSchedule([0.99, 0.98, 0.5, 0.45, 0.1, 0.001]),
}
CONTINUOUS = {name: each for name, each in SCHEDULES.items() if name != "discrete"}


def uneven(seed=0):
    """A sampler whose m differs by a factor of a hundred."""
    times = hosm.AdaptiveTimes()
    times.m.copy_(10 ** (2 * torch.rand(BINS, generator=torch.Generator().manual_seed(seed))))
    return times


def every_time(monkeypatch, schedule, weighting, count, times=None):
    """The times, spreads and factors that evenly spaced uniform numbers lead to."""
    times = times or uneven()
    middle = (torch.arange(count) + 0.5) / count
    monkeypatch.setattr(torch, "rand", lambda shape, **options: middle)
    model, x0 = hosm.ScoreModel(MLP(3), schedule, "v", time=1.0), torch.zeros(count, 3)
    t, spread = draw_time(model, x0, weighting, None, times)
    return model, t, spread, time_factors(model, x0, t, weighting, spread)


@pytest.mark.parametrize("weighting", ["noise", "native", "likelihood", torch.exp])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_means_of_the_terms_are_those_of_the_base(name, weighting, monkeypatch):
    """Midpoint sums over the uniform number, against sums over u with the base density."""
    schedule, count = CONTINUOUS[name], 200_000
    model, t, _, factors = every_time(monkeypatch, schedule, weighting, count)
    low, high = schedule.log_sigma_hat_range
    u = low + (high - low) * (torch.arange(count) + 0.5) / count
    base = schedule.time(u)
    spread = torch.tensor(high - low)
    expected = time_factors(model, torch.zeros(count, 3), base, weighting, spread)

    def value(t):
        return 0.3 + schedule.log_sigma_hat(t).sin()

    for found, wanted in zip(factors, expected, strict=True):
        torch.testing.assert_close(
            (found * value(t)).mean(), (wanted * value(base)).mean(), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("weighting", ["noise", "native", "likelihood", lambda t: t.double() + 1])
@pytest.mark.parametrize("name", TABLES)
def test_the_means_over_a_table_are_those_of_the_base(name, weighting, monkeypatch):
    schedule, count = TABLES[name], 2_000_000
    model, t, _, factors = every_time(monkeypatch, schedule, weighting, count)
    assert t.dtype == torch.int64
    index = torch.arange(len(schedule.alphas_cumprod))
    drawn = t.bincount(minlength=len(index)) / count
    assert (drawn > 0).all()  # no entry is lost
    width = Bins.of(schedule, torch.zeros(1), uniform=True).entries[0].diff()
    base = width if weighting == "likelihood" else torch.full_like(width, 1 / len(index))
    low, high = schedule.log_sigma_hat_range
    spread = torch.tensor(high - low) if weighting == "likelihood" else None
    x0 = torch.zeros(len(index), 3)
    expected = time_factors(model, x0, index, weighting, spread, from_schedule=spread is None)
    value = 0.3 + schedule.sigma(index)
    for found, wanted in zip(factors, expected, strict=True):
        wanted = (base * value * (1.0 if wanted is None else wanted)).sum()
        torch.testing.assert_close((found * value[t]).mean(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", ["noise", "likelihood"])
@pytest.mark.parametrize("name", [*CONTINUOUS, *TABLES])
def test_bins_are_drawn_with_their_probabilities(name, weighting, monkeypatch):
    """P_k = M_k (φ + (1 − φ) m_k/Σ M m), and the terms are reweighted by at most 1/φ."""
    schedule, count = (CONTINUOUS | TABLES)[name], 500_000
    times = uneven(1)
    _, t, _, _ = every_time(monkeypatch, schedule, weighting, count, times)
    low, high = schedule.log_sigma_hat_range
    u = (schedule.log_sigma_hat(t) - low) / (high - low)
    bins = (u * BINS).long().clamp(0, BINS - 1)
    shares = bins.bincount(minlength=BINS) / count
    masses = Bins.of(schedule, u, uniform=weighting == "likelihood").masses
    m = times.m.double()
    expected = masses * (FLOOR + (1 - FLOOR) * m / (masses * m).sum())
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=0, atol=1e-4)
    if weighting == "likelihood" and name in CONTINUOUS:
        torch.testing.assert_close(masses, torch.full_like(masses, 1 / BINS))


@pytest.mark.parametrize("name", [*CONTINUOUS, *TABLES])
def test_the_masses_are_those_of_the_schedules_own_draws(name):
    schedule = (CONTINUOUS | TABLES)[name]
    count, generator = 200_000, torch.Generator().manual_seed(0)
    t = schedule.sample_time(count, generator, dtype=torch.float64)
    low, high = schedule.log_sigma_hat_range
    bins = ((schedule.log_sigma_hat(t) - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    shares = bins.bincount(minlength=BINS) / count
    masses = Bins.of(schedule, shares, uniform=False).masses
    assert (abs(shares - masses) < 5 * (masses / count).sqrt() + 0.02 * masses + 1e-6).all()


def objective_of(order=1, sampler=None, network=None, **options):
    torch.manual_seed(0)
    network = MLP(3) if network is None else network
    times = hosm.AdaptiveTimes() if sampler is None else sampler
    return MODULES[order](hosm.ScoreModel(network, VP), time_sampler=times, **options)


def test_with_m_of_one_the_mean_is_the_base_and_given_times_have_no_factor():
    objective, x0 = objective_of(), torch.randn(5, 3)
    inputs = {"t": torch.rand(5), "noise": torch.randn(5, 3)}
    plain = hosm.first_order_dsm(objective.model, x0, **inputs)
    assert torch.equal(objective(x0, **inputs), plain)
    log_sigma_hat, density = objective.time_sampler.density(objective)
    low, high = VP.log_sigma_hat_range
    torch.testing.assert_close(density.sum() * (high - low) / BINS, torch.tensor(1.0))
    rate = VP.squared_diffusion(VP.time(log_sigma_hat))
    rate = rate / (2 * VP.sigma(VP.time(log_sigma_hat)).square())
    base = VP.time_density(VP.time(log_sigma_hat)) / rate
    torch.testing.assert_close(density, base, rtol=0.02, atol=1e-4)


def squared_gradients(objective, x0, rows, optimizer, **inputs):
    """What `learn` should see, from its definition: each row's loss alone, by backward."""
    sampler, seen = objective.time_sampler, {}
    update = type(sampler)._update

    def watch(self, places, squares):
        seen.update(places=places, squares=squares)
        update(self, places, squares)

    type(sampler)._update = watch
    try:
        sampler.learn(objective, x0, optimizer, rows=rows, **inputs)
    finally:
        type(sampler)._update = update
    return seen["places"], seen["squares"]


class Kept(nn.Module):
    """A network that keeps the x and t of its calls, in a form that vmap cannot batch."""

    def __init__(self, kept):
        super().__init__()
        self.inner, self.kept = MLP(3), kept

    def forward(self, x, t):
        self.kept.append(tuple(torch.tensor(each.detach().clone().numpy()) for each in (x, t)))
        return self.inner(x, t)


@pytest.mark.parametrize("weighting", ["noise", "native", "likelihood", hosm.EDMWeighting()])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("adam", [False, True])
def test_it_learns_from_the_gradient_of_each_samples_loss(adam, antithetic, weighting):
    """Order one, from the x and t that the network saw: ‖∇ ½…‖² by hand, in Adam's metric."""
    calls = []
    objective = objective_of(network=Kept(calls), antithetic=antithetic, weighting=weighting)
    model, x0 = objective.model, torch.randn(9, 3)
    optimizer = None
    if adam:
        optimizer = torch.optim.Adam(model.parameters(), eps=1e-3)
        objective(x0).backward()
        optimizer.step()
        calls.clear()
    places, squares = squared_gradients(objective, x0, 5, optimizer)
    assert [len(x) for x, _ in calls] == [2 if antithetic else 1] * 5
    low, high = VP.log_sigma_hat_range
    for (x, t), place, square in zip(list(calls), places, squares, strict=True):
        unit = (VP.log_sigma_hat(t[0]) - low) / (high - low)
        assert int(unit * BINS) == int(place)
        alpha, sigma = VP(t)
        # Which sample it is: the one whose noise is the same at both signs, or any for one call.
        best = None
        for own in x0:
            noise = (x - alpha[:, None] * own) / sigma[:, None]
            loss = (model.noise(x, t) - noise).square().sum(1).mean() / 3
            factor = {
                "noise": 1.0,
                "native": 1.0,
                "likelihood": 3 * (high - low),
            }.get(weighting) or float(1 + (sigma[0] / alpha[0] / 0.5) ** 2)
            found = 0.0
            for p, g in zip(model.parameters(), gradients(factor * loss, model), strict=True):
                scale = optimizer.state[p]["exp_avg_sq"].sqrt() + 1e-3 if adam else 1.0
                found = found + (g.square() / scale).sum()
            error = float(abs(found - square) / square)
            best = error if best is None else min(best, error)
        assert best < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"probes": hosm.Paired()}])
def test_single_rows_and_vmap_see_the_same_gradients(order, options, monkeypatch):
    if order == 1:
        options = {name: value for name, value in options.items() if name != "probes"}
    objective, x0 = objective_of(order, **options), torch.randn(12, 3)
    targets = hosm.TargetScores(-x0, averaged=hosm.AveragedTargets())
    results = []
    for largest in (10**6, 0):
        monkeypatch.setattr("hosm_losses.losses.times.SMALL", largest)
        generator = torch.Generator().manual_seed(4)
        inputs = {"targets": targets, "generator": generator}
        results.append(squared_gradients(objective, x0, 8, None, **inputs))
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[0][1].double(), results[1][1].double(), 1e-5)


def test_a_weighting_of_all_terms_multiplies_the_gradients():
    results = []
    for height in (1.0, 4.0):
        objective = objective_of(3, weighting=lambda t, height=height: torch.full_like(t, height))
        inputs = {"weights": (1, 1, 1, 1), "generator": torch.Generator().manual_seed(0)}
        results.append(squared_gradients(objective, torch.ones(6, 3), 6, None, **inputs)[1])
    assert_same(results[1], 16 * results[0], 1e-6)


def test_every_stratum_of_the_bins_that_have_mass_is_visited():
    """64 rows over 32 bins: two in each; over 26 that have an entry, at most four."""
    for schedule, most in ((VP, 2), (TABLES["cosine table"], 4)):
        objective = hosm.FirstOrderDSM(
            hosm.ScoreModel(MLP(3), schedule, time=1.0), time_sampler=hosm.AdaptiveTimes()
        )
        places, _ = squared_gradients(objective, torch.randn(100, 3), 64, None)
        masses = Bins.of(schedule, torch.zeros(1), uniform=False).masses
        counts = places.bincount(minlength=BINS)
        assert ((counts > 0) == (masses > 0)).all()
        assert counts.max() <= most


def test_the_running_mean_and_a_bin_without_a_row():
    times = hosm.AdaptiveTimes()
    times._update(torch.tensor([3, 3, 7]), torch.tensor([2.0, 4.0, 9.0]))
    expected = torch.ones(BINS)
    expected[3], expected[7] = (0.9 + 0.1 * 3 / 6) ** 0.5, (0.9 + 0.1 * 9 / 6) ** 0.5
    torch.testing.assert_close(times.m, expected.to(times.m))
    before = times.m.clone()
    with pytest.raises(ValueError, match="finite gradients; got NaN or infinite ones for 1 of 2"):
        times._update(torch.tensor([3, 4]), torch.tensor([1.0, torch.nan]))
    times._update(torch.tensor([3]), torch.tensor([0.0]))
    assert torch.equal(times.m, before)


class Stateful(nn.Module):
    """Dropout, batch norm, and parameters and a buffer that each call changes."""

    def __init__(self, checkpoint):
        super().__init__()
        layers = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.3)
        self.layers, self.last = nn.Sequential(*layers), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.checkpoint = checkpoint

    def body(self, x):
        self.calls += 1
        return self.layers(x)

    def forward(self, x):
        with torch.no_grad():
            self.last.weight.copy_(F.normalize(self.last.weight) + 0.1)
        body = checkpoint(self.body, x, use_reentrant=False) if self.checkpoint else self.body(x)
        return self.last(body)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("largest", [10**6, 0])
def test_learning_changes_nothing_but_m(largest, checkpointed, monkeypatch):
    monkeypatch.setattr("hosm_losses.losses.times.SMALL", largest)
    network = OfX(Stateful(checkpointed)).double()
    objective, x0 = objective_of(network=network), torch.randn(32, 3)
    optimizer = torch.optim.AdamW(objective.parameters())
    objective(x0).backward()
    optimizer.step()
    objective.eval().train()
    for part in network.network.layers[2::2]:
        part.eval()

    def state():
        own = {name: each for name, each in objective.state_dict().items() if "m" not in name[-1:]}
        grads = [p.grad for p in objective.parameters()]
        modes = [part.training for part in objective.modules()]
        return own, grads, modes, optimizer.state_dict(), torch.get_rng_state()

    before = copy.deepcopy(state())
    m = objective.time_sampler.m.clone()
    with torch.no_grad():
        objective.time_sampler.learn(objective, x0, optimizer)
    after = state()
    assert not torch.equal(objective.time_sampler.m, m)
    assert before[2] == after[2]
    for one, other in zip(
        torch.utils._pytree.tree_leaves(before),
        torch.utils._pytree.tree_leaves(after),
        strict=True,
    ):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class Storing(OfX):
    """Keeps tables that are made once, of x and not, by batch size too, and the latest x."""

    def forward(self, x, t):
        self.tables = getattr(self, "tables", {})
        for key, make in (("x", lambda: x.new_ones(3)), (len(x), lambda: torch.ones(3).cos())):
            self.tables[key] = self.tables[key] if key in self.tables else make()
        self.latest = x.detach() * 1
        return super().forward(x * self.tables["x"], t) * self.tables[len(x)]


@pytest.mark.parametrize("order", [1, 3])
def test_what_a_network_stores_in_its_forward_stays_usable(order):
    objective, x0 = objective_of(order, network=Storing(nn.Linear(3, 3))), torch.randn(8, 3)
    objective.time_sampler.learn(objective, x0)
    copied = copy.deepcopy(objective)
    torch.save(copied.model.network, io.BytesIO())
    assert torch.isfinite(copied(x0))


def test_samples_noise_and_masks_are_drawn_anew():
    """Every row of a batch may be chosen, and every row of a call has its own dropout mask."""
    calls, x0 = [], torch.tensor([[1.0], [1e4]]).repeat_interleave(4, 0).expand(8, 3)
    objective = objective_of(network=Kept(calls))
    for seed in range(8):
        torch.manual_seed(seed)
        objective.time_sampler.learn(objective, x0, rows=1)
    assert len({bool(x.abs().max() > 50) for x, _ in calls}) == 2
    assert len({float(t[0]) for _, t in calls}) == 8

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.dropout = nn.Parameter(torch.ones(())), nn.Dropout(0.5)

        def forward(self, x):
            return self.scale * self.dropout(torch.ones_like(x))

    objective = objective_of(network=OfX(Masked()))
    _, squares = squared_gradients(objective, torch.randn(40, 1), 40, None)
    assert 0 < int((squares[1:-1] == 0).sum()) < 38


def test_it_is_in_the_state_of_the_module_and_of_its_copies():
    objective = objective_of()
    assert "time_sampler.m" in objective.state_dict()
    copied = copy.deepcopy(objective)
    copied.time_sampler.m.fill_(2.0)
    objective.time_sampler = copied.time_sampler  # of which the loss draws from now on
    copied.time_sampler.m[0] = torch.nan
    with pytest.raises(ValueError, match=r"time_sampler.m: expected finite numbers"):
        objective(torch.randn(4, 3))
    objective.time_sampler = hosm.AdaptiveTimes()
    assert bool((objective.time_sampler.m == 1).all())
    assert "AdaptiveTimes(m from 1 to 1" in repr(objective)
    x0, generator = torch.randn(4, 3), torch.Generator()
    losses = [
        hosm.first_order_dsm(
            objective.model,
            x0,
            time_sampler=objective.time_sampler,
            generator=generator.manual_seed(0),
        ),
        objective(x0, generator=generator.manual_seed(0)),
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_m_keeps_its_precision_and_has_to_be_finite(bad):
    network, x0 = OfX(nn.Linear(3, 3)), torch.randn(8, 3, dtype=torch.float16)
    objective = objective_of(network=network).half()
    objective.time_sampler.learn(objective, x0)
    m = objective.time_sampler.m
    assert m.dtype == torch.float32
    assert torch.equal(objective.bfloat16().double().time_sampler.m, m)
    assert objective.to("meta").to_empty(device="cpu").time_sampler.m.dtype == torch.float32
    objective = objective_of()
    objective.time_sampler.m.fill_(bad)
    for call in (objective, partial(objective.time_sampler.learn, objective)):
        with pytest.raises(ValueError, match=r"time_sampler.m: .* Reset it: time_sampler.m.fill_"):
            call(x0.double())


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("other", [None, (torch.ones(3), 0), torch.ones(3, 1)])
def test_parameters_without_adams_state_get_the_mean_scale_of_the_others(kept, other):
    """As with Muon beside Adam, Adafactor, or a group that was added: none is left out."""
    objective = objective_of(network=OfX(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))))
    parameters = [*objective.parameters()]
    optimizer = torch.optim.SGD(parameters)
    eps = 1e-3 if other is None else 1e-8
    optimizer.param_groups[0]["eps"] = eps if other is None else (1e-30, 1e-3)
    for i, p in enumerate(parameters):
        if i < kept or other is not None:
            v = torch.full_like(p, (i + 1) ** 2) if i < kept else other
            optimizer.state[p]["exp_avg_sq"] = v
    sizes = torch.tensor([p.numel() for p in parameters[:kept]])
    mean = float((sizes * (torch.arange(kept) + 1 + eps)).sum() / sizes.sum())
    trained = _trained(objective, optimizer)
    assert [p for p, _ in trained] == parameters
    for i, (_, factor) in enumerate(trained):
        wanted = 1 / (i + 1 + eps) if i < kept else 1 / mean
        assert (factor is None) if not kept else factor.shape == parameters[i].shape
        assert not kept or float((factor - wanted).abs().max()) < 1e-6
    objective.time_sampler.learn(objective, torch.randn(8, 3), optimizer)


def test_a_network_behind_a_function_needs_the_optimizer():
    network = MLP(3)
    times = hosm.AdaptiveTimes()
    model = hosm.ScoreModel(lambda x, t: network(x, t), VP)
    objective = hosm.FirstOrderDSM(model, time_sampler=times)
    with pytest.raises(ValueError, match="behind a plain function, pass the optimizer"):
        times.learn(objective, torch.randn(8, 3))
    times.learn(objective, torch.randn(8, 3), torch.optim.SGD(network.parameters(), 0.1))
    assert bool((times.m != 1).any())
    others = torch.optim.SGD(MLP(3).parameters(), 0.1)
    with pytest.raises(ValueError, match="an optimizer that holds none of them"):
        hosm.AdaptiveTimes.learn(
            other := objective_of().time_sampler,
            objective_of(sampler=other),
            torch.randn(8, 3),
            others,
        )


def test_what_is_no_loss_of_this_sampler_is_refused():
    times, other = hosm.AdaptiveTimes(), objective_of()
    for wrong in (other, other.model, None):
        with pytest.raises(TypeError, match="whose time_sampler is this sampler"):
            times.learn(wrong, torch.randn(4, 3))
    fully_sharded = type("FSDPModule", (), {})
    part = type("Sharded", (MLP, fully_sharded), {})(3)
    objective = objective_of(sampler=times, network=part)
    with pytest.raises(TypeError, match="got a module sharded by FSDP"):
        times.learn(objective, torch.randn(4, 3))


def test_times_are_drawn_where_the_gradient_is_large():
    """A network whose parameters matter at σ̂ near 1 alone."""

    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, t):
            window = torch.exp(-4 * VP.log_sigma_hat(t).square())
            return self.layer(x) * window[:, None]

    objective = objective_of(network=Local())
    for _ in range(40):
        objective.time_sampler.learn(objective, torch.randn(256, 3))
    log_sigma_hat, density = objective.time_sampler.density(objective)
    assert abs(float(log_sigma_hat[density.argmax()])) < 1.0
    t, _ = draw_time(objective.model, torch.zeros(2000, 3), "noise", None, objective.time_sampler)
    own = VP.sample_time(2000)
    near = (VP.log_sigma_hat(t).abs() < 1).double().mean()
    assert near > 2 * (VP.log_sigma_hat(own).abs() < 1).double().mean()
