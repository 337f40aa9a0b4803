"""Probes: shapes, moments and the known variance of vᵀ A v."""

import math
import pickle
from typing import get_args

import numpy as np
import pytest
import torch

from hosm_losses.probes import (
    DISTRIBUTIONS,
    Distribution,
    Hutchinson,
    Paired,
    unit_vector_chunks,
    unit_vectors,
)
from tests.cases import Largest

COUNT = 20_000


def seeded():
    return torch.Generator().manual_seed(0)


def dct_matrix(n):
    """By definition: cosines, as rows of length 1."""
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n)
    rows = (math.pi * k * (2 * j + 1) / (2 * n)).cos()
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("distribution", get_args(Distribution))
def test_probes_are_like_the_batch_and_drawn_from_the_generator(distribution):
    before = torch.get_rng_state()
    for shape in ((3,), (1, 1), (2, 3, 4), (2, 1, 3, 2)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            like = torch.zeros(shape, dtype=dtype)
            probes, again = (Hutchinson(2, distribution).draw(like, seeded()) for _ in range(2))
            assert probes.shape == (2, *shape)
            assert probes.dtype == dtype
            assert torch.equal(probes, again)
        # No value is read.
        probes = Hutchinson(2, distribution).draw(torch.empty(shape, device="meta"), None)
        assert probes.device.type == "meta"
        assert probes.shape == (2, *shape)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_distribution_has_a_name():
    assert get_args(Distribution) == tuple(DISTRIBUTIONS)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moments_and_the_variance_of_a_quadratic_form(distribution):
    d = 4
    matrix = torch.randn(d, d)
    v = Hutchinson(2, distribution).draw(torch.zeros(COUNT, d), seeded())
    both = torch.cat([v[0], v[1]], 1)
    outer = torch.einsum("ni,nj->nij", both, both)
    error = outer.std(0) / COUNT**0.5
    assert bool(((outer.mean(0) - torch.eye(2 * d)).abs() <= 5 * error + 1e-12).all())

    symmetric = (matrix + matrix.T) / 2
    traceless = symmetric - symmetric.trace() / d * torch.eye(d)
    rotated = dct_matrix(d) @ symmetric @ dct_matrix(d).T
    variance = {
        "rademacher": 4 * (torch.triu(symmetric, 1) ** 2).sum(),
        "gaussian": 2 * (symmetric**2).sum(),
        "sphere": 2 * d / (d + 2) * (traceless**2).sum(),
        "dct": 4 * (torch.triu(rotated, 1) ** 2).sum(),
    }[distribution]
    squares = (torch.einsum("kni,ij,knj->kn", v, matrix, v) - matrix.trace()) ** 2
    assert abs(squares.mean() - variance) < 5 * squares.std() / (2 * COUNT) ** 0.5


def test_rademacher_is_signs_and_the_sphere_has_radius_root_d():
    like = torch.zeros(50, 3, 2)
    assert set(Hutchinson(2).draw(like, None).unique().tolist()) == {-1.0, 1.0}
    radius = Hutchinson(2, "sphere").draw(like, None).square().sum((2, 3))
    torch.testing.assert_close(radius, torch.full((2, 50), 6.0))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 2, 5), (1, 3)])
def test_dct_probes_are_signs_in_the_cosine_basis_of_every_dimension(shape):
    like, basis = torch.zeros(6, *shape), torch.ones(1, 1)
    v, signs = (Hutchinson(2, each).draw(like, seeded()) for each in ("dct", "rademacher"))
    for n in shape:
        basis = torch.kron(basis, dct_matrix(n))
    expected = (signs.reshape(12, -1) @ basis).reshape(v.shape)
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = Hutchinson(2, "dct").draw(like.float(), seeded())
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)
    for half in (torch.float16, torch.bfloat16):  # rounded once
        assert torch.equal(Hutchinson(2, "dct").draw(like.to(half), seeded()), single.to(half))


@pytest.mark.parametrize("shape", [(1, 1_000_000), (3, 512, 512)])
def test_dct_probes_of_a_million_elements_make_no_matrix(shape):
    like = torch.zeros(1, *shape, dtype=torch.float32)
    with Largest() as largest:
        v = Hutchinson(1, "dct").draw(like, seeded()).double()
    assert largest.elements <= 4 * like.numel()
    # An orthonormal basis keeps the length of the signs, √d.
    assert float(v.square().sum()) == pytest.approx(like.numel(), rel=2e-6)
    # The mean is the amplitude of the constant, a sign over √d in every element.
    assert abs(float(v.mean())) * like.numel() ** 0.5 == pytest.approx(1, rel=1e-3)


def test_unit_vectors_are_all_of_them_for_every_sample_in_chunks_made_when_due():
    units = unit_vectors(torch.zeros(3, 2, 2))
    assert torch.equal(units.reshape(4, 3, 4), torch.eye(4)[:, None].expand(4, 3, 4))
    assert unit_vectors(torch.zeros(3)).tolist() == [[1.0, 1.0, 1.0]]
    like = torch.zeros(2, 3, 70)
    assert torch.equal(torch.cat(list(unit_vector_chunks(like, 32))), unit_vectors(like))
    with Largest() as largest:
        assert {len(chunk) for chunk in unit_vector_chunks(torch.zeros(1, 5000), 3)} == {2, 3}
    assert largest.elements <= 3 * 5000


def test_too_many_unit_vectors_are_refused_before_they_are_made():
    # d·B·d numbers of 16 GiB are the most that is made.
    like = torch.empty(1, 2**16 + 1, device="meta", dtype=torch.float32)
    with Largest() as largest, pytest.raises(ValueError, match="probes: expected a number"):
        unit_vectors(like)
    assert largest.elements <= like.numel()
    assert unit_vectors(like[:, 1:]).shape == (2**16, 1, 2**16)


@pytest.mark.parametrize(("value", "fewest"), [(Hutchinson, 1), (Paired, 2)])
def test_values_compare_hash_pickle_and_print_as_written(value, fewest):
    made = value(np.int64(4), "dct")
    assert type(made.count) is int
    assert made == value(count=4, distribution="dct") == pickle.loads(pickle.dumps(made))
    assert len({made, value(4, "dct"), value()}) == 2
    assert repr(made).startswith(f"{value.__name__}(count=4, distribution='dct'")
    assert value().count == fewest
    with pytest.raises(AttributeError):
        made.count = 1
