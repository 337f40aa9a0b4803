"""What `check_wrapping` reports: the wrapping that fits better, a table of losses, a sentence."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class WrappingCandidate:
    """A way to wrap a network; it prints as the arguments of `ScoreModel`.

    Attributes:
        schedule: the schedule, as it is written; "your schedule" for the model's own.
        prediction: the kind of prediction.
        time: the argument `time`, as it is written; "" for none, "yours" for the model's own.
        negated: whether the output has to be negated.
        units: the data to give, as a function of x0; "x0" for the data as they are.
        loss: its mean squared error of ε̂ for one element.
        own_loss: that of the model as it is wrapped, at the same noise levels.
    """

    schedule: str
    prediction: str
    time: str
    negated: bool
    units: str
    loss: float
    own_loss: float

    def __str__(self) -> str:
        """The arguments, and what to do with the output and the data."""
        text = f"{self.schedule}, prediction={self.prediction!r}"
        text += f", time={self.time}" if self.time else ""
        text += ", the output times -1" if self.negated else ""
        return text + (f", the data as {self.units}" if self.units != "x0" else "")


@dataclass(frozen=True)
class WrappingReport:
    """What `check_wrapping` found; it prints as a table and a sentence.

    Attributes:
        ok: True where no candidate fits better and the network does better than a linear one.
        best: the candidate that fits better; None where there is none.
        log_sigma_hat: the noise levels, log σ/α in the units of the data.
        losses: at each level the mean squared error of ε̂ as the model is wrapped.
        linear: that of the best linear predictor.
        best_losses: that of the candidate; NaN outside its schedule; None without one.
        worse: the number of levels at which the network is worse than linear.
        calls: of the network.
    """

    ok: bool
    best: WrappingCandidate | None
    log_sigma_hat: list[float]
    losses: list[float]
    linear: list[float]
    best_losses: list[float] | None
    worse: int
    calls: int

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The losses by noise level, then the verdict."""
        columns = {"log σ/α": self.log_sigma_hat, "yours": self.losses, "linear": self.linear}
        if self.best_losses is not None:
            columns["best"] = self.best_losses
        lines = ["".join(f"{name:>10}" for name in columns)]
        for row in zip(*columns.values(), strict=True):
            lines.append("".join(f"{number:10.3g}" for number in row))
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        if self.best is not None:
            return (
                f"fits best as {self.best}: {self.best.loss:.2g} where you have "
                f"{self.best.own_loss:.2g}"
            )
        levels = f"{self.worse} of {len(self.linear)} noise levels"
        if not self.ok:
            return f"not trained, or no candidate fits: worse than a linear predictor at {levels}"
        return f"ok: no candidate fits better; worse than a linear predictor at {levels}"
