"""Use denoising-diffusion-pytorch's Trainer with the third-order loss by replacing one method.

python docs/examples/lucidrains_trainer.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from torchvision.utils import save_image

from hosm_losses import from_denoising_diffusion, third_order_dsm


class HighOrderDiffusion(GaussianDiffusion):
    """A diffusion with the loss of orders one to three; the first term is the project's loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The tuple keeps the network from being registered a second time.
        self.score_model = (from_denoising_diffusion(self),)

    def p_losses(self, x_start: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return the loss; the Trainer's forward has already normalised x_start and drawn t."""
        self.last = third_order_dsm(self.score_model[0], x_start, t=t, weights=(1, 0.5, 0.5, 0.1))
        return self.last


def main() -> None:
    """Train for a few steps on single-colour images."""
    torch.manual_seed(0)
    network = Unet(dim=8, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2)
    diffusion = HighOrderDiffusion(network, image_size=8, timesteps=100)
    with tempfile.TemporaryDirectory() as folder:
        for index, colour in enumerate(torch.rand(128, 3, 1, 1)):
            save_image(colour.expand(-1, 8, 8), f"{folder}/{index}.png")
        trainer = Trainer(
            diffusion,
            folder,
            train_batch_size=16,
            train_lr=1e-3,
            train_num_steps=20,
            save_and_sample_every=1000,
            calculate_fid=False,
            results_folder=str(Path(folder) / "results"),
        )
        trainer.train()
    print(f"{trainer.step} steps with a last loss of {diffusion.last:.3f}")


if __name__ == "__main__":
    main()
