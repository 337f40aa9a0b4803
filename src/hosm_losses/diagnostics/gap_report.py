"""What `likelihood_gap` reports: curves by noise level and numbers, as a table, a plot or JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class GapEstimate:
    """A mean over samples, with its standard error.

    Attributes:
        value: the mean.
        error: its standard error; NaN for a single sample.
        samples: how many there were. A sample whose path failed is not among them.
    """

    value: float
    error: float
    samples: int


@dataclass(frozen=True)
class GapReport:
    """What `likelihood_gap` found; it prints as a table, and draws itself.

    Attributes:
        log_sigma_hat: the nodes u.
        curves: by name, an estimate at every node; None for what could not be had.
        numbers: by name, in nats; None for what could not be had.
        missing: why, for each of those.
        evaluations: of the network, for each sample.
        samples: the number of samples that were given.
    """

    log_sigma_hat: list[float]
    curves: dict[str, list[GapEstimate] | None]
    numbers: dict[str, GapEstimate | None]
    missing: dict[str, str] = field(default_factory=dict)
    evaluations: int = 0
    samples: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists and numbers, for JSON."""
        return asdict(self)

    def plot(self, axes: Any) -> None:
        """Draw every curve against log σ̂ on axes of matplotlib, with its standard errors."""
        for name, curve in self.curves.items():
            if curve is not None:
                means, errors = zip(*((each.value, each.error) for each in curve), strict=True)
                axes.errorbar(self.log_sigma_hat, means, errors, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("log σ̂")
        axes.legend()

    def __str__(self) -> str:
        """The curves at the nodes, then the numbers, and what is missing."""
        curves = {name: curve for name, curve in self.curves.items() if curve is not None}
        lines = ["".join(f"{name:>12}" for name in ("log σ̂", *curves))] if curves else []
        for row, level in enumerate(self.log_sigma_hat if curves else ()):
            cells = "".join(f"{curve[row].value:12.4g}" for curve in curves.values())
            lines.append(f"{level:12.3f}{cells}")
        for name, number in self.numbers.items():
            if number is not None:
                told = f"{name}: {number.value:.4f} ± {number.error:.4f} nats"
                left = self.samples - number.samples
                lines.append(told + (f"; failed and left out: {left}" if left else ""))
        lines += [f"{name}: {why}" for name, why in self.missing.items()]
        return "\n".join(lines)
