"""Each primitive against its native operator, by value and where it matters: the derivatives."""

import copy
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hosm_losses as hosm
from hosm_losses.derivatives.primitive_mode import safe_primitives
from hosm_losses.derivatives.primitives import PRIMITIVES
from hosm_losses.model import noise_field
from tests.oracles import Function

ENGINES = ("auto", "reverse", "taylor")


class Attention(nn.Module):
    """Self-attention over the second dimension with a residual: (B, 1, n, c) takes flash."""

    def __init__(self, width, **options):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.options = options

    def forward(self, x):
        heads = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + F.scaled_dot_product_attention(*heads, **self.options).squeeze(1)


class MultiHead(nn.Module):
    """nn.MultiheadAttention as transformers call it: without its weights."""

    def __init__(self, width, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, **options)

    def forward(self, x, **options):
        return x + self.attention(x, x, x, need_weights=False, **options)[0]


class Gated(nn.Module):
    """The gated linear unit."""

    def forward(self, x):
        return F.glu(torch.cat([x, 0.5 * x * x], -1))


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """A layer for every primitive, with the shape of a sample it takes."""
    return {
        "layer_norm": (nn.LayerNorm(4), (3, 4)),
        "group_norm": (nn.GroupNorm(2, 4), (4, 3)),
        "batch_norm": (nn.BatchNorm1d(4, track_running_stats=False), (4, 3)),
        "tracking": (nn.BatchNorm1d(4), (4, 3)),
        "instance_norm": (nn.InstanceNorm1d(4, affine=True), (4, 3)),
        "attention": (Attention(4), (3, 4)),
        "multihead": (MultiHead(4), (3, 4)),
        "transformer": (
            nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True),
            (3, 4),
        ),
        "glu": (Gated(), (3, 4)),
        "logcumsumexp": (Function(lambda x: torch.logcumsumexp(x, 1)), (5, 4)),
    }


def network_of(name):
    """A smooth network with the layer in its middle."""
    torch.manual_seed(1)
    layer, shape = layers()[name]
    inner, outer = nn.Linear(shape[-1], shape[-1]), nn.Linear(shape[-1], shape[-1])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return nn.Sequential(inner, layer, nn.Tanh(), outer), shape


def loss_and_check(network, shape, order, engine, **model_options):
    """Relative error of a parameter gradient of ⟨D, b⟩ or ⟨G, c⟩ against a central difference."""
    model = hosm.ScoreModel(lambda x, t: network(x), hosm.VPSchedule(), **model_options)
    torch.manual_seed(2)
    x, w, b = torch.randn(4, *shape), torch.randn(1, 4, *shape), torch.randn(1, 4, *shape)
    field = noise_field(model, torch.full((4,), 0.5))

    def value():
        return (field.derive(x, w, order=order, derivative=engine)[order - 1] * b).sum()

    start = parameters_to_vector(network.parameters()).detach()
    direction = torch.randn_like(start)
    gradients = torch.autograd.grad(
        value(), list(network.parameters()), materialize_grads=True, allow_unused=True
    )
    gradient = float(torch.cat([g.reshape(-1) for g in gradients]) @ direction)
    h, ends = 1e-5, []
    for sign in (1, -1):
        vector_to_parameters(start + sign * h * direction, network.parameters())
        ends.append(float(_exact(field, x, w, order, b)))
    vector_to_parameters(start, network.parameters())
    difference = (ends[0] - ends[1]) / (2 * h)
    return abs(gradient - difference) / abs(difference)


