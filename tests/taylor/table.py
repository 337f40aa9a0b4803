"""For every operator with a rule, random calls of it, as functions of x (3, 8).

An entry is named after the operators it is for, and is given one of them, x, and `c`, which
chooses among its arguments. A new rule needs an entry here: `test_calls.py` asks for one.
"""

import math
from itertools import count

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

HOMES = (torch, Tensor, F, torch.linalg, torch.special)
DRAWS = torch.randn(13, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
WEIGHT = DRAWS[:8].clone().requires_grad_()
OTHER, ROW = DRAWS[8:11].reshape(3, 2, 4), DRAWS[11]
MASK, FLAT_MASK = OTHER > 0, DRAWS[8:11] > 0
INDEX, WHOLE = torch.tensor([1, 0, 1]), torch.tensor([1, 2, 3, 1, 2, 3, 1, 2])


def functions(names):
    """The functions, methods and properties of PyTorch with these names."""
    found = []
    for name in names.split():
        homes = HOMES if name[0] != "_" else [Tensor]
        entries = [getattr(home, name, None) for home in homes]
        found += [each if callable(each) else getattr(each, "__get__", None) for each in entries]
    return tuple(dict.fromkeys(each for each in found if each is not None))


def call(entry, function, pick):
    """A call of an operator whose choices are made once, `pick` giving a number below another."""
    picked = []

    def called(x):
        places = count()

        def choose(*options):
            place = next(places)
            if place == len(picked):
                picked.append(pick(len(options)))
            return options[picked[place]]

        return several(entry(function, x, choose))

    return called


def several(result):
    """All tensors of a result as one."""
    if isinstance(result, Tensor):
        return result
    return torch.cat([each.reshape(-1) for each in result if isinstance(each, Tensor)])


def cube(x):
    return x.reshape(3, 2, 4)


def image(x, c, axes, *more):
    """x as a batch with channels, now and then as a single sample."""
    shape = {1: (3, 2, 4), 2: (3, 2, 2, 2), 3: (3, 1, 2, 2, 2)}[axes]
    return c(x.reshape(shape), *more, x.reshape(shape), x.reshape(shape)[0])


def operand(x, c):
    """What is computed with: of x or not, wider, narrower, without axes, numbers, integers."""
    of_x = x, x.cos() + 2, x.mean() + 3, x[:, :1] * x[0, 0] + 3
    plain = WEIGHT[0], WEIGHT[:3].detach(), WEIGHT[:4, None, None], ROW[0], WHOLE, WHOLE[1]
    return c(*of_x, *plain, 2, -0.7, True)


def binary(f, x, c, **named):
    other = operand(x, c)
    # A method is one of a tensor.
    swaps = isinstance(other, Tensor) or f is not getattr(Tensor, f.__name__, None)
    return f(*c((x + 3, other), (x + 3, other), (other, x + 3) if swaps else (x, x)), **named)


def pointwise(f, x, c):
    return f(c(x, 4 * x, x.mean()))


def tokens(x):
    return cube(x).transpose(0, 1)


def multi_head(f, x, c):
    """x as 2 places of 3 samples with 4 channels, in 2 heads; plain tensors beside it."""
    q, k, context = tokens(x), tokens(x).cos(), OTHER[:, 0].expand(2, 3, 4)
    given = c(
        (q, q, q), (q, k, q.sin()), (q, context, context), (context, q, q), (context, context, q)
    )
    weight, bias = WEIGHT.reshape(-1)[:48].reshape(12, 4), WEIGHT.reshape(-1)[48:60]
    blocked = torch.tensor([[False, True], [False, False]])
    added = torch.zeros(2, 2).masked_fill(blocked, -math.inf)
    padded = torch.tensor([[False, False], [False, True], [False, False]])
    mask = c(None, blocked, added, blocked.expand(6, 2, 2), ROW[:4].reshape(2, 2))
    named = {
        "attn_mask": mask,
        "key_padding_mask": c(None, padded),
        "need_weights": c(False, True),
        "average_attn_weights": c(True, False),
        "is_causal": c(False, mask is blocked),
    }
    packed = weight, c(bias, None)
    if c(False, False, True):
        names = "q_proj_weight", "k_proj_weight", "v_proj_weight"
        named |= dict(zip(names, weight.chunk(3), strict=True), use_separate_proj_weight=True)
        packed = None, packed[1]
    out = WEIGHT.reshape(-1)[:16].reshape(4, 4), c(bias[:4], None)
    dropout, training = c((0.0, True), (0.5, False))
    rest = None, None, False, dropout, *out, training
    return f(*given, 4, 2, *packed, *rest, **named)


def attention(f, x, c):
    q, mask = cube(x), torch.tensor([[True, False], [False, False]])
    plain = OTHER[0, :, :2]
    masks = c(mask, plain, plain.masked_fill(~mask, -torch.inf))
    named = c({}, {"scale": 0.3}, {"is_causal": True}, {"dropout_p": 0.0}, {"attn_mask": masks})
    named = c(named, named, {"attn_mask": q[..., :2].cos()})
    given = c((q, q.cos(), q.sin()), (q, OTHER, OTHER), (OTHER, q, OTHER), (OTHER, OTHER, q), q)
    heads, groups = x.reshape(3, 4, 2, 1), OTHER.reshape(3, 4, 2, 1)[:, :2]
    if c(False, False, True):  # several heads with the same keys and values
        few = heads[:, :2].cos()
        return f(heads, *c((few, few), (groups, few), (few, groups)), enable_gqa=True)
    return f(*given, **named)


def einsum(f, x, c):
    y, three, four = x.sin(), cube(x), x.reshape(3, 2, 2, 2)
    pairs = "bij,bkj->bik bij,bkj->bki bji,bki->bjk bij,bij->b bij,bij-> ...ij,...kj->...ik "
    forms = [(each, three, c(three.cos(), OTHER)) for each in (pairs + "bij,bij->bji").split()]
    forms += [("bqhc,bkhc->bhqk", four, four.cos()), ("bhqk,bkhc->bqhc", four, four.cos())]
    forms += [
        (each, x, WEIGHT) for each in ("bi,ij->bj", "bi, ij -> b", "...i,ij", "...i,ij->...j")
    ]
    forms += [(each, x, y) for each in ("bi,bj->bij", "bi,ci", "bi,cj->bijc", "b...,b...->...")]
    forms += [("ij,bi->bj", WEIGHT, x), ("bi,bi,i->b", x, y, ROW), ("bi->", x), ("b...->b", three)]
    forms += [("bij->bji", three), ("ii->i", x[:, :3]), ("ii", x[:, :3])]
    equation, *factors = c(*forms)
    return f(*c((equation, *factors), (equation, factors), (x, [0, 1], WEIGHT, [1, 2], [0, 2])))


def concatenated(f, x, c):
    parts = c((x, x.cos()), (WEIGHT[:3], x), (torch.ones(3, 8, dtype=torch.int64), x * x, x))
    parts = c(
        parts, list(parts), [torch.empty(0), x], [x[0, :0], WEIGHT[:3]], [x[0, :0], x[1, :0], x[0]]
    )
    return f(parts, c(0, -1, 1)) * x.mean()


def chosen(f, x, c):
    mask = c(FLAT_MASK, FLAT_MASK[0], FLAT_MASK[:, None], FLAT_MASK & (x > 0))
    a, b = c((x, operand(x, c)), (operand(x, c), x))
    return f(a, mask, b) if f is Tensor.where else f(mask, a, b)


def spread(f, x, c):
    old = {"dim": c(None, 1, -1, 0), "unbiased": c(True, False)}
    new = {"dim": c(None, -1, (0, -1), [1, 2]), "correction": c(0, 1, 0.5)}
    named = c(old, new, {}, new | {"keepdim": True})
    return f(cube(x), **named) if c(True, True, False) else f(cube(x), c(True, False))


def near(x, c):
    return c((cube(x), cube(x).cos()), (cube(x), OTHER), (OTHER, cube(x)))


def norm(f, x, c):
    where = c(1, None, -1, (0, -1), [1, 2])
    order = c(2, 3.0, 1, "fro")
    if f is F.normalize:
        return f(cube(x) + 0.1, c(2.0, 3, 1), c(1, -1, 0), c(1e-12, 1e-9))
    return f(cube(x), order, where, c(False, True))


def distances(f, x, c):
    """Between rows of one batch, of which some coincide, and of two, on one side or both."""
    rows = cube(x)
    pairs = (rows, rows), (rows, rows.cos()), (rows, OTHER), (OTHER[:1], rows), (x, WEIGHT)
    return f(*c(*pairs), **c({}, {"p": 2}, {"p": 3.0}, {"p": 1.0}))


def angles(f, x, c):
    pairs = (cube(x), OTHER), (cube(x), cube(x).cos()), (OTHER[0], cube(x)), (x, x.sin())
    return f(*c(*pairs), **c({}, {"dim": -1}, {"eps": 1e-3}))


def huber(f, x, c):
    """Some elements are straight, some curved."""
    pair = c((2 * x, WEIGHT[:3]), (WEIGHT[:3], x), (x, x.cos()))
    loss = f(*pair, **c({}, {"reduction": "none"}, {"reduction": "sum", "delta": 0.5}))
    return loss * x[0]


def running(f, x, c):
    """Batch and instance norms; momentum zero leaves the statistics as they are."""
    statistics = torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.7])
    weights = c((None, None), (WEIGHT[0, :2], None), (WEIGHT[0, :2], WEIGHT[1, :2]))
    options = c(True, False), 0.0, c(0.3, 1e-5)
    return f(cube(x), *statistics, *weights, *options)


