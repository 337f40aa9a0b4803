"""What a user sees of the package: the names that complete, and what objects print as."""

import inspect
import re
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch
from torch import nn

import hosm_losses as hosm

SUBMODULES = {"model", "losses", "probes", "schedules", "likelihood", "derivatives"}
SUBMODULES |= {"diagnostics", "interop"}


def test_public_names_alone_complete():
    names = set(dir(hosm))
    assert set(hosm.__all__) == {name for name in names if not name.startswith("_")}
    assert not names & SUBMODULES
    assert "taylor" in names
    assert len(hosm.__all__) == len(set(hosm.__all__))
    assert all(hasattr(hosm, name) for name in names)


@pytest.mark.slow
def test_a_star_import_leaves_the_names_of_users():
    code = "model = 1\nfrom hosm_losses import *\nassert model == 1\nassert ScoreModel"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_help_of_the_package_begins_with_what_to_start_from():
    names = ("ScoreModel", "check_wrapping", "third_order_dsm", "AveragedTargets", "ode_nll")
    assert re.search(".*".join(names), hosm.__doc__, re.DOTALL)


def test_signatures_are_short():
    assert len(str(inspect.signature(hosm.third_order_dsm))) < 600
    for name in set(hosm.__all__) - {"DerivativeError", "taylor"}:
        call = getattr(hosm, name)
        assert not callable(call) or len(str(inspect.signature(call))) < 600, name


def test_annotations_resolve_to_the_public_types():
    hints = get_type_hints(hosm.third_order_dsm)
    assert hints["weighting"] == hosm.Weighting
    assert hints["time_sampler"] == hosm.TimeSampler
    assert hints["probes"] == hosm.Probes
    assert hints["weights"] == hosm.TermWeights | None
    assert get_type_hints(hosm.first_order_dsm)["targets"] == hosm.Targets
    assert get_type_hints(hosm.ode_nll)["divergence"] == hosm.Divergence
    assert get_type_hints(hosm.ScoreModel.__init__)["prediction"] == hosm.Prediction


def standard_normal(x, t):
    sigma = hosm.VPSchedule().sigma(t)[:, None]
    return sigma * x


def examples():
    """One object or more of every public class."""
    table = hosm.DiscreteSchedule.linear()
    model = hosm.ScoreModel(standard_normal, hosm.VPSchedule(), time=lambda t: t)
    wrapped = hosm.ScoreModel(nn.Linear(2, 2), table, "x0", call=lambda network, x, t: network(x))
    x = torch.randn(32, 2)
    exact = {"solver": hosm.FixedGrid(16, data_std=1.0), "divergence": "exact"}
    nll, drawn = hosm.ode_nll(model, x, **exact), hosm.ode_sample(model, x, **exact)
    posterior = hosm.denoising_posterior(model, x, torch.full((32,), 0.5))
    loss = hosm.ThirdOrderDSM(
        model,
        weights=(1, 1, 1, torch.tensor(0.5)),
        time_sampler=lambda n, _: 0.5 + torch.rand(n) / 4,
    )
    weighted = hosm.FirstOrderDSM(wrapped, weighting=lambda t: t)
    cubic = hosm.ScoreModel(lambda x, t: x**3, hosm.VPSchedule())
    yield hosm.OnSubspace(standard_normal, torch.clone, (2,))
    yield from (model, wrapped, table, nll, nll.summary(), drawn, posterior, posterior.covariance)
    yield from (loss, weighted, hosm.check_wrapping(model, x))
    yield hosm.WrappingCandidate("your schedule", "v", "", False, "x0", 0.1, 0.2)
    yield hosm.SecondOrderDSM(model, targets=hosm.AveragedTargets(x))
    yield hosm.importance_weights(drawn, lambda x: -x.square().sum(1) / 2)
    yield hosm.check_derivatives(cubic, x[:2])
    yield from (hosm.dsm_terms(model, x), loss(x, return_terms=True)[1])
    yield hosm.ODEDistribution(model, (2,), divergence=lambda x, t: (x, t))
    yield hosm.ODEDistribution(model, (2,), model_kwargs={"y": x}, batch_shape=(32,))
    yield from (hosm.Shared(x), hosm.Shared({"y": x, "z": [x]}), hosm.Shared(1))
    yield from (hosm.AveragedTargets(x), hosm.AveragedTargets(same=lambda kwargs: None))
    yield hosm.TargetScores(lambda x: -x, x[0], hosm.AveragedTargets(x))
    yield from (hosm.Adaptive(), hosm.FixedGrid(), hosm.ToTolerance(), hosm.EDMWeighting())
    yield hosm.AdaptiveTimes()
    yield from (hosm.Uniform(), hosm.TruncatedNormal(), hosm.Hutchinson(), hosm.Paired())
    yield from (hosm.Schedule(), hosm.VPSchedule(), hosm.SubVPSchedule())
    yield from (hosm.VESchedule(), hosm.CosineSchedule(), hosm.LinearFlowSchedule())
    yield from (hosm.EDMSchedule(), hosm.DivergenceFunction(standard_normal))


def test_every_object_prints_what_it_is():
    seen = set()
    for example in examples():
        text, kind = repr(example), type(example).__name__
        seen.add(kind)
        words = re.findall(r"[a-z]{3,}", text)
        assert words, kind
        assert len(text) < 600, text
        assert " at 0x" not in text, text
        assert "tensor([" not in text, text
    classes = {name for name in hosm.__all__ if isinstance(getattr(hosm, name), type)}
    internal = {"DerivativeError", "DivergenceEstimator", "Solver", "ODESolution"}
    assert seen == classes - internal
