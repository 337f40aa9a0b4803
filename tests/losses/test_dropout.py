"""Which of the numbers of one call see the same dropout mask."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import hosm_losses as hosm
from hosm_losses.model import bind_model
from tests.cases import VP

# By order and options, with two probes: whether they share a mask. At exact order three each probe
# has a copy of the sample; but paired in reverse mode, and all unit vectors in the Taylor engine.
SHARED = [
    (2, {"engine": "taylor"}, True),
    (2, {"engine": "reverse"}, True),
    (3, {"engine": "taylor"}, False),
    (3, {"engine": "reverse"}, False),
    (3, {"engine": "taylor", "summed": True}, True),
    (3, {"engine": "reverse", "summed": True}, False),
]


def of_squares(x, t):
    """f = −m x² for a mask m, so that m = −f/x² = −D/(2 x w)."""
    return F.dropout(x * x, 0.5)


def setting():
    x, w = torch.rand(4, 50) + 0.5, torch.rand(2, 4, 50) + 0.5
    return bind_model(hosm.ScoreModel(of_squares, VP), 4, t=torch.full((4,), 0.5)), x, w


def masks(derived, x, w):
    """Those of f and of D, each (K, B, *)."""
    value = derived.value.expand_as(derived.directional)
    return -value / x**2, -derived.directional / (2 * x * w)


def check(derived, x, w, shared):
    of_value, of_slope = masks(derived, x, w)
    torch.testing.assert_close(of_value, of_slope)
    assert torch.allclose(of_slope[0], of_slope[1]) == shared
    assert 0.3 < float((of_slope == 0).double().mean()) < 0.7


@pytest.mark.parametrize(("order", "options", "shared"), SHARED)
def test_a_value_and_its_derivatives_see_one_mask(order, options, shared):
    bound, x, w = setting()
    derived = bound.derive(x, w, order=order, **options)
    check(derived, x, w, shared)


@pytest.mark.parametrize(("order", "options", "shared"), SHARED[:4])
def test_and_so_do_products_with_the_whole_jacobian(order, options, shared):
    bound, x, w = setting()
    options = options | {"order": order, "push": order == 3}
    found = bound.derive_with_products(x, w, torch.ones_like, **options)
    check(found.derived, x, w, shared or options["engine"] == "reverse")
    expected = (2 * x * masks(found.derived, x, w)[0])[: len(found.vjp_c)]
    for each in (found.vjp_c, found.jvp_c):
        if each is not None:
            torch.testing.assert_close(-each, expected)
