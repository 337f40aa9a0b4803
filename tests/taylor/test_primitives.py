"""Each primitive against its native operator by value, and its derivatives against differences.

That PyTorch's own higher derivatives of an operator are wrong is asserted nowhere: where a later
version has them right, these tests pass.
"""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hosm_losses as hosm
from hosm_losses._torch_internals import graph_nodes
from hosm_losses.model import bind_model
from hosm_losses.taylor.primitives import safe_primitives
from tests.cases import VP, Function, OfX, assert_same, gradients, randomise

ENGINES = ("taylor", "reverse")
SDPA = F.scaled_dot_product_attention


class Attention(nn.Module):
    """Self-attention over the second dimension with a residual: (B, 1, n, c) takes flash."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        return x + SDPA(*self.qkv(x).unsqueeze(1).chunk(3, -1)).squeeze(1)


class MultiHead(nn.Module):
    """nn.MultiheadAttention as transformers call it: without its weights."""

    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


def transformer():
    return nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True)


# A layer for every primitive, with the shape of a sample that it takes.
LAYERS = {
    "layer_norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "batch_norm": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (4, 3)),
    "tracking": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "instance_norm": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 3)),
    "attention": (lambda: Attention(4), (3, 4)),
    "multihead": (lambda: MultiHead(4), (3, 4)),
    "transformer": (transformer, (3, 4)),
    "glu": (lambda: Function(lambda x: F.glu(torch.cat([x, 0.5 * x * x], -1))), (3, 4)),
    "glu_rows": (lambda: Function(lambda x: F.glu(torch.cat([x, x * x], 1), 1)), (3, 4)),
}
# Of which PyTorch has no value in 16 bits.
WIDE = {
    "cdist": (lambda: Function(lambda x: x + torch.cdist(x, x).sum(-1, keepdim=True)), (3, 4)),
}


def network_of(name):
    """A smooth network with the layer in its middle."""
    torch.manual_seed(1)
    make, shape = (LAYERS | WIDE)[name]
    layer, width = make(), shape[-1]
    randomise(layer)
    return nn.Sequential(nn.Linear(width, width), layer, nn.Tanh(), nn.Linear(width, width)), shape


def by_products(f, x, w, order, b):
    """⟨D, b⟩ or ⟨G, b⟩ from values and first-order vector-Jacobian products only."""

    def pulled(point, cotangent):
        point = point.clone().requires_grad_()
        return (torch.autograd.grad(f(point), point, cotangent)[0] * w).sum()

    if order == 2:  # ⟨J w, b⟩ = ⟨w, Jᵀ b⟩
        return float(pulled(x, b))
    # ⟨∇(wᵀ J w), b⟩: the derivative of ⟨w, Jᵀ w⟩ along b, by a fourth-order difference.
    h, steps = 2e-3, ((1, 8), (-1, -8), (2, -1), (-2, 1))
    return sum(weight * float(pulled(x + step * h * b, w)) for step, weight in steps) / (12 * h)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LAYERS | WIDE)
def test_parameter_gradients_through_every_layer_are_differences(name, engine):
    network, shape = network_of(name)
    bound = bind_model(hosm.ScoreModel(OfX(network), VP), 4, t=torch.full((4,), 0.5))
    torch.manual_seed(2)
    x, w, b = torch.randn(3, 4, *shape)
    start = parameters_to_vector(network.parameters()).detach()
    direction, h = torch.randn_like(start), 1e-5
    for order, tolerance in ((2, 1e-6), (3, 1e-5)):
        part = bound.derive(x, w[None], order=order, engine=engine)[order - 1]
        gradient = torch.cat([g.flatten() for g in gradients((part * b).sum(), network)])
        ends = []
        for sign in (1, -1):
            vector_to_parameters(start + sign * h * direction, network.parameters())
            ends.append(by_products(bound.f, x, w, order, b))
        vector_to_parameters(start, network.parameters())
        difference = (ends[0] - ends[1]) / (2 * h)
        assert float(gradient @ direction) == pytest.approx(difference, rel=tolerance)


def test_the_logarithm_of_a_running_sum_is_refused():
    """Its second derivative is NaN."""
    network = OfX(lambda x: torch.logcumsumexp(x, 1))
    for engine in ("auto", *ENGINES):
        with pytest.raises(hosm.DerivativeError, match="logsumexp"):
            hosm.second_order_dsm(hosm.ScoreModel(network, VP), torch.randn(2, 3), engine=engine)


FAR = {"mish": F.mish, "logaddexp": lambda x: torch.logaddexp(x, 1 - x * x / 1000)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FAR)
def test_far_from_zero_derivatives_are_finite(name, engine):
    """Where an exponential is out of range."""
    model = hosm.ScoreModel(lambda x, t: FAR[name](x), VP)
    bound = bind_model(model, 1, t=torch.full((1,), 0.5))
    for place in (-800.0, -100.0, -20.0, 0.0, 0.3, 1.0, 19.0, 21.0, 100.0, 800.0):
        x = torch.tensor([[place]], requires_grad=True)
        found = bound.derive(x, torch.ones(1, 1, 1), order=3, engine=engine)
        for each in (*found, *torch.autograd.grad(found.third.sum(), x)):
            assert each.isfinite().all(), (place, each)
        torch.testing.assert_close(-found.value[0], FAR[name](x), rtol=1e-12, atol=1e-300)


def test_mish_in_place():
    x = torch.linspace(-3, 3, 7)
    with safe_primitives():
        changed = x.clone()
        assert F.mish(changed, inplace=True) is changed
    torch.testing.assert_close(changed, F.mish(x))


def test_group_norm_on_channels_last():
    norm, plain = nn.GroupNorm(2, 4), torch.randn(2, 4, 3, 3)
    x = plain.to(memory_format=torch.channels_last)
    with safe_primitives():
        value, tangent = torch.func.jvp(norm, (x,), (x,))
    assert_same(value, norm(x))
    assert_same(tangent, torch.func.jvp(norm, (plain,), (plain,))[1])


CLOSE = {torch.bfloat16: 2e-2, torch.float32: 5e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", [*CLOSE, "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_types_are_those_of_the_native_operator(name, dtype):
    (make, shape), autocast = LAYERS[name], dtype == "autocast"
    dtype = torch.float32 if autocast else dtype
    layer, x = make().to(dtype), torch.randn(5, *shape, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        native = copy.deepcopy(layer)(x)
        with safe_primitives():
            safe = layer(x)
    near = 3e-2 if autocast else CLOSE[dtype]
    torch.testing.assert_close(safe, native, rtol=near, atol=near)


def same_as_native(call):
    """The results of a call with and without the primitives, which agree."""
    native = call()
    with safe_primitives():
        safe = call()
    torch.testing.assert_close(safe, native)
    return safe, native


MASK = torch.tensor([[True, False, True], [True, True, False], [False, False, False]])


def test_every_form_of_attention():
    q, k, v = torch.randn(3, 2, 4, 3, 5).unbind(0)
    numbers = MASK.double(), torch.where(MASK, 0.5, -torch.inf)
    masks = *({"attn_mask": mask} for mask in (MASK, *numbers)), {"is_causal": True}
    for options in ({}, *masks, {"scale": 0.3}, {"scale": -0.3}):
        same_as_native(lambda options=options: SDPA(q, k, v, **options))
    same_as_native(lambda: SDPA(q, k[:, :2], v[:, :2], enable_gqa=True))


def test_multihead_attention_returns_weights_where_they_are_asked_for():
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    x, mask = torch.randn(2, 3, 4, requires_grad=True), torch.ones(3, 3).triu(1).bool()
    for need in (True, False):
        same_as_native(lambda need=need: layer(x, x, x, need_weights=need, attn_mask=mask))


def test_norms_are_taken_over_by_either_name():
    x, weight, bias = torch.randn(3, 4, 5, requires_grad=True), torch.rand(4), torch.rand(4)
    for call in (
        *(lambda home=home: home.layer_norm(x, (5,)) for home in (F, torch)),
        *(lambda home=home: home.group_norm(x, 2, weight, bias) for home in (F, torch)),
        lambda: F.batch_norm(x, None, None, weight, bias, True),
        lambda: F.instance_norm(x, None, None, weight, bias),
    ):
        safe, native = same_as_native(call)
        found = [[node.name() for node in graph_nodes([each])] for each in (safe, native)]
        assert [any("Native" in name for name in names) for names in found] == [False, True]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_are_updated_as_natively_and_once(norm, engine):
    safe = norm(4, track_running_stats=True)
    native = copy.deepcopy(safe)
    x0, noise = torch.randn(2, 5, 4, 3)
    t = torch.full((5,), 0.4)
    hosm.third_order_dsm(hosm.ScoreModel(OfX(safe), VP), x0, t=t, noise=noise, engine=engine)
    alpha, sigma = VP(torch.tensor(0.4))
    native(alpha * x0 + sigma * noise)
    torch.testing.assert_close(dict(safe.named_buffers()), dict(native.named_buffers()))


def test_evaluation_mode_uses_the_running_statistics():
    for norm in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)):
        norm(torch.randn(9, 4, 3))
        norm.eval()
        x = torch.randn(2, 4, 3)
        same_as_native(lambda norm=norm, x=x: norm(x))
