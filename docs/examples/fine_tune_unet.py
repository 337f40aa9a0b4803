"""diffusers' UNet2DModel, trained with order one by the usual diffusers loop, then fine-tuned.

Fine-tuning is done twice, from the same weights and for the same number of steps: with orders one
and two, and with order one alone, to show the effect of the second order.

    python docs/examples/fine_tune_unet.py [--steps 600] [--tuning 200]
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

import hosm_losses as hosm


def draw(count: int) -> Tensor:
    """Draw images (count, 1, 8, 8) of a bright spot at a random place, with a little noise."""
    place = torch.arange(8.0)
    x, y = ((place - 1 - 5 * torch.rand(count, 1)).square() for _ in range(2))
    spots = 2 * torch.exp(-(x[:, None, None] + y[:, None, :, None]) / 4) - 1
    return spots + 0.1 * torch.randn(spots.shape)


def main() -> None:
    """Train, fine-tune in two ways, and print the likelihood of each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of ordinary training")
    parser.add_argument("--tuning", type=int, default=200, help="steps of fine-tuning")
    parser.add_argument("--held-out", type=int, default=128, help="images that are evaluated")
    options = parser.parse_args()
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 4}
    unet = UNet2DModel(in_channels=1, out_channels=1, layers_per_block=1, **blocks, **sizes)
    scheduler, held_out = DDPMScheduler(), draw(options.held_out)

    def report(name: str, unet: UNet2DModel) -> None:
        given = {"solver": hosm.FixedGrid(data_std=0.6), "divergence": hosm.Hutchinson(2)}
        given["generator"] = torch.Generator().manual_seed(1)
        print(
            name, hosm.ode_nll(hosm.from_diffusers(unet, scheduler), held_out, **given).summary()
        )

    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(options.steps):
        clean, t = draw(32), torch.randint(0, 1000, (32,))
        noise = torch.randn_like(clean)
        predicted = unet(scheduler.add_noise(clean, noise, t), t).sample
        F.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    report("order one:", unet)
    for name, loss in {"one": hosm.FirstOrderDSM, "one and two": hosm.SecondOrderDSM}.items():
        torch.manual_seed(2)
        tuned, start = copy.deepcopy(unet), time.perf_counter()
        more = {} if name == "one" else {"weights": (1, 1, 0)}
        objective = loss(hosm.from_diffusers(tuned, scheduler), weighting="native", **more)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=2e-4)
        for _ in range(options.tuning):
            objective(draw(32)).backward()
            optimizer.step()
            optimizer.zero_grad()
        report(f"then {name}, {time.perf_counter() - start:.0f} s:", tuned)


if __name__ == "__main__":
    main()