def last_norm(f, x, c):
    shape = c((4,), [2, 4], (3, 2, 4))
    weight = c(None, WEIGHT.reshape(-1)[: math.prod(shape)].reshape(shape))
    weight = c(weight, weight, cube(x)[0, 0].cos() if shape == (4,) else weight)
    weights = (weight,) if "rms" in f.__name__ else (weight, c(None, weight))
    return f(cube(x), shape, *c((*weights, 0.3), weights, ()))


def ordered(f, x, c):
    """Products with the places show that they are plain."""
    first = () if "sort" in f.__name__ else (c(1, 2),)
    values, at = f(cube(x), *first, *c((), (1,), (-1, True), (2, False)))
    return values * (1 + at)


def gathered(f, x, c):
    dim = c(0, 1, -1)
    index = torch.arange(12).reshape(3, 2, 2) % (3, 2, 4)[dim]
    return f(cube(x), dim, index[:, : c(2, 1)])


def added_at(f, x, c):
    dim = c(0, -2)
    index = INDEX if "index" in f.__name__ else INDEX[:, None].expand(3, 8)
    first, source = c((x[:2], x.cos()), (WEIGHT[:2], x), (x[1:], WEIGHT[:3]))
    return f(
        first, dim, index, source, **(c({}, {"alpha": -0.5}) if "index" in f.__name__ else {})
    )


