"""The loss modules compile to one graph, with the loss and the gradients of eager mode."""

from contextlib import suppress
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from benchmarks.networks import DiT
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError, Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

import hosm_losses as hosm
from hosm_losses.derivatives.kinks import memory_of
from tests.cases import (
    FUNCTIONS,
    MODULES,
    SCHEDULES,
    VP,
    Around,
    Detaches,
    Function,
    OfX,
    assert_same,
    given,
    networks,
    with_gradients,
)
from tests.versions import OLD, compiles_higher_orders

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WHOLE = {"backend": "eager", "fullgraph": True}
TRACED = {"backend": "aot_eager"}  # the pass back too, which takes twice the time


def compiled(module, **options):
    torch._dynamo.reset()
    return torch.compile(module, **(WHOLE | options))


def assert_agrees(module, x0, inputs, step=None, **options):
    """The compiled loss and its gradients are those of eager mode."""
    found = []
    for each in (compiled(module, **options) if step is None else step, module):
        torch.manual_seed(1)
        # A compiled pass back gives its memory away.
        found.append(with_gradients(each(x0, **inputs), module, retain_graph=False))
    assert_same(*found)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("mlp", 1),
        pytest.param("conv", 2, marks=compiles_higher_orders),
        pytest.param("attention", 3, marks=compiles_higher_orders),
    ],
)
def test_one_graph_with_the_gradients_of_eager_mode(name, order):
    network, shape = networks()[name]
    module = MODULES[order](hosm.ScoreModel(network, VP))
    assert_agrees(module, *given((2, *shape), order, 2), **TRACED)


@compiles_higher_orders
def test_products_of_two_probes_are_one_graph():
    network, shape = networks()["attention"]
    options = {"probes": hosm.Paired(), "weights": (1, 0, 0.3)}
    module = hosm.SecondOrderDSM(hosm.ScoreModel(network, VP), **options).eval()
    assert_agrees(module, *given((2, *shape), 2, 2))


@compiles_higher_orders
def test_values_are_made_in_the_graph():
    """As where a user compiles a step that calls the functions."""
    network, shape = networks()["mlp"]
    model, x0 = hosm.ScoreModel(network, VP), torch.ones(4, *shape)

    def step(x0):
        options = {"weights": "paper-toy", "weighting": hosm.EDMWeighting(), "fraction": 0.5}
        probes = hosm.Paired(2, "gaussian")
        loss = hosm.third_order_dsm(model, x0, probes=probes, **options)
        return loss + hosm.second_order_dsm(model, x0, probes=2)

    found = []
    for each in (compiled(step), step):
        torch.manual_seed(1)
        found.append(each(x0))
    assert_same(*found)


@compiles_higher_orders
def test_a_transformer_of_images_is_one_graph():
    """With time embeddings, attention at 4 × 4 and modulated norms."""
    network = DiT(size=16, width=16, heads=2)
    module = hosm.ThirdOrderDSM(hosm.ScoreModel(network, VP))
    assert_agrees(module, *given((2, 3, 16, 16)), **TRACED)


@compiles_higher_orders
@pytest.mark.parametrize(
    ("weighting", "schedule"), [("native", VP), ("likelihood", hosm.EDMSchedule())]
)
def test_a_weighting_draws_its_own_times_in_the_graph(weighting, schedule):
    network, shape = networks()["mlp"]
    model, options = hosm.ScoreModel(network, schedule), {"weighting": weighting}
    module = hosm.SecondOrderDSM(model, weights="paper", **options)
    assert_agrees(module, torch.ones(3, *shape), {})


def around(function, order, norm=None, **options):
    """The loss module of such a network, with its data and inputs."""
    function = Function(function) if norm is None else nn.Sequential(norm, Function(function))
    module = MODULES[order](hosm.ScoreModel(Around(function, 6), VP), **options)
    return module, *given((4, 2), order)


