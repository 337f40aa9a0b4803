"""A torchmetrics metric of the ODE's likelihood, over batches and over processes.

torchrun --nproc-per-node 2 docs/examples/nll_metric.py
"""

from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torchmetrics import Metric

from hosm_losses import NLLResult, ScoreModel, VPSchedule, ode_nll

FIELDS = ("nll", "latent", "nfe", "standard_error", "solver_error", "failed")
OTHERS = ("quantization", "steps", "widening")  # the same for every batch


class ODELikelihood(Metric):
    """Gathers results; compute() gives their means and standard errors."""

    full_state_update = False

    def __init__(self, model: ScoreModel, **options: object) -> None:
        super().__init__()
        self.model, self.options = (model,), options  # the tuple keeps it out of the state_dict
        self.others: dict[str, object] = {}
        for name in FIELDS:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, x: torch.Tensor) -> None:
        """Add a batch."""
        result = ode_nll(self.model[0], x, **self.options)
        self.others = {name: getattr(result, name) for name in OTHERS}
        unknown = torch.full_like(result.nll, torch.nan)
        for name in FIELDS:  # of which standard_error is None with one random probe
            value = getattr(result, name)
            getattr(self, name).append(unknown if value is None else value)

    def compute(self) -> dict[str, float | None]:
        """Means and standard errors over all batches of all processes."""
        parts = (getattr(self, name) for name in FIELDS)
        # A list before the processes are joined, a tensor after.
        joined = [torch.cat(part) if isinstance(part, list) else part for part in parts]
        result = NLLResult(*joined, **self.others)
        if bool(result.standard_error.isnan().all()):
            result = replace(result, standard_error=None)
        return asdict(result.summary())


def main() -> None:
    """Every process evaluates its share of the same points."""
    rank, world = 0, 1
    if dist.is_torchelastic_launched():  # by torchrun
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    model = ScoreModel(lambda x, _t: torch.tanh(layer(x)), VPSchedule())
    metric = ODELikelihood(model, divergence="exact", steps=16)
    for x in torch.randn(40, 2)[rank::world].split(8):
        metric.update(x)
    found = metric.compute()
    if rank == 0:
        print(*(f"{name} {found[name]:.6f}" for name in ("samples", "nll", "standard_error")))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
