"""The functions: the old loss, weights, reductions, probes, fractions, randomness."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from tests.oracles import MLP, AttentionNet, networks, sign_vectors

VP = hosm.VPSchedule()
ORDERS = {1: hosm.first_order_dsm, 2: hosm.second_order_dsm, 3: hosm.third_order_dsm}


def setting(size=4):
    network, shape = networks()["mlp"]
    t = torch.linspace(0.2, 0.8, size)
    return hosm.ScoreModel(network, VP), torch.randn(size, *shape), t, torch.randn(size, *shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("image", [False, True])
def test_order_one_is_the_old_loss_to_the_last_bit(dtype, image):
    layer = nn.Conv2d(3, 3, 3, padding=1) if image else nn.LayerNorm(7)
    shape = (64, 3, 8, 8) if image else (64, 7)
    layer = layer.to(dtype)
    x0, noise = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    t = torch.rand(64, dtype=torch.promote_types(dtype, torch.float32)).clamp(min=0.01)
    alpha, sigma = (part.reshape(64, *[1] * (x0.ndim - 1)) for part in VP(t))
    # Half precision as trainers have it: in float32 after the network.
    wide = torch.promote_types(dtype, torch.float32)
    old = F.mse_loss(layer((alpha * x0 + sigma * noise).to(dtype)).to(wide), noise.to(wide))
    new = hosm.first_order_dsm(hosm.ScoreModel(lambda x, t: layer(x), VP), x0, t=t, noise=noise)
    assert torch.equal(new, old)
    gradients = [torch.autograd.grad(loss, list(layer.parameters())) for loss in (old, new)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_order_holds_the_lower_ones():
    model, x0, t, noise = setting()
    inputs = {"t": t, "noise": noise}
    probed = {**inputs, "probe": torch.randn(2, *x0.shape)}
    terms = hosm.dsm_terms(model, x0, **probed)
    assert hosm.dsm_terms(model, x0, order=1, **inputs)[1:] == (None, None, None)
    assert hosm.dsm_terms(model, x0, order=2, **probed).third is None
    for order, function in ORDERS.items():
        expected = sum(term.mean() for term in terms[: 1 if order == 1 else order + 1])
        got = function(model, x0, **(inputs if order == 1 else probed))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_weights_multiply_their_terms(as_tensors):
    model, x0, t, noise = setting()
    inputs = {"t": t, "noise": noise, "probe": torch.randn_like(x0)}
    terms = hosm.dsm_terms(model, x0, **inputs)
    weights = (0.5, 2.0, 3.0, 0.25)
    for order in (2, 3):
        parts = zip(weights[: order + 1], terms, strict=False)
        expected = sum(weight * term.mean() for weight, term in parts)
        given = [torch.tensor(w) for w in weights] if as_tensors else weights
        torch.testing.assert_close(ORDERS[order](model, x0, weights=given, **inputs), expected)
    short = ORDERS[2](model, x0, weights=weights[:3], **inputs)
    torch.testing.assert_close(short, ORDERS[2](model, x0, weights=weights, **inputs))
    only = ORDERS[3](model, x0, weights=(0, 0, 0, 1), **inputs)
    torch.testing.assert_close(only, terms.third.mean())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_reductions(order):
    model, x0, t, noise = setting()
    inputs = {"t": t, "noise": noise}
    if order > 1:
        inputs["probe"] = torch.randn_like(x0)
    each = ORDERS[order](model, x0, reduction="none", **inputs)
    assert each.shape == (4,)
    terms = hosm.dsm_terms(model, x0, order=order, **inputs)
    torch.testing.assert_close(each, sum(term for term in terms if term is not None))
    torch.testing.assert_close(ORDERS[order](model, x0, reduction="sum", **inputs), each.sum())
    torch.testing.assert_close(ORDERS[order](model, x0, **inputs), each.mean())


def test_a_probe_of_the_shape_of_the_data_is_one_probe():
    model, x0, t, noise = setting()
    probe = torch.randn_like(x0)
    one = hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=probe)
    same = hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=probe[None])
    torch.testing.assert_close(one, same, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["auto", "taylor", "reverse"])
def test_all_signs_average_to_the_exact_second_term(engine):
    """E‖r2‖² = ‖M2‖²_F; the trace and third terms exceed theirs by the spread over probes."""
    model, x0, t, noise = setting(size=2)
    signs = sign_vectors(3)[:, None].expand(8, 2, 3).contiguous()
    inputs = {"t": t, "noise": noise, "derivative": engine}
    average = hosm.dsm_terms(model, x0, probe=signs, **inputs)
    exact = hosm.dsm_terms(model, x0, probes="exact", **inputs)
    torch.testing.assert_close(average.first, exact.first)
    torch.testing.assert_close(average.second, exact.second)
    assert bool((average.trace > exact.trace).all())
    assert bool((average.third > exact.third).all())


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere", "dct"])
@pytest.mark.parametrize("order", [2, 3])
def test_drawn_probes_are_those_of_the_distribution(order, distribution):
    model, x0, t, noise = setting()
    got = ORDERS[order](
        model,
        x0,
        t=t,
        noise=noise,
        probes=3,
        distribution=distribution,
        generator=torch.Generator().manual_seed(4),
    )
    from hosm_losses.probes import draw_probes

    probe = draw_probes(x0, 3, distribution, torch.Generator().manual_seed(4))
    torch.testing.assert_close(got, ORDERS[order](model, x0, t=t, noise=noise, probe=probe))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_generator_decides_everything_and_the_global_one_is_left_alone(order):
    model, x0, _, _ = setting()
    before = torch.get_rng_state()
    losses = [
        ORDERS[order](model, x0, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    assert torch.equal(*losses)
    assert torch.equal(torch.get_rng_state(), before)
    assert ORDERS[order](model, x0) != ORDERS[order](model, x0)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("derivative", ["auto", "taylor", "reverse"])
@pytest.mark.parametrize("probes", [1, 2, "exact"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_value_is_the_same_without_gradients(mode, probes, derivative, order):
    network, shape = networks()["attention"]
    model = hosm.ScoreModel(network, VP)
    x0 = torch.randn(2, *shape)

    def loss(x0, t, noise, label):
        inputs = {"t": t, "noise": noise, "model_kwargs": {"label": label}}
        if order > 1:
            generator = torch.Generator().manual_seed(0)
            inputs |= {"probes": probes, "derivative": derivative, "generator": generator}
        return ORDERS[order](model, x0, **inputs)

    tensors = (x0, torch.tensor([0.2, 0.6]), torch.randn_like(x0), torch.randn(2))
    expected = loss(*tensors)
    assert expected.requires_grad
    with mode():
        # As a validation loop makes them: inside the mode.
        got = loss(*(tensor * 1.0 for tensor in tensors))
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("derivative", ["auto", "taylor", "reverse"])
def test_tensors_made_in_inference_mode_can_be_trained_on(derivative):
    model, x0, t, noise = setting()
    expected = hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=noise)
    with torch.inference_mode():
        x0, t, noise = x0 * 1, t * 1, noise * 1
    loss = hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=noise, derivative=derivative)
    torch.testing.assert_close(loss, expected)
    loss.backward()


def test_a_fraction_is_unbiased_and_shares_the_first_order():
    """Over all choices of the rows the mean is the whole loss: an exact finite sum."""
    model, x0, t, noise = setting(size=3)
    probe = torch.randn_like(x0)
    inputs = {"t": t, "noise": noise, "probe": probe}
    whole = hosm.dsm_terms(model, x0, **inputs)
    expected = {}
    for chosen in itertools.combinations(range(3), 2):
        rows = list(chosen)
        higher = sum(term[rows].mean() for term in whole[1:])
        expected[chosen] = whole.first.mean() + higher
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        got = hosm.third_order_dsm(model, x0, fraction=0.6, generator=generator, **inputs)
        order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
        chosen = tuple(sorted(order[:2].tolist()))
        seen.add(chosen)
        torch.testing.assert_close(got, expected[chosen])
        total = hosm.third_order_dsm(
            model,
            x0,
            fraction=0.6,
            generator=torch.Generator().manual_seed(seed),
            reduction="sum",
            **inputs,
        )
        torch.testing.assert_close(total, 3 * expected[chosen])
    assert seen == set(expected)
    mean = sum(expected.values()) / 3
    torch.testing.assert_close(mean, sum(term.mean() for term in whole))


@pytest.mark.parametrize(("fraction", "rows"), [(0.01, 1), (0.5, 2), (0.99, 4)])
def test_a_fraction_takes_at_least_one_row(fraction, rows):
    model, x0, _, _ = setting()
    module = hosm.ThirdOrderDSM(model, fraction=fraction)
    _, terms = module(x0, return_terms=True)
    assert [len(term) for term in terms] == [4, rows, rows, rows]


def test_a_fraction_keeps_the_factors_of_its_rows():
    model, x0, t, noise = setting()
    inputs = {"t": t, "noise": noise, "probe": torch.randn_like(x0), "weighting": lambda t: t**2}
    whole = hosm.third_order_dsm(model, x0, reduction="none", **inputs)
    first = t**2 * hosm.dsm_terms(model, x0, order=1, t=t, noise=noise).first
    got = hosm.third_order_dsm(
        model, x0, fraction=0.5, generator=torch.Generator().manual_seed(1), **inputs
    )
    rows = torch.randperm(4, generator=torch.Generator().manual_seed(1))[:2]
    assert set(rows.tolist()) != {0, 1}
    torch.testing.assert_close(got, first.mean() + (whole - first)[rows].mean())


def test_gradients_flow_to_the_data_for_a_trainable_encoder():
    model, x0, t, noise = setting()
    x0.requires_grad_()
    direction = torch.randn_like(x0)

    def loss(x0):
        return hosm.first_order_dsm(model, x0, t=t, noise=noise)

    (gradient,) = torch.autograd.grad(loss(x0), x0)
    h = 1e-6
    ends = [float(loss((x0 + s * h * direction).detach()).detach()) for s in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h))
    hosm.third_order_dsm(model, x0, t=t, noise=noise).backward()
    assert torch.isfinite(x0.grad).all()


def test_dropout_has_one_mask_for_value_and_derivatives():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = MLP(3), nn.Linear(3, 3)

        def forward(self, x, t):
            return self.outer(F.dropout(self.inner(x, t), 0.5))

    network = Dropped()
    model = hosm.ScoreModel(network, VP)
    x0, noise, t = torch.randn(3, 3), torch.randn(3, 3), torch.tensor([0.2, 0.5, 0.8])
    probe = torch.randn(2, 3, 3)
    values = {}
    for engine in ("auto", "taylor", "reverse"):
        torch.manual_seed(7)
        values[engine] = hosm.dsm_terms(
            model, x0, t=t, noise=noise, probe=probe[:1], derivative=engine
        )
    for engine in values:
        for one, other in zip(values["reverse"], values[engine], strict=True):
            torch.testing.assert_close(one, other)
    torch.manual_seed(7)
    both = hosm.dsm_terms(model, x0, t=t, noise=noise, probe=probe, derivative="taylor")
    torch.testing.assert_close(both.first, values["taylor"].first)


@pytest.mark.parametrize("engine", ["auto", "taylor", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
def test_without_the_first_term_the_last_bias_has_a_gradient_of_zero_or_none(order, engine):
    model, x0, t, noise = setting()
    weights = (0, 1, 1, 1)
    ORDERS[order](model, x0, t=t, noise=noise, weights=weights, derivative=engine).backward()
    gradient = model.network.outer.bias.grad
    if engine in ("auto", "taylor"):
        assert gradient.abs().max() == 0
    else:
        assert gradient is None
    assert model.network.outer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_penalties_on_gradients_are_differentiated(fraction):
    """Twice, where PyTorch's fused attention has no second derivative and its norm a wrong one."""
    found = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        network = AttentionNet()
        network.by_hand = by_hand
        model = hosm.ScoreModel(network, VP)
        weights = list(model.parameters())
        value = hosm.third_order_dsm(
            model,
            torch.randn(4, 4, 3),
            t=torch.tensor([0.2, 0.4, 0.6, 0.8]),
            fraction=fraction,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(3):
            parts = torch.autograd.grad(value, weights, create_graph=True)
            found.append(parts)
            value = sum(part.square().sum() for part in parts)
    for one, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
