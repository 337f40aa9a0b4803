"""A Lightning module that trains with low-noise gradients and validates with the ODE's likelihood.

python docs/examples/lightning_module.py
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hosm_losses as hosm


class Network(nn.Module):
    """A network that predicts the noise in points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return ε̂(x, t)."""
        return self.layers(torch.cat([x, t[:, None]], 1))


class Diffusion(pl.LightningModule):
    """Stores the network only inside the loss module, so that Lightning wraps the two together."""

    def __init__(self) -> None:
        super().__init__()
        model = hosm.ScoreModel(Network(), hosm.VPSchedule())
        self.objective = hosm.FirstOrderDSM(
            model, antithetic=True, time_sampler=hosm.AdaptiveTimes()
        )

    def quiet(self, x: torch.Tensor) -> dict[str, Any]:
        """Return half of the batch for pairs, and the whole batch as reference for averages."""
        return {"x0": x[: len(x) // 2], "targets": hosm.AveragedTargets(x, own=False)}

    def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
        """Return the loss, and log it."""
        loss = self.objective(**self.quiet(batch[0]))
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, _outputs: Any, batch: list[torch.Tensor], index: int) -> None:
        """Every 50 steps, learn at which times gradients are noisy."""
        if index % 50 == 49:
            optimizer = self.optimizers(use_pl_optimizer=False)
            quiet = self.quiet(batch[0])
            self.objective.time_sampler.learn(self.objective, optimizer=optimizer, **quiet)

    def validation_step(self, batch: list[torch.Tensor], _index: int) -> None:
        """Log the ODE's mean −log p in nats. `ode_nll` works in Lightning's inference mode."""
        model, solver = self.objective.model, hosm.FixedGrid(20)
        result = hosm.ode_nll(model, batch[0], solver=solver, divergence="exact")
        self.log("nll", result.nll.mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer, as for any other module."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    data = torch.randn(4096, 2).sign() + 0.1 * torch.randn(4096, 2)
    loader = DataLoader(TensorDataset(data[64:]), batch_size=64, shuffle=True)
    held_out = DataLoader(TensorDataset(data[:64]), batch_size=64)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=4, enable_model_summary=False, **options)
    model = Diffusion()
    before = trainer.validate(model, held_out, verbose=False)[0]["nll"]
    trainer.fit(model, loader, held_out)
    print(f"nats: {before:.3f} before, {trainer.callback_metrics['nll'].item():.3f} after")
