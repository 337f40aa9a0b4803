"""The functions: the old loss, exact sums over probes and fractions, one dropout mask."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from tests.cases import ENGINES, FUNCTIONS, MODULES, VP, assert_same, gradients
from tests.oracles import (
    MLP,
    AttentionNet,
    anisotropic,
    mixture_noise,
    networks,
    ring,
    sign_vectors,
)


def setting(size=4):
    model, (x0, noise) = hosm.ScoreModel(MLP(3), VP), torch.randn(2, size, 3)
    return model, x0, {"t": torch.linspace(0.2, 0.8, size), "noise": noise}


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
    assert all(map(torch.equal, gradients(new, layer), gradients(old, layer)))


def test_a_probe_of_the_shape_of_the_data_is_one_probe():
    model, x0, given = setting()
    probe = torch.randn_like(x0)
    one = hosm.third_order_dsm(model, x0, **given, probe=probe)
    assert torch.equal(one, hosm.third_order_dsm(model, x0, **given, probe=probe[None]))


def test_all_signs_average_to_the_exact_second_term():
    """E‖r2‖² = ‖M2‖²_F; the trace and third terms exceed theirs by the spread over probes."""
    model, x0, given = setting(size=2)
    signs = sign_vectors(3)[:, None].expand(8, 2, 3).contiguous()
    average = hosm.dsm_terms(model, x0, probe=signs, **given)
    exact = hosm.dsm_terms(model, x0, probes="exact", **given)
    assert_same(average[:2], exact[:2])
    assert bool((average.trace > exact.trace).all())
    assert bool((average.third > exact.third).all())


@pytest.mark.parametrize("mixture", [ring(), anisotropic(6, 3)], ids=["ring", "anisotropic"])
def test_laplacian_is_exact_on_a_gradient_field(mixture):
    """As the true score is one."""
    model = hosm.ScoreModel(mixture_noise(mixture, VP), VP)
    x0 = mixture.sample(5, torch.Generator().manual_seed(0))
    given = {"t": torch.linspace(0.05, 0.9, 5), "noise": torch.randn_like(x0)}
    given["probe"] = torch.randn(2, *x0.shape)
    assert_same(
        *(hosm.dsm_terms(model, x0, third=each, **given) for each in ("laplacian", "exact"))
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("order", "options"),
    [
        (1, {}),
        *((order, {"derivative": engine}) for order in (2, 3) for engine in ENGINES[1:]),
        (2, {"probes": 2, "derivative": "reverse"}),
        (3, {"probes": "exact"}),
        (3, {"third": "laplacian"}),
        (3, {"estimator": "paired"}),
    ],
)
def test_the_value_is_the_same_without_gradients(order, options, mode):
    network, shape = networks()["attention"]
    model = hosm.ScoreModel(network, VP)

    def loss(x0, t, noise, label):
        inputs = {"t": t, "noise": noise, "model_kwargs": {"label": label}}
        generator = torch.Generator().manual_seed(0)
        return FUNCTIONS[order](model, x0, generator=generator, **inputs, **options)

    tensors = (torch.randn(2, *shape), torch.tensor([0.2, 0.6]), torch.randn(2, *shape))
    tensors += (torch.randn(2),)
    expected = loss(*tensors)
    assert expected.requires_grad
    with mode():
        # As a validation loop makes them: inside the mode.
        made = [tensor * 1.0 for tensor in tensors]
        got = loss(*made)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    # And they can be trained on.
    trained = loss(*made)
    torch.testing.assert_close(trained, expected)
    trained.backward()


def test_a_fraction_is_unbiased_and_shares_the_first_order():
    """Over all choices of the rows the mean is the whole loss: an exact finite sum."""
    model, x0, given = setting(size=3)
    given["probe"] = torch.randn_like(x0)
    whole = hosm.dsm_terms(model, x0, **given)
    expected = {}
    for chosen in itertools.combinations(range(3), 2):
        higher = sum(term[list(chosen)].mean() for term in whole[1:])
        expected[chosen] = whole.first.mean() + higher
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        got = hosm.third_order_dsm(model, x0, fraction=0.6, generator=generator, **given)
        order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
        seen.add(chosen := tuple(sorted(order[:2].tolist())))
        assert_same(got, expected[chosen])
    assert seen == set(expected)
    assert_same(sum(expected.values()) / 3, sum(term.mean() for term in whole))


@pytest.mark.parametrize(("fraction", "rows"), [(0.01, 1), (0.5, 2), (0.99, 4)])
def test_a_fraction_takes_at_least_one_row(fraction, rows):
    model, x0, _ = setting()
    _, terms = hosm.ThirdOrderDSM(model, fraction=fraction)(x0, return_terms=True)
    assert [len(term) for term in terms] == [4, rows, rows, rows]


def test_a_fraction_keeps_the_factors_of_its_rows():
    model, x0, given = setting()
    given |= {"probe": torch.randn_like(x0), "weighting": lambda t: t**2}
    whole = hosm.third_order_dsm(model, x0, reduction="none", **given)
    only_first = {"weights": (1, 0, 0, 0), "reduction": "none"}
    first = hosm.third_order_dsm(model, x0, **only_first, **given)
    generator = torch.Generator().manual_seed(1)
    got = hosm.third_order_dsm(model, x0, fraction=0.5, generator=generator, **given)
    rows = torch.randperm(4, generator=torch.Generator().manual_seed(1))[:2]
    assert set(rows.tolist()) != {0, 1}
    assert_same(got, first.mean() + (whole - first)[rows].mean())


def test_dropout_has_one_mask_for_value_and_derivatives():
    inner, outer = MLP(3), nn.Linear(3, 3)
    model = hosm.ScoreModel(lambda x, t: outer(F.dropout(inner(x, t), 0.5)), VP)
    _, x0, given = setting(3)
    probe, values = torch.randn(2, 3, 3), {}
    for engine in ENGINES:
        torch.manual_seed(7)
        values[engine] = hosm.dsm_terms(model, x0, probe=probe[:1], derivative=engine, **given)
        assert_same(values[engine], values["auto"])
    torch.manual_seed(7)
    both = hosm.dsm_terms(model, x0, order=2, probe=probe, **given)
    assert_same(both.first, values["auto"].first)


@pytest.mark.parametrize("engine", ["taylor", "reverse"])
def test_without_the_first_term_the_last_bias_has_a_gradient_of_zero_or_none(engine):
    model, x0, given = setting()
    weights = (0, 1, 1, 1)
    hosm.third_order_dsm(model, x0, weights=weights, derivative=engine, **given).backward()
    gradient = model.network.outer.bias.grad
    assert gradient is None if engine == "reverse" else gradient.abs().max() == 0
    assert model.network.outer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_penalties_on_gradients_are_differentiated(fraction):
    """Twice, where PyTorch's fused attention has no second derivative and its norm a wrong one."""
    found = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        network = AttentionNet()
        network.by_hand = by_hand
        value = hosm.third_order_dsm(
            hosm.ScoreModel(network, VP),
            torch.randn(4, 4, 3),
            t=torch.tensor([0.2, 0.4, 0.6, 0.8]),
            fraction=fraction,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(3):
            parts = gradients(value, network, create_graph=True)
            found.append(parts)
            value = sum(part.square().sum() for part in parts)
    for one, other in zip(found[:3], found[3:], strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("estimator", ["hutchinson", "paired"])
def test_samples_whose_cubed_size_is_beyond_integers(estimator):
    x0 = torch.randn(1, 2_700_000, dtype=torch.float32)
    terms = hosm.dsm_terms(hosm.ScoreModel(lambda x, t: 0.5 * x, VP), x0, estimator=estimator)
    assert all(bool(torch.isfinite(term).all()) for term in terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_data_takes_float32_times(dtype):
    own, x0 = hosm.ScoreModel(lambda x, t: x, VP), torch.randn(4, 2, dtype=dtype)
    terms = hosm.dsm_terms(own, x0, t=torch.full((4,), 0.5).float(), noise=x0, probe=x0)
    assert all(term.dtype == torch.float32 for term in terms)
    hosm.third_order_dsm(own, x0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_accumulated_parts_are_the_whole_batch(order):
    """The loop of the page on training: every part divided by the number of parts."""
    model, x0, given = setting()
    given |= {"probe": torch.randn_like(x0)} if order > 1 else {}
    loss = MODULES[order](model)
    expected = gradients(loss(x0, **given), model)
    for rows in (slice(0, 2), slice(2, 4)):
        part = {name: value[rows] for name, value in given.items()}
        (loss(x0[rows], **part) / 2).backward()
    assert_same([each.grad for each in model.parameters()], expected)
