"""Every engine against dense derivatives, and every gradient the losses need of them."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from hosm_losses import DerivativeError, ScoreModel, VPSchedule
from hosm_losses.derivatives.select import _choice
from hosm_losses.derivatives.taylor import Jet
from hosm_losses.model import noise_field
from tests.oracles import Cubes, OnceDifferentiable, Spectral, dense_derivatives, networks

ENGINES = ("auto", "reverse", "taylor")
NAMES = ("mlp", "conv", "attention")


def setting(name, batch=2, count=1):
    network, shape = networks()[name]
    model = ScoreModel(network, VPSchedule())
    t = torch.linspace(0.2, 0.7, batch)
    x = torch.randn(batch, *shape)
    w = torch.randn(count, batch, *shape)
    return network, noise_field(model, t), x, w, t


def by_hand(network, x, t):
    """Dense f, ∂f and ∂²f of each sample, its norms and attention written out."""
    network.by_hand = True
    dense = [
        dense_derivatives(
            lambda point, row=row: -network(point[None], t[row : row + 1])[0], x[row]
        )
        for row in range(len(x))
    ]
    network.by_hand = False
    return dense


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_value_directional_and_gradient_are_the_dense_ones(name, engine, order, count):
    network, field, x, w, t = setting(name, count=count)
    derived = field.derive(x, w, order=order, derivative=engine)
    assert (derived.third is None) == (order == 2)
    for row, (f, jacobian, second) in enumerate(by_hand(network, x, t)):
        for k in range(count):
            v = w[k, row].reshape(-1)
            value = derived.value[min(k, len(derived.value) - 1), row].reshape(-1)
            torch.testing.assert_close(value, f, rtol=1e-10, atol=1e-12)
            along = derived.directional[k, row].reshape(-1)
            torch.testing.assert_close(along, jacobian @ v, rtol=1e-10, atol=1e-12)
            if order == 3:
                gradient = torch.einsum("ijk,i,j->k", second, v, v)
                got = derived.third[k, row].reshape(-1)
                torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_directional_is_the_jacobian_and_not_its_transpose(engine):
    matrix = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    field = noise_field(ScoreModel(lambda x, t: -x @ matrix.T, VPSchedule()), torch.tensor([0.5]))
    w = torch.tensor([[[0.0, 1.0]]])
    for order in (2, 3):
        derived = field.derive(torch.zeros(1, 2), w, order=order, derivative=engine)
        assert derived.directional.tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_without_gradients_the_values_are_the_same_and_carry_no_graph(engine, order):
    _, field, x, w, _ = setting("attention", count=2)
    expected = field.derive(x, w, order=order, derivative=engine)
    with torch.no_grad():
        got = field.derive(x, w, order=order, derivative=engine)
    for part, reference in zip(got, expected, strict=True):
        if reference is not None:
            assert not part.requires_grad
            assert reference.requires_grad
            torch.testing.assert_close(part, reference, rtol=0, atol=0)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_reaches_the_point_itself(engine, order):
    """A trainable encoder before the diffusion gets its gradient, as central differences say."""
    _, field, x, w, _ = setting("mlp")
    direction = torch.randn_like(x)
    weights = [torch.randn(1, *x.shape) for _ in range(order)]

    def total(point):
        parts = [
            p for p in field.derive(point, w, order=order, derivative=engine) if p is not None
        ]
        return sum((a * b).sum() for a, b in zip(parts, weights, strict=True))

    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(point), point)
    h = 1e-5
    difference = (total(x + h * direction) - total(x - h * direction)).item() / (2 * h)
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_linear_field_has_gradient_zero(engine):
    layer = nn.Linear(3, 3)
    field = noise_field(ScoreModel(lambda x, t: layer(x), VPSchedule()), torch.tensor([0.5]))
    derived = field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=3, derivative=engine)
    assert derived.third.abs().max() == 0
    derived.directional.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("order", [2, 3])
def test_auto_is_the_taylor_engine_in_eager_mode(order, count):
    layer, seen = nn.Linear(3, 3), []

    def network(x, t):
        seen.append("taylor" if isinstance(x, Jet) else "reverse")
        return layer(x).sin()

    field = noise_field(ScoreModel(network, VPSchedule()), torch.tensor([0.2, 0.7]))
    x, w = torch.randn(2, 3), torch.randn(count, 2, 3)
    for engine in ENGINES:
        seen.clear()
        field.derive(x, w, order=order, derivative=engine)
        assert seen == ["taylor" if engine == "auto" else engine]


class DropsItsInputs(torch.autograd.Function):
    """A checkpoint that forgets its inputs in its first backward, so that a second cannot be."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function, ctx.saved = function, x.detach()
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved.requires_grad_()
            del ctx.saved
            return *torch.autograd.grad(ctx.function(x), x, grad, create_graph=True), None


def test_a_function_that_forgets_what_it_saved_is_explained():
    layer = nn.Linear(3, 3)
    network = ScoreModel(lambda x, t: DropsItsInputs.apply(x, layer).sin(), VPSchedule())
    field = noise_field(network, torch.tensor([0.5]))
    with pytest.raises(DerivativeError, match=r"can differentiate again.*no attribute 'saved'"):
        field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=3, derivative="reverse")


