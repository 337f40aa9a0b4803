"""Networks like those of repositories people train: every engine, without a warning."""

import warnings

import pytest
import torch
from benchmarks.repositories import EDM, Guided, NCSNpp

import hosm_losses as hosm

NETWORKS = {
    "ncsnpp": lambda: NCSNpp(8),
    "edm": lambda: EDM(8),
    "guided": lambda: Guided(8).eval(),
    "guided, checkpoints": lambda: Guided(8, use_checkpoint=True).eval(),
}


def gradients(name, order, two=False, **options):
    """The loss, along two probes if asked, and the gradients of all parameters, in float64."""
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x0, noise, probe, other = torch.randn(4, 2, 3, 8, 8, dtype=torch.float64).unbind()
    probe = torch.stack([probe, other]) if two else probe
    terms = hosm.dsm_terms(
        model, x0, order=order, t=torch.tensor([0.3, 0.6]), noise=noise, probe=probe, **options
    )
    loss = sum(term.sum() for term in terms if term is not None)
    return loss, *torch.autograd.grad(loss, list(network.parameters()))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_default_engine_has_the_gradients_of_reverse_mode(name, order):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of an engine that costs more
        got = gradients(name, order)
    expected = gradients(name, order, derivative="reverse")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_paired_probes_in_reverse_mode_have_the_gradients_of_the_taylor_engine(name, order):
    found = [
        gradients(name, order, two=True, estimator="paired", derivative=each)
        for each in ("auto", "taylor")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)