@compiles_higher_orders
@pytest.mark.parametrize("order", [1, 3])
def test_batches_of_several_sizes_and_how_often_they_are_compiled(order):
    """Nothing but times and noise is given: probes are drawn in the graph."""
    module, _, _ = around(torch.sin, order)
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(module, backend=counter)
    graphs = []
    for batch in (8, 8, 5, 7):
        x0, inputs = given((batch, 2))
        assert_agrees(module, x0, inputs, step)
        graphs.append(counter.frame_count)
    # Once for the first size, and once more for all sizes.
    assert graphs == [1, 1, 2, 2]


@compiles_higher_orders
@pytest.mark.parametrize(
    ("order", "function", "options"),
    [
        (2, lambda h: h.sort(1).values * h, {"probes": 2}),
        (3, lambda h: h.sort(1).values * h, {}),
        (2, nn.Dropout(0.5, inplace=True), {}),
    ],
)
def test_what_has_no_rule_in_batches_of_two_sizes(order, function, options):
    module, _, _ = around(function, order, **options)
    step = compiled(module, dynamic=True)
    for batch in (4, 3):
        assert_agrees(module, *given((batch, 2)), step)


@compiles_higher_orders
def test_averaged_targets_are_part_of_the_graph_and_may_be_given_to_a_call():
    network, shape = networks()["mlp"]
    targets = hosm.AveragedTargets(torch.randn(5, *shape))
    module = hosm.ThirdOrderDSM(hosm.ScoreModel(network, VP), targets=hosm.AveragedTargets())
    x0, inputs = given((4, *shape), 3)
    step = compiled(module)
    contains = hosm.AveragedTargets(x0, own=False)
    for each in ({}, {"targets": targets}, {"targets": contains}):
        assert_agrees(module, x0, inputs | each, step)


@pytest.mark.parametrize("order", [1, pytest.param(3, marks=compiles_higher_orders)])
@pytest.mark.parametrize("averaged", [None, hosm.AveragedTargets()])
def test_scores_of_the_data_are_part_of_the_graph(order, averaged):
    """Computed by a callable, with a decomposed matrix, or made in the graph of a batch."""
    network, shape = networks()["mlp"]
    model, F = hosm.ScoreModel(network, VP), torch.diag(torch.tensor([1.0, 2.0, 3.0]).double())
    scores = hosm.TargetScores(lambda x: -x * F.diagonal(), F, averaged)
    module = MODULES[order](model, targets=scores)
    x0, inputs = given((4, *shape), order)
    step = compiled(module)
    for each in ({}, {"targets": hosm.TargetScores(-x0, averaged=averaged)}):
        assert_agrees(module, x0, inputs | each, step)

    def made(x0, g):
        return module(x0, targets=hosm.TargetScores(g, 2.0), **inputs)

    assert_same(compiled(made)(x0, -x0), made(x0, -x0))


@compiles_higher_orders
def test_a_ramp_is_compiled_for_its_beginning_and_for_its_rest():
    network, shape = networks()["mlp"]
    module, x0 = (
        hosm.ThirdOrderDSM(hosm.ScoreModel(network, VP), fraction=0.5),
        torch.ones(4, *shape),
    )
    counter = CompileCounterWithBackend("eager")
    step = compiled(module, backend=counter)
    graphs = []
    for height in (0.0, 0.0, 0.1, 0.2, 0.3):
        assert_agrees(module, x0, {"weights": (1, 0.5 * height, 0, height)}, step)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2, 2]


@compiles_higher_orders
def test_weights_that_follow_a_rule_and_terms_beside_the_loss():
    module, x0, inputs = around(torch.sin, 2)
    step = compiled(module)
    for count in range(4):
        inputs["weights"] = (1.0, count / 10, count / 20 + 0.1)
        value, terms = step(x0, return_terms=True, **inputs)
        expected, others = module(x0, return_terms=True, **inputs)
        assert_same([value, *terms[:3], terms.t], [expected, *others[:3], inputs["t"]])


