"""Determinants, inverses, systems and Cholesky factors against closed forms and differences."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, vmap

from hosm_losses import taylor
from hosm_losses.taylor import propagate
from tests.cases import assert_same, gradients
from tests.taylor.checks import KINDS
from tests.versions import compiles_higher_orders

DRAWS = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
A = DRAWS[0]
TIMES = torch.linspace(-0.4, 0.4, 5, dtype=torch.float64)


def path(s, k=1):
    """Matrices on a curve of degree two in the numbers s (B,), far from singular ones."""
    s = s[:, None, None]
    return 3 * torch.eye(3) + DRAWS[k] * s + DRAWS[k + 1] * s * s


def lower(s):
    return path(s).tril() + 2 * torch.eye(3)


def upper(s):
    return path(s, 3).triu()


def log_diagonal(s):
    return lower(s).diagonal(dim1=1, dim2=2).log().sum(1) + upper(s).diagonal(
        dim1=1, dim2=2
    ).log().sum(1)


def swapped(s):
    """With two rows changed over, so that its determinant is below zero."""
    return (lower(s) @ upper(s))[:, [1, 0, 2]]


# A function of s in these operators, and what it is without them.
CLOSED = {
    "slogdet": (lambda s: torch.linalg.slogdet(swapped(s)).logabsdet, log_diagonal),
    "Tensor.slogdet": (lambda s: swapped(s).slogdet()[1], log_diagonal),
    "sign": (lambda s: torch.slogdet(swapped(s)).sign * s, lambda s: -s),
    "logdet": (lambda s: torch.logdet(lower(s) @ upper(s)), log_diagonal),
    "det": (lambda s: torch.linalg.det(swapped(s)), lambda s: -log_diagonal(s).exp()),
    "inv": (lambda s: torch.linalg.inv(torch.inverse(path(s))), path),
    "inv of a product": (
        lambda s: path(s) @ (path(s, 3) @ path(s)).inverse(),
        lambda s: path(s, 3).inverse(),
    ),
    "solve": (lambda s: torch.linalg.solve(path(s), path(s) @ path(s, 3)), lambda s: path(s, 3)),
    "solve from the right": (
        lambda s: torch.linalg.solve(path(s), path(s, 3) @ path(s), left=False),
        lambda s: path(s, 3),
    ),
    "solve for a vector": (
        lambda s: torch.linalg.solve(path(s), (path(s) @ path(s, 3)[:, 0, :, None])[..., 0]),
        lambda s: path(s, 3)[:, 0],
    ),
    "solve with a constant": (
        lambda s: torch.linalg.solve(A + 3 * torch.eye(3), (A + 3 * torch.eye(3)) @ path(s)),
        path,
    ),
    "cholesky": (lambda s: torch.linalg.cholesky(lower(s) @ lower(s).mT), lower),
    "the upper factor": (
        lambda s: torch.linalg.cholesky(upper(s).mT @ upper(s), upper=True),
        upper,
    ),
}


@pytest.mark.parametrize(("pairs", "count"), KINDS)
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name, pairs, count):
    directions = torch.stack([torch.ones(5), torch.linspace(-1, 2, 5)])[:count].double()
    found, expected = (propagate(f, TIMES, directions, pairs) for f in CLOSED[name])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_laplacian_in_the_entries():
    """That of log|det A| is −Σ X_ij²; the determinant is linear in each entry."""
    X = A.inverse()
    value, slope, bend = taylor.laplacian(lambda x: torch.linalg.slogdet(x)[1], A, gradient=True)
    assert_same([value, slope, bend], [A.det().abs().log(), X.mT, -X.square().sum((1, 2))], 1e-12)
    value, slope, bend = taylor.laplacian(torch.det, A, gradient=True)
    assert_same([value, slope], [A.det(), A.det()[:, None, None] * X.mT], 1e-12)
    assert bend.abs().max() < 1e-12
    assert_same(taylor.laplacian(torch.linalg.inv, A), 2 * X @ X.mT @ X, 1e-12)


def test_a_change_that_is_not_symmetric_counts_as_its_symmetric_part():
    """As in the gradients of PyTorch."""
    P = A @ A.mT + torch.eye(3)
    for upper in (False, True):
        factor = partial(torch.linalg.cholesky, upper=upper)
        assert_same(taylor.laplacian(factor, P, gradient=True)[1], vmap(jacrev(factor))(P))


class Fermions(nn.Module):
    """Trained orbitals of four particles in two dimensions, and a function of their matrix."""

    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.orbitals = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
        self.head = head

    def forward(self, x):
        return self.head(self.orbitals(x.unflatten(-1, (4, 2))))


def positive(M):
    return M @ M.mT + torch.eye(4)


HEADS = {
    "slogdet": lambda M: torch.linalg.slogdet(M)[1],
    "logdet": lambda M: torch.logdet(positive(M)),
    "det": lambda M: 100 * torch.linalg.det(M),
    "solve": lambda M: torch.linalg.solve(positive(M), M[..., 0]).sum(-1),
    "inv": lambda M: torch.linalg.inv(positive(M)).square().sum((-2, -1)),
    "cholesky": lambda M: torch.linalg.cholesky(positive(M)).sum((-2, -1)),
}
POINTS = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_under_vmap_and_grad():
    network = Fermions(HEADS["slogdet"])
    parameters = dict(network.named_parameters())

    def loss(parameters, x):
        called = lambda x: torch.func.functional_call(network, parameters, (x,))  # noqa: E731
        return taylor.laplacian(called, x[None]).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, POINTS)
    whole = taylor.laplacian(network, POINTS).square().sum()
    expected = dict(zip(parameters, gradients(whole, network), strict=True))
    torch.testing.assert_close({name: g.sum(0) for name, g in each.items()}, expected)


@pytest.mark.slow
@compiles_higher_orders
@pytest.mark.parametrize("name", HEADS)
def test_under_compile(name):
    network = Fermions(HEADS[name])
    compiled = torch.compile(taylor.laplacian, fullgraph=True, backend="aot_eager")
    found, expected = (f(network, POINTS) for f in (compiled, taylor.laplacian))
    assert_same(found, expected)
    assert_same(*(gradients(each.square().sum(), network) for each in (found, expected)))


IN_FLOAT32 = {
    "det": torch.det,
    "solve": lambda M: torch.linalg.solve(M, M[:, 0]),
    "cholesky": torch.linalg.cholesky,
}


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_autocast_changes_nothing(name):
    M = (A @ A.mT + torch.eye(3)).float()
    given = IN_FLOAT32[name], M, M.cos()[None], "sum"
    expected = taylor.jet(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = taylor.jet(*given)
    assert all(map(torch.equal, found, expected))


def test_matrices_that_have_no_inverse():
    """A determinant is right and its derivatives are NaN, for that sample alone."""
    x = torch.stack([torch.ones(2, 2), torch.eye(2)])
    for function, value in ((torch.det, 0.0), (lambda x: torch.slogdet(x)[1], -torch.inf)):
        found = taylor.jet(function, x, torch.ones(1, 2, 2, 2), "squares")
        assert found[0][0] == value
        assert [bool(each[0, 0].isnan()) for each in found[1:]] == [True, True]
        assert all(each[0, 1].isfinite() for each in found[1:])
    for function in (torch.linalg.inv, lambda x: torch.linalg.solve(x, x)):
        with pytest.raises(torch.linalg.LinAlgError):
            taylor.laplacian(function, x)
    with pytest.raises(torch.linalg.LinAlgError):
        taylor.laplacian(torch.linalg.cholesky, x - 2)


def test_the_log_of_a_determinant_below_zero_is_not_a_number():
    found = taylor.jet(
        torch.logdet, A[:, [1, 0, 2]] * A.det().sign()[:, None, None], A[None], "sum"
    )
    assert all(each.isnan().all() for each in found)
