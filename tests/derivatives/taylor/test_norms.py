"""Norms with statistics of the input, against the compositions of the safe primitives."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hosm_losses.derivatives.primitive_mode import safe_primitives
from hosm_losses.derivatives.taylor import carried
from tests.derivatives.taylor.checks import check
from tests.oracles import randomise

NORMS = {
    "layer norm": (lambda: nn.LayerNorm(5), (2, 5)),
    "layer norm without affine": (lambda: nn.LayerNorm(5, elementwise_affine=False), (2, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (5,)),
    "layer norm of two axes": (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    "layer norm with a large eps": (lambda: nn.LayerNorm(5, eps=0.7), (2, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "group norm of images": (lambda: nn.GroupNorm(2, 4), (4, 2, 3)),
    "group norm without affine": (lambda: nn.GroupNorm(3, 6, affine=False), (6, 2)),
    "group norm of rows": (lambda: nn.GroupNorm(2, 6), (6,)),
    "rms norm": (lambda: nn.RMSNorm(5), (2, 5)),
    "rms norm without affine": (lambda: nn.RMSNorm((2, 5), elementwise_affine=False), (2, 5)),
    "instance norm": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 3, 2)),
    "batch norm": (lambda: nn.BatchNorm1d(5), (5,)),
    "batch norm of images": (lambda: nn.BatchNorm2d(2), (2, 3, 2)),
    "batch norm without affine": (lambda: nn.BatchNorm1d(5, affine=False), (5,)),
    "batch norm in evaluation": (lambda: nn.BatchNorm2d(2).eval(), (2, 3, 2)),
    "instance norm with statistics": (
        lambda: nn.InstanceNorm1d(2, track_running_stats=True).eval(),
        (2, 5),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_between_curved_functions(name):
    torch.manual_seed(0)
    make, shape = NORMS[name]
    norm = make()
    randomise(norm)

    def function(x):
        return norm(x + x.sin() / 2).sin()

    def reference(x):
        with safe_primitives():
            return function(x)

    check(function, shape, *norm.parameters(), reference=reference)


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm2d, (2, 3, 2)), (nn.InstanceNorm1d, (2, 5))]
)
def test_running_statistics_move_once(kind, shape):
    norm, other = kind(2, track_running_stats=True), kind(2, track_running_stats=True)
    x = torch.randn(3, *shape)
    carried(norm, x, torch.randn(2, *x.shape))
    other(x)
    assert torch.equal(norm.running_mean, other.running_mean)
    assert torch.equal(norm.running_var, other.running_var)
    assert norm.num_batches_tracked == other.num_batches_tracked


def test_weights_that_depend_on_x():
    def layer(x):
        return F.layer_norm(x.sin(), (5,), x[0].cos(), x[1])

    def group(x):
        return F.group_norm(x.sin(), 1, x[0], x[1].cos())

    def rms(x):
        return F.rms_norm(x.sin(), (5,), x[0].cos())

    for function in (layer, group, rms):

        def reference(x, function=function):
            with safe_primitives():
                return function(x)

        check(function, (5,), reference=reference)


def test_wrong_shapes_are_refused():
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"expected an input that ends in \(4,\); got \(2, 5\)"):
        carried(lambda x: F.layer_norm(x, (4,)), x, x.unsqueeze(0))
    with pytest.raises(ValueError, match="expected channels that 2 groups divide; got 5"):
        carried(lambda x: F.group_norm(x, 2), x, x.unsqueeze(0))


def test_a_mean_that_is_large_costs_no_digits_that_the_native_norm_keeps():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 64, dtype=torch.float32) + 100
    v = torch.randn_like(x)
    exact = carried(lambda x: F.group_norm(x, 2), x.double(), v.double().unsqueeze(0))
    got = carried(lambda x: F.group_norm(x, 2), x, v.unsqueeze(0))
    native = F.group_norm(x, 2)
    assert (got[0] - exact[0]).abs().max() < 3 * (native - exact[0]).abs().max() + 1e-6
    assert (got[1] - exact[1]).abs().max() < 1e-4


@pytest.mark.parametrize("size", [3, 6, 10, 48])
def test_rows_of_equal_numbers_have_no_residue(size):
    x, v = torch.full((2, size), 1e6), torch.randn(1, 2, size)
    value, slope, bend = carried(lambda x: F.layer_norm(x, (size,)), x, v, "squares")
    assert torch.equal(value, torch.zeros_like(x))
    assert torch.equal(bend, torch.zeros_like(x))
    torch.testing.assert_close(slope, (v[0] - v[0].mean(1, keepdim=True)) / 1e-5**0.5)


def lengths(x, dim):
    return (x * x).sum(dim, keepdim=True).sqrt()


def test_vectors_of_length_one():
    """PyTorch's own fail in nested forward mode."""
    check(
        lambda x: F.normalize(x + x.sin()).sin() + F.normalize(x, dim=-1),
        (2, 5),
        reference=lambda x: ((x + x.sin()) / lengths(x + x.sin(), 1)).sin() + x / lengths(x, -1),
    )
    small = torch.full((1, 3), 1e-14)
    found = carried(F.normalize, small, torch.ones(1, 1, 3), "squares")
    torch.testing.assert_close(found[1], torch.full((1, 3), 1e12))
    assert torch.equal(found[2], torch.zeros(1, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.norm(),
        lambda x: x.norm(dim=-1),
        lambda x: torch.norm(x, dim=(1, 2), keepdim=True),
        lambda x: torch.linalg.vector_norm(x, dim=1),
    ],
)
def test_lengths(function):
    def reference(x):
        seen = function(x.detach())
        if seen.ndim == 0:
            return (x * x).sum().sqrt()
        dims = (1, 2) if seen.shape[1:] == (1, 1) else 1 if seen.shape[-1] == 5 else -1
        return (x * x).sum(dims, keepdim=isinstance(dims, tuple)).sqrt()

    check(function, (2, 5), reference=reference)
