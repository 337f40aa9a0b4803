"""Half-precision data: what is summed over the elements is summed in float32 at least."""

from itertools import pairwise, product

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import FUNCTIONS, VP, OfX, given, gradients

D = 3072  # an image of 32 by 32: ‖v‖⁴ is far outside float16
HALVES = [torch.float16, torch.bfloat16]
PAIRED, EXACT = {"probes": hosm.Paired()}, {"probes": "exact"}


class Elementwise(nn.Module):
    """A network whose own sums are short, so that only those of the loss are tested."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.2, 1.2, D))
        self.shift = nn.Parameter(torch.linspace(-0.5, 0.5, D))

    def forward(self, x, t):
        rolled = x * self.weight + 0.3 * x.roll(1, 1)
        return torch.tanh(rolled + self.shift + t.to(x.dtype)[:, None])


def both(network, half, size, prediction="epsilon", schedule=VP):
    """A model in half precision and in float64, each with x0 and inputs: the same numbers."""
    generator, state = torch.Generator().manual_seed(0), network.to(half).state_dict()
    x0, noise = (torch.randn(size, D, generator=generator).to(half) for _ in range(2))
    signs = torch.randint(0, 2, (2, size, D), generator=generator).to(half) * 2 - 1
    t = torch.linspace(0.3, 0.8, size).float()
    for dtype in (half, torch.float64):
        copy = type(network)().to(dtype)
        copy.load_state_dict(state)
        inputs = {"t": t.to(torch.promote_types(dtype, torch.float32))}
        inputs |= {"noise": noise.to(dtype), "probe": signs.to(dtype)}
        yield hosm.ScoreModel(copy, schedule, prediction), x0.to(dtype), inputs


def close(got, expected, half):
    """To a few roundings of the type; a cancelled difference is measured by what it is of."""
    assert got.dtype == torch.float32
    assert bool(torch.isfinite(got).all())
    tolerance = 20 * torch.finfo(half).eps
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def off(found, expected):
    """The relative error of gradients."""
    found, expected = (
        torch.cat([g.flatten().double() for g in each]) for each in (found, expected)
    )
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("weighting", "reduction"), [("noise", "mean"), ("native", "sum"), ("likelihood", "none")]
)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("half", HALVES)
def test_losses_and_gradients_equal_float64(half, order, weighting, reduction):
    # With "epsilon" nothing but the loss widens what the network returns.
    prediction, found = "v" if weighting == "native" else "epsilon", []
    for model, x0, inputs in both(Elementwise(), half, 4, prediction):
        probe = inputs.pop("probe")[:1]
        inputs |= {"probe": probe, "weights": "paper"} if order > 1 else {}
        options = {"weighting": weighting, "reduction": reduction}
        loss = FUNCTIONS[order](model, x0, **inputs, **options)
        found.append((loss.detach(), gradients(loss.sum(), [model.network.weight])))
    size = float(found[1][0].abs().max())
    close(found[0][0] / size, found[1][0] / size, half)
    assert off(found[0][1], found[1][1]) < 20 * torch.finfo(half).eps


@pytest.mark.parametrize("end", ["t_min", "t_max"])
@pytest.mark.parametrize("prediction", ["x0", "v", "velocity"])
@pytest.mark.parametrize("half", HALVES)
def test_the_native_error_at_an_end_is_that_of_the_prediction(half, prediction, end):
    schedule = hosm.LinearFlowSchedule()
    (model, x0, inputs), _ = both(Elementwise(), half, 2, prediction, schedule)
    noise, weight = inputs["noise"], model.network.weight
    inputs["t"] = t = torch.full((2,), getattr(schedule, end), dtype=torch.float32)
    alpha, sigma = (part[:, None] for part in schedule(t))
    predicted = model.network((alpha * x0 + sigma * noise).to(half), t)
    target = {
        "x0": x0,
        "v": alpha * noise - sigma * x0,
        "velocity": noise.float() - x0.float(),
    }[prediction]
    own = (predicted.float() - target.float()).square().mean()
    alone = {"weights": (1, 0, 0), "probe": inputs.pop("probe")}
    for order, options in ((1, {}), (2, alone), (2, alone | PAIRED)):
        loss = FUNCTIONS[order](model, x0, **inputs, **options, weighting="native")
        torch.testing.assert_close(loss, own, rtol=1e-3, atol=0)
        assert off(gradients(loss, [weight]), gradients(own, [weight])) < 1e-2


TERMS = [{"engine": "reverse"}, {}, PAIRED]
TERMS.append(PAIRED | {"engine": "taylor"})


@pytest.mark.parametrize(("half", "options"), [*product(HALVES, TERMS), (torch.float16, EXACT)])
def test_the_terms_equal_float64(half, options):
    """Of two probes relative to the sums that cancel in them."""
    found, exact = [], options.get("probes") == "exact"
    for model, x0, inputs in both(Elementwise(), half, 1 if exact else 2):
        probe = {} if exact else {"probe": inputs["probe"]}
        inputs = {"t": inputs["t"], "noise": inputs["noise"], **probe}
        with torch.no_grad():
            found.append([*hosm.dsm_terms(model, x0, **inputs, **options)])
    for got, expected in zip(*found, strict=True):
        close(got, expected, half)


def test_float16_needs_a_scale_on_the_loss():
    """Of images the higher terms have gradients below its range, as no value of a loss shows."""
    torch.set_default_dtype(torch.float32)  # as a user has it; tests/conftest.py sets it back
    widths = D, 128, 128, D
    layers = [nn.Sequential(nn.Linear(*each), nn.SiLU()) for each in pairwise(widths)]
    network = OfX(nn.Sequential(*layers))
    model = hosm.ScoreModel(network, hosm.DiscreteSchedule.linear())
    x0, inputs = given((2, D), 2)
    x0, inputs = x0.float() / 2, {name: each.float() for name, each in inputs.items()}
    inputs["t"] = torch.tensor([200, 500])

    def of_terms(half, scale):
        with torch.autocast("cpu", torch.float16, enabled=half):
            _, second, _, third = hosm.dsm_terms(model, x0, **inputs)
        for term in (second, third):
            yield [each / scale for each in gradients(scale * term.mean(), network)]

    expected = [*of_terms(False, 1.0)]
    for scale, least, most in ((1.0, 0.01, 1.5), (2.0**16, 0.0, 0.003)):
        found = [off(*each) for each in zip(of_terms(True, scale), expected, strict=True)]
        assert all(least < each < most for each in found)
