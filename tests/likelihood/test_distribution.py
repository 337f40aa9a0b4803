"""`ODEDistribution`: densities, samples and gradients against closed forms."""

import math
import re

import pytest
import torch
from torch import nn
from torch.distributions import Distribution, Independent, Normal

import hosm_losses as hosm
from tests.oracles import anisotropic, mixture_noise

SCHEDULE = hosm.VESchedule(sigma_max=200.0)
GRID = hosm.FixedGrid(data_std=1.0)


class Shifted(nn.Module):
    """The exact noise of N(mean + offset, std²) for a mean of each sample."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.25))

    def forward(self, x, t, mean=None, std=None, table=None):
        mean = torch.zeros(len(x), x.shape[1]) if mean is None else mean
        std = torch.ones(2) if std is None else std
        assert mean.shape == x.shape
        assert std.shape == (2,)
        assert table is None or table.shape == (6, 3)
        sigma = SCHEDULE.sigma(t)[:, None]
        return sigma * (x - mean - self.offset) / (std**2 + sigma**2)


def distribution(**options):
    """That of the closed form, in two dimensions."""
    return hosm.ODEDistribution(hosm.ScoreModel(Shifted(), SCHEDULE), (2,), solver=GRID, **options)


SHARED = {"std": hosm.Shared(torch.ones(2)), "table": hosm.Shared(torch.zeros(6, 3))}


def exact(mean=0.0, std=1.0):
    """The density at t_min, of what begins at the prior: a Gaussian, a little narrower."""
    low, high = SCHEDULE.log_sigma_hat_range
    shrink = ((std**2 + math.exp(2 * low)) / (std**2 + math.exp(2 * high))) ** 0.5
    return Normal(mean + 0.25 - shrink * (mean + 0.25), shrink * math.exp(high))


def test_it_is_a_distribution_with_the_density_of_ode_nll():
    q = distribution()
    assert isinstance(q, Distribution)
    assert (q.batch_shape, q.event_shape, q.has_rsample) == ((), (2,), True)
    x = q.sample((3, 4))
    assert x.shape == (3, 4, 2)
    found = q.log_prob(x)
    assert not x.requires_grad
    assert found.requires_grad
    nll = hosm.ode_nll(q.model, x.reshape(12, 2), solver=GRID, divergence="exact").nll
    torch.testing.assert_close(found.detach(), -nll.reshape(3, 4), rtol=0, atol=1e-12)
    expected = exact().log_prob(x).sum(-1)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-4)
    assert q.log_prob(x[0, 0]).shape == q.sample().shape[:-1] == ()
    assert torch.equal(q.log_prob(x), q.log_prob(x))
    Independent(
        hosm.ODEDistribution(hosm.ScoreModel(lambda x, t: x, SCHEDULE), (2,), batch_shape=(3,)), 1
    )


def test_one_call_takes_observations_and_draws():
    """M = 6 conditions, with tensors that all share and that are as long as a batch."""
    mean = torch.randn(6, 2)
    q = distribution(model_kwargs={"mean": mean} | SHARED, batch_shape=(6,), batch_size=5)
    with torch.no_grad():
        x, log_prob = q.rsample_and_log_prob((3,))
        assert (x.shape, log_prob.shape) == ((3, 6, 2), (3, 6))
        expected = exact(mean).log_prob(x).sum(-1)
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(q.log_prob(x), expected, rtol=0, atol=1e-4)
        # One value for all, and one batch alone, whose length is that of the table.
        point = torch.tensor([0.5, -1.0])
        expected = exact(mean).log_prob(point).sum(-1)
        torch.testing.assert_close(q.log_prob(point), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(q.log_prob(point[None]), expected, rtol=0, atol=1e-4)


def test_expanded_distributions_are_those_of_expanded_conditions():
    mean = torch.randn(3, 2)
    q = distribution(model_kwargs={"mean": mean} | SHARED, batch_shape=(3,))
    wide, x = q.expand((4, 3)), torch.randn(4, 3, 2)
    with torch.no_grad():
        expected = exact(mean).log_prob(x).sum(-1)
        torch.testing.assert_close(wide.log_prob(x), expected, rtol=0, atol=1e-4)
        assert wide.sample((2,)).shape == (2, 4, 3, 2)
        alone = distribution(model_kwargs={"mean": mean[:1]}, batch_shape=(1,)).expand([5])
        point = torch.zeros(2)
        expected = exact(mean[0]).log_prob(point).sum(-1).expand(5)
        torch.testing.assert_close(alone.log_prob(point), expected, rtol=0, atol=1e-4)
    assert q.batch_shape == (3,)
    assert "batch_shape=(4, 3)" in repr(wide)
    assert Independent(q, 1).expand((7,)).batch_shape == (7,)
    for sizes in ((4,), (), (3, 1)):
        with pytest.raises(RuntimeError, match="expand"):
            q.expand(sizes)


def test_conditions_come_in_the_dtype_of_x():
    class Float32(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, dtype=torch.float32)

        def forward(self, x, t, mean, label, table):
            assert (mean.dtype, table.dtype, label.dtype) == (x.dtype, x.dtype, torch.int64)
            return 0 * self.layer(torch.cat([mean, x])[: len(x)])

    model = hosm.ScoreModel(Float32(), SCHEDULE)
    kwargs = {
        "mean": torch.zeros(3, 2, dtype=torch.float64),
        "label": torch.zeros(3, dtype=torch.int64),
        "table": hosm.Shared(torch.zeros(2, dtype=torch.float64)),
    }
    q = hosm.ODEDistribution(model, (2,), solver=GRID, model_kwargs=kwargs, batch_shape=(3,))
    assert q.sample().dtype == torch.float32
    assert q.log_prob(torch.zeros(2, dtype=torch.float32)).shape == (3,)


def test_the_entropy_is_estimated_from_samples():
    q = hosm.ODEDistribution(hosm.ScoreModel(Shifted(), SCHEDULE), (2,), solver=GRID)
    with pytest.raises(NotImplementedError):
        q.entropy()
    with torch.no_grad():
        log_prob = q.rsample_and_log_prob((400,))[1]
    error = float(log_prob.std()) / 400**0.5
    exactly = float(exact().entropy()) * 2
    assert abs(float(-log_prob.mean()) - exactly) < 5 * error


def test_a_condition_of_one_distribution_belongs_to_each_sample():
    mean = torch.tensor([1.0, -1.0])
    q = distribution(model_kwargs={"mean": mean} | SHARED)
    x = torch.randn(2, 2)  # as many as the condition is long
    with torch.no_grad():
        expected = exact(mean).log_prob(x).sum(-1)
        torch.testing.assert_close(q.log_prob(x), expected, rtol=0, atol=1e-4)


def test_gradients_follow_the_mode_and_are_those_of_the_closed_form():
    model = hosm.ScoreModel(Shifted(), SCHEDULE)
    offset, q = model.network.offset, hosm.ODEDistribution(model, (2,), solver=GRID)
    torch.manual_seed(1)
    x, _ = q.rsample_and_log_prob((5,))
    torch.manual_seed(1)
    same = q.rsample((5,))
    torch.testing.assert_close(same, x, rtol=0, atol=1e-12)
    # x = (1 − s) offset + s z, and log q(x) of the same z does not depend on the offset.
    low, high = SCHEDULE.log_sigma_hat_range
    shrink = ((1 + math.exp(2 * low)) / (1 + math.exp(2 * high))) ** 0.5
    (moved,) = torch.autograd.grad(same.sum(), offset)
    assert float(moved) == pytest.approx(10 * (1 - shrink), abs=1e-4)
    (moved,) = torch.autograd.grad(q.log_prob(q.rsample((5,))).sum(), offset)
    assert float(moved) == pytest.approx(0, abs=1e-4)
    point = torch.randn(5, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(q.log_prob(point).sum(), point)
    expected = torch.autograd.grad(exact().log_prob(point).sum(), point)[0]
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        assert not q.log_prob(point).requires_grad
        assert not q.rsample((2,)).requires_grad
    assert not q.sample((2,)).requires_grad


def test_importance_sampling_with_the_density_apart_from_the_samples():
    mixture, schedule = anisotropic(4, count=2), hosm.VPSchedule()
    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    q = hosm.ODEDistribution(model, (4,), solver=hosm.FixedGrid(companion=True), batch_size=500)
    with torch.no_grad():
        x = q.sample((1000,))
        alpha, sigma = schedule(torch.full((1000,), schedule.t_min))
        log_w = mixture.log_density(x, alpha, sigma) + math.log(3) - q.log_prob(x)
    w = log_w.exp()
    assert abs(float(w.mean()) - 3) < 5 * float(w.std()) / 1000**0.5
    assert float(w.sum() ** 2 / w.square().sum()) > 900


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"divergence": None}, TypeError, "divergence: "),
        (
            {"model_kwargs": {"mean": torch.ones(3, 2)}, "batch_shape": (6,)},
            ValueError,
            r"model_kwargs\['mean'\]: .*\(6,\).*Shared",
        ),
        ({"batch_shape": 6}, TypeError, r"batch_shape: expected a shape .* got 6"),
    ],
)
def test_what_it_cannot_take_is_an_error(options, error, told):
    with pytest.raises(error, match=told):
        distribution(**options)


@pytest.mark.parametrize("shape", [(3, 2), ()])
def test_a_missing_batch_shape_is_named_where_the_network_fails(shape):
    model = hosm.ScoreModel(lambda x, t, c: torch.cat([x, c], 1)[:, :2], SCHEDULE)
    q = hosm.ODEDistribution(model, (2,), model_kwargs={"c": torch.zeros(shape)})
    for call in (q.sample, lambda: q.log_prob(torch.zeros(3, 2))):
        with pytest.raises((RuntimeError, IndexError)) as caught:
            call()
        notes = "".join(getattr(caught.value, "__notes__", ()))
        named = re.search(r"batch_shape is .*'c'\] \(3, 2\).* set batch_shape=\(3,\)", notes)
        assert named if shape else "batch_shape" not in notes


def test_a_failed_sample_and_another_shape_raise():
    bad = hosm.ODEDistribution(hosm.ScoreModel(lambda x, t: x / 0, SCHEDULE), (2,), solver=GRID)
    for call in (bad.sample, bad.rsample_and_log_prob, lambda: bad.log_prob(torch.zeros(2))):
        with pytest.raises(ValueError, match=r"distribution: .* Row 0: the network"):
            call()
    q = distribution()
    with pytest.raises(ValueError, match="event_shape"):
        q.log_prob(torch.zeros(3))
