"""Probes have the covariance and the variances they are said to, summed over all there are."""

import pytest
import torch
from benchmarks import estimator_variance as fields
from benchmarks.trained import exact

from tests.oracles import ring, sign_vectors
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


def closed_form(mixture, x0, noise, sigma_hat):
    """A, M and T of a mixture at α = 1, T symmetrised in its last two, where

    T_kij = σ³ ∂³_kij log q + ℓ_i ℓ_j ℓ_k − (A + I)_ij ℓ_k − (A + I)_ki ℓ_j − (A + I)_kj ℓ_i.
    """
    sigma = torch.tensor([sigma_hat], dtype=torch.float64)
    given = (x0 + sigma * noise)[None], torch.ones_like(sigma), sigma
    ell = noise + sigma * mixture.score(*given)[0]
    jacobian = sigma**2 * mixture.hessian(*given)[0]
    shifted = jacobian + torch.eye(len(x0), dtype=torch.float64)
    crossed = torch.einsum("ki,j->kij", shifted, ell)
    forms = (
        sigma**3 * mixture.third(*given)[0]
        + torch.einsum("k,i,j->kij", ell, ell, ell)
        - torch.einsum("ij,k->kij", shifted, ell)
        - crossed
        - crossed.transpose(-1, -2)
    )
    return jacobian, shifted - torch.outer(ell, ell), fields.symmetric(forms)


@pytest.mark.parametrize("level", [0.1, 0.7, 3.0])
def test_a_network_has_the_derivatives_of_its_closed_form(level):
    mixture = ring()
    problem, generator = exact(mixture), torch.Generator().manual_seed(1)
    (row,) = mixture.sample(1, generator)
    state = generator.get_state()
    network = fields.Point(problem.model, row, level, generator)
    noise = torch.randn(2, generator=generator.set_state(state), dtype=torch.float64)
    jacobian, second, forms = closed_form(mixture, row, noise, level)
    v = torch.randn(5, 2, dtype=torch.float64)
    for ours, expected in (
        (network.jacobian, jacobian),
        (network.second, second),
        (network.third(v), fields.along(forms)(v)),
        (network.thirds, forms),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
