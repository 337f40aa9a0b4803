"""diffusers' unconditional training loop with accelerate; "-" is removed, "+" is added.

accelerate launch docs/examples/diffusers_accelerate.py      (any number of GPUs, or --cpu)
"""

import argparse

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, TensorDataset

from hosm_losses import AdaptiveTimes, FirstOrderDSM, from_diffusers

STEPS = 60


def main() -> None:
    """Train a tiny UNet on random images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    accelerator = Accelerator(cpu=parser.parse_args().cpu)
    torch.manual_seed(0)
    unet = UNet2DModel(
        layers_per_block=1,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    images = torch.rand(2048, 3, 1, 1).expand(-1, -1, 8, 8) * 2 - 1
    loader = DataLoader(TensorDataset(images), batch_size=16, shuffle=True)
    # - unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    times, model = AdaptiveTimes(), from_diffusers(unet, scheduler)  # +
    objective = FirstOrderDSM(model, weighting="native", time_sampler=times)  # +
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)  # +
    ema = EMAModel(unet.parameters())
    torch.manual_seed(accelerator.process_index)
    for step, (clean,) in zip(range(STEPS), loader, strict=False):
        # - noise = torch.randn_like(clean)
        # - timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
        # - noisy = scheduler.add_noise(clean, noise, timesteps)
        # - loss = F.mse_loss(unet(noisy, timesteps).sample, noise)
        loss = objective(clean)  # + the same mean, as it draws noise and timesteps
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        if step % 50 == 49:
            times.learn(objective, clean, optimizer)  # +
        if step % 10 == 9:
            accelerator.print(step + 1, f"{loss:.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
