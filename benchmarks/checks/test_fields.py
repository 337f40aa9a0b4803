"""Probes have the covariance and the variances they are said to, summed over all there are."""

import itertools

import pytest
import torch
from tests.oracles import mixture_noise, ring, sign_vectors
from tests.test_probes import dct_matrix

import hosm_losses as hosm
from benchmarks import fields

D = 4


@pytest.fixture
def forms() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return fields.symmetric(torch.randn(3, D, D, generator=generator, dtype=torch.float64))


def values(forms: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ni,mij,nj->nm", vectors, forms, vectors)


def test_signs(forms):
    exact = values(forms, sign_vectors(D)).var(0, correction=0).sum()
    known = fields.known_variance("rademacher", forms, 1, (D,))
    assert known == pytest.approx(float(exact))
    assert fields.known_variance("rademacher", forms, 5, (D,)) == pytest.approx(known / 5)


@pytest.mark.parametrize("shape", [(D,), (2, 2)])
def test_cosines(forms, shape):
    basis = torch.ones(1, 1, dtype=torch.float64)
    for size in shape:
        basis = torch.kron(basis, dct_matrix(size))
    exact = values(forms, sign_vectors(D) @ basis).var(0, correction=0).sum()
    assert fields.known_variance("dct", forms, 1, shape) == pytest.approx(float(exact))


@pytest.mark.parametrize("count", range(1, D + 1))
def test_unit_vectors(forms, count):
    diagonal = D * forms.diagonal(dim1=1, dim2=2).T
    subsets = [diagonal[list(chosen)] for chosen in itertools.combinations(range(D), count)]
    exact = torch.stack([each.mean(0) for each in subsets]).var(0, correction=0).sum()
    known = fields.known_variance(fields.UNITS, forms, count, (D,))
    assert known == pytest.approx(float(exact), abs=1e-12)


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
        known = fields.known_variance(name, forms, 1, (D,))
        assert known == pytest.approx(float(exact))


@pytest.mark.parametrize("name", fields.SAMPLERS)
def test_what_is_drawn(name):
    generator = torch.Generator().manual_seed(0)
    probes = fields.draw(name, 2000, 3, (2, 2), generator).double()
    assert probes.shape == (2000, 3, D)
    flat = probes.flatten(0, 1)
    squares = flat[:, :, None] * flat[:, None]
    error = squares.std(0) / len(flat) ** 0.5
    assert ((squares.mean(0) - torch.eye(D)).abs() <= 5 * error + 1e-6).all()


@pytest.mark.parametrize("name", [fields.ORTHOGONAL, fields.UNITS])
def test_directions_of_a_set_are_orthogonal(name):
    probes = fields.draw(name, 50, D, (D,), torch.Generator().manual_seed(0))
    products = probes @ probes.transpose(1, 2)
    torch.testing.assert_close(products, (D * torch.eye(D)).expand(50, D, D), atol=1e-5, rtol=0)


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