def cast(f, x, c):
    """To integers and masks, which carry nothing when they are cast back; and to float64."""
    kinds = torch.int64, torch.bool, "torch.LongTensor", torch.float64, "torch.DoubleTensor"
    if f is Tensor.type_as:
        found = f(3 * x, c(OTHER, WHOLE, MASK, x))
    elif f is Tensor.type:
        found = f(3 * x, c(*kinds))
    elif f is Tensor.to:
        forms = [(torch.float64,), ("cpu",), ("cpu", torch.float64, False, True), (OTHER,), (x,)]
        forms += [(torch.int64,), ("cpu", torch.bool), (WHOLE,), (MASK,)]
        named = (
            {"dtype": torch.float64},
            {"dtype": torch.int8},
            {"other": OTHER},
            {"device": "cpu"},
        )
        found = f(3 * x, *c(*forms)) if c(True, True, False) else f(3 * x, **c(*named))
    else:
        found = f(3 * x)
    return x * found.double() + found


PARTS = (
    *(0, -1, None, ..., slice(None), slice(1, None), slice(None, None, 2), [0, 1], range(2), True),
    *([[0, 1], [1, 0]], [True, False], INDEX, INDEX[0], INDEX.numpy(), INDEX.numpy()[0]),
    *(INDEX.reshape(1, 3), INDEX.to(torch.int32), (0, 1)),
)
INDICES = (
    *((), (INDEX, INDEX), (INDEX, slice(None), INDEX), (slice(None), INDEX, INDEX), False),
    *((0, slice(None), INDEX), ([0, 1], slice(None), [1, 2]), (INDEX, None, INDEX), MASK),
    *((INDEX.numpy(), slice(None), INDEX), MASK.numpy(), MASK[:, 0], (MASK[:, 0], 0)),
    *((..., MASK[0, 0]), (MASK[:, 0, 0], slice(None), [0, 1, 1]), (MASK[:, 0], None)),
)


