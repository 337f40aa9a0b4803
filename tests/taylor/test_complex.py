"""Rotary embeddings by complex numbers, as QwenImage and Lumina2 have them, against real ones."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from hosm_losses.taylor import TaylorError, propagate
from tests.cases import ENGINES, assert_same, loss_and_gradients

PLACES, HEADS, WIDTH = 3, 2, 4
ANGLES = torch.outer(torch.arange(PLACES) + 1.0, torch.tensor([1.0, 0.3], dtype=torch.float64))
TURNS = torch.polar(torch.ones_like(ANGLES), ANGLES)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.ones(1, 3, 4, dtype=torch.float64)


def qwen(x):
    """As in diffusers, of (B, places, heads, width), but for its cast to float32."""
    rotated = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(rotated * TURNS.unsqueeze(1)).flatten(3).type_as(x)


def lumina(x):
    """With the heads before the places, and a polar constant made inside."""
    turns = torch.polar(torch.ones_like(ANGLES), ANGLES)[None].unsqueeze(2)
    rotated = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(turns * rotated).flatten(3)


def meta(x):
    """As in the first LLaMA, and in many transformers after it: it asks for shapes."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    shape = [size if axis in (1, pairs.ndim - 1) else 1 for axis, size in enumerate(pairs.shape)]
    turned = (pairs * TURNS.to(pairs.device).view(*shape)).transpose(1, 2).transpose(1, 2)
    return torch.view_as_real(turned).reshape(*x.shape)


def by_parts(x):
    """The same in real arithmetic."""
    re, im = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = ANGLES.cos()[:, None], ANGLES.sin()[:, None]
    return torch.stack([re * cos - im * sin, re * sin + im * cos], -1).flatten(3)


ROTARY = {"qwen": qwen, "lumina": lumina, "meta": meta}


class Attention(nn.Module):
    """Self-attention over places with rotary embeddings of the queries and keys."""

    def __init__(self, rotary):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(2, HEADS * WIDTH)
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.outer = nn.Linear(HEADS * WIDTH, 2)
        self.rotary = rotary

    def forward(self, x, t):
        h = self.inner(x) + t[:, None, None]
        q, k, v = (
            each.unflatten(-1, (HEADS, WIDTH)) for each in self.qkv(torch.tanh(h)).chunk(3, -1)
        )
        q, k = self.rotary(q), self.rotary(k)
        mixed = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
        return self.outer(h + mixed.transpose(1, 2).flatten(2))


SHAPE = (4, PLACES, 2)
OPTIONS = {
    "order two": {"order": 2},
    "order three": {},
    "pairs": {"probes": hosm.Paired(), "probe": torch.ones(2, *SHAPE, dtype=torch.float64)},
}


@pytest.mark.filterwarnings("error:engine='auto'")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ROTARY)
def test_losses_and_gradients_are_those_of_real_arithmetic_in_every_engine(name, options):
    expected = loss_and_gradients(Attention(by_parts), SHAPE, engine="taylor", **options)
    for engine in ENGINES:
        got = loss_and_gradients(Attention(ROTARY[name]), SHAPE, engine=engine, **options)
        assert_same(got, expected, 1e-11)


def pairs(x):
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def back(z):
    return torch.view_as_real(z).flatten(1)


REFUSED = {
    "the complex result": pairs,
    "their product": lambda x: back(pairs(x) * pairs(x)),
    "the square": lambda x: back(pairs(x).square()),
    "the product with itself": lambda x: back((lambda z: z * z)(pairs(x))),
    "a product with x": lambda x: back(pairs(x) * x[:, :2]),
    "the absolute value": lambda x: pairs(x).abs(),
    "the angle": lambda x: pairs(x).angle(),
    "the conjugate": lambda x: back(pairs(x).conj().resolve_conj()),
    "the real part": lambda x: pairs(x).real,
    "a quotient": lambda x: back(1 / pairs(x)),
    "in place": lambda x: back(pairs(x).mul_(2)),
    "the exponential": lambda x: back(pairs(x).exp()),
    "a sum with a real tensor": lambda x: back(pairs(x) + x[:, :2]),
    "a product of matrices": lambda x: back(pairs(x) @ torch.eye(2, dtype=torch.complex128)),
    "a determinant": lambda x: torch.linalg.det(pairs(x)[:, None] * torch.ones(2, 1)).abs(),
    "a real tensor times a complex constant": lambda x: x * TURNS[0, 0],
    "a cast": lambda x: x.cdouble().real,
    "a number": lambda x: x * 1j,
    "a plain tensor": lambda x: x + torch.ones(4, dtype=torch.complex128),
    "a transform": lambda x: torch.fft.ifft(torch.fft.fft(x)).real,
    "a power": lambda x: (x**1j).real,
    "a list of them": lambda x: back(torch.cat([pairs(x), pairs(x)], 1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_complex_numbers_are_refused_as_before(name):
    with pytest.raises(TaylorError, match="complex"):
        propagate(REFUSED[name], X, W)


def test_a_change_of_what_shares_memory_is_refused():
    def function(x):
        x = x * 1.0
        z = pairs(x)
        x.mul_(2)
        return back(z * 1j)

    with pytest.raises(TaylorError, match="in place"):
        propagate(function, X, W)
