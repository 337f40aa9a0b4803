"""Mixed precision: autocast around the loss module, with a gradient scaler for float16.

python docs/examples/mixed_precision.py
"""

import torch
from torch import nn

from hosm_losses import ScoreModel, ThirdOrderDSM, VPSchedule


class Network(nn.Module):
    """A network that predicts the noise in one-channel images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.norm, self.middle = nn.GroupNorm(8, 32), nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return ε̂(x, t)."""
        hidden = self.first(x) + t[:, None, None, None]
        hidden = hidden + self.middle(nn.functional.silu(self.norm(hidden)))
        return self.last(nn.functional.silu(hidden))


def main(steps: int = 24) -> None:
    """Train in bfloat16 on a CPU or in float16 on a GPU, and print early and late losses."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    network = Network().to(device)  # parameters stay in float32
    objective = ThirdOrderDSM(ScoreModel(network, VPSchedule()), weights=(1, 0.5, 0.5, 0.1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    images = torch.rand(256, 1, 1, 1, device=device).expand(-1, -1, 8, 8) * 2 - 1
    losses = []
    for _ in range(steps):
        x0 = images[torch.randint(256, (32,), device=device)]
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = objective(x0)  # the residuals stay in float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    first, last = (torch.stack(part).mean() for part in (losses[:6], losses[-6:]))
    print(f"{dtype}: loss {first:.3f} at first, {last:.3f} at last")


if __name__ == "__main__":
    main()
