"""Bits per dimension, summaries, and results that are joined."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch

import hosm_losses as hosm
from hosm_losses import NLLResult
from hosm_losses.likelihood.adaptive import student_factor
from hosm_losses.likelihood.result import Quantization


def result(nll, shape):
    zeros = torch.zeros(len(nll))
    return NLLResult(nll, torch.zeros(len(nll), *shape), zeros, None, zeros, zeros > 0)


def test_continuous_bits_are_nats_over_d_log_2():
    bits = result(torch.tensor([1.0, -6.0]), (3, 2)).bits_per_dim()
    torch.testing.assert_close(bits, torch.tensor([1.0, -6.0]) / (6 * math.log(2)))


@pytest.mark.parametrize(("low", "high", "offset"), [(-1, 1, 7.0), (0, 1, 8.0), (0, 256, 0.0)])
def test_levels_add_the_width_of_a_level(low, high, offset):
    """A uniform density over [low, high] gives every 8-bit level 8 bits."""
    nll = torch.tensor([3 * math.log(high - low)])
    got = result(nll, (3,)).bits_per_dim(levels=256, low=low, high=high)
    torch.testing.assert_close(got, torch.tensor([8.0]))
    zero = result(torch.zeros(1), (3,)).bits_per_dim(levels=256, low=low, high=high)
    torch.testing.assert_close(zero, torch.tensor([offset]))


@pytest.mark.parametrize("options", [{"levels": np.int64(256)}, {"low": -1}, {"high": 1.0}])
def test_what_agrees_with_the_dequantization_changes_nothing(options):
    assert torch.equal(full().bits_per_dim(**options), full().bits_per_dim())
    assert full().summary(**options) == full().summary()


def full(n=3, d=4, **changes):
    """A result with a number of its own in every place."""
    parts = {
        "nll": torch.arange(n) + 1.0,
        "latent": torch.arange(n * d).reshape(n, d) + 0.0,
        "nfe": torch.arange(n) + 70,
        "standard_error": torch.arange(n) + 0.3,
        "solver_error": torch.arange(n) + 0.01,
        "failed": torch.zeros(n, dtype=torch.bool),
        "quantization": Quantization(256, -1.0, 1.0),
    }
    return NLLResult(**(parts | changes))


def test_cat_joins_every_field_in_order():
    parts = [full(), full(n=2, nll=torch.tensor([9.0, 8.0]), failed=torch.tensor([True, False]))]
    joined = NLLResult.cat(parts)
    for field in dataclasses.fields(NLLResult):
        if field.name not in ("quantization", "steps", "widening"):
            expected = torch.cat([getattr(part, field.name) for part in parts])
            assert torch.equal(getattr(joined, field.name), expected)
    assert joined.quantization == parts[0].quantization
    assert NLLResult.cat([full(steps=64), full(steps=64)]).steps == 64
    assert NLLResult.cat([full(steps=64), full(steps=32)]).steps is None
    bare = full(standard_error=None)
    assert NLLResult.cat([bare, bare]).standard_error is None
    assert torch.equal(NLLResult.cat(iter([full()])).nll, full().nll)


def test_what_failed_says_why():
    """Of five samples one did not fail; an error above the limit, NaN, and two late ones did."""
    latent = torch.zeros(5, 2)
    latent[2, 1] = math.inf
    error = torch.tensor([0.1, 2000.0, 0.0, math.nan, 0.5])
    failed = torch.tensor([False, True, True, True, True])
    nll = torch.zeros(5).masked_fill(failed, math.nan)
    result = full(n=5, nll=nll, latent=latent, solver_error=error, failed=failed)
    found = result.failures()
    assert list(found) == [1, 2, 3, 4]
    assert "2e+03 nats is above 1000" in found[1]
    assert "on its path is not finite" in found[2]
    assert found[3] == found[2]
    assert "did not arrive" in found[4]


def test_no_sample_left_says_why_the_first_one_failed():
    nll = torch.tensor([math.nan, math.nan])
    failed, error = torch.tensor([True, True]), torch.tensor([5000.0, 0.0])
    result = full(n=2, nll=nll, failed=failed, solver_error=error)
    with pytest.raises(ValueError) as refused:
        result.summary()
    assert result.failures()[0] in str(refused.value)


def test_summary_leaves_out_what_failed_and_separates_the_estimators_part():
    nll = torch.tensor([1.0, math.nan, 3.0, 8.0])
    failed = torch.tensor([False, True, False, False])
    summary = full(n=4, nll=nll, failed=failed).summary()
    assert (summary.samples, summary.failed) == (3, 1)
    assert summary.nll == pytest.approx(4.0)
    assert summary.standard_error == pytest.approx(math.sqrt(13 / 3))
    assert summary.estimator_error == pytest.approx(math.sqrt(0.3**2 + 2.3**2 + 3.3**2) / 3)
    assert summary.solver_error == pytest.approx((0.01 + 2.01 + 3.01) / 3)
    assert summary.nfe == pytest.approx((70 + 72 + 73) / 3)
    assert summary.bits_per_dim == pytest.approx(1 / math.log(2) + 7)
    assert summary.bits_standard_error == pytest.approx(math.sqrt(13 / 3) / (4 * math.log(2)))
    shown = str(summary)
    assert "8.4427 ± 0.7508 bits/dim, 4.000 ± 2.082 nats over 3 samples" in shown
    assert "1.345 nats from the probes" in shown
    assert "failed and left out: 1" in shown


def test_summary_counts_nan_as_failed_whatever_the_flag_says():
    nll = torch.tensor([1.0, math.nan, 3.0])
    bare = full(nll=nll, standard_error=None)
    for made in (bare, NLLResult.cat([bare])):
        summary = made.summary()
        assert (summary.samples, summary.failed, summary.nll) == (2, 1, 2.0)
        assert summary.bits_per_dim == pytest.approx(2 / (4 * math.log(2)) + 7)
    with pytest.raises(ValueError):
        full(nll=nll * math.nan).summary()


def test_summary_says_no_more_than_it_knows():
    summary = full(n=1, standard_error=None, quantization=None).summary(levels=256)
    assert summary.standard_error is None
    assert summary.bits_standard_error is None
    assert summary.estimator_error is None
    assert summary.bits_per_dim == pytest.approx(1 / (4 * math.log(2)) + 7)
    assert "±" not in str(summary)
    with pytest.raises(ValueError):
        full(failed=torch.ones(3, dtype=torch.bool)).summary()


def test_the_standard_error_of_the_mean_covers_the_probes():
    """The spread over samples holds the noise of their probes already."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, generator=generator)
    result = full(n=4000, nll=noise, standard_error=torch.ones(4000))
    summary = result.summary()
    assert summary.standard_error == pytest.approx(summary.estimator_error, rel=0.05)