def indexed(f, x, c):
    index = tuple(c(*PARTS) for _ in range(c(1, 2, 3)))
    return f(cube(x), c(*PARTS, *INDICES) if c(True, False) else index)


def moves(*options):
    """Calls with the arguments of one of these tuples, now and then of a row or a number."""
    return lambda f, x, c: f(c(cube(x), cube(x), cube(x), x.flatten(), x.mean()), *c(*options))


def turned(_, x, c):
    """Pairs as complex numbers, times a constant and moved about, and as pairs again."""
    pairs = c(cube(x), tokens(x), x[:, None], 2 * cube(x)).unflatten(-1, (-1, 2))
    constants = torch.view_as_complex(OTHER.unflatten(2, (2, 2)))
    turn = c(constants[0, 0, 0], constants[0, 0, :1], 0.7, ROW[0], WEIGHT[0, 0], OTHER[0, 0, :1])
    z = torch.view_as_complex(pairs)
    z = c(z * turn, turn * z, torch.mul(turn, z), z.mul(turn))
    z = c(z, z.flatten(1), z.transpose(0, 1), z[..., :1], z.unsqueeze(1).chunk(2, -1)[0])
    return torch.view_as_real(z)


def pooled(f, x, c):
    axes = int(f.__name__[-2])
    if "adaptive" in f.__name__:
        return f(image(x, c, axes), c(1, (2,) * axes))
    return f(image(x, c, axes), 2, *c((), (1,), (1, 1), (1, 1, False, False)))


