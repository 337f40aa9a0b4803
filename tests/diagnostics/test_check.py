"""check_derivatives: silent on what is right, loud and precise on what is wrong."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives import recompute
from tests.oracles import Cubes, Spectral, networks

ENGINES = ("reverse", "taylor")
VP = hosm.VPSchedule()


class Around(nn.Module):
    """A network with one layer in its middle."""

    def __init__(self, layer, width=4):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width), layer])
        self.outer = nn.Linear(width, width)

    def forward(self, x, t):
        hidden = torch.tanh(self.inner(x) + t[:, None])
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.outer(hidden)


def check(network, shape=(4,), dtype=torch.float32, order=3, **options):
    torch.manual_seed(0)
    primitives = options.pop("primitives", True)
    model = hosm.ScoreModel(network.to(dtype), VP, primitives=primitives)
    hosm.check_derivatives(model, torch.randn(2, *shape, dtype=dtype), order, **options)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_no_false_alarm(name, engine, dtype, order):
    network, shape = networks()[name]
    check(network, shape, dtype, order, derivative=engine)


@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm_on_attention_in_float32(seed):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.gelu, batch_first=True)
    network = nn.Sequential(nn.Linear(3, 8), layer, layer, nn.Linear(8, 3))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t):
            return self.network(x + t[:, None, None])

    check(Transformer(), (5, 3))


class Detached(nn.Module):
    def forward(self, x):
        return x.sin() * x.detach().cos()


class DropsGraph(torch.autograd.Function):
    """Like an activation checkpoint that recomputes outside the graph."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            (pulled,) = torch.autograd.grad(ctx.function(x), x, grad.detach())
        return pulled, None


class CheckpointFunction(DropsGraph):
    """The name under which guided-diffusion's checkpoint is known."""


class UpFirDn2dCompiled(DropsGraph):
    """The compiled filter's wrapper: a backward without a second derivative in its weights."""


class DropsPart(torch.autograd.Function):
    """A kernel whose gradient is right, and has no graph to what the kernel was given."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].detach().cos()


class FlashKernel(DropsPart):
    """A fused attention kernel, by its name."""


class Custom(nn.Module):
    """A layer that calls a custom Function."""

    def __init__(self, function, width=4):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.function = function

    def forward(self, x):
        if issubclass(self.function, DropsGraph):
            return self.function.apply(x, self.layer)
        return self.function.apply(self.layer(x))


def calling(function):
    """Makes the layer in the test, under its seed."""
    return functools.partial(Custom, function)


@pytest.mark.parametrize(
    ("make", "engine", "message"),
    [
        (Detached, "reverse", r"'blocks\.1' \(Detached\).*without \.detach\(\)"),
        (Detached, "taylor", r"'blocks\.1' \(Detached\).*without \.detach\(\)"),
        (calling(DropsGraph), "reverse", r"'blocks\.1' \(Custom\).*In its graph: DropsGraph"),
        (
            calling(CheckpointFunction),
            "reverse",
            r"\(Custom\).*Use hosm_losses\.checkpoint.*guided",
        ),
        (calling(UpFirDn2dCompiled), "reverse", r"\(Custom\).*upfirdn2d.*impl='ref'"),
        (calling(DropsPart), "reverse", r"\(Custom\)"),
        (calling(FlashKernel), "reverse", r"\(Custom\).*Fused attention kernels"),
        (calling(DropsGraph), "taylor", r"no derivative at all"),
    ],
)
def test_the_culprit_is_named_with_its_remedy(make, engine, message):
    with pytest.raises(hosm.DerivativeError, match=message):
        check(Around(make()), derivative=engine)


@pytest.mark.parametrize("seed", range(3))
def test_a_function_at_fault_is_found_in_float32_however_small_its_part_of_the_whole(seed):
    """Its own derivative is wrong by 30 %, those of the network by less than 0.1 %."""

    class Small(Custom):
        def forward(self, x):
            return 0.03 * super().forward(x)

    torch.manual_seed(seed)
    with pytest.raises(hosm.DerivativeError, match=r"off by .* in the module 'blocks\.1' \(Small"):
        check(Around(Small(DropsPart)), derivative="reverse")


def test_code_in_the_networks_own_forward_is_named_as_such():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, t):
            return self.layer(x).sin() * x.detach()

    with pytest.raises(hosm.DerivativeError, match="in its own forward"):
        check(Own())


def test_a_network_that_is_no_module_is_checked_in_x():
    good = hosm.ScoreModel(lambda x, t: x.sin(), VP)
    bad = hosm.ScoreModel(lambda x, t: x.sin() * x.detach(), VP)
    hosm.check_derivatives(good, torch.randn(2, 3))
    with pytest.raises(hosm.DerivativeError, match="directional derivative off by"):
        hosm.check_derivatives(bad, torch.randn(2, 3))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "flow_prediction"])
def test_what_auto_trains_by_reverse_mode_is_no_alarm_whatever_it_predicts(prediction):
    """The check differentiates what the losses do: the network, not the prediction's part of x."""
    hosm.check_derivatives(hosm.ScoreModel(Spectral(), VP, prediction), torch.randn(2, 3))
    model = hosm.ScoreModel(Cubes(), VP, prediction)
    with pytest.raises(hosm.DerivativeError, match="once_differentiable or detaches"):
        hosm.check_derivatives(model, torch.randn(2, 3), derivative="reverse")


