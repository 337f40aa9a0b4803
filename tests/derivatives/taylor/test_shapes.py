"""What moves elements about, and properties."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from hosm_losses.derivatives.taylor import TaylorError, carried
from tests.derivatives.taylor.checks import check

OTHER = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(3))
INDEX = torch.tensor([1, 0, 2, 2])
MOVES = {
    "reshape": lambda x: x.reshape(3, -1).reshape((3, 4, 2)),
    "view": lambda x: x.contiguous().view(x.shape[0], 8).view(torch.Size((3, 2, 4))),
    "view of another dtype": lambda x: x.view(3, 2, 4),
    "view as": lambda x: x.view_as(OTHER).reshape_as(OTHER),
    "permute": lambda x: x.permute(2, 0, -2).permute((1, 2, 0)),
    "transpose": lambda x: x.transpose(0, 1).transpose(-1, 1).swapaxes(0, 2),
    "properties": lambda x: x.mT + x[0].T.mT.reshape(1, 4, 2) + x.real.mT,
    "squeeze": lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze().unsqueeze(0).squeeze((0,)),
    "squeeze one": lambda x: x.unsqueeze(1).squeeze(1).squeeze(0),
    "flatten": lambda x: x.flatten(1) + x.flatten(-2, -1) + x.flatten().reshape(3, 8),
    "unflatten": lambda x: x.unflatten(-1, (2, 2)).unflatten(0, (3, 1)),
    "expand": lambda x: (
        x[:, :1].expand(-1, 5, 4).expand(2, 3, 5, 4) + x[:, :1].expand_as(x)[:, :1]
    ),
    "repeat": lambda x: x.repeat(1, 2, 1).repeat(2, 1, 1, 1),
    "repeat interleave": lambda x: (
        x.repeat_interleave(2, 1) + torch.repeat_interleave(x, 2, dim=-2)
    ),
    "chunk": lambda x: x.chunk(2, -1)[0] * x.chunk(2, 2)[1],
    "split": lambda x: x.split(2, -1)[1] + x.split([1, 3], 2)[1][..., :2],
    "unbind": lambda x: x.unbind(1)[1] * x.unbind(-2)[0] + next(iter(x.transpose(0, 1))),
    "narrow": lambda x: x.narrow(-1, 1, 2) * x.select(1, 0)[:, None, :2],
    "index": lambda x: x[..., None][:, 1, ::2] * x[:, -1:, [0, 1], None],
    "index by a tensor": lambda x: x[:, :, INDEX] + x[INDEX[:3]],
    "index by two tensors": lambda x: x[INDEX, :, INDEX],
    "index by a mask": lambda x: x[OTHER > 0],
    "cat": lambda x: torch.cat([x, x.sin(), OTHER], 1) + torch.cat((x, OTHER, x * x), dim=-2),
    "stack": lambda x: torch.stack([x, OTHER, x * x], -1),
    "sum": lambda x: x.sum(-1) + x.sum((1, 2), keepdim=True)[..., 0] + x.sum(),
    "mean": lambda x: x.mean(1) + x.mean(dim=(1, -1), keepdim=True)[..., 0] + x.mean(),
    "roll and flip": lambda x: x.roll(1, -1).flip(1),
    "movedim": lambda x: x.movedim(1, 2),
    "pad": lambda x: F.pad(x, (1, 2), mode="reflect") + F.pad(x, (1, 2)),
    "pad with a number": lambda x: F.pad(x, (1, 1), value=3.0),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
    "pooling": lambda x: F.avg_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 2),
    "largest": lambda x: F.max_pool1d(x, 2) + x.max(-1).values.unsqueeze(-1) + x.topk(2).values,
    "pixel shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.reshape(3, 4, 1, 2), 2), 2),
    "masked fill": lambda x: (
        x.masked_fill(OTHER > 0, -2.0) + x.masked_fill(OTHER[0] > 0, x.mean())
    ),
    "where": lambda x: torch.where(OTHER > 0, x, x.sin()),
    "of the same type": lambda x: (
        x.to(torch.float64).double().type_as(OTHER).to(OTHER).type(x.dtype)
    ),
    "cumulative": lambda x: x.cumsum(-1).sin(),
    "constant parts": lambda x: x * x.detach().sign() + torch.zeros_like(x) + x.new_ones(4),
}


@pytest.mark.parametrize("name", MOVES)
def test_between_curved_functions(name):
    def reference(x):
        return MOVES[name](x.sin() + x)

    if name == "constant parts":  # which the engine may hold fixed, and jvp does not

        def function(x):
            inner = x.sin() + x
            return inner * inner.detach().sign() + inner.new_ones(4)

        check(function, (2, 4), reference=lambda x: (x.sin() + x).abs() + 1)
        return
    # The type of OTHER is float32.
    check(reference, (2, 4), rounding=1e-6 if name == "of the same type" else 1e-11)


def test_properties_are_those_of_the_value():
    seen = []

    def function(x):
        seen.append((x.shape, x.size(), x.size(0), x.dim(), x.ndim, x.numel(), len(x), x.stride()))
        seen.append((x.dtype, x.device, x.is_floating_point(), x.is_contiguous(), x.is_cuda))
        seen.append((x.requires_grad, bool((x > 0).all()), x.argmax(-1).shape, x.layout, x.type()))
        return x

    x = torch.rand(3, 2, 4, requires_grad=True)
    carried(function, x, torch.ones(1, 3, 2, 4))
    got, seen[:] = list(seen), []
    function(x)
    assert got == seen


def test_a_view_of_other_bits_is_refused():
    with pytest.raises(TaylorError, match="another dtype for the same bits"):
        carried(lambda x: x.view(torch.int64), torch.ones(1, 2), torch.ones(1, 1, 2))


def test_channels_last_stays():
    seen = []

    def function(x):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return x

    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    carried(function, x, torch.randn_like(x).unsqueeze(0))
    assert seen == [True]


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout1d, F.alpha_dropout])
def test_one_mask_for_value_and_derivatives(dropout):
    x = torch.rand(3, 4, 5) + 1
    found = carried(lambda x: dropout(x, 0.5, True), x, torch.ones(2, 3, 4, 5))
    kept = found[1] != 0
    assert kept.any()
    assert not kept.all()
    assert ((found[2] != 0) == kept).all()
    scale = found[1][kept][0]
    torch.testing.assert_close(
        (found[0] - scale * x)[kept], (found[0] - scale * x)[kept][:1].expand(int(kept.sum()))
    )


@pytest.mark.parametrize(
    ("dropout", "axes"), [(F.dropout1d, 1), (F.dropout2d, 2), (F.dropout3d, 3)]
)
def test_channels_are_dropped_as_a_whole(dropout, axes):
    x = torch.rand(3, 8, *[4] * axes) + 1
    torch.manual_seed(0)
    found = carried(lambda x: dropout(x, 0.5, True), x, torch.ones(1, *x.shape))
    torch.manual_seed(0)
    torch.testing.assert_close(found[0], dropout(x, 0.5, True))
    kept = (found != 0).flatten(3)
    assert (kept.all(-1) | ~kept.any(-1)).all()


def test_dropout_off():
    check(lambda x: F.dropout(x.sin(), 0.5, False), (4,))