def resized(f, x, c):
    axes = c(1, 2, 3)
    mode = c("nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[axes])
    return f(image(x, c, axes), **c({"size": 3}, {"scale_factor": 2.0}), mode=mode)


def pixels(f, x, c):
    if f is torch.pixel_shuffle:
        return f(x.reshape(c((3, 4, 2, 1), (3, 1, 4, 2, 1), (12, 2, 1))), 2)
    return f(x.reshape(c((3, 1, 2, 4), (3, 2, 4), (1, 3, 1, 4, 2))), 2)


def padded(f, x, c):
    x = c(x, cube(x))
    pad = c((1, 2), [1, 0, 0, 1], (1, -1), (0, 1) * x.ndim)
    return f(x, pad, *c((), ("constant", 2.0), ("reflect",), ("replicate",), ("circular",)))


def dropped(f, x, c):
    shape = {"1": (3, 2, 4), "2": (3, 2, 2, 2), "3": (3, 1, 2, 2, 2)}.get(f.__name__[-2], (3, 8))
    return f(x.reshape(shape), *c((0.0, True), (0.7, False)))


def convolution(f, x, c):
    axes, grouped = int(f.__name__[-2]), c(False, False, True)
    shape = {1: (3, 2, 4), 2: (3, 2, 2, 2), 3: (3, 2, 2, 2, 1)}[axes]
    x = c(x.reshape(shape), x.reshape(shape), x.reshape(shape)[0])
    weight = WEIGHT.reshape(-1)[: 4 * 2**axes].reshape(2, 2, *(2,) * axes)[:, : 2 - grouped]
    weight, padding = c(weight, weight, weight * x.mean()), c(1, (1, 2, 0)[:axes], 0)
    groups, stride, dilation = 1 + grouped, c(1, 2, (2, 1, 1)[:axes]), c(1, [2, 1, 1][:axes])
    rest = (dilation, groups)
    if "transpose" in f.__name__:
        padding, rest = c(0, 1), (c(0, 1), groups, dilation)
    elif c(False, False, True):
        stride, padding, rest = 1, c("same", "valid"), (c(1, 2), groups)
    return f(x, weight, c(None, WEIGHT[0, :2]), stride, padding, *c((), rest, rest))


def product(f, x, c):
    y, three = x.cos(), cube(x)
    forms = [(x, y.mT), (x, WEIGHT), (WEIGHT, x.mT), (x, x[0]), (x[0], x.mT), (WEIGHT, x[0])]
    forms += [(three, three.cos().mT), (three, OTHER.mT), (three, WEIGHT[:4, :2]), (x, y, x)]
    few = c(x[:, :0], x[:0])
    forms += [(few, few.cos().mT), (few.mT, few), (x, y[:0].mT), (x[:0], y.mT)]
    return f(*c(*forms))


def square(x, c):
    """Square matrices: some of x alone, a batch of batches, a single one; none is singular."""
    y = 0.3 * x + 0.2 * x.roll(1, 0)
    shape = c((3, 2, 2), (3, 1, 2, 2), (2, 2))
    return y[:, :4].tanh().reshape(-1)[: math.prod(shape)].reshape(shape) + 2 * torch.eye(2)


def factored(f, x, c):
    """Cholesky factors; of the torch of old and of methods `upper` may have no name."""
    y = square(x, c)
    upper = c({}, {"upper": True}, {"upper": False})
    return f(y + y.mT, **upper)


def system(f, x, c):
    """A matrix, a right-hand side or both of x; matrices and vectors; from the right as well."""
    A, plain = square(x, c), WEIGHT[:2, :2] + 3 * torch.eye(2)
    B = c(x.cos().reshape(3, 2, 4), WEIGHT[:2, :3], x[:, 4:].reshape(3, 2, 2), x[:, :2], x[0, :2])
    left = c(True, True, False)
    return f(c(A, A, A, plain), B if left else B.mT if B.ndim > 1 else B, **c({"left": left}))


def sum_of_products(f, x, c):
    three, y = cube(x), x.cos()
    if "baddbmm" in f.__name__:
        forms = (WEIGHT[:2, :2], three, three.mT), (three[..., :2], OTHER, OTHER.mT)
        forms += ((three[:1, :, :2], three, OTHER.mT),)
    else:
        forms = (WEIGHT[0], x, WEIGHT), (x, y[:, :4], WEIGHT[:4]), (WEIGHT[:3, :3], x, y.mT)
        forms += ((x, WEIGHT[:3, :4], WEIGHT[:4]),)
    return f(*c(*forms), **c({}, {"beta": 0.5}, {"alpha": 2, "beta": 0}, {"alpha": -1}))


TABLE = {
    "add sub subtract rsub": lambda f, x, c: binary(f, x, c, **c({}, {"alpha": 2})),
    "mul multiply true_divide __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__": binary,
    "__truediv__ __rdiv__ __rtruediv__": binary,
    "div divide": lambda f, x, c: binary(f, x, c, **c({}, {}, {"rounding_mode": "floor"})),
    "addcmul": lambda f, x, c: f(
        c(x, WEIGHT[:3]), c(x, WEIGHT[0], x.mean()), x.cos(), **c({}, {"value": -0.5})
    ),
    "pow __pow__": lambda f, x, c: f(
        *c((x * x + 0.5, c(2, 3, 0, 1, -1, 0.5, True, WEIGHT[0], x)), (2, x))
    ),
    "neg negative __neg__ square exp sin cos sigmoid tanh abs absolute __abs__": pointwise,
    "relu silu mish": pointwise,
    "log sqrt rsqrt reciprocal": lambda f, x, c: f(c(x * x, x.mean() ** 2) + 0.5),
    "gelu": lambda f, x, c: f(x, **c({}, {"approximate": "tanh"})),
    "leaky_relu": lambda f, x, c: f(x, *c((), (0.3,))),
    # Some elements are beyond the threshold, where it is a straight line.
    "softplus": lambda f, x, c: f(4 * x, *c((), (2, 1.0), (torch.tensor(0.7), WHOLE[2]))),
    "clamp clip": lambda f, x, c: f(x, *c((-0.3, 0.5), (None, 0.5), (0.5, -0.3), (-ROW, ROW))),
    "clamp_min clamp_max": lambda f, x, c: f(x, c(0.3, -1, ROW)),
    "matmul __matmul__ __rmatmul__": product,
    "mm": lambda f, x, c: f(*c((x, WEIGHT), (WEIGHT, x.mT), (x, x.mT.cos()))),
    "bmm": lambda f, x, c: f(*c((cube(x), cube(x).mT.cos()), (cube(x), OTHER.mT))),
    "baddbmm addmm": sum_of_products,
    "det slogdet logdet inv inverse": lambda f, x, c: f(square(x, c)),
    "cholesky": factored,
    "einsum": einsum,
    "solve": system,
    "cat concat concatenate": concatenated,
    "stack": lambda f, x, c: f(
        c([x, x * x], (WEIGHT[:3], x), [x.mean(), x[0, 0], ROW[0]]), *c((), (-1,), (1,))
    ),
    "where": chosen,
    "masked_fill": lambda f, x, c: (
        f(c(x, WEIGHT[:3], x.mean()), c(FLAT_MASK, FLAT_MASK[0]), c(2, WHOLE[2], x.mean())) * x[0]
    ),
    "broadcast_tensors": lambda f, x, c: f(*c((x[:, None], WEIGHT[:3]), (x, x.mean(0)))),
    "__getitem__": indexed,
    "topk kthvalue sort": ordered,
    "gather": gathered,
    "scatter_add index_add": added_at,
    "softmax": lambda f, x, c: moves((0,), (-1,), (1,))(
        lambda *args: f(*args, **c({}, {"dtype": torch.float64})), x, c
    ),
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head,
    "glu": moves((), (1,), (-1,)),
    "layer_norm rms_norm": last_norm,
    "group_norm": lambda f, x, c: f(
        x.reshape(3, 4, 2), c(1, 2), *c((), (WEIGHT[0, :4], WEIGHT[1, :4]), (None, ROW[:4], 0.3))
    ),
    "batch_norm instance_norm": running,
    "norm vector_norm normalize": norm,
    "cdist": distances,
    "cosine_similarity": angles,
    "huber_loss": huber,
    "prod": moves((1,), (-1, True), (0,)),
    "var std var_mean std_mean": spread,
    "logaddexp": lambda f, x, c: f(*near(x, c)),
    "linear": lambda f, x, c: f(
        c(x, x[:, None], x[0]), *c((WEIGHT, WEIGHT[0]), (WEIGHT,), (ROW,), (x.sin(), x[:, 0]))
    ),
    "conv2d conv1d conv3d conv_transpose2d conv_transpose1d conv_transpose3d": convolution,
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d": pooled,
    "adaptive_avg_pool2d adaptive_avg_pool3d": pooled,
    "interpolate upsample": resized,
    "pixel_shuffle pixel_unshuffle": pixels,
    "pad": padded,
    "dropout dropout1d dropout2d dropout3d": dropped,
    # What moves elements about.
    "reshape view": moves(((24,),), (3, 8), (-1, 4), (torch.Size((2, 3, 1, 4)),)),
    "view_as reshape_as expand_as": lambda f, x, c: (
        f(*c((x, x.cos()), (x, WEIGHT[:3].mT.mT), (WEIGHT[:3], x))),
        x,
    ),
    "view_as_complex view_as_real": turned,
    "permute": moves(((2, 0, -2),), (1, 2, 0), ([0, -1, 1],)),
    "expand": lambda f, x, c: f(
        cube(x)[:, :1], *c((3, 5, 4), ((2, 3, 5, 4),), (-1, 2, -1), ((1, 3, 2, 4),))
    ),
    "repeat": moves((1, 2, 1), ((2, 1, 1, 2),)),
    "tile": moves(((2,),), ((2, 1),), (1, 2, 1), ((2, 1, 1, 2),)),
    "squeeze": lambda f, x, c: f(x.reshape(3, 1, 8, 1), *c((), (1,), (0,), ((-1, 1),), ((0, 3),))),
    "unsqueeze": moves((0,), (-1,), (2,)),
    "flatten": moves((), (1,), (-2, -1), (0, 1)),
    "unflatten": moves((2, (2, 2)), (-1, [2, -1]), (1, (2, 1))),
    "transpose swapdims swapaxes": moves((1, 2), (0, -1), (-2, -2)),
    "chunk": moves((2,), (3, -1), (2, 1)),
    "split": moves((2, 2), (1,), ([1, 3], -1), ((2, 2), 2)),
    "split_with_sizes": moves(([1, 3], 2), ((2, 2), -1)),
    "unbind": moves((), (1,), (-1,)),
    "narrow": moves((2, 1, 2), (-1, -2, 2)),
    "select": moves((1, 0), (-1, -1), (0, 2)),
    "repeat_interleave": moves((torch.tensor([1, 0, 2, 1]), 2), (2, 1), (2,)),
    "roll": moves((1, -1), ((1,), (0,)), ((1, -2), (1, 2)), (3,)),
    "flip": lambda f, x, c: f(cube(x), *c(((0,),), ([1, -1],), ((0, 1, 2),), (0, 2))),
    "sum mean": moves((), (None, True), (1,), ((0, -1), True), ([1, 2],), ((),)),
    "cumsum": moves((1,), (-1,), (0,)),
    "index_select": moves((1, INDEX), (-1, INDEX.int()), (0, INDEX[:0])),
    "clone contiguous": lambda f, x, c: f(
        x.reshape(3, 2, 2, 2).transpose(1, 2),
        **c(
            {}, {"memory_format": torch.contiguous_format}, {"memory_format": torch.channels_last}
        ),
    ),
    "mT T t adjoint": lambda f, x, c: f(c(x, cube(x))),
    "__iter__ as_tensor asarray cpu": moves(()),
    "to type type_as double int long short char byte bool": cast,
    "requires_grad grad_fn": lambda f, x, c: (f(x * 1), x)[1],
    "register_hook": lambda f, x, c: (x * 1, f(x * 1, lambda gradient: None))[0],
    # Functions that have no rule, or no derivative.
    "amax logsumexp log_softmax": moves((1,), (-1,)),
    "max median": moves((), (1,), (-1, True)),
    "tensor_split movedim": moves((1, 2)),
    "frac": lambda f, x, c: f(3 * x),
    "real diagonal": moves(()),
    "maximum hypot": lambda f, x, c: f(*near(x, c)),
    "max_pool1d": lambda f, x, c: f(cube(x), 2, **c({}, {"return_indices": True})),
    "hstack column_stack multi_dot": lambda f, x, c: f(
        [x, x.sin().mT if f is torch.linalg.multi_dot else x.sin()]
    ),
    "sign floor ceil round isfinite argsort argmax zeros_like ones_like": lambda f, x, c: (
        x,
        f(x),
    ),
    "lt le gt ge eq ne __lt__ __le__ __gt__ __ge__ __eq__ __ne__": lambda f, x, c: (
        x,
        f(x, c(ROW, x.cos(), 0.1)),
    ),
    "all any count_nonzero new_ones": lambda f, x, c: (x, f(x > 0, 1)),
}
