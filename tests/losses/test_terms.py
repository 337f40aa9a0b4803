"""The estimators of the third order: what they have in common, and how they spread."""

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.losses.objective import perturbed
from hosm_losses.losses.options import LossOptions
from hosm_losses.losses.terms import Directions, terms_along
from hosm_losses.model import noise_field
from hosm_losses.probes import draw_probes, unit_vectors
from tests.oracles import anisotropic, mixture_noise, networks, ring, sign_vectors

ENGINES = ("auto", "forward", "taylor")


def sliced(name, probes, others, exact=False):
    """The third terms (B,) of every u of `others` (N, d), for one probe of every sample."""
    network, shape = networks()[name]
    x0, noise, t = torch.randn(2, *shape), torch.randn(2, *shape), torch.tensor([0.3, 0.6])
    model, inputs = perturbed(
        hosm.ScoreModel(network, hosm.VPSchedule()), x0, t, noise, LossOptions(order=1), None
    )
    field = noise_field(model, t, primitives=True)
    number = "exact" if exact else 1
    whole = LossOptions(order=3, probes=number)
    parts = LossOptions(order=3, third="sliced", probes=number)
    expected = terms_along(field, inputs, Directions(probes(x0)), whole)
    found = [
        terms_along(
            field, inputs, Directions(probes(x0), u.reshape(shape).expand_as(probes(x0))), parts
        )
        for u in others
    ]
    return expected, torch.stack([terms.third for terms in found]), found


@pytest.mark.parametrize("exact", [False, True])
def test_sliced_is_unbiased_over_all_sign_vectors_with_the_variance_of_the_docs(exact):
    def probes(x0):
        return unit_vectors(x0) if exact else torch.ones(1, *x0.shape)

    expected, thirds, found = sliced("mlp", probes, sign_vectors(3), exact)
    torch.testing.assert_close(thirds.mean(0), expected.third, rtol=1e-12, atol=0)
    for terms in found:
        torch.testing.assert_close(terms[:3], expected[:3], rtol=1e-12, atol=0)
    # 2 (‖r‖⁴ − Σ r_i⁴), with r from u = unit vectors: (e_i·r)² = r_i².
    _, squares, _ = sliced("mlp", probes, torch.eye(3), exact)
    variance = 2 * (squares.sum(0).square() - squares.square().sum(0))
    torch.manual_seed(0)
    torch.testing.assert_close(thirds.var(0, correction=0), variance, rtol=1e-10, atol=0)


@pytest.fixture(autouse=True)
def _same_draws():
    torch.manual_seed(0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("probes", [1, 3])
def test_sliced_draws_u_of_its_own_in_every_engine(engine, probes):
    network, shape = networks()["conv"]
    model, x0 = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(2, *shape)
    found = []
    for each in ("taylor", engine):
        generator = torch.Generator().manual_seed(0)
        options = {"probes": probes, "third": "sliced", "generator": generator}
        found.append(hosm.third_order_dsm(model, x0, derivative=each, **options))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("probes", [2, "exact"])
def test_u_is_drawn_after_v_and_for_itself(probes):
    network, shape = networks()["mlp"]
    model, x0 = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(2, *shape)
    given = {"t": torch.tensor([0.3, 0.6]), "noise": torch.randn_like(x0)}
    generator = torch.Generator().manual_seed(0)
    if probes == "exact":
        v = unit_vectors(x0)
        u = draw_probes(x0, 1, generator=generator).expand_as(v)
    else:
        v, u = (draw_probes(x0, probes, generator=generator) for _ in range(2))
    options = LossOptions(order=3, third="sliced", probes=probes)
    _, inputs = perturbed(model, x0, given["t"], given["noise"], options, None)
    field = noise_field(model, given["t"], primitives=True)
    expected = terms_along(field, inputs, Directions(v, u), options)
    again = torch.Generator().manual_seed(0)
    got = hosm.dsm_terms(model, x0, third="sliced", probes=probes, generator=again, **given)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


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


@pytest.mark.parametrize("third", ["laplacian", "sliced"])
def test_what_goes_forward_is_refused_in_reverse_mode(third):
    with pytest.raises(ValueError, match=f"with third='{third}'; got 'reverse'"):
        LossOptions(order=3, third=third, derivative="reverse")
    with pytest.raises(ValueError, match="third: expected one of 'exact', 'laplacian', 'sliced'"):
        LossOptions(order=3, third="hutchinson")


@pytest.mark.parametrize("third", ["exact", "laplacian", "sliced"])
def test_a_fraction_of_the_batch_has_its_own_terms(third):
    network, shape = networks()["attention"]
    model, x0 = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(6, *shape)
    probe, t, noise = torch.randn(2, *x0.shape), torch.rand(6), torch.randn_like(x0)
    module = hosm.ThirdOrderDSM(model, fraction=0.5, third=third)
    _, terms = module(x0, t=t, noise=noise, probe=probe, return_terms=True)
    whole = hosm.dsm_terms(model, x0, t=t, noise=noise, probe=probe, third=third)
    torch.testing.assert_close(terms.first, whole.first, rtol=1e-12, atol=0)
    assert terms.third.shape == (3,)
    if third != "sliced":  # whose u is another
        matches = (terms.third[:, None] - whole.third).abs().min(1).values
        assert matches.max() < 1e-12


@pytest.mark.parametrize("estimator", ["hutchinson", "paired"])
def test_samples_whose_cubed_size_is_beyond_integers(estimator):
    x0 = torch.randn(1, 2_700_000, dtype=torch.float32)
    model = hosm.ScoreModel(lambda x, t: 0.5 * x, hosm.VPSchedule())
    terms = hosm.dsm_terms(model, x0, estimator=estimator)
    assert all(bool(torch.isfinite(term).all()) for term in terms)
