"""The likelihood of a data set, as numbers on the host: what `NLLResult.summary` returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NLLSummary:
    """The likelihood of a data set, as numbers on the host; it prints as a sentence.

    `nll` in nats, `solver_error`, `bits_per_dim` and `nfe` are means over `samples` samples. The
    `failed` ones, those with NaN for their nll included, are left out. `standard_error` is that of
    the mean nll as an estimate for the data's distribution, probes included, and
    `bits_standard_error` is the same in bits per dimension; both are None for a single sample.
    `estimator_error` is the part of it that comes from the random probes; None where unknown. Bits
    are printed where the data are `discrete`.
    """

    samples: int
    failed: int
    nll: float
    standard_error: float | None
    estimator_error: float | None
    solver_error: float
    bits_per_dim: float
    bits_standard_error: float | None
    nfe: float
    discrete: bool = False

    def __str__(self) -> str:
        bits, nats = f"{self.bits_per_dim:.4f}", f"{self.nll:.3f}"
        if self.standard_error is not None:
            bits += f" ± {self.bits_standard_error:.4f}"
            nats += f" ± {self.standard_error:.3f}"
        shown = f"{bits} bits/dim, " if self.discrete else ""
        shown += f"{nats} nats over {self.samples} sample{'s' * (self.samples > 1)}"
        if self.estimator_error is not None:
            shown += f"; of which {self.estimator_error:.3f} nats from the probes"
        shown += f"; solver error about {self.solver_error:.2g} nats, {self.nfe:.0f} evaluations"
        return shown + (f"; failed and left out: {self.failed}" if self.failed else "")