def test_schedules_keep_their_digits_near_t_min_in_compiled_loops():
    """Of eight elements and more: Inductor has its own formulas there, of expm1 and asinh."""
    names = ("alpha", "sigma", "log_sigma_hat", "time", "squared_diffusion", "drift", "rates")
    places = torch.cat([torch.zeros(1), torch.logspace(-6, -1, 39)])

    def values(t, u):
        for name, method in product(SCHEDULES, names):
            at = u if method == "time" else t
            found = getattr(SCHEDULES[name], method)(at[name])
            yield from found if method == "rates" else [found]

    def stacked(t, u):
        return torch.stack([*values(t, u)])

    t = {name: (s.t_min + (s.t_max - s.t_min) * places).float() for name, s in SCHEDULES.items()}
    u = {name: s.log_sigma_hat(t[name]) for name, s in SCHEDULES.items()}
    exact = stacked(*({name: each.double() for name, each in given.items()} for given in (t, u)))
    step = compiled(stacked, backend="inductor")
    error, eager = (((f(t, u) - exact) / exact).nan_to_num().abs() for f in (step, stacked))
    assert bool((error <= 1e-6 + 4 * eager.amax(1, keepdim=True)).all())


def test_a_loss_next_to_t_min_compiles_to_the_loss_of_eager_mode():
    network, (x0, inputs) = nn.Linear(3, 3).float(), given((40, 3))
    module = hosm.FirstOrderDSM(hosm.ScoreModel(OfX(network), VP, "x0"), weighting="native")
    inputs = {"t": torch.full((40,), 1e-5).float(), "noise": inputs["noise"].float()}
    found, expected = (
        f(x0.float(), **inputs) for f in (compiled(module, backend="inductor"), module)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


class Conditioned(nn.Module):
    """Labels, a text with its mask, a dict of tensors, a table that all share, and numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.of_label, self.query = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.of_text, self.norm = nn.Linear(3, 8), nn.LayerNorm(4)

    def forward(self, x, t, label, text, mask, added, table, absent=None, scale=1.0):
        assert absent is None
        hidden = self.first(torch.cat([x, t[:, None]], 1)) + self.of_label(label)
        keys, values = self.of_text(text)[:, None].chunk(2, -1)
        query = self.query(hidden)[:, None, None]
        attended = F.scaled_dot_product_attention(query, keys, values, mask[:, None, None])
        hidden = (hidden + attended[:, 0, 0]) * added["sizes"][0][:, None] + table[label]
        return self.last(F.silu(self.norm(hidden)) * scale)


@compiles_higher_orders
def test_conditions_of_every_kind_in_batches_of_two_sizes():
    module = hosm.SecondOrderDSM(hosm.ScoreModel(Conditioned(), VP))
    step = compiled(module, dynamic=True)
    for batch in (6, 4):
        x0, inputs = given((batch, 2))
        mask = torch.rand(batch, 3) > 0.4
        mask[:, 0] = True
        inputs["model_kwargs"] = {
            "label": torch.randint(5, (batch,)),
            "text": torch.randn(batch, 3, 3),
            "mask": mask,
            "added": {"sizes": [torch.rand(batch) + 0.5]},
            "table": hosm.Shared(torch.randn(5, 4)),
            "absent": None,
            "scale": 0.7,
        }
        assert_agrees(module, x0, inputs, step)


def in_place(h):
    """Changes of activations, and next to a reshape."""
    h = F.silu(h * 2, inplace=True).mul_(0.7)
    y = h.reshape(len(h), 2, 3) * 2
    y += h.reshape(len(h), 2, 3)
    return y.tanh_().flatten(1)


def resampled(h):
    """Of a network in one dimension."""
    rows = h[:, None]
    small = F.avg_pool1d(rows, 2)
    up = F.interpolate(small, size=6) * F.interpolate(small, scale_factor=2.0, mode="linear")
    shuffled = F.pixel_shuffle(h.reshape(-1, 6, 1, 1).repeat(1, 4, 1, 1), 2)
    return (up + shuffled[:, :, 0, :1].mT)[:, 0]


def mixed(h):
    """Masks, integers and tensors without axes among what depends on x."""
    h = torch.where(h > 0, h**2, torch.expm1(h)) + torch.where(h > 0.1, h.sin(), 0.0)
    h = h * (h > 0) + h * (torch.arange(6) > 2) + h * torch.arange(6)
    return (h + torch.arange(6)) / torch.tensor(3) * torch.tensor(3.0, dtype=torch.float32)


ONE_GRAPH = {
    "in place": in_place,
    "resampled": resampled,
    "mixed": mixed,
    "data, read": lambda h: h * h.data.sin() + h,
    "data, changed": lambda h: (lambda z: (z.data.mul_(0.5), z.sin())[1])(h.clone()),
    "as_tensor, changed": lambda h: (lambda z: (torch.as_tensor(z).mul_(0.5), z.sin())[1])(h * 2),
}


@compiles_higher_orders
@pytest.mark.parametrize("name", ONE_GRAPH)
def test_what_is_one_graph(name):
    assert_agrees(*around(ONE_GRAPH[name], 3), **TRACED)


def assigned(h):
    h = h * 2
    h[:, 3] = h.sum(1)
    return h.tanh()


def assigned_to_a_view(h):
    h = h * 2
    h.view(-1)[0] = 1.0
    return h.tanh()


@compiles_higher_orders
@pytest.mark.parametrize("function", [assigned, assigned_to_a_view])
def test_an_assignment_is_right_or_breaks_the_graph(function):
    """From 2.14 on, PyTorch keeps it from the engine, and the loss was another, in silence."""
    module, x0, inputs = around(function, 3)
    assert_agrees(module, x0, inputs, fullgraph=False)
    with suppress(Unsupported):
        assert_agrees(module, x0, inputs)


@compiles_higher_orders
def test_a_residual_under_autocast_is_one_graph():
    layer, norm = nn.Linear(6, 6), nn.LayerNorm(6)
    module, x0, inputs = around(lambda h: h.float() + layer(F.silu(norm(h))), 3)
    module, layer, norm = module.float(), layer.float(), norm.float()
    inputs = {name: each.float() for name, each in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (
            with_gradients(each(x0.float(), **inputs), module, retain_graph=False)
            for each in (compiled(module), module)
        )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    one, other = (torch.cat([each.flatten() for each in all_[1:]]) for all_ in (found, expected))
    assert (one - other).norm() < 0.02 * other.norm()


def cut_by_a_block(h):
    with torch.no_grad():
        gate = h.sin()
    return h * gate + h


class Straight(torch.autograd.Function):
    """Rounded, with the gradient of what was not."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1


def filled(h):
    out = torch.zeros_like(h)
    out[:, :3] = h[:, 3:].sin()
    return out * h


CUTS = {
    "no_grad": (cut_by_a_block, 2, {}, "with .detach"),
    "detach_": (lambda h: h * (h * 2).detach_().sin(), 2, {}, "with .detach"),
    "a custom Function": (lambda h: h * Straight.apply(h), 2, {}, "with .detach"),
    "filled": (filled, 3, {}, "without fullgraph=True|setitem"),
}


@compiles_higher_orders
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_is_evaluated_in_eager_mode(cut):
    """Without fullgraph=True the loss is evaluated in eager mode, by the engine that is there."""
    function, order, options, told = CUTS[cut]
    module, x0, inputs = around(function, order, **options)
    assert_agrees(module, x0, inputs, fullgraph=False)
    with pytest.raises(Unsupported, match=told):
        compiled(module)(x0, **inputs)


@compiles_higher_orders
def test_a_checkpoint_inside_is_evaluated_in_eager_mode_above_order_one():
    def block(h):
        return hosm.checkpoint(lambda h: h.sin() * h, h)

    module, x0, inputs = around(block, 1)
    with pytest.raises(InternalTorchDynamoError, match="checkpoint"):
        compiled(module, fullgraph=False)(x0, **inputs)
    for order in (2, 3):
        module, x0, inputs = around(block, order)
        assert_agrees(module, x0, inputs, fullgraph=False)
    with pytest.raises((Unsupported, InternalTorchDynamoError)):
        compiled(module)(x0, **inputs)


def broken(h):
    torch._dynamo.graph_break()
    return h**2 + h.sin()


@compiles_higher_orders
@pytest.mark.filterwarnings("error:engine='auto'")
@pytest.mark.parametrize(
    ("order", "options"),
    [(3, {}), (2, {"probes": hosm.Paired()})],
    ids=str,
)
def test_a_network_that_breaks_the_graph_keeps_its_engine(order, options):
    """The engines run in eager mode; torch.compile is kept from what they call there."""
    module, x0, _ = around(broken, order, **options)
    inputs = given((4, 2), order, 2)[1]
    assert_agrees(module, x0, inputs, fullgraph=False)
    assert not any(past.refused for past in memory_of(module.model.network).engines.values())


@compiles_higher_orders
def test_running_statistics_compile_but_at_exact_order_three():
    assert_agrees(*around(torch.sin, 2, nn.BatchNorm1d(6)))
    module, x0, inputs = around(torch.sin, 3, nn.BatchNorm1d(6))
    assert_agrees(module, x0, inputs, fullgraph=False)
    assert module.model.network.function[0].num_batches_tracked == 2
    with pytest.raises(Unsupported, match="got BatchNorm1d"):
        compiled(module)(x0, **inputs)
    module.model.network.function[0].eval()
    assert_agrees(module, x0, inputs)


@compiles_higher_orders
def test_exact_pairs_are_one_graph_as_reverse_mode_is_not():
    module, x0, _ = around(torch.sin, 3, probes=hosm.Paired())
    inputs = given((4, 2), 3, 2)[1]
    assert_agrees(module, x0, inputs)
    module, x0, inputs = around(torch.sin, 3, engine="reverse")
    with pytest.raises(Unsupported):
        compiled(module)(x0, **inputs)


@compiles_higher_orders
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(6)])
def test_reverse_mode_runs_eagerly_and_still_finds_a_dropped_graph(norm, order):
    options = TRACED | {"fullgraph": False}
    module, x0, inputs = around(torch.sin, order, norm, engine="reverse")
    assert_agrees(module, x0, inputs, **options)
    for probes in (1, hosm.Paired()):
        module, x0, inputs = around(Detaches.apply, order, norm, engine="reverse", probes=probes)
        inputs.pop("probe")
        with pytest.raises(hosm.DerivativeError, match="once_differentiable"):
            compiled(module, **options)(x0, **inputs)