def _exact(field, x, w, order, b):
    """⟨D, b⟩ or ⟨G, c⟩ from values and first-order vector-Jacobian products only."""
    w = w[0]

    def form(point):
        point = point.clone().requires_grad_()
        (pulled,) = torch.autograd.grad(field(point), point, w)
        return pulled

    if order == 2:
        # ⟨J w, b⟩ = ⟨w, Jᵀ b⟩.
        point = x.clone().requires_grad_()
        (pulled,) = torch.autograd.grad(field(point), point, b[0])
        return (pulled * w).sum()
    # ⟨∇(wᵀ J w), c⟩: the derivative of ⟨w, Jᵀ w⟩ along c, by a fourth-order difference.
    h, total = 2e-3, 0.0
    for step, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        total += weight * float((form(x + step * h * b[0]) * w).sum())
    return total / (12 * h)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", sorted(layers()))
def test_parameter_gradients_through_every_layer_are_right(name, engine, order):
    network, shape = network_of(name)
    assert loss_and_check(network, shape, order, engine) < (1e-6 if order == 2 else 1e-5)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "instance_norm"])
def test_without_the_primitive_pytorch_is_silently_wrong(name, order):
    """Why each primitive exists. If this fails, PyTorch was mended and the primitive can go."""
    network, shape = network_of(name)
    assert loss_and_check(network, shape, order, "reverse", primitives=False) > 1e-2


@pytest.mark.parametrize("name", ["attention", "multihead", "transformer"])
def test_without_the_primitive_pytorch_fails(name):
    network, shape = network_of(name)
    refused = "engine 'reverse' can differentiate; got: .*(not implemented|not support)"
    with pytest.raises(hosm.DerivativeError, match=refused):
        loss_and_check(network, shape, 3, "reverse", primitives=False)


@pytest.mark.parametrize("spread", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_logarithm_of_a_running_sum(dim, spread):
    """Of equal terms, of ordinary ones, and of those of which one hides all others."""
    x = (spread * torch.randn(2, 5, 3)).requires_grad_()
    mine = PRIMITIVES[torch.logcumsumexp]
    torch.testing.assert_close(mine(x, dim), x.logcumsumexp(dim), rtol=1e-12, atol=1e-12)
    if spread < 10:
        torch.autograd.gradgradcheck(lambda x: mine(x, dim), x)
    nothing = torch.full((2, 3), -torch.inf)
    assert torch.equal(mine(nothing, 1), nothing)

    def by_cotangent(function):
        cotangent = torch.zeros_like(x).requires_grad_()
        (once,) = torch.autograd.grad(function(x, dim), x, cotangent, create_graph=True)
        return torch.autograd.grad(once.sum(), cotangent)[0]

    torch.testing.assert_close(by_cotangent(mine), torch.ones_like(x))
    # Why it is here. If this fails, PyTorch was mended and it can go.
    assert by_cotangent(torch.logcumsumexp).isnan().all()


ENTRIES = -torch.inf, torch.inf, torch.nan, 1.0


@pytest.mark.parametrize("entries", list(product(ENTRIES, repeat=3)), ids=str)
def test_what_is_not_finite_in_a_running_sum(entries):
    x = torch.tensor(entries)
    mine = PRIMITIVES[torch.logcumsumexp](x, 0)
    torch.testing.assert_close(mine, x.logcumsumexp(0), equal_nan=True)


def test_a_running_sum_of_one_term_is_a_tensor_of_its_own():
    x = torch.zeros(3, 1)
    PRIMITIVES[torch.logcumsumexp](x, 1).add_(1)
    assert not x.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_running_sum_is_rounded_once(dtype):
    x = torch.randn(4, 100).to(dtype)
    found, half = PRIMITIVES[torch.logcumsumexp](x, 1), torch.finfo(dtype).eps / 2
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), x.double().logcumsumexp(1), rtol=half, atol=1e-5)


