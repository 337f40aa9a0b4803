"""The generators of `tests.derivatives.taylor.table` for what moves elements about, and for casts and indices."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.derivatives.taylor.table import every
from tests.derivatives.taylor.table import (
    MASK,
    NUMBERS,
    OTHER,
    cube,
    dim,
    dims,
    is_method,
    joined,
    of,
    some,
    spelled,
    with_sizes,
)


# ---------------------------------------------------------------------------------------- shapes
@of("reshape", Tensor.view)
def _(r, f):
    shape = r.choice([(3, 2, 4), (24,), (-1, 4), (2, 3, 1, 4)])
    return with_sizes(r, f, lambda x: x, shape, "size" if f is Tensor.view else "shape")


@of("permute")
def _(r, f):
    order = r.sample(range(3), 3)
    return with_sizes(r, f, cube, [each - r.choice((0, 3)) for each in order], "dims")


@of("expand")
def _(r, f):
    shape = r.choice([(3, 5, 4), (2, 3, 5, 4), (-1, 2, -1), (1, 3, 2, 4)])
    return with_sizes(r, f, lambda x: cube(x)[:, :1], shape, "size")


@of("repeat")
def _(r, f):
    return with_sizes(r, f, cube, r.choice([(1, 2, 1), (2, 1, 1, 2), (1, 1, 3)]), "repeats")


@of("tile")
def _(r, f):
    return with_sizes(r, f, cube, r.choice([(2,), (2, 1), (1, 2, 1), (2, 1, 1, 2)]), "dims")


@of("squeeze")
def _(r, f):
    def first(x):
        return x.reshape(3, 1, 8, 1)

    given = r.choice([None, dim(r, 4), (1, 3), (-1, 0), [1]])
    if given is None or isinstance(given, list):
        return lambda x: f(first(x))
    return spelled(r, f, first, ("dim", given))


@of("sum", "mean")
def _(r, f):
    where = r.choice([dims(r, 3), None, (), []])
    only = r.choice([{}, {"dtype": torch.float64}])
    if r.random() < 0.2:
        return lambda x: f(cube(x), **only) + f(x.mean(), **only)
    return spelled(r, f, cube, ("dim", where), *some(r, ("keepdim", True)), only=only)


@of("view_as", "reshape_as", "expand_as")
def _(r, f):
    shape = r.choice([(3, 8), (3, 8)] if f is Tensor.expand_as else [(3, 2, 4), (24,)])
    if r.random() < 0.3:  # a plain tensor, of the shape of what depends on x
        return lambda x: x * f(OTHER.reshape(-1)[:24].reshape(3, 8), x).cos()
    return spelled(r, f, lambda x: x, ("other", lambda x: torch.ones(shape) * x.mean()))


@of("flatten")
def _(r, f):
    start, end = sorted(r.sample(range(3), 2))
    given = some(
        r, ("start_dim", r.choice([start, start - 3])), ("end_dim", r.choice([end, end - 3]))
    )
    return r.choice([spelled(r, f, cube, *given), lambda x: f(x.mean())])


@of("unflatten")
def _(r, f):
    shape = r.choice([(2, 2), [2, -1], (4, 1)])
    return spelled(r, f, cube, ("dim", r.choice([2, -1])), ("sizes", shape))


@of("transpose", "swapdims", "swapaxes")
def _(r, f):
    names = ("axis0", "axis1") if f in every("swapaxes") else ("dim0", "dim1")
    return spelled(r, f, cube, (names[0], dim(r, 3)), (names[1], dim(r, 3)))


@of("unsqueeze")
def _(r, f):
    return spelled(r, f, r.choice([cube, lambda x: x.mean()]), ("dim", r.choice([0, -1])))


@of("chunk")
def _(r, f):
    return joined(spelled(r, f, cube, ("chunks", r.choice([2, 3])), *some(r, ("dim", dim(r, 3)))))


@of("split")
def _(r, f):
    place = r.choice([2, -1])
    name = "split_size" if is_method(f) else "split_size_or_sections"
    size = r.choice([1, 3, [1, 3], (2, 2)])
    if is_method(f):
        return joined(spelled(r, f, cube, (name, size), ("dim", place)))
    return joined(lambda x: f(cube(x), size, dim=place))


@of("unbind")
def _(r, f):
    return joined(spelled(r, f, cube, *some(r, ("dim", dim(r, 3)))))


@of("split_with_sizes")
def _(r, f):
    place = ("dim", r.choice([2, -1]))
    return joined(spelled(r, f, cube, ("split_sizes", r.choice([[1, 3], (2, 2)])), place))


@of("roll")
def _(r, f):
    shifts, where = r.choice([(1, -1), ((1,), (0,)), ((1, -2), (1, 2)), ([2], [1]), (3, None)])
    given = (("shifts", shifts), *(() if where is None else (("dims", where),)))
    return spelled(r, f, cube, *given)


@of("flip")
def _(r, f):
    where = r.choice([(0,), [1, -1], (-1,), (0, 1, 2), ()])
    return with_sizes(r, f, cube, where, "dims")


@of("cumsum")
def _(r, f):
    kinds = [{}, {"dtype": torch.float64}, {"dtype": torch.float32}]
    first = r.choice([cube, cube, lambda x: x.mean()])
    return spelled(r, f, first, ("dim", dim(r, 3)), only=r.choice(kinds[:2]))


@of("index_select")
def _(r, f):
    index = torch.tensor(
        r.choice([[1, 0, 1], [0], []]), dtype=r.choice([torch.int64, torch.int32])
    )
    return spelled(r, f, cube, ("dim", dim(r, 3)), ("index", index))


@of("topk", "sort")
def _(r, f):
    place, both = ("dim", r.choice([1, 2, -1])), r.random() < 0.5
    if f in every("topk"):
        given = (("k", r.choice([1, 2])), *some(r, place, ("largest", both)))
    else:
        given = some(r, place, ("descending", both))
    called = spelled(r, f, cube, *given)
    return r.choice([lambda x: called(x).values, lambda x: called(x)[0] * called(x).indices])


@of(torch.broadcast_tensors)
def _(r, f):
    tensors = r.choice([lambda x: (x[:, None], OTHER.reshape(3, 8)), lambda x: (x, x.mean(0))])
    return joined(lambda x: f(*tensors(x)))


@of("narrow")
def _(r, f):
    return spelled(
        r, f, cube, ("dim", r.choice([2, -1])), ("start", r.choice([1, -2])), ("length", 2)
    )


@of("select")
def _(r, f):
    return spelled(r, f, cube, ("dim", dim(r, 3)), ("index", r.choice([1, -1])))


@of("repeat_interleave")
def _(r, f):
    where = r.choice([2, -1, None])
    each = torch.tensor([1, 0, 2, 1]) if where else 2
    given = () if where is None and r.random() < 0.5 else (("dim", where),)
    only = {"output_size": 4} if where and r.random() < 0.3 else {}
    return spelled(r, f, cube, ("repeats", each), *given, only=only)


@of("clone", "contiguous")
def _(r, f):
    layouts = [torch.contiguous_format, torch.preserve_format, torch.channels_last]
    layout = r.choice([None, *layouts[: 3 if f in every("clone") else 1]])
    named = {} if layout is None else {"memory_format": layout}
    return lambda x: f(x.reshape(3, 2, 2, 2).transpose(1, 2), **named)


@of(Tensor.mT.__get__, "adjoint", Tensor.T.__get__, "t")
def _(r, f):
    deep = f is not Tensor.T.__get__ and f not in every("t") and r.random() < 0.5
    return lambda x: f(cube(x)) if deep else f(x)


@of(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
def _(r, f):
    axes = int(f.__name__[-2])
    given = (("kernel_size", 2), ("stride", 1), ("padding", 1), ("ceil_mode", False))
    given = (given[0], *some(r, *given[1:], ("count_include_pad", False)))
    return spelled(r, f, images(r, axes), *given)


@of(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
def _(r, f):
    axes = int(f.__name__[-2])
    return spelled(r, f, images(r, axes), ("output_size", r.choice([1, (2,) * axes])))


def images(r, axes):
    """x as a batch with channels, or now and then as a single sample."""
    shape = {1: (3, 2, 4), 2: (3, 2, 2, 2), 3: (3, 1, 2, 2, 2)}[axes]
    batched = r.random() < 0.8
    return lambda x: x.reshape(shape) if batched else x.reshape(shape)[0]


@of("interpolate", "upsample")
def _(r, f):
    axes = r.choice([1, 2, 3])
    mode = r.choice(["nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[axes]])
    shape = {1: (3, 2, 4), 2: (3, 2, 2, 2), 3: (3, 1, 2, 2, 2)}[axes]
    size = r.choice([{"size": 3}, {"size": (3,) * axes}, {"scale_factor": 2.0}])
    return lambda x: f(x.reshape(shape), mode=mode, **size)


@of("pixel_shuffle", "pixel_unshuffle")
def _(r, f):
    name = "upscale_factor" if f in every("pixel_shuffle") else "downscale_factor"
    shape = r.choice([(3, 4, 2, 1), (3, 1, 4, 2, 1), (12, 2, 1)])
    if name.startswith("down"):
        shape = r.choice([(3, 1, 2, 4), (3, 2, 4), (1, 3, 1, 4, 2)])
    return spelled(r, f, lambda x: x.reshape(shape), (name, 2))


@of(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def _(r, f):
    shape = {"dropout": (3, 8), "dropout1d": (3, 2, 4), "dropout2d": (3, 2, 2, 2)}
    first = shape.get(f.__name__, (3, 1, 2, 2, 2))
    given = r.choice([(("p", 0.0), ("training", True)), (("p", 0.7), ("training", False))])
    return spelled(r, f, lambda x: x.reshape(first), *given)


@of(F.pad)
def _(r, f):
    shape, pad = r.choice([((3, 8), (1, 2)), ((3, 2, 4), (1, 0, 0, 1)), ((3, 2, 4), (1, -1))])
    if r.random() < 0.4:  # of the batch as well
        pad = (0, 1) * len(shape)
    mode = r.choice([(), (("mode", "constant"),), (("mode", "constant"), ("value", 2.0))])
    shape = r.choice([shape, (24,)]) if len(pad) == 2 else shape
    if len(pad) == 2 and shape == (3, 2, 4) and r.random() < 0.5:
        pad, mode = (1, 2), (("mode", r.choice(["reflect", "replicate", "circular"])),)
    return spelled(r, f, lambda x: x.reshape(shape), ("pad", r.choice([pad, list(pad)])), *mode)


# ------------------------------------------------------------------------------------ properties
@of(Tensor.requires_grad.__get__, Tensor.grad_fn.__get__)
def _(r, f):
    return lambda x: (f(x), x)[1]


@of(Tensor.register_hook)
def _(r, f):
    return lambda x: (x, f(x, lambda gradient: None))[0] if x.requires_grad else x


# --------------------------------------------------------------------------------------- indices
INDEX = torch.tensor([1, 0, 1])
PARTS = (
    *(0, -1, None, ..., slice(None), slice(1, None), slice(None, None, 2)),
    *([0, 1], [[0, 1], [1, 0]], [True, False], INDEX, INDEX.reshape(1, 3), INDEX.numpy()),
    *(INDEX[0], INDEX.numpy()[0], INDEX.to(torch.int32), range(2), True, (0, 1)),
)
MASKS = (MASK, MASK[:, 0].clone(), MASK[:, 0, 0].clone(), MASK.numpy())
WHOLE = (
    *([0, 1], [[0, 1], [1, 0]], INDEX, INDEX.numpy(), INDEX.reshape(1, 3).numpy(), None, ...),
    *((), (INDEX, INDEX), (INDEX, slice(None), INDEX), (slice(None), INDEX, INDEX), range(2)),
    *((0, slice(None), INDEX), ([0, 1], slice(None), [1, 2]), (INDEX, None, INDEX), True, False),
    *MASKS,
    *((MASKS[1], 0), (..., MASKS[1][0]), (MASKS[1], None), (MASKS[2], slice(None), [0, 1, 1])),
)


@of(Tensor.__getitem__)
def _(r, f):
    index = r.choice(WHOLE)
    if r.random() < 0.6:
        parts = [r.choice(PARTS) for _ in range(r.randint(1, 3))]
        if sum(part is ... for part in parts) < 2:
            index = tuple(parts)
    return lambda x: f(cube(x), index)


@of(Tensor.__iter__)
def _(r, f):
    return joined(lambda x: list(f(cube(x))))


# ----------------------------------------------------------------------------------------- casts
@of("to", "type", "type_as", "float", "double", "half", "bfloat16")
def _(r, f):
    name, cast = f.__name__, lambda x: x.double()
    if name == "to":
        forms = [
            *(
                ((torch.float64,), {}),
                (("cpu",), {}),
                (("cpu", torch.float64), {}),
                ((OTHER,), {}),
            ),
            *(((), {"dtype": torch.float64}), ((), {"other": OTHER}), ((), {"device": "cpu"})),
            *(((torch.int64,), {}), (("cpu", torch.bool), {}), ((), {"dtype": torch.int8})),
            *(((NUMBERS,), {}), ((torch.float64, False, True), {}), ((MASK,), {})),
        ]
    elif name == "type":
        forms = [((kind,), {}) for kind in ("torch.DoubleTensor", torch.float64, torch.int32)]
        forms += [((), {"dtype": torch.bool}), (("torch.LongTensor",), {})]
    elif name == "type_as":
        forms = [((other,), {}) for other in (OTHER, NUMBERS, MASK)]
    else:
        forms = [((), {}), ((), {"memory_format": torch.preserve_format})]
    args, named = r.choice(forms)
    return lambda x: x * cast(f(3 * x, *args, **named))


@of("int", "long", "short", "char", "byte", "bool")
def _(r, f):
    return lambda x: x * f(3 * x).double() + f(3 * x)


@of(torch.as_tensor, torch.asarray)
def _(r, f):
    named = r.choice([{}, {"dtype": torch.float64}])
    return lambda x: f(x, **named)


@of("cpu")
def _(r, f):
    return f


@of("gather")
def _(r, f):
    place = r.randrange(3)
    sizes = [
        r.randint(1, 5) if each == place else r.randint(1, most)
        for each, most in enumerate((3, 2, 4))
    ]
    index = torch.arange(120)[: sizes[0] * sizes[1] * sizes[2]].reshape(sizes) % (3, 2, 4)[place]
    return spelled(r, f, cube, ("dim", place - r.choice((0, 3))), ("index", index))


@of("scatter_add", "index_add")
def _(r, f):
    place, tall = r.choice([0, -2]), OTHER.reshape(-1)[:16].reshape(2, 8)
    index = torch.tensor([1, 0, 1])
    first, added = r.choice(
        [
            (lambda x: x[:2], lambda x: x.cos()),
            (lambda x: tall, lambda x: x),
            (lambda x: x[1:], lambda x: OTHER.reshape(3, 8)),
        ]
    )
    if f in every("scatter_add"):
        index = index[:, None].expand(3, 8)
        given = (("dim", place), ("index", index), ("src", added))
        return spelled(r, f, first, *given)
    given = (("dim", place), ("index", index), ("source", added))
    return spelled(r, f, first, *given, only=r.choice([{}, {"alpha": -0.5}]))