def test_auto_falls_back_to_reverse_mode_and_says_so_once():
    network = Spectral()
    field = noise_field(ScoreModel(network, VPSchedule()), torch.tensor([0.5]))
    x, w = torch.randn(1, 3), torch.randn(1, 1, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for order in (2, 3, 2):
            derived = field.derive(x, w, order=order)
            reverse = field.derive(x, w, order=order, derivative="reverse")
            assert torch.equal(derived.directional, reverse.directional)
    (told,) = [str(record.message) for record in said]
    assert "the engine 'taylor' cannot differentiate Spectral (fft_fft: makes complex" in told
    assert told.endswith("x), so reverse mode, which is slower, takes its place.")


def test_the_choice_does_not_keep_the_network_alive():
    network = Spectral()
    field = noise_field(ScoreModel(network, VPSchedule()), torch.tensor([0.5]))
    with pytest.warns(UserWarning, match="so reverse mode"):
        field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=2)
    alive = weakref.ref(network)
    del network, field
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("order", [2, 3])
def test_auto_names_every_reason_where_no_engine_can(order):
    layer = nn.Linear(3, 3)
    network = ScoreModel(lambda x, t: OnceDifferentiable.apply(layer(x)), VPSchedule())
    field = noise_field(network, torch.tensor([0.5]))
    with pytest.raises(DerivativeError, match=r"taylor: .*; reverse: "):
        field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=order)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("16 GiB"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_auto_does_not_take_a_device_that_fails_for_a_network_that_cannot(error):
    layer, failures = nn.Linear(3, 3), [error]

    class Failing(nn.Module):
        def forward(self, x, t):
            if failures:
                raise failures.pop()
            return layer(x).sin()

    network = Failing()
    field = noise_field(ScoreModel(network, VPSchedule()), torch.tensor([0.5]))
    with pytest.raises(type(error), match=str(error)):
        field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=2)
    field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=2)
    assert _choice(network).refused == {}


def test_auto_keeps_nothing_of_an_error_that_every_engine_would_raise():
    layer, wrong = nn.Linear(3, 3), [True]

    class Mistaken(nn.Module):
        def forward(self, x, t):
            return layer(x[:, :2] if wrong else x).sin()

    network = Mistaken()
    field = noise_field(ScoreModel(network, VPSchedule()), torch.tensor([0.5]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=2)
    wrong.clear()
    field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=2)
    assert _choice(network).refused == {}


def test_auto_does_not_hide_the_networks_own_errors():
    def network(x, t):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    field = noise_field(ScoreModel(network, VPSchedule()), torch.tensor([0.5]))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=2)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_part_of_x_in_a_prediction_does_not_hide_a_lost_graph(order, prediction):
    """The network alone is differentiated: x itself has a graph that a lost one would hide in."""
    model = ScoreModel(Cubes(), VPSchedule(), prediction)
    field, w = noise_field(model, torch.tensor([0.5])), torch.randn(1, 1, 3)
    with pytest.raises(DerivativeError, match="once_differentiable or detaches"):
        field.derive(torch.randn(1, 3), w, order=order, derivative="reverse")
    detached = ScoreModel(lambda x, t: x.detach(), VPSchedule(), prediction)
    field = noise_field(detached, torch.tensor([0.5]))
    with pytest.raises(DerivativeError, match="graph does not lead to x"):
        field.derive(torch.randn(1, 3), w, order=order, derivative="reverse")
    with pytest.raises(DerivativeError, match="graph does not lead to x"):
        field.quadratic_forms(torch.randn(1, 3), [w])


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("detached", [lambda x: x.detach(), lambda x: torch.ones_like(x)])
def test_a_network_cut_from_its_input_is_an_error_in_reverse_mode(detached, order):
    layer = nn.Linear(3, 3)
    field = noise_field(
        ScoreModel(lambda x, t: layer(detached(x)), VPSchedule()), torch.tensor([0.5])
    )
    with pytest.raises(DerivativeError, match=r"graph does not lead to x.*Remove \.detach"):
        field.derive(torch.randn(1, 3), torch.randn(1, 1, 3), order=order, derivative="reverse")


@pytest.mark.parametrize("sizes", [[1], [4], [1, 3]])
@pytest.mark.parametrize("name", NAMES)
def test_quadratic_forms_are_the_dense_ones(name, sizes):
    network, field, x, w, t = setting(name, count=4)
    value, forms = field.quadratic_forms(x, w[: sum(sizes)].split(sizes))
    for row, (f, jacobian, _) in enumerate(by_hand(network, x, t)):
        torch.testing.assert_close(value[row].reshape(-1), f, rtol=1e-10, atol=1e-12)
        v = w[: sum(sizes), row].reshape(sum(sizes), -1)
        dense = torch.einsum("ki,ij,kj->k", v, jacobian, v)
        torch.testing.assert_close(forms[:, row], dense, rtol=1e-10, atol=1e-12)
