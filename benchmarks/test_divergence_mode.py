"""Which derivative gives value and divergence at the least cost: over one evaluation, in one run.

python -m pytest benchmarks/test_divergence_mode.py
"""

import pytest
import torch

import hosm_losses as hosm
from benchmarks.networks import NETWORKS
from benchmarks.timing import ratios
from hosm_losses.derivatives.primitive_mode import safe_primitives
from hosm_losses.derivatives.taylor import carried
from hosm_losses.likelihood.divergence import hutchinson_divergence
from hosm_losses.model import noise_field
from hosm_losses.probes import draw_probes


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_value_and_divergence_over_one_evaluation(benchmark, choose, name, probes):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network, x = make(), torch.randn(choose(2, *shape[:1], *shape[:1]), *shape[1:])
    t = torch.full((len(x),), 0.5)
    field = noise_field(hosm.ScoreModel(network, hosm.VPSchedule()), t, primitives=False)
    v = draw_probes(x, probes)

    def separate():
        network(x, t)
        for probe in v:
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                torch.autograd.grad((network(point, t) * probe).sum(), point)

    def forward_mode():
        with safe_primitives():
            if probes == 1:
                torch.func.jvp(lambda x: network(x, t), (x,), (v[0],))
            else:
                torch.func.vmap(
                    lambda w: torch.func.jvp(lambda x: network(x, t), (x,), (w,)),
                    out_dims=(None, 0),
                )(v)

    routes = {
        "one evaluation": lambda: network(x, t),
        "ours: one pass forward, one back for each probe": lambda: hutchinson_divergence(
            field, x, v
        ),
        "a pass forward, and both passes for each probe": separate,
        "forward mode": forward_mode,
        "the losses' Taylor engine": lambda: carried(lambda x: network(x, t), x, v),
    }

    rounds = choose(1, 3, 15)
    with torch.no_grad():
        found = benchmark.pedantic(ratios, (routes, "one evaluation", rounds), rounds=1)
    benchmark.extra_info["ratios"] = found
