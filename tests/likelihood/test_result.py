"""Bits per dimension, summaries, failures, and results that are joined."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from hosm_losses import NLLResult, NLLSummary, SampleResult
from hosm_losses.likelihood.result import Cause, Quantization


def full(n=3, d=4, **changes):
    """A result with a number of its own in every place."""
    parts = {
        "nll": torch.arange(n) + 1.0,
        "latent": torch.arange(n * d).reshape(n, d) + 0.0,
        "nfe": torch.arange(n) + 70,
        "standard_error": torch.arange(n) + 0.3,
        "solver_error": torch.arange(n) + 0.01,
        "failed": torch.zeros(n, dtype=torch.bool),
        "products": torch.arange(n) + 140,
        "kinks": torch.arange(n) % 2 == 0,
        "cause": torch.zeros(n, dtype=torch.uint8),
        "prior_error": 0.1 * torch.arange(n) - 0.1,
        "quantization": Quantization(256, -1.0, 1.0),
        "steps": torch.arange(n) + 64,
    }
    return NLLResult(**(parts | changes))


@pytest.mark.parametrize(
    ("levels", "offset"),
    [
        ({}, 0.0),
        ({"levels": 256}, 7.0),
        ({"levels": 256, "low": 0}, 8.0),
        ({"levels": 256, "low": 0, "high": 256}, 0.0),
        ({"levels": 2, "low": 0}, 1.0),
        ({"levels": 2**16}, 15.0),
    ],
)
def test_levels_add_the_width_of_a_level(levels, offset):
    """A uniform density over [low, high] gives every 8-bit level 8 bits."""
    bits = full(quantization=None).bits_per_dim(**levels)
    torch.testing.assert_close(bits, full().nll / (4 * math.log(2)) + offset)


@pytest.mark.parametrize("options", [{"levels": np.int64(256)}, {"low": -1}, {"high": 1.0}])
def test_what_agrees_with_the_dequantization_changes_nothing(options):
    assert torch.equal(full().bits_per_dim(**options), full().bits_per_dim())
    assert full().summary(**options) == full().summary()


@pytest.mark.parametrize(
    "index",
    [slice(1, None), slice(-2, None), torch.tensor([False, True, True]), torch.tensor([1, 2])],
)
def test_an_index_takes_the_rows_of_every_field(index):
    result, rows = full(), torch.tensor([1, 2])
    samples = SampleResult(**vars(result), x=result.latent + 1)
    for whole in (result, samples):
        part = whole[index]
        assert type(part) is type(whole)
        for field in dataclasses.fields(whole):
            value = getattr(whole, field.name)
            expected = value[rows] if isinstance(value, torch.Tensor) else value
            torch.testing.assert_close(getattr(part, field.name), expected, rtol=0, atol=0)
    halves = [result[:1], result[1:]]
    assert torch.equal(NLLResult.cat(halves).nll, result.nll)
    assert result[1:].summary().nll == 2.5


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (0, TypeError, r"index: expected a slice, a mask .*Take \[i : i \+ 1\]"),
        ([0, 1], TypeError, "index: expected a slice"),
        (torch.ones(2, dtype=torch.bool), IndexError, "The shape of the mask"),
        (torch.zeros(3, dtype=torch.bool), ValueError, "index: expected one that leaves a sample"),
        (slice(3, None), ValueError, "index: expected one that leaves a sample"),
    ],
)
def test_other_indices_are_errors(index, error, message):
    with pytest.raises(error, match=message):
        full()[index]


def test_cat_joins_every_field_in_order():
    parts = [full(), full(n=2, nll=torch.tensor([9.0, 8.0]), failed=torch.tensor([True, False]))]
    joined = NLLResult.cat(iter(parts))
    for field in dataclasses.fields(NLLResult):
        if field.name not in ("quantization", "widening", "dimensions"):
            expected = torch.cat([getattr(part, field.name) for part in parts])
            assert torch.equal(getattr(joined, field.name), expected)
    assert joined.quantization == parts[0].quantization
    options = {"widening": 2.0, "standard_error": None}
    joined = NLLResult.cat([full(**options), full(**options)])
    assert (joined.widening, joined.standard_error) == (2.0, None)


def test_what_failed_says_why():
    """By its cause; the limit of errors is a tenth of a nat for each of many elements."""
    error, cause = torch.tensor([0.1, 2000.0, 0.5]), torch.tensor([0, Cause.SOLVER, Cause.RANGE])
    found = full(solver_error=error, failed=cause > 0, cause=cause).failures()
    assert list(found) == [1, 2]
    assert "2e+03 nats is not within 1000" in found[1]
    assert "beyond torch.float64" in found[2]
    (reason,) = full(n=1, d=20_000, failed=cause[1:2] > 0, cause=cause[1:2]).failures().values()
    assert "is not within 2000" in reason
    assert "does not say why" in full(n=1, failed=cause[1:2] > 0).failures()[0]


def test_summary_leaves_out_what_failed_and_separates_the_estimators_part():
    nll = torch.tensor([1.0, math.nan, 3.0, 8.0, math.nan])
    failed = torch.tensor([False, True, False, False, False])  # NaN counts, whatever this says
    summary = full(n=5, nll=nll, failed=failed).summary()
    assert (summary.samples, summary.failed) == (3, 2)
    assert summary.nll == pytest.approx(4.0)
    assert summary.standard_error == pytest.approx(math.sqrt(13 / 3))
    assert summary.estimator_error == pytest.approx(math.sqrt(0.3**2 + 2.3**2 + 3.3**2) / 3)
    assert summary.solver_error == pytest.approx((0.01 + 2.01 + 3.01) / 3)
    assert summary.nfe == pytest.approx((70 + 72 + 73) / 3)
    assert summary.bits_per_dim == pytest.approx(1 / math.log(2) + 7)
    assert summary.bits_standard_error == pytest.approx(math.sqrt(13 / 3) / (4 * math.log(2)))
    assert repr(full(n=5, nll=nll, failed=failed)) == str(summary)


def test_a_summary_prints_in_a_line_and_its_warnings_in_another():
    fields = {"samples": 256, "failed": 0, "nll": 10.336, "standard_error": 0.004}
    fields |= {"estimator_error": 0.0, "solver_error": 2e-4, "bits_per_dim": 7.456}
    summary = NLLSummary(**fields, bits_standard_error=0.003, nfe=66.0, products=64.0)
    line = "NLL 10.336 nats ± 0.004 (probes 0.000), n = 256; solver error 2e-4; 66 evaluations"
    assert str(summary) == line
    doubtful = dataclasses.replace(summary, failed=1, kinks=2, prior_size=0.12, prior_error=0.1)
    first, second = str(doubtful).splitlines()
    assert first == line
    assert second == (
        "1 failed and left out; kinks suspected on 2 paths; the prior is off by 0.120 nats per "
        "sample, by +0.100 in the mean log-likelihood: set log_prior to the Gaussian of data_mean "
        "and data_std at t_max"
    )
    for error, written in ((0.0, "0"), (0.034, "0.034"), (1.0, "1"), (2345.0, "2.3e+03")):
        changed = dataclasses.replace(summary, solver_error=error)
        assert f"solver error {written};" in str(changed)
    alone = dataclasses.replace(summary, standard_error=None, estimator_error=None, discrete=True)
    alone = dataclasses.replace(alone, samples=1, bits_standard_error=None)
    assert str(alone).startswith("NLL 7.4560 bits/dim, 10.336 nats, n = 1; solver error 2e-4 nats")


def test_summary_says_no_more_than_it_knows():
    summary = full(n=1, standard_error=None, quantization=None).summary(levels=256)
    found = (summary.standard_error, summary.bits_standard_error, summary.estimator_error)
    assert found == (None, None, None)
    assert summary.bits_per_dim == pytest.approx(1 / (4 * math.log(2)) + 7)
    assert "±" not in str(summary)
    failed, error = torch.tensor([True, True]), torch.tensor([5000.0, 0.0])
    result = full(n=2, failed=failed, solver_error=error)
    with pytest.raises(ValueError) as refused:
        result.summary()
    assert result.failures()[0] in str(refused.value)


def test_the_part_of_the_probes_is_not_widened_and_not_above_the_whole():
    """A mean of many has no need of Student's factor."""
    nll = torch.tensor([1.0, 1.2, 1.4])
    summary = full(nll=nll, standard_error=torch.full((3,), 5.0)).summary()
    assert summary.estimator_error == summary.standard_error
    single = full(n=1, standard_error=torch.tensor([5.0]), widening=2.5).summary()
    assert single.estimator_error == pytest.approx(2.0)


