"""Random programs of many operators, views and changes in place, with all their gradients.

A rule may be right by itself and wrong where it stands first, or twice, or before a change in
place. The reference changes copies, which PyTorch can differentiate again and again.
"""

from random import Random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tests.derivatives.taylor.checks import check
from tests.oracles import standardise_by_hand

STEPS, SEEDS = 8, 30
EPS = torch.finfo(torch.float64).eps
EVERY = torch.arange(18).reshape(3, 2, 3)  # the place of every element


def _length(y, dim):
    return y.square().sum(dim, keepdim=True).sqrt()


def _deviation(y):
    return _length(y - y.mean(-1, keepdim=True), -1) / 2**0.5


# New tensors of one shape (3, 2, 3), of two such and a weight (3, 3).
MAKES = {
    "sum": lambda y, z, w: y + 0.5 * z,
    "product": lambda y, z, w: y * z,
    "quotient": lambda y, z, w: y / (1 + z * z),
    "by its length": lambda y, z, w: y / (y + 0.1).norm(dim=-1, keepdim=True),
    "to a length": lambda y, z, w: F.normalize(y + 0.1, dim=1),
    "centred": lambda y, z, w: z - y.mean(1, keepdim=True),
    "deviation": lambda y, z, w: z / (y * w[0]).add(w[1]).std(-1, keepdim=True),
    "log-sum": lambda y, z, w: y - z.logsumexp(-1, keepdim=True),
    "softmax": lambda y, z, w: y.softmax(-1) * z,
    "attention": lambda y, z, w: F.scaled_dot_product_attention(y, z, y.tanh()),
    "einsum": lambda y, z, w: torch.einsum("bij,bkj->bik", y, z) @ y,
    "linear": lambda y, z, w: F.linear(y, w, w[0]),
    "matrix": lambda y, z, w: y @ w,
    "convolution": lambda y, z, w: F.conv1d(y, w[:2, :2, None].tile(3), padding=1),
    "layer norm": lambda y, z, w: F.layer_norm(y, (3,), w[0], w[1]),
    "rms norm": lambda y, z, w: F.rms_norm(y, (3,)),
    "group norm": lambda y, z, w: F.group_norm(y, 1, w[0, :2]),
    "silu": lambda y, z, w: F.silu(y),
    "gelu": lambda y, z, w: F.gelu(y, approximate="tanh"),
    "mish": lambda y, z, w: F.mish(y),
    "sine": lambda y, z, w: torch.sin(y + z),
    "lerp": lambda y, z, w: torch.lerp(y, z, 0.3),
    "cumulated": lambda y, z, w: y.cumsum(1) * z,
    "where": lambda y, z, w: torch.where(y.detach() > 0, y, 0.2 * z),
    "sorted": lambda y, z, w: y.sort(-1).values + z,
    "rolled": lambda y, z, w: y.roll(1, -1).flip(1),
    "stacked": lambda y, z, w: torch.stack([y, z], 1)[:, 0].clone(),
    "padded": lambda y, z, w: F.pad(y, (1, -1)),
    "chosen": lambda y, z, w: y[:, [1, 0]] + z.index_select(2, torch.tensor([2, 0, 0])),
    "added to": lambda y, z, w: y.index_add(2, torch.tensor([2, 0, 0]), z),
    "filled": lambda y, z, w: torch.zeros(3, 2, 3).copy_(y).mul_(0.9),
    "copy": lambda y, z, w: y.clone(),
}
# Of those that PyTorch does not differentiate rightly often enough.
BY_HAND = {
    "by its length": lambda y, z, w: y / _length(y + 0.1, -1),
    "to a length": lambda y, z, w: (y + 0.1) / _length(y + 0.1, 1),
    "deviation": lambda y, z, w: z / _deviation(y * w[0] + w[1]),
    "layer norm": lambda y, z, w: standardise_by_hand(y, (2,)) * w[0] + w[1],
    "rms norm": lambda y, z, w: y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt(),
    "group norm": lambda y, z, w: standardise_by_hand(y, (1, 2)) * w[0, :2, None],
}
VIEWS = (
    lambda y: y[:, :1],
    lambda y: y[..., ::2],
    lambda y: y.mT[:, 1:],
    lambda y: y.select(2, 1),
    lambda y: y.view(3, 6)[:, 2:],
    lambda y: y.unsqueeze(1).narrow(3, 1, 2),
    lambda y: y,
)
# A change in place, and what the part becomes by it.
CHANGES = (
    (lambda p, z, w: p.mul_(z.mean() + w.mean()), lambda p, z, w: p * (z.mean() + w.mean())),
    (lambda p, z, w: p.add_(z[0, 0, 0]), lambda p, z, w: p + z[0, 0, 0]),
    (lambda p, z, w: p.sub_(p.cos(), alpha=0.3), lambda p, z, w: p - 0.3 * p.cos()),
    (lambda p, z, w: p.div_(1 + z.square().sum()), lambda p, z, w: p / (1 + z.square().sum())),
    (lambda p, z, w: p.copy_(p.square()), lambda p, z, w: p * p),
    (lambda p, z, w: p.tanh_(), lambda p, z, w: p.tanh()),
    (lambda p, z, w: F.silu(p, inplace=True), lambda p, z, w: F.silu(p)),
    (lambda p, z, w: p.fill_(w[0, 0]), lambda p, z, w: 0 * p + w[0, 0]),
    (lambda p, z, w: p.zero_(), lambda p, z, w: 0 * p),
    (lambda p, z, w: p.__setitem__(..., z.sum()), lambda p, z, w: 0 * p + z.sum()),
    (lambda p, z, w: p.__iadd__(1).mul_(0.5), lambda p, z, w: (p + 1) * 0.5),
)


def program(r, weight, *, in_place=True):
    """A random function of x (3, 6)."""
    steps = [(r.random() < 0.7, *(r.randrange(10**6) for _ in range(4))) for _ in range(STEPS)]
    makes = list((MAKES if in_place else MAKES | BY_HAND).values())

    def run(x):
        # The data themselves come first: nothing that trains is before them.
        data = x.reshape(3, 2, 3)
        pool = [data, data * 1.0]
        for is_new, what, one, two, three in steps:
            z = pool[two % len(pool)]
            if is_new:
                pool.append(makes[what % len(makes)](pool[one % len(pool)], z, weight))
                continue
            place, view = 1 + one % (len(pool) - 1), VIEWS[three % len(VIEWS)]
            change, becomes = CHANGES[what % len(CHANGES)]
            if not in_place:
                y = pool[place]
                part, where = becomes(view(y), z, weight), view(EVERY).reshape(-1)
                pool[place] = y.reshape(-1).index_put((where,), part.reshape(-1)).reshape(y.shape)
            else:
                change(view(pool[place]), z.clone(), weight)
        return sum((k + 1) * each.sin() for k, each in enumerate(pool)).flatten(1)

    return run


@pytest.mark.parametrize("seed", range(SEEDS))
def test_program(seed):
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    copies = program(Random(seed), weight, in_place=False)
    check(program(Random(seed), weight), (6,), weight, reference=copies)
