"""Which derivative gives value and divergence at the least cost: over one evaluation, in one run.

python -m pytest benchmarks/test_divergence_mode.py
"""

import pytest
import torch
from torch.func import jvp, vmap

from benchmarks.networks import NETWORKS
from benchmarks.steps import model_of
from benchmarks.timing import ratios
from hosm_losses.derivatives import safe_primitives
from hosm_losses.derivatives.taylor import carried
from hosm_losses.likelihood.ode import with_divergence
from hosm_losses.model import noise_field
from hosm_losses.probes import draw_probes


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_value_and_divergence_over_one_evaluation(benchmark, choose, name, probes):
    model, (batch, *shape) = model_of(name), NETWORKS[name][1]
    x = torch.randn(choose(2, batch, batch), *shape)
    t = torch.full((len(x),), 0.5)
    field, v = noise_field(model, t, primitives=False), draw_probes(x, probes)

    def evaluate(x):
        return model.network(x, t)

    def separate():
        evaluate(x)
        for probe in v:
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                torch.autograd.grad((evaluate(point) * probe).sum(), point)

    def forward_mode():
        with safe_primitives():
            if probes == 1:
                jvp(evaluate, (x,), (v[0],))
            else:
                vmap(lambda w: jvp(evaluate, (x,), (w,)), out_dims=(None, 0))(v)

    routes = {
        "one evaluation": lambda: evaluate(x),
        "ours: one pass forward, one back for each probe": lambda: with_divergence(field, x, v),
        "a pass forward, and both passes for each probe": separate,
        "forward mode": forward_mode,
        "the losses' Taylor engine": lambda: carried(evaluate, x, v),
    }
    with torch.no_grad():
        given = (routes, "one evaluation", choose(1, 3, 15))
        benchmark.extra_info["ratios"] = benchmark.pedantic(ratios, given, rounds=1)
