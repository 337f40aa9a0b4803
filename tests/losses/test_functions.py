"""The functions: the old loss, penalties on gradients, networks that write to weights."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from tests.cases import FUNCTIONS, MLP, VP, AttentionNet, assert_same, gradients


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


def test_penalties_on_gradients_are_differentiated():
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
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(3):
            parts = gradients(value, network, create_graph=True)
            found.append(parts)
            value = sum(part.square().sum() for part in parts)
    for one, other in zip(found[:3], found[3:], strict=True):
        assert_same(one, other)


class Normalised(nn.Module):
    """Forced weight normalisation, as in EDM2: its forward writes to its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x, t):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(nn.functional.normalize(self.weight))
        return (x @ self.weight).tanh()


def test_a_network_that_writes_to_its_parameters_takes_no_fraction():
    model, x0 = hosm.ScoreModel(Normalised(), VP), torch.randn(4, 3)
    for function in (FUNCTIONS[2], FUNCTIONS[3]):
        function(model, x0).backward()
        with pytest.raises(ValueError, match=r"fraction: .*changes"):
            function(model, x0, fraction=0.5)
        function(model.eval(), x0, fraction=0.5).backward()
        with torch.no_grad():
            function(model.train(), x0, fraction=0.5)


@pytest.mark.parametrize("probes", [1, hosm.Paired()])
def test_samples_whose_cubed_size_is_beyond_integers(probes):
    x0 = torch.randn(1, 2_700_000, dtype=torch.float32)
    terms = hosm.dsm_terms(hosm.ScoreModel(lambda x, t: 0.5 * x, VP), x0, probes=probes)
    assert all(bool(torch.isfinite(term).all()) for term in terms)
