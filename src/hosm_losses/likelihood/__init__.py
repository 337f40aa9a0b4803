"""Likelihoods under the probability-flow ODE, and the variational bound for the SDE.

- `ode`: `ode_nll`, which computes log-densities under the ODE, and `ode_sample`, which draws
  samples.
- `variational`: `variational_nll`.
- `solvers`: the solvers `FixedGrid`, `ToTolerance` and `Adaptive`, and their base class `Solver`.
- `multistep`: the solver that uses one fixed grid for the whole batch.
- `adaptive`: the solver that chooses the step sizes of each sample separately.
- `paths`: the coordinates in which the ODE is solved; evaluations of the slope, the divergence and
  the prior; and checks of the network's first evaluation.
- `divergence`: estimators of the divergence.
- `job`: code that checks a call's arguments, splits the samples into batches, and joins the
  results of the batches.
- `checkpoints`: network evaluations whose activations are recomputed in the backward pass.
- `dequantize`: `Uniform`, `TruncatedNormal`, and the function that averages the densities of
  several draws.
- `distribution`: `ODEDistribution`.
- `weights`: `importance_weights`, and the estimates that `Weights` computes.
- `result`: `NLLResult`, `SampleResult`, and `NLLSummary`, which holds means over samples;
  `ODESolution`, which a solver returns; and the causes of failures.
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
from hosm_losses.likelihood.result import ODESolution as ODESolution
from hosm_losses.likelihood.result import SampleResult as SampleResult
from hosm_losses.likelihood.solvers import Adaptive as Adaptive
from hosm_losses.likelihood.solvers import FixedGrid as FixedGrid
from hosm_losses.likelihood.solvers import Solver as Solver
from hosm_losses.likelihood.solvers import ToTolerance as ToTolerance
from hosm_losses.likelihood.variational import variational_nll as variational_nll
from hosm_losses.likelihood.weights import Expectation as Expectation
from hosm_losses.likelihood.weights import Sandwich as Sandwich
from hosm_losses.likelihood.weights import Weights as Weights
from hosm_losses.likelihood.weights import importance_weights as importance_weights
