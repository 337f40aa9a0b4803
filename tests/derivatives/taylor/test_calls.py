"""Calls of every operator with a rule, and of some without.

Values, types and shapes are PyTorch's, and so is what is refused; derivatives are those of
reverse mode.
"""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hosm_losses.derivatives.taylor import carried, derived
from hosm_losses.derivatives.taylor.table import RULES, WITHOUT_RULE
from tests.derivatives.taylor.checks import KINDS, check, close, name
from tests.derivatives.taylor.table import TABLE, WEIGHT, call, functions

# In files of their own: changes in place, casts that round, and what is refused.
ELSEWHERE = "hardsigmoid float half bfloat16 cfloat cdouble chalf cuda __setitem__ retain_grad"
ELSEWHERE += " as_strided as_strided_copy as_strided_scatter"
ENTRIES = {function: entry for names, entry in TABLE.items() for function in functions(names)}
X, V = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X.requires_grad_()


def in_place(function):
    name = function.__name__
    return name.startswith("__i") if name.endswith("__") else name.endswith("_")


def test_every_rule_has_an_entry():
    known = {WITHOUT_RULE, *functions(ELSEWHERE), *ENTRIES}
    assert [name(each) for each in RULES if each not in known and not in_place(each)] == []


def right(function, pick, *, curved=True, kinds=KINDS[2:3]):
    """Whether PyTorch takes a call; all of it is compared, and what it refuses is refused."""
    called = call(ENTRIES[function], function, pick)

    def of_x(x):  # without second derivatives of its own, or with
        return called(x + x.sin() / 2 if curved else x)

    try:
        value = of_x(X)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017
            carried(of_x, X, V.unsqueeze(0))
        return False
    got = carried(of_x, X, V.unsqueeze(0))
    assert got.dtype == value.dtype
    close(got[0], value)
    check(of_x, (8,), WEIGHT, kinds=kinds)
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", ENTRIES, ids=name)
def test_every_name(function, monkeypatch):
    """The first choices go by the rule, and not by that for all functions; others are random."""
    along, calls = derived.along, []
    monkeypatch.setattr(derived, "along", lambda *given: calls.append(1) or along(*given))
    assert (right(function, lambda _: 0) and not calls) or function not in RULES
    right(function, Random(0).randrange, curved=False, kinds=KINDS[4:5])


# One name for each rule, with the number of its calls where it takes many kinds.
MANY = {"__getitem__": 60, "einsum": 40, "multi_head_attention_forward": 30, "conv2d": 40}
MANY |= {"scaled_dot_product_attention": 30, "conv_transpose2d": 30, "matmul": 20, "add": 20}
ONE_NAME = {}
for function, entry in ENTRIES.items():
    if function in RULES:
        found = RULES[function].function
        ONE_NAME.setdefault((entry, getattr(found, "func", found)), function)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", ONE_NAME.values(), ids=name)
def test_random_calls(function):
    @settings(max_examples=MANY.get(function.__name__, 8))
    @given(st.data(), st.booleans(), st.sampled_from(KINDS))
    def random_calls(data, curved, kind):
        pick = lambda count: data.draw(st.integers(0, count - 1))  # noqa: E731
        right(function, pick, curved=curved, kinds=[kind])

    random_calls()
