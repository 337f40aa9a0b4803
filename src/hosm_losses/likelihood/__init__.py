"""The likelihood of the probability-flow ODE, and the variational bound of the SDE.

- `ode`: `ode_nll` for log-densities along the ODE, and `ode_sample` for paths from noise to data.
- `variational`: `variational_nll`.
- `solvers`: the options `FixedGrid`, `ToTolerance` and `Adaptive`.
- `multistep`: the fixed grid that a batch shares, the choice of the number of steps, and the
  number of probes needed for a given standard error.
- `adaptive`: the solver with a step size for each sample.
- `paths`: the coordinates in which the paths are solved; the evaluation of the slope and the
  divergence at a node, and of the prior; checks for networks whose output is random.
- `divergence`: estimators of the divergence.
- `job`: the checked arguments of a call, its batches, and the result.
- `checkpoints`: evaluations whose activations are recomputed in the backward pass.
- `dequantize`: `Uniform`, `TruncatedNormal`, and the combination of draws into one density.
- `distribution`: `ODEDistribution`.
- `result`: `NLLResult`, `SampleResult`, and `NLLSummary`, which holds means over samples.
"""

from hosm_losses.likelihood.dequantize import TruncatedNormal as TruncatedNormal
from hosm_losses.likelihood.dequantize import Uniform as Uniform
from hosm_losses.likelihood.distribution import ODEDistribution as ODEDistribution
from hosm_losses.likelihood.divergence import Divergence as Divergence
from hosm_losses.likelihood.divergence import DivergenceEstimator as DivergenceEstimator
from hosm_losses.likelihood.divergence import DivergenceFunction as DivergenceFunction
from hosm_losses.likelihood.ode import ode_nll as ode_nll
from hosm_losses.likelihood.ode import ode_sample as ode_sample
from hosm_losses.likelihood.result import NLLResult as NLLResult
from hosm_losses.likelihood.result import NLLSummary as NLLSummary
from hosm_losses.likelihood.result import SampleResult as SampleResult
from hosm_losses.likelihood.solvers import Adaptive as Adaptive
from hosm_losses.likelihood.solvers import FixedGrid as FixedGrid
from hosm_losses.likelihood.solvers import ToTolerance as ToTolerance
from hosm_losses.likelihood.variational import variational_nll as variational_nll
from hosm_losses.likelihood.weights import Expectation as Expectation
from hosm_losses.likelihood.weights import Sandwich as Sandwich
from hosm_losses.likelihood.weights import Weights as Weights
from hosm_losses.likelihood.weights import importance_weights as importance_weights
