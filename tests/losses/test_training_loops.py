"""What a training loop puts around a loss: autocast, averages, checkpoints."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import hosm_losses as hosm
from tests.cases import MODULES, VP, assert_same, given, gradients
from tests.versions import tells_hooks

ENGINES = [(1, None), (2, "taylor"), (3, "taylor"), (3, "reverse")]


class Mixed(nn.Module):
    """Convolutions, group norm, layer norm and attention."""

    def __init__(self, width=4, dropout=0.0):
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.group = nn.GroupNorm(2, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.layer = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x, t):
        hidden = F.silu(self.group(self.first(x) + t[:, None, None, None]))
        hidden = hidden + self.middle(hidden)
        tokens = hidden.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.layer(tokens)).unsqueeze(1).chunk(3, -1)
        tokens = tokens + F.scaled_dot_product_attention(q, k, v).squeeze(1)
        image = F.silu(tokens).transpose(1, 2).reshape(hidden.shape)
        return self.last(self.dropout(image))


def loss_module(order, engine, network, **options):
    if order > 1 and engine is not None:
        options["engine"] = engine
    return MODULES[order](hosm.ScoreModel(network, VP), **options)


def data(order, batch=4, size=(3, 2), dtype=torch.float64):
    x0, inputs = given((batch, 2, *size), order)
    return x0.to(dtype), {name: value.to(dtype) for name, value in inputs.items()}


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def gradient(module, x0, inputs):
    return torch.cat([each.flatten() for each in gradients(module(x0, **inputs), module)])


def left_by_backward(module):
    """The gradients of all parameters, zero where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


# Each term alone too, for the gradient of a sum shows little of its smallest part.
@pytest.mark.parametrize(
    ("order", "weights", "engine", "dtype"),
    [
        (2, (0, 1, 0), "taylor", torch.bfloat16),
        (2, (0, 0, 1), "reverse", torch.float16),
        (3, None, "taylor", torch.float16),
        (3, (0, 0, 0, 1), "taylor", torch.bfloat16),
        (3, (0, 0, 0, 1), "reverse", torch.bfloat16),
        (3, (0, 0, 0, 1), "reverse", torch.float16),
    ],
)
def test_the_gradient_under_autocast_is_near_that_of_float32(order, weights, engine, dtype):
    module = loss_module(order, engine, Mixed(width=16).float(), weights=weights)
    x0, inputs = data(order, batch=8, size=(6, 6), dtype=torch.float32)
    inputs["probe"] = inputs["probe"].sign()
    expected = gradient(module, x0, inputs)
    with torch.autocast("cpu", dtype=dtype):
        loss = module(x0, **inputs)
    assert loss.dtype == torch.float32
    found = torch.cat([each.flatten() for each in gradients(loss, module)])
    size = float(expected.norm())
    assert float(found.norm()) == pytest.approx(size, rel=0.05)
    # Above the first bound the low precision was used at all; the page on training says 1 %.
    assert 1e-4 * size < float((found - expected).norm()) < 0.01 * size


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("of", ["model", "module"])
def test_an_averaged_copy_is_a_model_of_its_own(order, of):
    module = loss_module(order, None, Mixed())
    x0, inputs = data(order)
    source = module if of == "module" else module.model
    averaged = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected, optimizer = None, torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(x0, **inputs).backward()
        optimizer.step()
        averaged.update_parameters(source)
        now = flat(module)
        expected = now if expected is None else 0.5 * expected + 0.5 * now
    torch.testing.assert_close(flat(averaged), expected)
    # The loss of the average is that of a network with its weights, not of the one in training.
    fresh = Mixed()
    own = averaged.module.model if of == "module" else averaged.module
    fresh.load_state_dict(own.network.state_dict())
    reference = loss_module(order, None, fresh)
    through = averaged if of == "module" else MODULES[order](averaged.module)
    assert torch.equal(through(x0, **inputs), reference(x0, **inputs))
    assert not torch.equal(through(x0, **inputs), module(x0, **inputs))
    assert_same(gradient(through, x0, inputs), gradient(reference, x0, inputs))


@tells_hooks
@pytest.mark.parametrize(
    ("order", "engine", "options"),
    [
        *((*each, {}) for each in ENGINES),
        (2, "reverse", {"probes": 2}),
        (3, "reverse", {"probes": 2}),
        (3, None, {"probes": hosm.Paired()}),
    ],
)
def test_a_checkpoint_around_the_loss_changes_nothing(order, engine, options):
    """Of one that draws: a recomputation under vmap may not, and would be another one."""
    module = loss_module(order, engine, Mixed(dropout=0.3), **options)
    x0, inputs = data(order)
    inputs = {} if options else inputs
    torch.manual_seed(1)
    expected = gradients(module(x0, **inputs), module)
    torch.manual_seed(1)
    checkpoint(module, x0, use_reentrant=False, **inputs).backward()
    assert_same(left_by_backward(module), expected)


@pytest.mark.parametrize(("order", "engine"), ENGINES[1:])
def test_checkpoints_around_the_loss_and_inside_the_network(order, engine):
    network = Mixed()
    module = loss_module(order, engine, network)
    x0, inputs = data(order)
    expected = gradient(module, x0, inputs)
    for part in (network.middle, network.layer):
        part.forward = partial(hosm.checkpoint, part.forward)
    loss = checkpoint(module, x0, use_reentrant=False, **inputs)
    loss.backward()
    assert_same(torch.cat([each.flatten() for each in left_by_backward(module)]), expected)


def test_torchs_checkpoint_inside_is_refused_whatever_is_around():
    network = Mixed()
    module = loss_module(2, "reverse", network)
    x0, inputs = data(2)
    network.layer.forward = partial(checkpoint, network.layer.forward, use_reentrant=False)
    for call in (module, partial(checkpoint, module, use_reentrant=False)):
        with pytest.raises(hosm.DerivativeError):
            call(x0, **inputs)
        # The checkpoint of PyTorch 2.6 leaves its hooks on until what was raised is collected.
        gc.collect()
