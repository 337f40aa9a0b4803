"""Probes have the variances they are said to, and a network the forms that they are drawn for."""

import pytest
import torch
from benchmarks import estimator_variance as fields
from benchmarks.trained import exact

from tests.oracles import ring, sign_vectors
from tests.test_probes import dct_matrix

D, EYE = 4, torch.eye(4, dtype=torch.float64)


@pytest.fixture
def forms():
    return fields.symmetric(torch.randn(3, D, D, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("rademacher", (4,)), ("dct", (4,)), ("dct", (2, 2)), (fields.UNITS, (4,))],
)
def test_variances_are_those_of_all_vectors_there_are(name, shape, forms):
    vectors = D**0.5 * EYE if name == fields.UNITS else sign_vectors(D)
    if name == "dct":
        pytest.importorskip("scipy")
        basis = torch.ones(1, 1, dtype=torch.float64)
        for size in shape:
            basis = torch.kron(basis, dct_matrix(size))
        vectors = vectors @ basis
    values = torch.einsum("ni,mij,nj->nm", vectors, forms, vectors)
    expected = float(values.var(0, correction=0).sum())
    assert fields.known_variance(name, forms, shape) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "factor"), [("gaussian", 1.0), ("sphere", D / (D + 2))])
def test_variances_by_fourth_moments(name, factor, forms):
    """E v_i v_j v_k v_l = c (δ_ij δ_kl + δ_ik δ_jl + δ_il δ_jk)."""
    pairs = [torch.einsum(f"{each}->ijkl", EYE, EYE) for each in ("ij,kl", "ik,jl", "il,jk")]
    square = torch.einsum("mij,ijkl,mkl->", forms, factor * sum(pairs), forms)
    expected = square - forms.diagonal(dim1=1, dim2=2).sum(1).square().sum()
    assert fields.known_variance(name, forms, (D,)) == pytest.approx(float(expected))


@pytest.mark.parametrize("level", [0.1, 3.0])
def test_a_network_has_the_derivatives_of_its_closed_form(level):
    """Of a mixture at α = 1. The form of the third residual, symmetric in its last two, is

    T_kij = σ³ ∂³_kij log q + ℓ_i ℓ_j ℓ_k − (A + I)_ij ℓ_k − (A + I)_ki ℓ_j − (A + I)_kj ℓ_i.
    """
    mixture, generator = ring(), torch.Generator().manual_seed(1)
    (row,) = mixture.sample(1, generator)
    state = generator.get_state()
    network = fields.Point(exact(mixture).model, row, level, generator)
    noise = torch.randn(2, generator=generator.set_state(state), dtype=torch.float64)
    sigma = torch.tensor([level], dtype=torch.float64)
    given = (row + sigma * noise)[None], torch.ones_like(sigma), sigma
    ell = noise + sigma * mixture.score(*given)[0]
    jacobian = sigma**2 * mixture.hessian(*given)[0]
    shifted = jacobian + torch.eye(2, dtype=torch.float64)
    crossed = torch.einsum("ki,j->kij", shifted, ell)
    forms = sigma**3 * mixture.third(*given)[0] + torch.einsum("k,i,j->kij", ell, ell, ell)
    forms = forms - torch.einsum("ij,k->kij", shifted, ell) - crossed - crossed.transpose(1, 2)
    forms, v = fields.symmetric(forms), torch.randn(5, 2, dtype=torch.float64)
    for ours, expected in (
        (network.jacobian, jacobian),
        (network.second, shifted - torch.outer(ell, ell)),
        (network.third(v), torch.einsum("ni,kij,nj->nk", v, forms, v)),
        (network.thirds, forms),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