FAR = {
    "mish": (F.mish, [-800.0, -100.0, -20.0, 0.0, 0.3, 19.0, 21.0, 100.0, 800.0]),
    "logaddexp": (
        lambda x: torch.logaddexp(x, 1 - x * x / 1000),
        [-800.0, -100.0, 0.0, 1.0, 100.0, 800.0],
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FAR)
def test_far_from_zero_derivatives_are_finite(name, engine):
    """Where an exponential is out of range, of which PyTorch's own are NaN."""
    function, places = FAR[name]
    model = hosm.ScoreModel(lambda x, t: function(x), hosm.VPSchedule())
    field = noise_field(model, torch.full((1,), 0.5))
    for place in places:
        x = torch.tensor([[place]], requires_grad=True)
        found = field.derive(x, torch.ones(1, 1, 1), order=3, derivative=engine)
        (again,) = torch.autograd.grad(found.third.sum(), x)
        for each in (*found, again):
            assert each.isfinite().all(), (place, each)
        torch.testing.assert_close(-found.value[0], function(x), rtol=1e-12, atol=1e-300)


RIGHT = {
    "rms_norm": (nn.RMSNorm(4), (3, 4)),
    "local_response_norm": (nn.LocalResponseNorm(2), (4, 3)),
    "batch_norm in evaluation": (nn.BatchNorm1d(4).eval(), (4, 3)),
    "normalize": (Function(lambda x: F.normalize(x, dim=-1)), (3, 4)),
    "vector_norm": (
        Function(lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)),
        (3, 4),
    ),
    "norm": (Function(lambda x: x / x.norm(dim=-1, keepdim=True)), (3, 4)),
    "std": (Function(lambda x: x / x.std(-1, keepdim=True)), (3, 4)),
    "var_mean": (Function(lambda x: x / (1 + torch.var_mean(x, -1, keepdim=True)[0])), (3, 4)),
    "softmax": (Function(lambda x: x.softmax(-1)), (3, 4)),
    "logsumexp": (Function(lambda x: x - x.logsumexp(-1, keepdim=True)), (3, 4)),
    "silu": (nn.SiLU(), (3, 4)),
    "gelu": (nn.GELU(), (3, 4)),
    "gelu tanh": (nn.GELU("tanh"), (3, 4)),
    "mish": (nn.Mish(), (3, 4)),
    "softplus": (nn.Softplus(), (3, 4)),
    "avg_pool": (nn.AvgPool1d(3, 1, 1), (4, 3)),
    "weight_norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (3, 4)),
}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RIGHT)
def test_what_pytorch_differentiates_rightly_is_left_alone(name, engine, order):
    """If this fails, a new PyTorch needs a new primitive."""
    torch.manual_seed(1)
    layer, shape = copy.deepcopy(RIGHT[name])
    with torch.no_grad():  # what was drawn on import depends on the other files of the run
        for parameter in layer.parameters():
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    inner, outer = nn.Linear(shape[-1], shape[-1]), nn.Linear(shape[-1], shape[-1])
    network = nn.Sequential(inner, layer.double(), nn.Tanh(), outer)
    error = loss_and_check(network, shape, order, engine, primitives=False)
    assert error < (1e-6 if order == 2 else 1e-5)
    x = torch.randn(2, *shape)
    # Nested forward mode too: it has a value, that of reverse over reverse.
    nested = torch.func.jvp(lambda y: torch.func.jvp(network, (y,), (x,))[1], (x,), (x,))[1]

    def along(step):
        return network(x + step * x)

    step = 1e-3
    difference = (along(step) - 2 * along(0) + along(-step)) / step**2
    torch.testing.assert_close(nested, difference, rtol=1e-4, atol=1e-4)


MENDED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)


def test_group_norm_on_channels_last():
    """PyTorch fails on it before 2.15; under torch.compile it still needs the primitive."""
    norm, x = nn.GroupNorm(2, 4), torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    native = nullcontext() if MENDED else pytest.raises(RuntimeError, match="view")
    with native:
        torch.func.jvp(norm, (x,), (x,))
    with safe_primitives():
        value, tangent = torch.func.jvp(norm, (x,), (x,))
    torch.testing.assert_close(value, norm(x))
    plain = x.contiguous()
    torch.testing.assert_close(tangent, torch.func.jvp(norm, (plain,), (plain,))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(layers()))
