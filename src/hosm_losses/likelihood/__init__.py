"""The likelihood of the probability-flow ODE, and the variational bound of the SDE.

- `ode`: `ode_nll`.
- `variational`: `variational_nll`.
- `inputs`: what both share: options, a batch in chunks, and samples that failed.
- `paths`: log-density along the ODE, by `multistep` on a grid or `adaptive` for each sample.
- `coordinates`: x and its drift in the coordinates in which the ODE is solved.
- `dequantize`: images of integers.
- `result`: `NLLResult` and its summary.
"""

from hosm_losses.likelihood.ode import ode_nll as ode_nll
from hosm_losses.likelihood.result import NLLResult as NLLResult
from hosm_losses.likelihood.result import NLLSummary as NLLSummary
from hosm_losses.likelihood.variational import variational_nll as variational_nll
