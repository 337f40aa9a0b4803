"""Fine-tune a text-to-image UNet on latents, with the text states in model_kwargs.

The shapes match Stable Diffusion's latents and text encoder; the weights are random.

python docs/examples/latents_and_text.py
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from hosm_losses import FirstOrderDSM, FixedGrid, Hutchinson, checkpoint, from_diffusers, ode_nll


def main(steps: int = 3) -> None:
    """Fine-tune, then evaluate the likelihood of latents given their texts."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    # This checkpoint works at every order, and in likelihoods.
    unet.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
    model = from_diffusers(unet, DDPMScheduler(beta_schedule="scaled_linear"))
    objective = FirstOrderDSM(model, weighting="native")  # the loss of diffusers' scripts
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    for step in range(steps):
        latents = 0.9 * torch.randn(4, 4, 8, 8)  # 0.18215 · vae.encode(images)
        text = {"encoder_hidden_states": torch.randn(4, 77, 768)}
        optimizer.zero_grad()
        loss = objective(latents, model_kwargs=text)
        loss.backward()
        optimizer.step()
        print(step, f"{loss:.4f}")
    unet.eval()
    options = {"solver": FixedGrid(12, data_std=0.9), "divergence": Hutchinson(2)}
    result = ode_nll(model, latents, model_kwargs=text, **options)
    print(result.summary())


if __name__ == "__main__":
    main()
