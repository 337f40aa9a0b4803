"""A frozen network: no gradient but of what is not frozen.

In `test_random_options` a part is frozen, beside data and conditions that are not.
"""

import pytest
import torch

import hosm_losses as hosm
from tests.cases import FUNCTIONS, MLP, VP, given

CHOICES = [
    (1, {}),
    *((order, {"engine": name}) for order in (2, 3) for name in ("taylor", "reverse")),
    *((order, {"probes": hosm.Paired(), "engine": "taylor"}) for order in (2, 3)),
    (3, {"probes": hosm.Paired(), "engine": "reverse"}),
]


@pytest.mark.parametrize(("order", "options"), CHOICES)
def test_it_trains_nothing_but_a_probe_that_requires_a_gradient(order, options):
    """Without one backward raises, as it does of a loss of order one."""
    model = hosm.ScoreModel(MLP(3).requires_grad_(False), VP)
    x0, inputs = given((4, 3), order, 2)
    assert not FUNCTIONS[order](model, x0, **inputs, **options).requires_grad
    if order > 1:
        probe = inputs["probe"].requires_grad_()
        loss = FUNCTIONS[order](model, x0, **inputs, **options)
        assert bool(torch.autograd.grad(loss, probe)[0].any())