class Counting(nn.Module):
    """Its output depends on a buffer that every call updates."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.layer(x) * (1 + self.seen)


class Random(nn.Module):
    """It draws from a generator of its own, which no seed of torch reaches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return x.sin() * (1 + self.count % 7)


def test_buffers_that_the_data_changes_are_named():
    with pytest.raises(hosm.DerivativeError, match=r"changes with the buffers blocks\.1\.seen"):
        check(Around(Counting()))


def test_a_network_that_is_not_deterministic_is_an_error():
    with pytest.raises(hosm.DerivativeError, match="same output for the same input and seed"):
        check(Around(Random()))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5), Detached()])
def test_the_training_state_is_as_it_was(layer):
    network = Around(layer)
    network.outer.requires_grad_(False)
    network.inner.eval()
    before = copy.deepcopy(network.state_dict())
    try:
        model = hosm.ScoreModel(network.float(), VP)
        hosm.check_derivatives(model, torch.ones(2, 4, dtype=torch.float32).normal_())
    except hosm.DerivativeError:
        assert not isinstance(layer, nn.Dropout)
    else:
        assert isinstance(layer, nn.Dropout)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value.double(), before[name].double(), rtol=1e-6, atol=1e-7)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.outer.weight.requires_grad
    assert [network.inner.training, network.blocks.training] == [False, True]
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_random_numbers_are_restored():
    network, shape = networks()["mlp"]
    model, x0 = hosm.ScoreModel(network, VP), torch.randn(2, *shape)
    before = torch.get_rng_state()
    hosm.check_derivatives(model, x0)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_module_is_blamed_because_its_derivative_happens_to_vanish_along_one_direction():
    """With these weights the inner linear layer was blamed for the checkpoint around it."""
    torch.manual_seed(217)
    layer = Custom(CheckpointFunction)
    torch.manual_seed(0)
    with pytest.raises(hosm.DerivativeError, match=r"\(Custom\)"):
        check(Around(layer), derivative="reverse")


def test_a_network_that_looks_its_time_up_in_a_table_is_given_whole_indices():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.table = nn.Linear(3, 3), nn.Embedding(1000, 3)

        def forward(self, x, t):
            return torch.tanh(self.inner(x)) * self.table(t)

    model = hosm.ScoreModel(Looks(), hosm.DiscreteSchedule.linear())
    hosm.check_derivatives(model, torch.randn(4, 3))


def test_a_gradient_that_is_wrong_in_training_alone_is_found(monkeypatch):
    """In training x asks for no gradient, so that other gradients are computed than with one."""
    network = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3)).double()
    model = hosm.ScoreModel(
        network,
        hosm.VPSchedule(),
        call=lambda network, x, t: network(x / (2 + x.square())),
    )
    x0 = torch.randn(2, 3, dtype=torch.float64)
    hosm.check_derivatives(model, x0)
    own = recompute._by_autograd

    def doubled(function, again, needed, *others):
        found = own(function, again, needed, *others)
        return found if all(needed) else tuple(2 * each for each in found)

    monkeypatch.setattr(recompute, "_by_autograd", doubled)
    with pytest.raises(hosm.DerivativeError, match=r"the gradient of the gradient of the quadr"):
        hosm.check_derivatives(model, x0)
