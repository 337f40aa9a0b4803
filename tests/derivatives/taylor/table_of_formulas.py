"""The generators of `tests.derivatives.taylor.table` for what computes: arithmetic, activations, layers."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.derivatives.taylor.table import every
from tests.derivatives.taylor.table import (
    MASK,
    OTHER,
    cube,
    dim,
    dims,
    is_method,
    of,
    some,
    spelled,
)

PARAMETER = torch.randn(8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
ROWS = PARAMETER[0].clone()
# Operands: numbers, plain tensors that are narrower, wider and without axes, integers, Jets.
PLAIN = (ROWS, PARAMETER[:3], PARAMETER[:4, None, None, :].clone(), ROWS[0].clone())
WHOLE_NUMBERS = (torch.tensor([1, 2, 3, 1, 2, 3, 1, 2]), torch.tensor(2))


def operand(r, number=True):
    """Something to compute with, as a function of x; two in five depend on it."""
    dependent = (lambda x: x.cos() + 2, lambda x: x.mean(), lambda x: x[:, :1] * x[0, 0] + 3)
    fixed = [*PLAIN, *WHOLE_NUMBERS, *((2, -0.7, True) if number else ())]
    found = r.choice(fixed)
    return r.choice([*dependent, *(lambda x: found,) * 4])


@of("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "rsub")
def _(r, f):
    scaled = f.__name__ in ("add", "sub", "subtract", "rsub") and r.random() < 0.4
    second = operand(r)
    if scaled:
        return spelled(r, f, lambda x: x, ("other", second), only={"alpha": r.choice([2, -0.5])})
    if f.__name__ in ("div", "divide") and r.random() < 0.2:
        kind = r.choice(["floor", "trunc", None])
        return spelled(r, f, lambda x: x, ("other", 0.3), only={"rounding_mode": kind})
    if not is_method(f) and r.random() < 0.4:  # the Jet second
        first = r.choice([*PLAIN, *WHOLE_NUMBERS])
        return lambda x: f(first, x + 3)
    return spelled(r, f, lambda x: x + 3, ("other", second))


@of("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__")
@of("__rdiv__", "__rtruediv__")
def _(r, f):
    second = operand(r)
    if r.random() < 0.3:
        first = r.choice(PLAIN)
        return lambda x: f(first, x + 3)
    return lambda x: f(x + 3, second(x))


@of("neg", "negative", "__neg__", "square", "exp", "sin", "cos", "sigmoid", "tanh", "abs")
@of("absolute", "__abs__")
def _(r, f):
    if r.random() < 0.2:
        return lambda x: f(x.mean())
    return spelled(r, f, lambda x: x)


@of("log", "sqrt", "rsqrt", "reciprocal")
def _(r, f):
    return spelled(r, f, lambda x: x * x + 0.5)


@of("relu", "silu", "leaky_relu", "hardsigmoid", "gelu")
def _(r, f):
    if f.__name__ == "gelu":
        kind = r.choice(["none", "tanh"])
        return r.choice([lambda x: f(x), lambda x: f(x, approximate=kind)])
    if f is F.leaky_relu:
        return spelled(r, f, lambda x: x, *some(r, ("negative_slope", 0.3), ("inplace", False)))
    named = () if f in (torch.relu, Tensor.relu) else some(r, ("inplace", False))
    return spelled(r, f, lambda x: x, *named)


@of("softplus")
def _(r, f):
    # Some elements are beyond the threshold, where it is a straight line.
    return spelled(r, f, lambda x: x, *some(r, ("beta", r.choice([2, 0.7])), ("threshold", 1.0)))


@of("mish")
def _(r, f):
    return spelled(r, f, lambda x: 3 * x, *some(r, ("inplace", False)))


@of("clamp", "clip", "clamp_min", "clamp_max")
def _(r, f):
    if f.__name__ in ("clamp_min", "clamp_max"):
        return spelled(r, f, lambda x: x, (f.__name__[-3:], r.choice([0.3, -1, ROWS])))
    low, high = r.choice(
        [(-0.3, 0.5), (None, 0.5), (-0.3, None), (0.5, -0.3), (-ROWS.abs(), None)]
    )
    named = {} if low is None else {"min": low}
    named |= {} if high is None else {"max": high}
    return r.choice([lambda x: f(x, **named), lambda x: f(x, low, high)])


@of("pow", "__pow__", "float_power")
def _(r, f):
    exponent = r.choice([2, 3, 0, 1, -1, 0.5, -1.5, 2.0, True, torch.tensor(3), ROWS])
    if f in every("pow", "float_power") and r.random() < 0.3:
        base = r.choice([ROWS.abs() + 1, ROWS[0].abs() + 1] + ([] if is_method(f) else [2]))
        return lambda x: f(base, x)
    return lambda x: f(x * x + 0.5, exponent)


@of("addcmul")
def _(r, f):
    a, b = operand(r, number=False), operand(r, number=False)
    named = r.choice([{}, {"value": 2}, {"value": -0.5}])
    first = r.choice([lambda x: x, lambda x: PARAMETER[:3]])
    return lambda x: f(first(x), a(x), b(x) * x.mean(), **named)


@of("matmul", "__matmul__", "__rmatmul__")
def _(r, f):
    fixed = r.choice([PARAMETER, ROWS, PARAMETER.expand(2, 8, 8)])
    forms = [lambda x: f(x, fixed), lambda x: f(x, x.mT.cos()), lambda x: f(cube(x), cube(x).mT)]
    forms += [lambda x: f(x, x[0]), lambda x: f(x[0], x.mT)]
    forms += [lambda x: f(fixed, x.mT), lambda x: f(fixed[..., :8], x[0])]
    if f in every("__rmatmul__"):
        forms = [lambda x: f(x.mT, fixed), lambda x: f(x.mT, x.sin())]
    return r.choice(forms)


@of("mm", "bmm")
def _(r, f):
    if f in every("bmm"):
        form = r.choice([lambda x: (cube(x), cube(x).mT), lambda x: (cube(x), OTHER.mT)])
    else:
        form = r.choice([lambda x: (x, PARAMETER), lambda x: (PARAMETER, x.mT)])
    return lambda x: f(*form(x))


@of(torch.einsum)
def _(r, f):
    forms = [
        *(("bi,ij->bj", lambda x: (x, PARAMETER)), ("bi, ij -> b", lambda x: (x, PARAMETER))),
        *(("bi,bj->bij", lambda x: (x, x.sin())), ("bij->bji", lambda x: (cube(x),))),
        *(("...i,ij", lambda x: (x, PARAMETER)), ("bi,ci", lambda x: (x, x.cos()))),
        *(("ii->i", lambda x: (x[:, :3],)), ("ii", lambda x: (x[:, :3],))),
        *(("bi,bi,i->b", lambda x: (x, x.sin(), ROWS)), ("bi->", lambda x: (x,))),
        *(("Bi,Bj->ij", lambda x: (x, x)), ("b...,b...->...", lambda x: (cube(x), cube(x)))),
        *(("ij,bi->bj", lambda x: (PARAMETER, x)), ("bi,jk->bijk", lambda x: (x, x[:, :2]))),
        *(("...ij,...kj->...ik", lambda x: (cube(x), OTHER)), ("b...->b", lambda x: (cube(x),))),
        *(("...i,ij->...j", lambda x: (cube(x), PARAMETER[:4])),),
        *(("...i,...j->...ij", lambda x: (cube(x), OTHER[0])),),
    ]
    equation, operands = r.choice(forms)
    if r.random() < 0.2:
        return lambda x: f(x, [0, 1], PARAMETER, [1, 2], [0, 2])
    if r.random() < 0.3:
        return lambda x: f(equation, list(operands(x)))
    return lambda x: f(equation, *operands(x))


@of("baddbmm")
def _(r, f):
    named = r.choice([{}, {"beta": 0.5}, {"alpha": 2, "beta": 0}, {"alpha": -1}])
    plain, rows = torch.ones(3, 2, 2), OTHER
    form = r.choice(
        [
            lambda x: (plain, cube(x), cube(x).mT),
            lambda x: (cube(x)[..., :2], rows, rows.mT),
            lambda x: (cube(x)[:1, :, :2], cube(x), rows.mT),
        ]
    )
    if is_method(f) or r.random() < 0.5:
        return lambda x: f(*form(x), **named)
    return lambda x: f(form(x)[0], batch1=form(x)[1], batch2=form(x)[2], **named)


@of("addmm")
def _(r, f):
    named = r.choice([{}, {"beta": 0.5}, {"alpha": 2, "beta": 0}, {"alpha": -1}])
    forms = [
        lambda x: (ROWS, x, PARAMETER),  # as the layer of a transposed weight
        lambda x: (x, OTHER[:, 0], PARAMETER[:4]),
        lambda x: (x[0], PARAMETER[:3], x.mT @ x),
    ]
    form = r.choice(forms)
    if is_method(f) or r.random() < 0.5:
        return lambda x: f(*form(x), **named)
    return lambda x: f(form(x)[0], mat1=form(x)[1], mat2=form(x)[2], **named)


# --------------------------------------------------------------------------- joins
@of("cat", "concat", "concatenate")
def _(r, f):
    place = dim(r, 2)
    parts = [
        lambda x: x,
        lambda x: x * x,
        lambda x: PARAMETER[:3],
        lambda x: torch.ones(3, 8, dtype=torch.int64),
    ]
    if r.random() < 0.2:
        parts, place = [lambda x: torch.empty(0), lambda x: x], r.choice([0, 1])
    chosen = [parts[-1], *r.sample(parts[:-1], r.randint(1, len(parts) - 1)), lambda x: x]
    made = r.choice([tuple, list])
    forms = [
        lambda x: f(made(part(x) for part in chosen), place),
        lambda x: f(made(part(x) for part in chosen), axis=place),
        lambda x: f(tensors=made(part(x) for part in chosen), dim=place),
    ]
    return r.choice(forms)


@of(torch.stack)
def _(r, f):
    place = dim(r, 3)
    parts = r.sample([lambda x: x, lambda x: x * x, lambda x: PARAMETER[:3]], 2)
    first = r.choice([lambda x, part: part(x), lambda x, part: part(x)[0, 0]])
    where = {} if first(torch.ones(3, 8), parts[0]).ndim == 0 else {"dim": place}
    return lambda x: f([first(x, part) for part in [*parts, lambda x: x]], **where)


@of("where")
def _(r, f):
    mask = r.choice([MASK.reshape(3, 8), MASK.reshape(3, 8)[0], MASK.reshape(3, 1, 8)])
    a, b = r.choice([(lambda x: x, operand(r)), (operand(r), lambda x: x)])
    if is_method(f):
        return lambda x: f(a(x) if isinstance(a(x), Tensor) else x, mask, b(x))
    if r.random() < 0.3:
        return lambda x: f(mask, input=x, other=b(x))
    return lambda x: f(mask, a(x), b(x))


@of("masked_fill")
def _(r, f):
    mask = r.choice([MASK.reshape(3, 8), MASK.reshape(3, 8)[0], MASK.reshape(3, 1, 8)])
    if r.random() < 0.5:
        value = r.choice([2, -1.5, torch.tensor(2.0), torch.tensor(3), lambda x: x.mean()])
        return spelled(r, f, lambda x: x, ("mask", mask), ("value", value))
    first = r.choice([lambda x: x, lambda x: PARAMETER[:3], lambda x: x.mean()])
    return lambda x: f(first(x), mask, x.mean())


# ------------------------------------------------------------- softmax, attention, norms
@of(torch.softmax, Tensor.softmax, F.softmax)
def _(r, f):
    only = r.choice([{}, {"dtype": torch.float64}])
    if f is not F.softmax and r.random() < 0.3:
        place = dim(r, 3)
        return lambda x: f(cube(x), place, torch.float64)
    if r.random() < 0.1:
        return lambda x: f(x.mean(), 0)
    return spelled(r, f, cube, ("dim", dim(r, 3)), only=only)


@of(F.scaled_dot_product_attention)
def _(r, f):
    mask = torch.tensor([[True, False], [True, True]])
    options = [{}, {"scale": 0.3}, {"is_causal": True}, {"attn_mask": mask}, {"dropout_p": 0.0}]
    named = r.choice([*options, {"attn_mask": OTHER[0, :, :2].clone()}])
    form = r.choice(
        [
            lambda x: (cube(x), cube(x).cos(), cube(x).sin()),
            lambda x: (cube(x), OTHER, OTHER),
            lambda x: (OTHER, OTHER, cube(x)),
            lambda x: (cube(x)[:, None], cube(x)[:, None], OTHER[:, None]),
            lambda x: (cube(x)[0], cube(x)[1], cube(x)[2]),
        ]
    )
    if r.random() < 0.3:  # several heads with the same keys and values
        named = {"enable_gqa": True}
        q, k = (lambda x: x.reshape(3, 4, 2, 1)), (lambda x: x.reshape(3, 4, 2, 1)[:, :2].cos())
        plain = OTHER.reshape(3, 4, 2, 1)[:, 1:2]
        form = r.choice([lambda x: (q(x), k(x), k(x)), lambda x: (q(x), plain, k(x))])
    return lambda x: f(*form(x), **named)


@of(F.multi_head_attention_forward)
def _(r, f):
    # x (3, 8) as 2 places of 3 samples with 4 channels, in 2 heads; plain tensors beside it.
    draw = torch.randn(12, 4, generator=torch.Generator().manual_seed(r.randint(0, 9)))
    weight, bias, context = draw.double(), OTHER.reshape(-1)[:12], OTHER[:, 0].expand(2, 3, 4)
    out = OTHER[:2].reshape(4, 4), bias[:4]

    def places(x):
        return cube(x).transpose(0, 1)

    form = r.choice(
        [
            lambda x: (places(x),) * 3,
            lambda x: (places(x), places(x).cos(), places(x).sin()),
            lambda x: (places(x), context, context),
            lambda x: (context, places(x), places(x)),
            lambda x: (context, context, places(x)),
        ]
    )
    blocked = torch.tensor([[False, True], [False, False]])
    floating = torch.zeros(2, 2).masked_fill(blocked, -math.inf)
    padding = torch.tensor([[False, False], [False, True], [False, False]])
    named = {
        "need_weights": r.random() < 0.5,
        "average_attn_weights": r.random() < 0.5,
        "attn_mask": r.choice([None, blocked, floating, blocked.expand(6, 2, 2)]),
        "key_padding_mask": r.choice([None, padding]),
        "training": r.random() < 0.5,
    }
    packed = weight, r.choice([bias, None])
    if r.random() < 0.3:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        named |= {
            "use_separate_proj_weight": True,
            **dict(zip(names, weight.chunk(3), strict=True)),
        }
        packed = None, packed[1]
    if named["attn_mask"] is blocked and r.random() < 0.3:
        named["is_causal"] = True

    def called(x):
        mixed, weights = f(*form(x), 4, 2, *packed, None, None, False, 0.0, *out, **named)
        if weights is None:
            return mixed
        return torch.cat([mixed.flatten(), weights.flatten()])

    return called


@of(F.glu)
def _(r, f):
    return spelled(r, f, cube, *some(r, ("dim", r.choice([1, 2, -1, -2]))))


@of(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def _(r, f):
    shape = r.choice([(4,), [2, 4], torch.Size((4,)), (3, 2, 4)])
    own = OTHER.reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
    weight = r.choice([None, own])
    rest = [("weight", weight), ("eps", 0.3)]
    if f in (F.layer_norm, torch.layer_norm):
        rest.insert(1, ("bias", weight))
    return spelled(r, f, cube, ("normalized_shape", shape), *some(r, *rest))


@of(F.group_norm, torch.group_norm)
def _(r, f):
    weight = OTHER.reshape(-1)[:4].clone()
    rest = (("weight", weight), ("bias", r.choice([None, weight])), ("eps", 0.3))
    return spelled(
        r, f, lambda x: x.reshape(3, 4, 2), ("num_groups", r.choice([1, 2])), *some(r, *rest)
    )


@of(F.batch_norm, F.instance_norm)
def _(r, f):
    weight = OTHER.reshape(-1)[:2].clone()
    mean, variance = torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.7])
    weights = r.choice([(None, None), (weight, None), (weight, weight)])
    training = r.random() < 0.5
    rest = (("momentum", 0.0), ("eps", 0.3))
    name = "training" if f is F.batch_norm else "use_input_stats"
    start = (("running_mean", mean), ("running_var", variance))
    middle = (("weight", weights[0]), ("bias", weights[1]), (name, training))
    return spelled(r, f, cube, *start, *middle, *some(r, *rest))


@of(torch.norm, Tensor.norm, torch.linalg.vector_norm, F.normalize)
def _(r, f):
    if f is F.normalize:
        given = some(r, ("p", 2.0), ("dim", r.choice([1, -1, 0])), ("eps", 1e-9))
        return spelled(r, f, cube, *given)
    name = "ord" if f is torch.linalg.vector_norm else "p"
    p = r.choice([2, 2.0, *((1, 3, 2.5) if name == "ord" else ("fro",))])
    where = r.choice([None, dim(r, 3), (0, -1), [1, 2], dims(r, 2)])
    given = ((name, p), ("dim", where), ("keepdim", True))[: r.randint(2, 3)]
    return spelled(r, f, cube, *given)


@of(torch.linalg.norm, torch.linalg.matrix_norm)
def _(r, f):
    if f is torch.linalg.matrix_norm:
        given = some(r, ("ord", "fro"), ("dim", r.choice([(-2, -1), (0, 2)])), ("keepdim", True))
        return spelled(r, f, cube, *given)
    if r.random() < 0.5:
        return spelled(r, f, cube, *some(r, ("ord", None), ("dim", r.choice([None, (1, 2), 1]))))
    given = ("ord", r.choice([2, 3, 1.5])), ("dim", dim(r, 3)), ("keepdim", True)
    return spelled(r, f, cube, *given[: r.randint(2, 3)])


@of(torch.var, Tensor.var, torch.std, Tensor.std, torch.var_mean, torch.std_mean)
def _(r, f):
    where = ("dim", r.choice([None, dim(r, 3), (0, -1), [1, 2]]))
    given = [where, *some(r, ("correction", r.choice([0, 1, 0.5])), ("keepdim", True))]
    old = [("dim", dim(r, 3)), ("unbiased", r.choice([True, False])), ("keepdim", True)]
    given = r.choice([given, old[: r.randint(1, 3)]])
    if ("keepdim", True) in given and given[0] == ("dim", None):
        given = [where, ("correction", 0)]
    if "mean" not in f.__name__:
        return lambda x: f(cube(x), **dict(given))
    return lambda x: (lambda a, b: a * b)(*f(cube(x), **dict(given)))


@of(torch.dist, Tensor.dist)
def _(r, f):
    given = some(r, r.choice([2.0, 3, 1]))
    return r.choice([lambda x: f(cube(x), cube(x).cos(), *given), lambda x: f(cube(x), OTHER)])


@of(F.cosine_similarity, F.pairwise_distance)
def _(r, f):
    near = r.choice([lambda x: (cube(x) * 0.5).cos(), lambda _: OTHER])
    if f is F.cosine_similarity:
        given = some(r, ("dim", dim(r, 3)), ("eps", 1e-6))
    else:
        given = some(r, ("p", r.choice([2.0, 3.0, 1.0])), ("eps", 0.01), ("keepdim", True))
    named = dict(given)
    return r.choice(
        [lambda x: f(cube(x), near(x), **named), lambda x: f(near(x), cube(x), **named)]
    )


# ------------------------------------------------------------------------- layers
@of(F.linear)
def _(r, f):
    weight, bias = r.choice([(PARAMETER, ROWS), (PARAMETER, None), (ROWS, None)])
    given = (("weight", weight), *some(r, ("bias", bias)))
    first = r.choice([lambda x: x, lambda x: x[:, None], lambda x: x[0]])
    return r.choice([spelled(r, f, first, *given), lambda x: f(PARAMETER, x.sin(), x[:, 0].cos())])


@of(F.conv1d, F.conv2d, F.conv3d)
@of(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _(r, f):
    axes = int(f.__name__[-2])
    weight = PARAMETER.reshape(-1)[: 4 * 2**axes].reshape(2, 2, *(2,) * axes)
    shape = {1: (3, 2, 4), 2: (3, 2, 2, 2), 3: (3, 2, 2, 2, 1)}[axes]
    padding = r.choice([0, 1, (1,) * axes])
    if axes == 3:  # of which the last has one element
        padding = 0 if "transpose" in f.__name__ else 1
    named = some(r, ("bias", ROWS[:2].clone()), ("stride", r.choice([1, (2,) * axes])))
    rest = {"padding": padding} if axes == 3 or r.random() < 0.7 else {}
    batched = r.random() < 0.8
    return spelled(
        r,
        f,
        lambda x: x.reshape(shape) if batched else x.reshape(shape)[0],
        ("weight", weight),
        *named,
        only=rest,
    )
