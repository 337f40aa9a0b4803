"""Probes: shapes, moments and the known variance of vᵀ A v."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hosm_losses.probes import (
    DISTRIBUTIONS,
    Distribution,
    draw_probes,
    unit_vector_chunks,
    unit_vectors,
)
from tests.oracles import Largest

COUNT = 40_000


def test_the_names_that_a_type_checker_knows_are_those_that_can_be_drawn():
    assert get_args(Distribution) == tuple(DISTRIBUTIONS)


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    count=st.integers(1, 3),
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_shape_and_dtype_are_those_of_the_batch(shape, count, distribution, dtype):
    probes = draw_probes(torch.zeros(shape, dtype=dtype), count, distribution)
    assert probes.shape == (count, *shape)
    assert probes.dtype == dtype


def dct_matrix(n):
    """By definition, one element after the other."""
    rows = []
    for k in range(n):
        row = [math.cos(math.pi * k * (2 * j + 1) / (2 * n)) for j in range(n)]
        length = math.sqrt(sum(entry**2 for entry in row))
        rows.append([entry / length for entry in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 2, 5), (1, 3)])
def test_dct_probes_are_signs_in_the_cosine_basis_of_every_dimension(shape):
    v = draw_probes(torch.zeros(6, *shape), 2, "dct", torch.Generator().manual_seed(0))
    signs = draw_probes(torch.zeros(6, *shape), 2, "rademacher", torch.Generator().manual_seed(0))
    basis = torch.ones(1, 1)
    for n in shape:
        basis = torch.kron(basis, dct_matrix(n))
    torch.testing.assert_close(
        v.reshape(12, -1), signs.reshape(12, -1) @ basis, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(1, 1_000_000), (3, 512, 512)])
def test_dct_probes_of_a_million_elements_make_no_matrix(shape):
    like = torch.zeros(1, *shape, dtype=torch.float32)
    with Largest() as largest:
        v = draw_probes(like, 1, "dct", torch.Generator().manual_seed(0))
    assert largest.elements <= 4 * like.numel()
    # An orthonormal basis keeps the length of the signs, √d.
    length = v.double().square().sum().sqrt()
    assert float(length) == pytest.approx(like.numel() ** 0.5, rel=1e-6)
    # The mean is the amplitude of the constant, a sign over √d in every element.
    assert abs(float(v.double().mean())) * like.numel() ** 0.5 == pytest.approx(1, rel=1e-3)


def test_dct_probes_in_half_precision_are_rounded_once():
    options = (3, "dct")
    exact = draw_probes(torch.zeros(2, 3, 64), *options, torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        like = torch.zeros(2, 3, 64, dtype=dtype)
        v = draw_probes(like, *options, torch.Generator().manual_seed(0))
        wide = draw_probes(like.float(), *options, torch.Generator().manual_seed(0))
        assert torch.equal(v, wide.to(dtype))
        torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_probes_on_meta_read_no_value(distribution):
    v = draw_probes(torch.empty(2, 3, 8, device="meta"), 4, distribution)
    assert v.device.type == "meta"
    assert v.shape == (4, 2, 3, 8)


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_probes_are_drawn_in_one_graph(distribution):
    def draw(like):
        return draw_probes(like, 2, distribution)

    like = torch.zeros(3, 4)
    torch.manual_seed(1)
    compiled = torch.compile(draw, fullgraph=True, backend="eager")(like)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled, draw(like))


def test_dct_probes_have_no_variance_where_neighbours_act_alike():
    """A second difference with reflecting ends is diagonal in the cosine basis."""
    d = 6
    matrix = 2 * torch.eye(d) - torch.ones(d - 1).diag(1) - torch.ones(d - 1).diag(-1)
    matrix[0, 0] = matrix[-1, -1] = 1
    v = draw_probes(torch.zeros(20, d), 1, "dct")[0]
    forms = torch.einsum("ni,ij,nj->n", v, matrix, v)
    torch.testing.assert_close(forms, matrix.trace().expand(20))


def test_autocast_does_not_round_the_probes():
    like = torch.zeros(5, 3, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = draw_probes(like, 4, "dct").double()
    torch.testing.assert_close(v.square().sum((2, 3)), torch.full((4, 5), 24.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_moments_and_the_variance_of_a_quadratic_form(distribution):
    d = 4
    matrix = torch.randn(d, d)
    generator = torch.Generator().manual_seed(1)
    v = draw_probes(torch.zeros(COUNT, d), 1, distribution, generator)[0]
    outer = torch.einsum("ni,nj->nij", v, v)
    error = outer.std(0) / COUNT**0.5
    assert bool(((outer.mean(0) - torch.eye(d)).abs() <= 5 * error + 1e-12).all())

    symmetric = (matrix + matrix.T) / 2
    off = torch.triu(matrix + matrix.T, 1)
    gaussian = 2 * (symmetric**2).sum()
    traceless = symmetric - symmetric.trace() / d * torch.eye(d)
    rotated = dct_matrix(d) @ matrix @ dct_matrix(d).T
    variance = {
        "rademacher": (off**2).sum(),
        "gaussian": gaussian,
        "sphere": 2 * d / (d + 2) * (traceless**2).sum(),
        "dct": (torch.triu(rotated + rotated.T, 1) ** 2).sum(),
    }[distribution]
    forms = torch.einsum("ni,ij,nj->n", v, matrix, v)
    squares = (forms - matrix.trace()) ** 2
    assert abs(squares.mean() - variance) < 5 * squares.std() / COUNT**0.5


def test_rademacher_is_signs_and_the_sphere_has_radius_root_d():
    like = torch.zeros(50, 3, 2)
    assert set(draw_probes(like, 2).unique().tolist()) == {-1.0, 1.0}
    radius = draw_probes(like, 2, "sphere").square().sum((2, 3))
    torch.testing.assert_close(radius, torch.full((2, 50), 6.0))


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_a_generator_decides_and_the_global_one_is_left_alone(distribution):
    before = torch.get_rng_state()
    draws = [
        draw_probes(torch.zeros(3, 2), 2, distribution, torch.Generator().manual_seed(5))
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)


def test_unit_vectors_are_all_of_them_for_every_sample():
    units = unit_vectors(torch.zeros(3, 2, 2))
    assert units.shape == (4, 3, 2, 2)
    for row in range(3):
        assert torch.equal(units[:, row].reshape(4, 4), torch.eye(4))
    assert unit_vectors(torch.zeros(3)).tolist() == [[1.0, 1.0, 1.0]]


def test_unit_vectors_come_in_chunks_that_are_made_when_due():
    like = torch.zeros(2, 3, 70)
    assert torch.equal(torch.cat(list(unit_vector_chunks(like, 32))), unit_vectors(like))
    with Largest() as largest:
        for chunk in unit_vector_chunks(torch.zeros(1, 5000), 3):
            assert chunk.shape[0] <= 3
    assert largest.elements <= 3 * 5000


def test_too_many_unit_vectors_say_what_they_would_take():
    with (
        Largest() as largest,
        pytest.raises(ValueError),
    ):
        unit_vectors(torch.zeros(2, 1_000_000, device="meta", dtype=torch.float32))
    assert largest.elements <= 2_000_000
    # d·B·d = 16 GiB is the most that is made.
    like = torch.empty(1, 2**16, device="meta", dtype=torch.float32)
    assert unit_vectors(like).shape == (2**16, 1, 2**16)
