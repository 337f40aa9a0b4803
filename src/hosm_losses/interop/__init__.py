"""ScoreModels from the objects that users of other projects hold, none of which is imported.

- `diffusers`, `denoising_diffusion`, `edm`, `score_sde`, `guided_diffusion`: one for each project.
  Each reads the attributes that it needs, and an error names the one that is missing.
- `foreign`: what they share.
"""

from hosm_losses.interop.denoising_diffusion import (
    from_denoising_diffusion as from_denoising_diffusion,
)
from hosm_losses.interop.diffusers import from_diffusers as from_diffusers
from hosm_losses.interop.edm import from_edm as from_edm
from hosm_losses.interop.guided_diffusion import from_guided_diffusion as from_guided_diffusion
from hosm_losses.interop.score_sde import from_score_sde as from_score_sde
