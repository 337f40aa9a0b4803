"""Importance weights: every number against a direct computation or a closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, StudentT

import hosm_losses as hosm
from hosm_losses.likelihood.result import NLLResult
from tests.oracles import anisotropic, mixture_noise


def drawn(nll, x=None, *, standard_error=0.0, failed=(), solver_error=0.0, widening=1.0):
    """A SampleResult with these numbers, and NaN where a sample failed."""
    nll = torch.as_tensor(nll, dtype=torch.float64)
    bad = torch.zeros(len(nll), dtype=torch.bool)
    bad[list(failed)] = True
    x = torch.arange(len(nll)).double()[:, None] if x is None else x
    numbers = [
        torch.where(bad, math.nan, torch.zeros_like(nll) + each)
        for each in (nll, standard_error, solver_error)
    ]
    return hosm.SampleResult(
        x=x,
        latent=x,
        nll=numbers[0],
        nfe=torch.ones(len(nll)),
        standard_error=numbers[1],
        solver_error=numbers[2],
        failed=bad,
        widening=widening,
    )


def of_logs(logs, **options):
    """Weights whose logarithms are these."""
    logs = torch.as_tensor(logs, dtype=torch.float64)
    return hosm.importance_weights(drawn(torch.zeros_like(logs), **options), lambda x: logs)


def test_numbers_are_those_of_a_direct_computation():
    w = torch.tensor([0.3, 2.0, 1.1, 0.7, 0.4], dtype=torch.float64)
    found = of_logs(w.log(), solver_error=torch.tensor([1.0, 2, 3, 4, 5]).double())
    assert found.log_z == pytest.approx(float(w.mean().log()))
    assert found.effective_sample_size == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    assert found.largest_share == pytest.approx(2 / 4.5)
    assert found.log_z_bias == pytest.approx(float(w @ torch.arange(1.0, 6).double()) / 4.5)
    values = torch.stack([w.sin(), w.cos()], 1)
    mean = found.expectation(lambda x: values)
    assert torch.allclose(mean.value, w @ values / w.sum())
    # The jackknife, sample by sample.
    others = [[j for j in range(5) if j != i] for i in range(5)]
    for error, estimate in (
        (torch.tensor(found.log_z_error), lambda rows: w[rows].mean().log()),
        (mean.error, lambda rows: w[rows] @ values[rows] / w[rows].sum()),
    ):
        each = torch.stack([estimate(rows) for rows in others])
        exact = (4 / 5 * (each - each.mean(0)).square().sum(0)).sqrt()
        assert torch.allclose(error.double(), exact)


def test_where_the_target_is_zero_samples_have_no_weight_and_did_not_fail():
    """A box prior, against sums over all samples; one of them failed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((100, 2), generator=generator, dtype=torch.float64)
    nll, inside = x.square().sum(1) / 2, x[:, 0] > 0.3
    failed = int(inside.nonzero()[0])

    def log_target(x):
        return torch.where(x[:, 0] > 0.3, -x.square().sum(1) / 4, -math.inf)

    errors = {"solver_error": nll, "standard_error": 0.1}
    found = hosm.importance_weights(drawn(nll, x, failed=[failed], **errors), log_target)
    w = inside * (nll / 2 - 0.005).exp()
    w[failed] = 0
    assert found.log_z == pytest.approx(float(w.mean().log()), abs=1e-12)
    assert found.effective_sample_size == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    assert found.log_z_bias == pytest.approx(float(w @ nll / w.sum()))
    assert found.probe_variance == pytest.approx(0.01)
    assert found.failed_share == 0.01
    assert not bool((found.resample(200)[1] == failed).any())
    mean = found.expectation(log_target).value  # of values that are −∞ where the weight is zero
    assert float(mean) == pytest.approx(float((w * -nll / 2).sum() / w.sum()))
    others = ~torch.eye(100, dtype=torch.bool)
    each = torch.stack([w[rows].mean().log() for rows in others])
    exact = (99 / 100 * (each - each.mean()).square().sum()).sqrt()
    assert found.log_z_error == pytest.approx(float(exact))
    share = float((~inside).double().mean())
    assert f"1.00% failed, with weight zero; {share:.2%} outside the target" in str(found)
    bounds = found.sandwich(x[inside], NLLResult(*[nll[inside]] * 5, nll[inside] < 0))
    assert bounds.lower == -math.inf
    assert bounds.upper == pytest.approx(float(nll[inside].mean() / 2))
    assert found.sandwich(x, NLLResult(*[nll] * 5, nll < 0)).upper == -math.inf


