"""A torchmetrics metric for the ODE's likelihood, over batches and processes.

torchrun --nproc-per-node 2 docs/examples/nll_metric.py
"""

from dataclasses import asdict

import torch
import torch.distributed as dist
from torchmetrics import Metric

from hosm_losses import FixedGrid, NLLResult, ScoreModel, VPSchedule, ode_nll

FIELDS = ("nll", "nfe", "standard_error", "solver_error", "failed", "products", "kinks")
OTHERS = ("levels", "low", "high", "widening", "elements")  # the same for every batch


class ODELikelihood(Metric):
    """A metric that gathers results; compute() returns their means and standard errors."""

    full_state_update = False

    def __init__(self, model: ScoreModel, **options: object) -> None:
        super().__init__()
        self.model, self.options = (model,), options  # a tuple, to stay out of the state_dict
        # Each state is (B,) in float64, even the empty state of a process without a batch.
        self.set_dtype(torch.float64)
        for name in FIELDS + OTHERS:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, x: torch.Tensor) -> None:
        """Add a batch."""
        result = ode_nll(self.model[0], x, **self.options)
        known = {"elements": result.latent[0].numel()}
        known |= {} if result.quantization is None else result.quantization._asdict()
        for name in FIELDS + OTHERS:  # some may be missing
            value = getattr(result, name, known.get(name))
            value = torch.as_tensor(torch.nan if value is None else value).to(x.device).double()
            getattr(self, name).append(value.expand(len(x)))

    def compute(self) -> dict[str, float | None]:
        """Return means and standard errors over all batches of all processes."""
        parts = {name: getattr(self, name) for name in FIELDS + OTHERS}
        found = {n: torch.cat(p) if isinstance(p, list) else p for n, p in parts.items()}
        levels, low, high, widening, elements = (found.pop(name)[0].item() for name in OTHERS)
        for name in ("standard_error", "products", "kinks"):
            found[name] = None if found[name].isnan().all() else found[name]
        for name in ("failed", "kinks"):
            found[name] = found[name] if found[name] is None else found[name] > 0
        latent = found["nll"].new_zeros(len(found["nll"]), int(elements))  # only the size matters
        result = NLLResult(**found, latent=latent, widening=widening)
        return asdict(result.summary(*([int(levels), low, high] if levels > 0 else [])))


def main() -> None:
    """Evaluate a different share of the points in every process."""
    if launched := dist.is_torchelastic_launched():  # by torchrun
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    model = ScoreModel(lambda x, _t: torch.tanh(layer(x)), VPSchedule())
    metric = ODELikelihood(model, solver=FixedGrid(20), divergence="exact")
    for x in torch.randn(40, 2)[rank::world].split(8):
        metric.update(x)
    found = metric.compute()
    if rank == 0:
        print(*(f"{name} {found[name]:.6f}" for name in ("samples", "nll", "standard_error")))
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