@pytest.mark.parametrize("name", ["whole", "block", "in place", "function"])
def test_what_is_compiled_by_itself_is_refused_above_order_one(name):
    torch._dynamo.reset()
    network, shape = networks()["mlp"]
    compile_ = partial(torch.compile, backend="aot_eager")
    if name == "whole":
        network = compile_(network)
    elif name == "block":
        network.middle = compile_(network.middle)
    elif name == "in place":
        network.middle.compile(backend="aot_eager")
    else:
        network.middle.forward = compile_(network.middle.forward)
    model, x0 = hosm.ScoreModel(network, VP), torch.randn(2, *shape)
    hosm.first_order_dsm(model, x0)
    if name != "function":
        for engine in ("auto", "taylor", "reverse"):
            with pytest.raises(TypeError):
                hosm.third_order_dsm(model, x0, engine=engine)
        return
    # Which only a derivative shows, if the function is not run eagerly there.
    bare = hosm.ScoreModel(networks()["mlp"][0], VP)
    bare.load_state_dict(model.state_dict())
    for order in (2, 3):
        draws = [
            {"generator": torch.Generator().manual_seed(0), "engine": "reverse"} for _ in "ab"
        ]
        expected = with_gradients(FUNCTIONS[order](bare, x0, **draws[0]), bare)
        try:
            found = with_gradients(FUNCTIONS[order](model, x0, **draws[1]), model)
        except hosm.DerivativeError:
            continue
        assert_same(found, expected)
    if not OLD:  # whose reverse mode is not reached
        with pytest.raises(RuntimeError, match="double backward"):
            hosm.third_order_dsm(model, x0).backward()