def test_a_mean_of_many_is_not_widened_by_students_factor():
    """One point 1000 times, where all spread is of four probes along each path."""
    torch.manual_seed(0)
    matrix = torch.randn(4, 4)
    model = hosm.ScoreModel(lambda x, t: x @ (matrix + matrix.T) / 8, hosm.VPSchedule())
    x = torch.ones(1, 4).expand(1000, -1)
    result = hosm.ode_nll(model, x, probes=4, method="adaptive", tolerance=0.01)
    summary = result.summary()
    assert result.widening == student_factor(3)
    # Both have a relative error of a few hundredths.
    assert summary.estimator_error == pytest.approx(summary.standard_error, rel=0.15)
    parts = NLLResult.cat([result, NLLResult.from_dict(through_a_file(result.to_dict()))])
    assert parts.summary().estimator_error == pytest.approx(
        summary.estimator_error / math.sqrt(2), rel=0.01
    )


def test_the_part_of_the_probes_is_not_above_the_whole():
    nll = torch.tensor([1.0, 1.2, 1.4])
    summary = full(nll=nll, standard_error=torch.full((3,), 5.0)).summary()
    assert summary.estimator_error == summary.standard_error
    single = full(n=1, standard_error=torch.tensor([5.0]), widening=2.5).summary()
    assert single.estimator_error == pytest.approx(2.0)


def through_a_file(values):
    file = io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def identical(a, b):
    """In value, dtype and shape."""
    if not isinstance(a, torch.Tensor):
        return type(a) is type(b) and a == b
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    )


@pytest.mark.parametrize(
    "given",
    [
        full(),
        full(standard_error=None, quantization=None),
        full(nll=torch.tensor([1.0, math.nan, 3.0], dtype=torch.float64)),
        NLLResult.cat([full(), full(n=2)]),
    ],
    ids=["full", "bare", "failed", "joined"],
)
def test_a_result_comes_back_from_a_file_as_it_was(given):
    again = NLLResult.from_dict(through_a_file(given.to_dict()))
    for field in dataclasses.fields(NLLResult):
        assert identical(getattr(again, field.name), getattr(given, field.name)), field.name
    assert again.quantization == given.quantization
    assert identical(again.bits_per_dim(), given.bits_per_dim())
    assert again.summary() == given.summary()


def test_the_dict_has_every_field_and_no_graph():
    nll = torch.ones(3, requires_grad=True)
    values = full(nll=nll * 2).to_dict()
    assert list(values) == [field.name for field in dataclasses.fields(NLLResult)]
    assert not values["nll"].requires_grad
    assert values["quantization"] == {"levels": 256, "low": -1.0, "high": 1.0}


def test_a_result_kept_by_an_earlier_version_is_read():
    model = hosm.ScoreModel(lambda x, t: x, hosm.VPSchedule())
    kept = hosm.ode_nll(model, torch.ones(2, 3), steps=8).to_dict()
    del kept["widening"]
    assert hosm.NLLResult.from_dict(kept).widening == 1.0
