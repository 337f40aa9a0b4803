"""Probes have the covariance and the variances they are said to, summed over all there are."""

import pytest
import torch
from benchmarks import estimator_variance as fields

import hosm_losses as hosm
from tests.oracles import mixture_noise, ring, sign_vectors
from tests.test_probes import dct_matrix

D = 4


@pytest.fixture
def forms() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return fields.symmetric(torch.randn(3, D, D, generator=generator, dtype=torch.float64))


def values(forms: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ni,mij,nj->nm", vectors, forms, vectors)


def test_signs(forms):
    exact = values(forms, sign_vectors(D)).var(0, correction=0).sum()
    assert fields.known_variance("rademacher", forms, (D,)) == pytest.approx(float(exact))


@pytest.mark.parametrize("shape", [(D,), (2, 2)])
def test_cosines(forms, shape):
    pytest.importorskip("scipy")
    basis = torch.ones(1, 1, dtype=torch.float64)
    for size in shape:
        basis = torch.kron(basis, dct_matrix(size))
    exact = values(forms, sign_vectors(D) @ basis).var(0, correction=0).sum()
    assert fields.known_variance("dct", forms, shape) == pytest.approx(float(exact))


def test_unit_vectors(forms):
    exact = values(forms, D**0.5 * torch.eye(D).double()).var(0, correction=0).sum()
    assert fields.known_variance(fields.UNITS, forms, (D,)) == pytest.approx(float(exact))


def test_gaussian_and_sphere(forms):
    # By their fourth moments: E v_i v_j v_k v_l = c (δ_ij δ_kl + δ_ik δ_jl + δ_il δ_jk).
    eye = torch.eye(D, dtype=torch.float64)
    pairs = (
        torch.einsum("ij,kl->ijkl", eye, eye),
        torch.einsum("ik,jl->ijkl", eye, eye),
        torch.einsum("il,jk->ijkl", eye, eye),
    )
    for name, factor in (("gaussian", 1.0), ("sphere", D / (D + 2))):
        square = torch.einsum("mij,ijkl,mkl->", forms, factor * sum(pairs), forms)
        exact = square - forms.diagonal(dim1=1, dim2=2).sum(1).square().sum()
        known = fields.known_variance(name, forms, (D,))
        assert known == pytest.approx(float(exact))


@pytest.mark.parametrize("name", fields.SAMPLERS)
def test_what_is_drawn(name):
    probes = fields.draw(name, 6000, (2, 2), torch.Generator().manual_seed(0)).double()
    assert probes.shape == (6000, D)
    squares = probes[:, :, None] * probes[:, None]
    error = squares.std(0) / len(probes) ** 0.5
    assert ((squares.mean(0) - torch.eye(D)).abs() <= 5 * error + 1e-6).all()


def test_polarisation_finds_the_forms(forms):
    found = fields.polarised(fields.along(forms), D)
    torch.testing.assert_close(found, forms, rtol=1e-6, atol=1e-6)


def test_a_network_and_a_closed_form_give_the_same_point():
    mixture, schedule = ring(), hosm.VESchedule(sigma_max=20.0)
    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    (closed,) = fields.mixture_points(mixture, 0.7, 1, generators[0])
    (row,) = mixture.sample(1, generators[1])
    network = fields.network_point(model, row, 0.7, generators[1])
    v = torch.randn(5, 2, dtype=torch.float64)
    for ours, expected in (
        (network.jacobian, closed.jacobian),
        (network.second, closed.second),
        (network.third(v), closed.third(v)),
        (network.thirds, closed.thirds),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
