"""The likelihood of the probability-flow ODE, and the variational bound of the SDE.

- `ode`: `ode_nll`, the log-density along the ODE, and the choice of a solver.
- `sample`: `ode_sample`, the same paths from noise to data.
- `multistep`: method "fixed", a grid that the batch shares, of steps that are given or found.
- `adaptive`: method "adaptive", steps of each sample's own.
- `variational`: `variational_nll`.
- `inputs`: what they share: options, a batch in chunks, integers, and samples that failed.
- `paths`: the paths of a batch, the coordinates they are solved in, and the divergence.
- `result`: `NLLResult`.
- `summary`: `NLLSummary`, the means over its samples.
"""

from hosm_losses.likelihood.ode import ode_nll as ode_nll
from hosm_losses.likelihood.result import NLLResult as NLLResult
from hosm_losses.likelihood.sample import SampleResult as SampleResult
from hosm_losses.likelihood.sample import ode_sample as ode_sample
from hosm_losses.likelihood.summary import NLLSummary as NLLSummary
from hosm_losses.likelihood.variational import variational_nll as variational_nll