def unpacked(qkv):
    q, k, v = qkv
    return torch.tanh(q) * k + v


def starred(qkv):
    first, *others = qkv
    return torch.cat([first, others[0] + others[1]], -1)[..., 2:6].sin()


def iterated(qkv):
    total = 0
    for row in qkv:
        total = total * 0.5 + row.exp()
    return total


def listed(qkv):
    rows = [row.softmax(-1) for row in qkv]
    return torch.stack(rows).prod(0) + list(qkv)[1]


def of_rows(qkv):
    """Rows of rows, and a row that nothing is done to."""
    (a, b), _, c = qkv.unflatten(1, (2, -1))
    return torch.cat([a * b, c[0]]).square()


def asked(qkv):
    q, _, v = qkv
    assert tuple(q.shape) == tuple(q.size()) == (*q.shape[:-1], q.size(-1))
    assert q.dim() == q.ndim == v.ndim
    return q.reshape(len(q), -1).cos() * v.new_ones(v.shape) * v.numel()


def of_another(qkv):
    hidden = nn.SiLU(inplace=True)(qkv.flatten(1) * 2)
    hidden += 1
    return unpacked(hidden.unflatten(1, (-1, 4)).sin())


class Heads(nn.Module):
    """What a function makes of three projections of x, stacked along the first axis."""

    def __init__(self, function):
        super().__init__()
        self.project, self.function = nn.Linear(4, 12), function

    def forward(self, x, t):
        qkv = self.project(x * (1 + t[:, None])).unflatten(-1, (3, 4)).movedim(-2, 0)
        return self.function(qkv)


