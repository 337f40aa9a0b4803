"""Random programs of operators, views, changes in place and detached parts, with all gradients.

A rule may be right by itself and wrong where it stands first, or twice, or before a change in
place. The reference changes copies, which PyTorch can differentiate again and again.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from hosm_losses.taylor import TaylorError
from tests.taylor.checks import KINDS, check, close


def square(y):
    """Matrices (3, 2, 2) that have an inverse."""
    return 0.4 * y[..., :2].tanh() + torch.eye(2)


# New tensors of one shape (3, 2, 3), of two such and a weight (3, 3).
MAKES = {
    "copy": lambda y, z, w: y.clone(),
    "sum": lambda y, z, w: y + 0.5 * z,
    "product": lambda y, z, w: y * z,
    "quotient": lambda y, z, w: y / (1 + z * z),
    "by its length": lambda y, z, w: y / (y + 0.1).norm(dim=-1, keepdim=True),
    "to a length": lambda y, z, w: F.normalize(y + 0.1, dim=1),
    "distances": lambda y, z, w: y + torch.cdist(y, z).sum(-1, keepdim=True),
    "angles": lambda y, z, w: F.cosine_similarity(y + 0.1, z + 0.2, -1)[..., None] * z,
    "robust": lambda y, z, w: F.huber_loss(y, z, reduction="none", delta=0.3) + z,
    "factors": lambda y, z, w: y.prod(-1, keepdim=True) * z,
    "centred": lambda y, z, w: z - y.mean(1, keepdim=True),
    "deviation": lambda y, z, w: z / (y * w[0]).add(w[1]).std(-1, keepdim=True),
    "log-sum": lambda y, z, w: y - z.logsumexp(-1, keepdim=True),
    "softmax": lambda y, z, w: y.softmax(-1) * z,
    "attention": lambda y, z, w: F.scaled_dot_product_attention(y, z, y.tanh()),
    "einsum": lambda y, z, w: torch.einsum("bij,bkj->bik", y, z) @ y,
    "determinant": lambda y, z, w: z * torch.linalg.slogdet(square(y))[1][:, None, None],
    "system": lambda y, z, w: torch.linalg.solve(square(y), z),
    "factor": lambda y, z, w: torch.linalg.cholesky(square(y) + square(y).mT) @ z,
    "linear": lambda y, z, w: F.linear(y, w, w[0]),
    "convolution": lambda y, z, w: F.conv1d(y, w[:2, :2, None].tile(3), w[0, :2], padding=1),
    "layer norm": lambda y, z, w: F.layer_norm(y, (3,), w[0], w[1]),
    "group norm": lambda y, z, w: F.group_norm(y, 1, w[0, :2]),
    "silu": lambda y, z, w: F.silu(y),
    "gelu": lambda y, z, w: F.gelu(y, approximate="tanh"),
    "lerp": lambda y, z, w: torch.lerp(y, z, 0.3),
    "where": lambda y, z, w: torch.where(y.detach() > 0, y, 0.2 * z),
    "sorted": lambda y, z, w: y.sort(-1).values + z,
    "stacked": lambda y, z, w: torch.stack([y, z], 1)[:, 0].clone(),
    "chosen": lambda y, z, w: y[:, [1, 0]] + z.index_select(2, torch.tensor([2, 0, 0])),
    "filled": lambda y, z, w: torch.zeros(3, 2, 3).copy_(y).mul_(0.9),
}
VIEWS = {
    "slice": lambda p: p[..., ::2],
    "rows": lambda p: p[-2:],
    "transposed": lambda p: p.transpose(0, -1),
    "narrow": lambda p: p.unsqueeze(0).narrow(1, 0, 1),
    "select": lambda p: p.unsqueeze(0).select(-1, 0),
    "whole": lambda p: p[...],
    "reshape": lambda p: p.reshape(-1),
    "contiguous": lambda p: p.contiguous(),
    "by no rule": lambda p: p.movedim(0, -1),
}
# A change in place by a number or a tensor of one element, and what the part becomes by it.
CHANGES = {
    "mul": (lambda p, s: p.mul_(s), lambda p, s: p * s),
    "add": (lambda p, s: p.add_(s), lambda p, s: p + s),
    "sub": (lambda p, s: p.sub_(p.cos(), alpha=0.3), lambda p, s: p - 0.3 * p.cos()),
    "div": (lambda p, s: p.div_(1 + s * s), lambda p, s: p / (1 + s * s)),
    "copy": (lambda p, s: p.copy_(p.square()), lambda p, s: p * p),
    "tanh": (lambda p, s: p.tanh_(), lambda p, s: p.tanh()),
    "silu": (lambda p, s: F.silu(p, inplace=True), lambda p, s: F.silu(p)),
    "mask": (lambda p, s: p.masked_fill_(p > 0.2, 0.5), lambda p, s: p.where(p <= 0.2, 0.5)),
    "fill": (lambda p, s: p.fill_(s), lambda p, s: 0 * p + s),
    "zero": (lambda p, s: p.zero_(), lambda p, s: 0 * p),
    "item": (lambda p, s: p.__setitem__(..., s), lambda p, s: 0 * p + s),
    "first": (
        lambda p, s: p.__setitem__(slice(1), s),
        lambda p, s: torch.cat([0 * p[:1] + s, p[1:]]),
    ),
    "iadd": (lambda p, s: p.__iadd__(1).mul_(0.5), lambda p, s: (p + 1) * 0.5),
}


class InPlace:
    """The program as it is written."""

    new = read = staticmethod(lambda tensor: tensor)
    view = staticmethod(lambda part, view: view(part))
    detach = staticmethod(lambda part: part.detach())

    def change(self, part, change, by):
        change[0](part, by)


class Copies:
    """The same with each part as the places of its elements in a whole, which is replaced."""

    def __init__(self):
        self.wholes, self.shared = [], set()
        self.refused = False  # whether what shares its memory, or may, was written to

    def new(self, tensor):
        self.wholes.append(tensor)
        return len(self.wholes) - 1, torch.arange(tensor.numel()).reshape(tensor.shape), False

    def read(self, part):
        whole, places, detached = part
        found = self.wholes[whole].reshape(-1)[places]
        return found.detach() if detached else found

    def view(self, part, view):
        whole, places, detached = part
        found = view(places)
        self.shared.add(whole)
        if found.untyped_storage().data_ptr() == places.untyped_storage().data_ptr():
            return whole, found, detached
        self.shared.add(len(self.wholes))
        return self.new(view(self.read(part)))

    def detach(self, part):
        self.shared.add(part[0])
        return *part[:2], True

    def change(self, part, change, by):
        whole, places, _ = part
        self.refused |= whole in self.shared
        becomes, before = change[1](self.read(part), by), self.wholes[whole]
        flat = before.reshape(-1).index_put((places.reshape(-1),), becomes.reshape(-1))
        self.wholes[whole] = flat.reshape(before.shape)


def program(steps, weight, kind):
    """A function of x (3, 6): new tensors, views of them, changes of both, and detached parts."""

    def run(x):
        memory = kind()
        # The data themselves come first: nothing that trains is before them.
        data = memory.new(x.reshape(3, 2, 3))
        wholes = [data, memory.new(memory.read(data) * 1.0)]
        parts, held = wholes[1:], []
        for what, name, one, two in steps:
            y, z = wholes[one % len(wholes)], wholes[two % len(wholes)]
            part = parts[one % len(parts)]
            if what == "make":
                made = MAKES[name](memory.read(y), memory.read(z), weight)
                wholes.append(memory.new(made))
                parts.append(wholes[-1])
            elif what == "view":
                parts.append(memory.view(part, VIEWS[name]))
            elif what == "detach":
                held.append(memory.detach(part))
            else:
                source = memory.read((parts + held)[two % len(parts + held)])
                memory.change(part, CHANGES[name], source.mean() * weight[0, 0])
        found = sum((k + 1) * memory.read(each).sin() for k, each in enumerate(wholes))
        found = found + sum(memory.read(each).cos().mean() for each in parts)
        return (found + x.mean() * sum(memory.read(each).mean() for each in held)).flatten(1)

    return run


PLACES = st.integers(0, 11)


def step(kind, names):
    return st.tuples(st.just(kind), st.sampled_from(names), PLACES, PLACES)


CHANGE = step("change", sorted(CHANGES))
STEP = st.one_of(
    step("make", list(MAKES)),
    step("view", list(VIEWS)),
    CHANGE,
    CHANGE,
    step("detach", ["detached"]),
)


def test_programs():
    """Right, or refused where what shares its memory is written to, and nowhere else."""
    followed = []

    @settings(max_examples=150)
    @given(st.lists(STEP, min_size=1, max_size=12), st.sampled_from(KINDS))
    def right(steps, kind):
        weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
        memories = []
        written = program(steps, weight, InPlace)
        copies = program(steps, weight, lambda: memories.append(Copies()) or memories[-1])
        with torch.no_grad():
            x = torch.linspace(-1, 1, 18).sin().reshape(3, 6)
            close(written(x), copies(x))
        try:
            check(written, (6,), weight, reference=copies, kinds=[kind])
        except TaylorError:
            if not memories[0].refused:
                raise
        else:
            followed.append(any(each[0] == "change" for each in steps))

    right()
    assert sum(followed) > 20