def test_an_unknown_error_says_why():
    for logs in ([3.0], [3.0, -math.inf, -math.inf], [0.0, 50.0]):
        alone = of_logs(logs)
        assert math.isnan(alone.log_z_error)
        assert all(map(math.isnan, alone.log_z_interval))
        assert "nats, its error unknown as one sample has all the weight" in str(alone)
        assert "inf" not in str(alone)
        assert bool(alone.expectation(lambda x: x).error.isnan())


def test_no_sample_inside_the_target_says_so_and_failed_ones_may_be_nan():
    nowhere = of_logs([-math.inf, math.nan, -math.inf], failed=[1])
    assert nowhere.log_z == -math.inf
    assert str(nowhere) == (
        "log Z = -inf, as none of 3 samples lies inside the target: look at x and log_target; "
        "33.33% failed, with weight zero; 66.67% outside the target, with weight zero; a mode "
        "that the samples miss shows only in sandwich(...)"
    )


def test_the_interval_inverts_the_transformation_of_hall():
    logs = [0.0, 0.4, -0.3, 2.5]
    found, w = of_logs(logs), torch.tensor([*logs, 2.5], dtype=torch.float64).exp()
    lower, upper = found.log_z_interval
    assert lower == pytest.approx(found.log_z - 1.959964 * found.log_z_error)
    mean, error = w.mean(), w.std() / len(w) ** 0.5
    gamma = (w - mean).pow(3).mean() / w.std() ** 3 / len(w) ** 0.5
    t = (mean - math.exp(upper)) / error
    normal = t + gamma * t**2 / 3 + gamma**2 * t**3 / 27 + gamma / 6
    assert float(normal) == pytest.approx(-1.959964)
    assert of_logs([1.2] * 40).log_z_interval == pytest.approx((1.2, 1.2))


