"""The estimators of the third order: what they have in common, and how they spread."""

import pytest
import torch

import hosm_losses as hosm
from tests.oracles import anisotropic, mixture_noise, networks, ring

ENGINES = ("auto", "taylor")


@pytest.fixture(autouse=True)
def _same_draws():
    torch.manual_seed(0)


@pytest.mark.parametrize("mixture", [ring(), anisotropic(6, 3)], ids=["ring", "anisotropic"])
def test_laplacian_is_exact_on_a_gradient_field(mixture):
    """As the true score is one."""
    schedule = hosm.VPSchedule()
    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    x0 = mixture.sample(5, torch.Generator().manual_seed(0))
    given = {"t": torch.linspace(0.05, 0.9, 5), "noise": torch.randn_like(x0)}
    given["probe"] = torch.randn(2, *x0.shape)
    terms = [hosm.dsm_terms(model, x0, third=third, **given) for third in ("exact", "laplacian")]
    torch.testing.assert_close(terms[1], terms[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("third", ["exact", "laplacian"])
def test_a_fraction_of_the_batch_has_its_own_terms(third):
    network, shape = networks()["attention"]
    model, x0 = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(6, *shape)
    probe, t, noise = torch.randn(2, *x0.shape), torch.rand(6), torch.randn_like(x0)
    module = hosm.ThirdOrderDSM(model, fraction=0.5, third=third)
    _, terms = module(x0, t=t, noise=noise, probe=probe, return_terms=True)
    whole = hosm.dsm_terms(model, x0, t=t, noise=noise, probe=probe, third=third)
    torch.testing.assert_close(terms.first, whole.first, rtol=1e-12, atol=0)
    assert terms.third.shape == (3,)
    matches = (terms.third[:, None] - whole.third).abs().min(1).values
    assert matches.max() < 1e-12


@pytest.mark.parametrize("estimator", ["hutchinson", "paired"])
def test_samples_whose_cubed_size_is_beyond_integers(estimator):
    x0 = torch.randn(1, 2_700_000, dtype=torch.float32)
    model = hosm.ScoreModel(lambda x, t: 0.5 * x, hosm.VPSchedule())
    terms = hosm.dsm_terms(model, x0, estimator=estimator)
    assert all(bool(torch.isfinite(term).all()) for term in terms)
