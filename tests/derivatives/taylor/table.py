"""For every operator with a rule, random calls of it in the spellings that PyTorch takes.

A generator is given a source of choices and one of the functions it stands for, and returns a function
of x (3, 8). A new rule needs a generator here: `test_calls.py` asks for one.
"""

import types

import torch
from torch import Tensor

from hosm_losses.derivatives.taylor.table import every

GENERATORS = {}
OTHER = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MASK = OTHER > 0
NUMBERS = torch.arange(-3, 5).reshape(2, 4)


def of(*functions):
    """Register a generator for functions, or for all with a name."""

    def register(generator):
        for function in functions:
            found = every(function) if isinstance(function, str) else (function,)
            GENERATORS.update(dict.fromkeys(found, generator))
        return generator

    return register


def is_method(function):
    return function in vars(Tensor).values() or function in vars(torch._C.TensorBase).values()


def is_native(function):
    """Whether it takes NumPy's names, which functions in Python do not."""
    return not isinstance(function, types.FunctionType)


NUMPYS = {"dim": "axis", "keepdim": "keepdims"}


def cube(x):
    return x.reshape(3, 2, 4)


def spelled(r, function, first, *rest, only=()):
    """A call with some arguments in their place and some by name; functions are called with x."""
    cut = r.randint(0, len(rest))
    named = {}
    for name, value in rest[cut:]:
        if is_native(function) and r.random() < 0.3:
            name = NUMPYS.get(name, name)
        named[name] = value
    named |= dict(only)
    places = [value for _, value in rest[:cut]]

    def at(value, x):
        return value(x) if isinstance(value, types.FunctionType) else value

    keyword = not cut and not is_method(function) and r.random() < 0.2

    def called(x):
        args = [at(value, x) for value in places]
        kwargs = {name: at(value, x) for name, value in named.items()}
        if keyword and is_native(function):
            return function(input=first(x), **kwargs)
        return function(first(x), *args, **kwargs)

    return called


def some(r, *options):
    """Of some arguments, the first few or all."""
    return options[: r.randint(0, len(options))]


def dim(r, ndim):
    return r.randrange(-ndim, ndim)


def dims(r, ndim):
    """One dimension, or several in a tuple or a list."""
    chosen = r.sample(range(ndim), r.randint(1, ndim))
    chosen = [each - r.choice((0, ndim)) for each in chosen]
    return r.choice((chosen[0], tuple(chosen), list(chosen)))


def several(result):
    """All tensors of a result as one."""
    if isinstance(result, Tensor):
        return result
    return torch.cat([each.reshape(-1) for each in result])


def joined(function):
    return lambda x: several(function(x))


def sizes(r, function, shape, name):
    """Sizes one by one, or in a sequence, or by name."""
    forms = [(tuple(shape),), (list(shape),), (torch.Size(shape),)]
    if is_method(function):
        forms.append(tuple(shape))
    if r.random() < 0.2:
        return {"named": {name: tuple(shape)}}
    return {"args": r.choice(forms)}


def with_sizes(r, function, first, shape, name):
    given = sizes(r, function, shape, name)
    return lambda x: function(first(x), *given.get("args", ()), **given.get("named", {}))
