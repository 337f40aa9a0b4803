"""The public face of the engine against torch.func, with gradients in what a function trains."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import hessian, jacrev, vmap

from hosm_losses import taylor
from tests.cases import gradients
from tests.versions import CONSTANT


@pytest.fixture
def network():
    torch.manual_seed(0)
    # No norm that torch.func gets wrong. PyTorch 2.6 takes its own eps from the dtype.
    parts = nn.Linear(3, 8), nn.SiLU(), nn.RMSNorm(8, 1e-5), nn.Linear(8, 2), nn.GELU("tanh")
    return nn.Sequential(*parts)


@pytest.fixture
def points():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)


def directions(count=4):
    return torch.randn(count, 5, 3, generator=torch.Generator().manual_seed(2))


def same(got, expected, leaves):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(expected)
    mine, theirs = (gradients((each * weight).sum(), leaves) for each in (got, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def by_hessian(network, x, w, pairs):
    found = torch.einsum("bijk,nbj,nbk->nbi", vmap(hessian(network))(x), w, w)
    return found.sum(0) if pairs == "sum" else found


@pytest.mark.parametrize("pairs", ["none", "squares", "sum"])
def test_jet_is_what_torch_func_finds(network, points, pairs):
    w = directions().requires_grad_()
    leaves = [points, w, *network.parameters()]
    value, first, second = taylor.jet(network, points, w, pairs)
    same(value, network(points), [points, *network.parameters()])
    same(first, torch.einsum("bij,kbj->kbi", vmap(jacrev(network))(points), w), leaves)
    if pairs == "none":
        assert second is None
    else:
        same(second, by_hessian(network, points, w, pairs), leaves)


@pytest.mark.parametrize("flat", [True, False], ids=["a number for each sample", "a vector"])
def test_laplacian_is_the_trace_of_the_hessian_beside_value_and_gradient(network, points, flat):
    function = (lambda x: network(x).prod(-1)) if flat else network
    leaves = [points, *network.parameters()]
    value, gradient, found = taylor.laplacian(function, points, gradient=True)
    same(value, function(points), leaves)
    same(gradient, vmap(jacrev(function))(points), leaves)
    same(found, torch.einsum("b...ii->b...", vmap(hessian(function))(points)), leaves)
    same(taylor.laplacian(function, points), found, leaves)


def test_gradients_of_images_and_of_numbers():
    x = torch.randn(2, 1, 4, 4)
    found = taylor.laplacian(lambda x: x**3, x, gradient=True)
    units = torch.eye(16).reshape(1, 1, 4, 4, 1, 4, 4)
    gradient = 3 * x.square().reshape(2, 1, 4, 4, 1, 1, 1) * units
    torch.testing.assert_close(found, (x**3, gradient, 6 * x))
    numbers = taylor.laplacian(torch.sin, x[0, 0, 0], gradient=True)
    assert [each.shape for each in numbers] == [(4,)] * 3


def heat(x, t, label=None):
    """A function that mixes all of its inputs, with the shapes (B, 3), (B,) and (B, 1)."""
    wave = torch.exp(-t[:, None] * x.square()) * torch.cos(t)[:, None]
    return wave if label is None else wave * label


@pytest.mark.parametrize("pairs", ["none", "squares", "sum"])
def test_several_inputs_are_one_of_their_columns(points, pairs):
    t, label = torch.rand(5, requires_grad=True), torch.arange(5)[:, None]
    w = directions().requires_grad_(), torch.randn(4, 5, requires_grad=True)
    columns = torch.cat([points, t[:, None]], 1), torch.cat([w[0], w[1][..., None]], 2)
    expected = taylor.jet(lambda xt: heat(xt[:, :3], xt[:, 3], label), *columns, pairs)
    found = taylor.jet(heat, (points, t, label), (*w, None), pairs)
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            same(one, other, [points, t, *w])


def test_an_input_without_directions_is_held(points):
    t = torch.rand(5, requires_grad=True)
    found = taylor.jet(heat, (points, t), (directions(), None), "sum")
    expected = taylor.jet(lambda x: heat(x, t), points, directions(), "sum")
    for one, other in zip(found, expected, strict=True):
        same(one, other, [points, t])


def test_inputs_keep_their_own_types_and_inference_mode_is_left(points):
    x, t = points.detach(), torch.rand(5).float()
    w = directions(), torch.randn(4, 5)
    expected = taylor.jet(heat, (x, t), w, "squares")
    with torch.inference_mode():
        found = taylor.jet(heat, (x.clone(), t.clone()), tuple(map(torch.clone, w)), "squares")
        held = taylor.jet(heat, (x.clone(), t.clone()), (w[0].clone(), None))
    assert all(map(torch.equal, found, expected))
    assert torch.equal(held[0], expected[0])
    rounded = taylor.jet(heat, (x, t.double()), (w[0], w[1].float().double()), "squares")
    assert torch.allclose(expected[1], rounded[1], rtol=1e-5, atol=1e-6)


# Operators whose first or second derivative PyTorch does not implement in forward mode.
MISSING = {
    "pdist": F.pdist,
    "embedding_bag": lambda x: F.embedding_bag(torch.zeros(5, 1, dtype=torch.long), x, mode="sum"),
    "heaviside": lambda x: torch.heaviside(x, x),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, x.detach().sign(), reduction="none"),
    "special_zeta": lambda x: torch.special.zeta(x.square() + 2, x.square() + 1),
}


@pytest.mark.parametrize("name", MISSING)
def test_an_operator_without_a_forward_derivative_is_named_with_a_remedy(name, points):
    words = f"^{name}: PyTorch does not implement .* Write it with other operators"
    for derive in (taylor.laplacian, lambda f, x: taylor.jet(f, x, directions(), "squares")):
        with pytest.raises(taylor.TaylorError, match=words) as raised:
            derive(MISSING[name], points)
        assert "file an issue" not in str(raised.value)


def test_what_pytorch_does_not_implement_at_all_is_its_own_error(points):
    with pytest.raises(RuntimeError, match="Half"):
        taylor.laplacian(lambda x: torch.linalg.qr(x.half())[0], points)


# PyTorch takes these rows for a batch of vectors; and what is no part of a triangle is not read.
ROWS = torch.tensor([[1.0, 2.0], [-1.0, 3.0]], dtype=torch.float64)
WRONG = {
    "cholesky_solve": lambda x: torch.cholesky_solve(ROWS, x.tril()),
    "triangular_solve": lambda x: torch.triangular_solve(ROWS, x)[0],
    "functions behind": lambda x: torch._native_batch_norm_legit(x, None, None, True, 0.1, 1e-5)[
        0
    ],
}


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("words", WRONG)
def test_operators_with_a_wrong_forward_derivative_are_refused(words):
    x = torch.randn(2, 2, 2) + 3 * torch.eye(2)
    with pytest.raises((taylor.TaylorError, taylor.DerivativeError), match=words):
        taylor.laplacian(WRONG[words], x)


BATCH = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


ONES, BOTH = torch.ones(4, 5, 3), (BATCH, torch.ones(5))
# Inputs and directions: no batch in floating point, and what does not go together.
REFUSED = [
    (BATCH.long(), ONES, TypeError, r"x: expected .*; got torch\.int64\. .*torch\.as_tensor"),
    (BATCH.numpy(), ONES, TypeError, r"x: expected .*; got ndarray\. .*torch\.as_tensor"),
    (BATCH.cfloat(), ONES, TypeError, r"got torch\.complex64\. Pass real numbers, "),
    (BATCH[0, 0], ONES, ValueError, r"x: expected a batch.*x\.reshape"),
    (BATCH, ONES.long(), TypeError, r"directions: .*torch\.as_tensor\("),
    (BATCH, ONES.numpy(), TypeError, r"directions: .*torch\.as_tensor\("),
    (BATCH, ONES[..., :2], ValueError, "directions"),
    (BATCH, ONES[:0], ValueError, "directions"),
    (BATCH, (ONES,), TypeError, "tensor in floating point; got tuple"),
    (BOTH, (None, None), ValueError, "for at least one of them"),
    (BOTH, (ONES, ONES[:2, :, 0]), ValueError, "one K and one B"),
    ((BATCH, torch.ones(1)), (ONES, ONES[:, :1, 0]), ValueError, "one K and one B"),
    (BOTH, (None, ONES[..., :1]), ValueError, r"directions\[1\]: .*\(K, 5\); got \(4, 5, 1\)"),
    (BOTH, (ONES.long(), None), TypeError, r"directions\[0\]: "),
    ((BATCH, BATCH[0, 0]), (None, torch.ones(1)), ValueError, r"x\[1\]: expected a batch"),
]


@pytest.mark.parametrize(("x", "w", "error", "told"), REFUSED)
def test_what_is_refused_in_a_sentence(x, w, error, told):
    with pytest.raises(error, match=told):
        taylor.jet(heat if isinstance(x, tuple) else torch.sin, x, w)
    if x is not BATCH and not isinstance(x, tuple):
        with pytest.raises(error, match=told):
            taylor.laplacian(torch.sin, x)


def test_pairs_are_of_a_kind_that_is_known():
    with pytest.raises(ValueError):
        taylor.jet(torch.sin, BATCH, ONES, "all")


def test_samples_may_have_no_elements():
    value, first, _ = taylor.jet(torch.sin, BATCH[:, :0], BATCH[None, :, :0])
    assert (value.shape, first.shape) == ((5, 0), (1, 5, 0))


@pytest.mark.parametrize(("short", "wide"), [("x", "directions"), ("directions", "x")])
def test_directions_are_taken_in_the_type_of_x(network, short, wide):
    given = {short: torch.float32, wide: torch.float64}
    x, w = BATCH.to(given["x"]), directions().to(given["directions"])
    got = taylor.jet(network.to(x.dtype), x, w, "sum")
    expected = taylor.jet(network, x, w.to(x.dtype), "sum")
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == x.dtype


def test_in_inference_mode_they_are_what_they_are_outside(network):
    found = []
    for around in (torch.no_grad, torch.inference_mode):
        with around():
            x, w = BATCH.clone(), directions()
            jet = taylor.jet(network, x, w, "squares")
            found.append((*jet, taylor.laplacian(network, x)))
            assert not any(each.requires_grad for each in found[-1])
    assert all(map(torch.equal, *found))


def test_advice_names_no_argument_of_another_function():
    for function in (torch.linalg.eigvalsh, torch.fft.fft, torch.no_grad()(torch.sin), CONSTANT):
        with pytest.raises((taylor.TaylorError, taylor.DerivativeError)) as raised:
            taylor.laplacian(function, torch.randn(2, 3, 3))
        assert "engine" not in str(raised.value)