@pytest.mark.parametrize(("dimensions", "share"), [(8, 0.7), (32, 0.34)])
def test_the_interval_holds_log_z_as_often_as_it_says(dimensions, share):
    """Of Student's t by a normal, over all runs, whatever their own effective sizes are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((600, 256, dimensions), generator=generator, dtype=torch.float64)
    logs = (StudentT(10.0).log_prob(x) - Normal(0.0, 1.0).log_prob(x)).sum(2)
    runs, least = [of_logs(each) for each in logs], 0.92
    sizes = torch.tensor([run.effective_sample_size / 256 for run in runs])
    assert float(sizes.mean()) == pytest.approx(share, abs=0.02)
    lower, upper = torch.tensor([run.log_z_interval for run in runs]).T
    covered = ((lower <= 0) & (upper >= 0)).double().mean()
    assert float(covered) > least - 5 * (least * (1 - least) / len(runs)) ** 0.5


@pytest.mark.parametrize(("ones", "advised"), [(24, True), (26, False)])
def test_few_effective_samples_bring_advice(ones, advised):
    """`ones` equal weights and the others zero are as many effective samples."""
    weights = of_logs([*[0.0] * ones, *[-math.inf] * (100 - ones)])
    assert round(weights.effective_sample_size, 6) == ones
    message = "fewer than a quarter of the samples are effective: compare several runs"
    assert (message in str(weights)) == advised


def test_resampling_follows_the_weights():
    found, generator = of_logs([math.log(3), 0.0]), torch.Generator().manual_seed(0)
    x, rows = found.resample(4000, generator)
    assert torch.equal(x, found.x[rows])
    assert float((rows == 0).double().mean()) == pytest.approx(0.75, abs=5 * 0.0069)


def test_noise_of_the_probes_is_taken_out():
    # nll = its truth + η with η of variance v, which is known here.
    generator = torch.Generator().manual_seed(0)
    noise = 0.8 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    result = drawn(noise, standard_error=1.6, widening=2.0)
    given = result, lambda x: torch.zeros(len(x))
    corrected = hosm.importance_weights(*given)
    exact = hosm.importance_weights(replace(result, standard_error=0 * noise), given[1])
    error = corrected.log_z_error
    assert abs(corrected.log_z) < 5 * error < 0.02
    assert exact.log_z - corrected.log_z == pytest.approx(0.32)
    assert corrected.probe_variance == pytest.approx(0.64)
    assert corrected.effective_sample_size_without_probes is None  # it cannot be told
    small = replace(corrected, variance=0 * corrected.variance + 0.01)
    without = math.exp(0.01) * small.effective_sample_size
    assert small.effective_sample_size_without_probes == pytest.approx(without)
    with pytest.warns(UserWarning, match=r"variance .* 1.4 nats.*more probes"):
        hosm.importance_weights(replace(result, widening=1.35), given[1])


def test_the_sandwich_of_two_gaussians_holds_its_divergences():
    # q = N(0, 1), π = 3 N(m, 1): both divergences are m²/2.
    count, m = 100_000, 0.6
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x = torch.special.ndtri(u)[:, None]
    half = math.log(2 * math.pi) / 2

    def log_target(x):
        return math.log(3) - half - (x[:, 0] - m).square() / 2

    def nll(x):
        return half + x[:, 0].square() / 2

    found = hosm.importance_weights(drawn(nll(x), x), log_target)
    assert found.log_z == pytest.approx(math.log(3), abs=1e-3)
    y = x + m
    zero = torch.zeros(count, dtype=torch.float64)
    bounds = found.sandwich(y, NLLResult(nll(y), y, zero, zero, zero, zero > 0))
    assert bounds.lower == pytest.approx(math.log(3) - m**2 / 2, abs=1e-3)
    assert bounds.upper == pytest.approx(math.log(3) + m**2 / 2, abs=1e-3)
    assert bounds.lower_error == pytest.approx(m / count**0.5, rel=1e-2)
    lower, _, upper, _ = bounds
    assert str(bounds) == f"log Z is between {lower:.4f} ± 0.0019 and {upper:.4f} ± 0.0019 nats"
    failed = NLLResult(nll(y), y, zero, zero, zero, torch.arange(count) == 0)
    assert str(found.sandwich(y, failed)).endswith(" ± 0.0019 and inf nats")


@pytest.mark.slow
def test_corrected_weights_of_few_probes_have_the_mean_of_exact_ones():
    """E exp(η − v̂/2) is 1 but for 0.02, for η the error of two probes; E exp(η) is above 1.05."""
    mixture, schedule = anisotropic(8), hosm.VPSchedule()
    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    generator = torch.Generator().manual_seed(0)
    latent = schedule.prior_std * torch.randn((2000, 8), generator=generator).double()
    two = hosm.ode_sample(model, latent, divergence=hosm.Hutchinson(2), generator=generator)
    exact = hosm.ode_sample(model, latent, divergence="exact")
    assert exact.nll is not None
    density = exact.nll
    corrected = hosm.importance_weights(two, lambda x: -density)
    ignored = corrected.log_weights + corrected.variance / 2
    mean, error = corrected.log_weights.exp().mean(), corrected.log_z_error
    assert abs(float(mean) - 1) < 0.02 + 5 * error
    assert float(ignored.exp().mean().log()) > 0.05
    log_z = hosm.importance_weights(exact, lambda x: log_density(mixture, schedule, x)).log_z
    assert log_z == pytest.approx(0, abs=0.02)


def log_density(mixture, schedule, x):
    """That of the data with the noise of t_min."""
    alpha, sigma = schedule(torch.full((len(x),), schedule.t_min, dtype=x.dtype))
    return mixture.log_density(x, alpha, sigma)
