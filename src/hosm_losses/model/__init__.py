"""Wrap a network as a noise predictor ε̂(x, t), and as a function of x for differentiation.

- `adapters`: modules that wrap a network, such as `OnSubspace` for data in a linear subspace.
- `score_model`: `ScoreModel`, a network with its noise schedule and its kind of prediction.
- `bound`: `BoundModel`, the network's prediction as a function of x, for fixed times and
  conditions.
- `posterior`: the mean and covariance of clean data given noised data.
- `conditions`: the rule that decides which tensors in `model_kwargs` are per-sample.
"""

from hosm_losses.model.adapters import OnSubspace as OnSubspace
from hosm_losses.model.bound import BoundModel as BoundModel
from hosm_losses.model.bound import bind_model as bind_model
from hosm_losses.model.bound import refuse_wrapped as refuse_wrapped
from hosm_losses.model.conditions import Shared as Shared
from hosm_losses.model.conditions import map_tensors as map_tensors
from hosm_losses.model.conditions import per_sample as per_sample
from hosm_losses.model.conditions import tensors_in as tensors_in
from hosm_losses.model.posterior import DenoisingPosterior as DenoisingPosterior
from hosm_losses.model.posterior import PosteriorCovariance as PosteriorCovariance
from hosm_losses.model.posterior import denoising_posterior as denoising_posterior
from hosm_losses.model.score_model import TARGETS as TARGETS
from hosm_losses.model.score_model import UNSHARD as UNSHARD
from hosm_losses.model.score_model import Affine as Affine
from hosm_losses.model.score_model import Prediction as Prediction
from hosm_losses.model.score_model import ScoreModel as ScoreModel
from hosm_losses.model.score_model import apply_affine as apply_affine
from hosm_losses.model.score_model import check_model as check_model
from hosm_losses.model.score_model import check_time as check_time
