"""Which derivative gives value and divergence at the least cost: over one evaluation, in one run.

python -m benchmarks divergence_mode [--full]
"""

from collections.abc import Callable, Mapping
from itertools import product

import torch
from torch import Tensor
from torch.func import jvp, vmap

import hosm_losses as hosm
from benchmarks.experiment import Choose, times
from benchmarks.intervals import ratio_of_medians
from benchmarks.steps import NETWORKS, TWINS, model_of
from hosm_losses.likelihood.paths import with_divergence
from hosm_losses.model import condition
from hosm_losses.probes import draw_probes
from hosm_losses.taylor import propagate, safe_primitives

CASES = ("all networks",)


def routes(model: hosm.ScoreModel, x: Tensor, probes: int) -> Mapping[str, Callable[[], object]]:
    """Ways to value and divergence at a batch, by name."""
    t = torch.full((len(x),), 0.5)
    field, v = condition(model, len(t), primitives=False).at(t), draw_probes(x, probes)

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

    return {
        "one evaluation": lambda: evaluate(x),
        "ours: one pass forward, one back for each probe": lambda: with_divergence(field, x, v),
        "a pass forward, and both passes for each probe": separate,
        "forward mode": forward_mode,
        "the losses' Taylor engine": lambda: propagate(evaluate, x, v),
    }


def answer(_: str, choose: Choose) -> dict:
    """Times of value and divergence over one evaluation: by route, number of probes, network."""
    found: dict = {}
    for name, probes in product(TWINS, (1, 4)):
        shape = NETWORKS[name][1]
        model, x = model_of(name), torch.randn(choose(2, shape[0], shape[0]), *shape[1:])
        with torch.no_grad():
            seconds = times(routes(model, x, probes), choose(1, 3, 15))
        for route, each in seconds.items():
            ratio = ratio_of_medians(each, seconds["one evaluation"])
            found.setdefault(route, {}).setdefault(str(probes), {})[name] = ratio
    return found
