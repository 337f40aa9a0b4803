"""The public face of the engine against torch.func, with gradients in what a function trains."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import hessian, jacrev, vmap

from hosm_losses import taylor
from tests.cases import gradients
from tests.versions import CONSTANT, compiles_higher_orders


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
def test_laplacian_is_the_trace_of_the_hessian(network, points, flat):
    function = (lambda x: network(x).prod(-1)) if flat else network
    found = taylor.laplacian(function, points)
    assert found.shape == function(points).shape
    whole = vmap(hessian(function))(points)
    same(found, torch.einsum("b...ii->b...", whole), [points, *network.parameters()])


@pytest.mark.parametrize("flat", [True, False], ids=["a number for each sample", "a vector"])
def test_value_and_gradient_come_with_the_laplacian(network, points, flat):
    function = (lambda x: network(x).prod(-1)) if flat else network
    value, gradient, found = taylor.laplacian(function, points, gradient=True)
    leaves = [points, *network.parameters()]
    same(value, function(points), leaves)
    same(gradient, vmap(jacrev(function))(points), leaves)
    same(found, taylor.laplacian(function, points), leaves)


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


SEVERAL = {
    "one tensor of directions": (torch.ones(4, 5, 3), ValueError, r"directions\[0\]: expected"),
    "too few": ((torch.ones(4, 5, 3),), ValueError, "shorter"),
    "none at all": ((None, None), ValueError, "for at least one of them"),
    "another K": ((torch.ones(4, 5, 3), torch.ones(2, 5)), ValueError, "one K and one B"),
    "another shape": (
        (None, torch.ones(4, 5, 1)),
        ValueError,
        r"directions\[1\]: .*\(K, 5\); got \(4, 5, 1\)",
    ),
    "integers": ((torch.ones(4, 5, 3).long(), None), TypeError, r"directions\[0\]: "),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_directions_of_several_inputs_are_refused_in_a_sentence(name, points):
    w, kind, match = SEVERAL[name]
    with pytest.raises(kind, match=match):
        taylor.jet(heat, (points, torch.ones(5)), w)


def test_several_inputs_have_one_batch(points):
    with pytest.raises(ValueError, match="one K and one B"):
        taylor.jet(heat, (points, torch.ones(1)), (torch.ones(1, 5, 3), torch.ones(1, 1)))
    with pytest.raises(ValueError, match=r"x\[1\]: expected a batch"):
        taylor.jet(heat, (points, torch.tensor(1.0)), (None, torch.ones(1)))
    with pytest.raises(TypeError, match="tensor in floating point; got tuple"):
        taylor.jet(torch.sin, points, (torch.ones(1, 5, 3),))


def test_laplacian_of_images():
    """Of the sum of cubes of a convolution, whose Laplacian is written out."""
    layer = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    x = torch.randn(2, 1, 4, 4)
    found = taylor.laplacian(lambda x: layer(x) ** 3, x)
    ones = torch.ones_like(x)
    squares = nn.functional.conv2d(ones, layer.weight.square(), padding=1)
    torch.testing.assert_close(found, 6 * layer(x) * squares)


def test_under_vmap_and_grad(network, points):
    parameters = dict(network.named_parameters())

    def loss(parameters, x):
        called = lambda x: torch.func.functional_call(network, parameters, (x,))  # noqa: E731
        return taylor.laplacian(called, x[None]).square().sum()

    each = vmap(torch.func.grad(loss), (None, 0))(parameters, points.detach())
    whole = taylor.laplacian(network, points).square().sum()
    expected = dict(zip(parameters, gradients(whole, list(parameters.values())), strict=True))
    summed = {name: gradient.sum(0) for name, gradient in each.items()}
    torch.testing.assert_close(summed, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@compiles_higher_orders
def test_under_compile(network, points):
    compiled = torch.compile(taylor.laplacian, fullgraph=True, backend="aot_eager")

    def function(x):
        return network(x.sin() + x.cos())

    same(compiled(function, points), taylor.laplacian(function, points), [*network.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(network, points, dtype):
    near = 4 * torch.finfo(dtype).eps
    short, w = network.to(dtype), directions().to(dtype)
    x = points.detach().to(dtype)
    found = taylor.jet(short, x, w, "squares")
    exact = taylor.jet(short.double(), x.double(), w.double(), "squares")
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < near * other.norm()


@pytest.mark.parametrize(
    ("count", "shape", "pairs"),
    [(2, (5, 4), "none"), (0, (5, 3), "none"), (2, (5, 3), "all")],
)
def test_arguments_that_do_not_go_together(network, points, count, shape, pairs):
    with pytest.raises(ValueError):
        taylor.jet(network, points, torch.ones(count, *shape), pairs)


def test_what_cannot_be_followed_is_named(points):
    with pytest.raises(taylor.TaylorError, match="complex"):
        taylor.jet(lambda x: torch.fft.fft(x).real, points, directions())


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
REFUSED = {
    "integers": (
        BATCH.long(),
        TypeError,
        r"x: expected .*; got torch\.int64\. .*torch\.as_tensor",
    ),
    "an array": (BATCH.numpy(), TypeError, r"x: expected .*; got ndarray\. .*torch\.as_tensor"),
    "complex numbers": (BATCH.cfloat(), TypeError, r"got torch\.complex64\. Pass real numbers, "),
    "a number": (BATCH[0, 0], ValueError, r"x: expected a batch.*x\.reshape"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("call", ["jet", "laplacian"])
def test_what_is_no_batch_in_floating_point_is_refused_in_a_sentence(call, name):
    x, kind, match = REFUSED[name]
    calls = {
        "jet": lambda: taylor.jet(torch.sin, x, torch.ones(1, 5, 3)),
        "laplacian": lambda: taylor.laplacian(torch.sin, x),
    }
    with pytest.raises(kind, match=match):
        calls[call]()


def test_samples_may_have_no_elements():
    value, first, _ = taylor.jet(torch.sin, BATCH[:, :0], BATCH[None, :, :0])
    assert (value.shape, first.shape) == ((5, 0), (1, 5, 0))


@pytest.mark.parametrize("w", [BATCH[None].long(), BATCH[None].numpy()])
def test_directions_are_refused_likewise(w):
    with pytest.raises(TypeError, match=r"directions: .*torch\.as_tensor\("):
        taylor.jet(torch.sin, BATCH, w)


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
    functions = (
        torch.linalg.eigvalsh,
        torch.fft.fft,
        torch.no_grad()(torch.sin),
        CONSTANT,
    )
    for function in functions:
        with pytest.raises((taylor.TaylorError, taylor.DerivativeError)) as raised:
            taylor.laplacian(function, torch.randn(2, 3, 3))
        assert "engine" not in str(raised.value)