def test_a_dict_has_every_field():
    values = full(nll=torch.ones(3, requires_grad=True) * 2).to_dict()
    assert list(values) == [field.name for field in dataclasses.fields(NLLResult)]
    assert not values["nll"].requires_grad
    assert values["quantization"] == {"levels": 256, "low": -1.0, "high": 1.0}
    assert NLLResult.from_dict(values).to_dict().keys() == values.keys()


def test_results_print_as_their_summaries():
    """Bits of discrete data alone; without numbers where there is nothing to look at."""
    continuous = full(quantization=None)
    assert str(continuous) == repr(continuous) == str(continuous.summary())
    assert "bits/dim" in str(full())
    assert "bits/dim" not in str(continuous)
    assert "bits/dim" in str(continuous.summary(levels=256))
    failed = full(failed=torch.ones(3, dtype=torch.bool))
    assert str(failed) == f"3 samples, all failed; the first one: {failed.failures()[0]}"
    assert str(full(failed=torch.zeros(3, device="meta"))) == "NLLResult of 3 samples, not on hand"


def samples(**changes):
    return SampleResult(**(vars(full(quantization=None)) | {"x": torch.zeros(3, 4)} | changes))


def test_samples_have_what_likelihoods_have():
    drawn = samples()
    assert str(drawn) == str(full(quantization=None))
    joined = SampleResult.cat([drawn, SampleResult.from_dict(drawn.to_dict())])
    assert joined.x.shape == (6, 4)
    assert joined.summary().nll == drawn.summary().nll
    bare = samples(nll=None, standard_error=None, solver_error=None)
    assert str(bare) == "3 samples without density; 71 evaluations; 0 failed"
    for call in (bare.bits_per_dim, bare.summary):
        with pytest.raises(ValueError, match="divergence=None"):
            call()
    for wrong in ([drawn, bare], []):
        with pytest.raises(ValueError):
            SampleResult.cat(wrong)
    with pytest.raises(TypeError):
        NLLResult.cat([drawn])