def test_values_are_those_of_the_native_operator(name, dtype):
    layer, shape = layers()[name]
    layer = layer.to(dtype)
    x = torch.randn(5, *shape, dtype=dtype)
    native = copy.deepcopy(layer)(x)
    with safe_primitives():
        safe = layer(x)
    assert safe.dtype == native.dtype
    ulps = {torch.bfloat16: 2e-2, torch.float32: 5e-6, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(safe, native, rtol=ulps, atol=ulps)


MASK = torch.tensor([[True, False, True], [True, True, False], [False, False, False]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": MASK},
        {"attn_mask": MASK.double()},
        {"scale": 0.3},
        {"scale": -0.3},
    ],
)
def test_every_form_of_attention(options):
    q, k, v = torch.randn(3, 2, 4, 3, 5).unbind(0)
    native = F.scaled_dot_product_attention(q, k, v, **options)
    with safe_primitives():
        safe = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(safe, native)
    grouped = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    with safe_primitives():
        safe = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    torch.testing.assert_close(safe, grouped)


MASKS = {
    "none": {},
    "boolean": {"attn_mask": torch.tensor([[False, True, False]] * 3)},
    "causal": {"attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True},
    "padding": {"key_padding_mask": torch.tensor([[False, False, True]] * 2)},
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_every_form_of_multihead_attention(masks, need_weights):
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4, requires_grad=True)
    native = layer(x, x, x, need_weights=need_weights, **MASKS[masks])
    with safe_primitives():
        safe = layer(x, x, x, need_weights=need_weights, **MASKS[masks])
    torch.testing.assert_close(safe[0], native[0])
    assert (safe[1] is None) == (native[1] is None)
    if need_weights:
        torch.testing.assert_close(safe[1], native[1])


def by_torch_names():
    """The functions of torch behind those of torch.nn.functional, as some networks call them."""
    statistics = (None, None, True, 0.1, 1e-5, False)
    return {
        "layer_norm": lambda x: torch.layer_norm(x, (4,)),
        "group_norm": lambda x: torch.group_norm(x, 2),
        "batch_norm": lambda x: torch.batch_norm(x, None, None, *statistics),
        "instance_norm": lambda x: torch.instance_norm(x, None, None, *statistics),
    }


@pytest.mark.parametrize("name", sorted(by_torch_names()))
def test_the_functions_of_torch_are_taken_over_as_well(name):
    function = by_torch_names()[name]
    x = torch.randn(5, 4, 4, requires_grad=True)
    native = function(x)
    with safe_primitives():
        safe = function(x)
    torch.testing.assert_close(safe, native)
    assert "Norm" in type(native.grad_fn).__name__ or name == "instance_norm"
    assert type(safe.grad_fn) is not type(native.grad_fn)


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_glu_along_every_dimension(dim):
    x = torch.randn(2, 4, 6)
    with safe_primitives():
        safe = F.glu(x, dim)
    torch.testing.assert_close(safe, F.glu(x, dim))


def test_multihead_attention_with_its_arguments_by_position():
    layer = nn.MultiheadAttention(4, 2)
    x = torch.randn(3, 2, 4)
    tail = (layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0)
    tail = (*tail, layer.out_proj.weight, layer.out_proj.bias, True, None, False)
    native = F.multi_head_attention_forward(x, x, x, 4, 2, *tail)
    with safe_primitives():
        safe = F.multi_head_attention_forward(x, x, x, 4, 2, *tail)
    torch.testing.assert_close(safe[0], native[0])
    assert safe[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", sorted(layers()))
def test_autocast_keeps_its_dtypes(name, dtype):
    layer, shape = layers()[name]
    layer = layer.float()
    x = torch.randn(5, *shape, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        native = copy.deepcopy(layer)(x)
        with safe_primitives():
            safe = layer(x)
    assert safe.dtype == native.dtype
    torch.testing.assert_close(safe, native, rtol=3e-2, atol=3e-2)


def test_a_row_that_may_attend_to_nothing_has_finite_derivatives():
    q = torch.randn(1, 3, 4, requires_grad=True)
    with safe_primitives():
        out = F.scaled_dot_product_attention(q, q, q, attn_mask=MASK)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    gradient.sum().backward()
    assert out[0, 2].abs().max() == 0
    assert torch.isfinite(q.grad).all()


def test_attention_dropout_scales_what_it_keeps():
    q = torch.randn(1, 2, 200, 4)
    v = torch.ones(1, 2, 200, 4)
    with safe_primitives():
        out = F.scaled_dot_product_attention(q, q, v, dropout_p=0.5)
    assert out.std() > 0
    assert abs(out.mean().item() - 1) < 5 * out[..., 0].std().item() / 20


@pytest.mark.parametrize("functional", [F, torch], ids=["functional", "torch"])
def test_functions_called_by_either_name(functional):
    x, weight, bias = torch.randn(3, 4, 5), torch.rand(4), torch.rand(4)
    calls = {
        "layer": lambda: functional.layer_norm(x, (5,)),
        "group": lambda: functional.group_norm(x, 2, weight, bias),
    }
    if functional is F:
        calls["batch"] = lambda: F.batch_norm(x, None, None, weight, bias, True)
        calls["instance"] = lambda: F.instance_norm(x, None, None, weight, bias)
    else:
        tail = (None, None, True, 0.1, 1e-5, False)
        calls["batch"] = lambda: torch.batch_norm(x, weight, bias, *tail)
        calls["instance"] = lambda: torch.instance_norm(x, weight, bias, *tail)
    for call in calls.values():
        native = call()
        with safe_primitives():
            torch.testing.assert_close(call(), native)


@pytest.mark.parametrize(
    ("engine", "probes"),
    [("auto", 1), ("taylor", 1), ("reverse", 1)],
)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_are_updated_as_natively_and_once(norm, engine, probes):
    safe = norm(4, track_running_stats=True)
    native = copy.deepcopy(safe)
    x0, noise = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    model = hosm.ScoreModel(lambda x, t: safe(x), hosm.VPSchedule())
    t = torch.full((5,), 0.4)
    hosm.third_order_dsm(model, x0, t=t, noise=noise, derivative=engine, probes=probes)
    alpha, sigma = hosm.VPSchedule()(torch.tensor(0.4))
    native(alpha * x0 + sigma * noise)
    for name, buffer in native.named_buffers():
        torch.testing.assert_close(safe.get_buffer(name), buffer)


def test_evaluation_mode_uses_the_running_statistics():
    for norm in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)):
        norm(torch.randn(9, 4, 3))
        norm.eval()
        x = torch.randn(2, 4, 3)
        with safe_primitives():
            torch.testing.assert_close(norm(x), nn.Module.__call__(norm, x))
        native = norm(x)
        with safe_primitives():
            torch.testing.assert_close(norm(x), native)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.layer_norm(torch.ones(2, 3), (4,)), "layer_norm: expected an input that ends"),
        (lambda: F.group_norm(torch.ones(2, 3), 2), "group_norm: expected channels that 2"),
        (lambda: F.batch_norm(torch.ones(1, 3), None, None, training=True), "batch_norm: expe"),
        (lambda: F.glu(torch.ones(2, 3)), "glu: expected an even size in dimension -1"),
        (lambda: F.instance_norm(torch.ones(2, 3, 1)), "instance_norm: expected more than one"),
        (
            lambda: F.scaled_dot_product_attention(
                *[torch.ones(1, 3, 3)] * 3, attn_mask=MASK, is_causal=True
            ),
            "attn_mask or is_causal, not both",
        ),
    ],
)
def test_what_the_native_operator_refuses_is_refused(call, message):
    with safe_primitives(), pytest.raises(ValueError, match=message):
        call()