@compiles_higher_orders
@pytest.mark.parametrize(
    "function", [unpacked, starred, iterated, listed, of_rows, asked, of_another]
)
def test_every_way_of_taking_rows_is_one_graph(function):
    module = hosm.ThirdOrderDSM(hosm.ScoreModel(Heads(function), VP))
    assert_agrees(module, *given((4, 4), 3))


def of_a_row(qkv):
    q, k, v = qkv
    q[:, :2].mul_(2)
    return q * k + v


def of_what_it_is_a_view_of(qkv):
    q, k, v = qkv
    qkv.mul_(2)
    return torch.cat([q * k, v])


@compiles_higher_orders
@pytest.mark.parametrize("change", [of_a_row, of_what_it_is_a_view_of])
def test_changes_in_place_of_what_was_unpacked_are_refused(change):
    """In eager mode PyTorch refuses them too, of what has a gradient."""
    module = hosm.ThirdOrderDSM(hosm.ScoreModel(Heads(change), VP), engine="taylor")
    x0, inputs = given((4, 4), 3)
    with pytest.raises(Unsupported, match="in place"):
        compiled(module)(x0, **inputs)


@compiles_higher_orders
def test_what_takes_the_data_past_the_engine_is_nan():
    """vmap computes with derivatives as if they were elements: another number, and in silence."""

    def by_vmap(qkv):
        q, k, v = qkv
        return q * torch.func.vmap(lambda row: row.square().sum())(k)[:, None] + v

    module = hosm.ThirdOrderDSM(hosm.ScoreModel(Heads(by_vmap), VP))
    x0, inputs = given((4, 4), 3)
    assert module(x0, **inputs).isfinite()
    assert compiled(module)(x0, **inputs).isnan()


@compiles_higher_orders
def test_coordinates_of_a_subspace_are_in_the_graph():
    """With the copy of the basis, which is made in the first call."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.Unflatten(1, (3, 2)))
    adapted = hosm.OnSubspace(OfX(network), lambda x: x - x.mean(1, keepdim=True), (3, 2))
    module = hosm.ThirdOrderDSM(hosm.ScoreModel(adapted, VP))
    assert_agrees(module, *given((4, 4), 3))
