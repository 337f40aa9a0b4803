"""What each term of a loss does to the gradient of a network: its size, and its noise.

Formula, with g_i the parameter gradient of one term, times its weight, in the draw i of N:
    gradient = √max(0, ‖ḡ‖² − s²/N), without the bias of the norm of a mean
    noise = s, s² = Σ‖g_i − ḡ‖²/(N − 1), the standard deviation of the gradient of one batch

    A draw takes new times, noise and probes for the same data, which all terms share.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from hosm_losses._checks import check_flag, check_generator, check_sample_batch, check_whole
from hosm_losses._progress import progress_bar
from hosm_losses._torch_internals import normal, outside_inference_mode
from hosm_losses.derivatives import Snapshot, gradients
from hosm_losses.losses.objective import evaluate
from hosm_losses.losses.options import (
    LossOptions,
    PartsOptions,
    TermsOptions,
    Weights,
    check_weights,
    counts,
    refuse_unknown,
    spelled_out,
)
from hosm_losses.losses.terms import DSMTerms
from hosm_losses.losses.weighting import TimeSampler, Weighting
from hosm_losses.model import ScoreModel, check_model

IDLE = 0.01  # a share of the first term's gradient, below which a term does next to nothing
DROWNED = 10  # times the first term's noise, above which a term drowns it


@dataclass(frozen=True)
class TermReport:
    """What one term does.

    Attributes:
        weight: its weight.
        value: the mean of the term times its weight.
        gradient: the norm of the mean of its gradient, times the weight.
        noise: the standard deviation of that gradient from batch to batch.
        share: its gradient over that of the first term.
    """

    weight: float
    value: float
    gradient: float
    noise: float
    share: float


@dataclass(frozen=True)
class LossReport:
    """The terms of a loss by name, of which `print` makes a table.

    Attributes:
        terms: what each term does, for those whose weight is not 0.
        batch: the number of samples of a batch, to which `noise` belongs.
        draws: the number of draws it was measured with.
    """

    terms: dict[str, TermReport]
    batch: int
    draws: int

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A row for each term, and a line for each that does next to nothing."""
        lines = [f"{'':8}{'weight':>10}{'value':>12}{'gradient':>12}{'noise':>12}{'share':>10}"]
        for name, term in self.terms.items():
            numbers = f"{term.value:12.4g}{term.gradient:12.4g}{term.noise:12.4g}"
            lines.append(f"{name:8}{term.weight:10.4g}{numbers}{term.share:10.2g}")
        lines.append(f"Noise of a batch of {self.batch}, over {self.draws} draws.")
        lines += [f"{name}: {told}" for name in self.terms if (told := self._judged(name))]
        return "\n".join(lines)

    def _judged(self, name: str) -> str | None:
        """What should be said of a term."""
        term, first = self.terms[name], self.terms.get("first")
        if term.gradient == term.noise == 0:
            return "it has no gradient, as the third of a network that is linear in x."
        if term.gradient == 0:
            return "its gradient cannot be told from its noise. Take more draws or a larger batch."
        if term.share < IDLE:
            equal = term.weight / term.share
            return (
                f"its gradient is {term.share:.1g} of the first term's, so it does next to "
                f"nothing. They are equal at a weight of about {equal:.1g}."
            )
        if first is not None and term.noise > DROWNED * first.noise:
            return (
                f"its noise is {term.noise / first.noise:.0f} times the first term's. Take "
                "estimator='paired', or a smaller weight."
            )
        return None


class ReportOptions(TermsOptions, PartsOptions, total=False):
    """Options of `loss_report`."""

    weights: Weights | None
    weighting: Weighting
    time_sampler: TimeSampler
    model_kwargs: Mapping[str, Any] | None


@spelled_out
def loss_report(
    model: ScoreModel,
    x0: Tensor,
    *,
    order: int = 3,
    draws: int = 16,
    generator: torch.Generator | None = None,
    progress: bool = False,
    **options: Unpack[ReportOptions],
) -> LossReport:
    """Measure how large and how noisy the gradient of each term of a loss is, on a network.

    Nothing is trained, and no .grad is written. The global generator is left as it was.

    Args:
        model: the score model.
        x0: data (B, *).
        order: 1, 2 or 3. Options of a higher order are not used.
        draws: N, 2 or more. The cost is that of as many steps for each term.
        generator: the source of randomness, on the device of x0; a new one of seed 0 if None.
        progress: whether a progress bar is shown.
        **options: those shown, as in `third_order_dsm`, which also says what is raised.

    Returns:
        The report.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> class Network(torch.nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> model = ScoreModel(Network(2, 2), VPSchedule())
        >>> report = loss_report(model, torch.randn(8, 2), draws=4)
        >>> list(report.terms)
        ['first', 'second', 'trace', 'third']
    """
    refuse_unknown("loss_report", ReportOptions, options)
    given: dict[str, Any] = dict(options)
    weights, kwargs = given.pop("weights", None), given.pop("model_kwargs", None)
    chosen = LossOptions(order=order, **given)
    checked = check_weights(weights, chosen.order)
    count = check_whole("draws", draws, 2)
    check_flag("progress", progress)
    data = normal(check_sample_batch("x0", x0))
    source = check_generator(generator, data.device)
    if source is None:
        source = torch.Generator(data.device).manual_seed(0)
    parameters = [each for each in check_model(model).parameters() if each.requires_grad]
    if not parameters:
        raise ValueError("model: expected one with parameters that require a gradient; got none.")
    # The weights that keep one term alone, for every term that counts.
    alone = {
        name: [weight if each == place else 0.0 for each in range(len(checked))]
        for place, (name, weight) in enumerate(zip(DSMTerms._fields, checked, strict=False))
        if counts(weight) and place <= chosen.order
    }
    before = Snapshot(model.network, data)
    bar = progress_bar(progress, count * len(alone), "gradient")
    try:
        with outside_inference_mode(), torch.enable_grad(), bar as done:
            totals = {name: _Totals(parameters) for name in alone}
            for _ in range(count):
                state = source.get_state()
                for name, total in totals.items():
                    source.set_state(state)
                    inputs: dict[str, Any] = {"weights": alone[name], "generator": source}
                    total.add(evaluate(model, data, chosen, **inputs, model_kwargs=kwargs).loss)
                    done(1)
    finally:
        before.restore()
    first = totals["first"].gradient() if "first" in totals else math.nan
    found = {
        name: TermReport(
            weight=sum(
                float(torch.as_tensor(each, device="cpu").detach()) for each in alone[name]
            ),
            value=total.value / count,
            gradient=total.gradient(),
            noise=total.variance() ** 0.5,
            share=total.gradient() / first if first else math.nan,
        )
        for name, total in totals.items()
    }
    return LossReport(found, len(data), count)


class _Totals:
    """Sums of values, gradients and their squared norms over draws."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters, self.count, self.value, self.squares = parameters, 0, 0.0, 0.0
        self.sums = [torch.zeros_like(each, dtype=torch.float64) for each in parameters]

    def add(self, loss: Tensor) -> None:
        self.count += 1
        self.value += float(loss.detach())
        found = gradients(loss, self.parameters)
        for total, gradient in zip(self.sums, found, strict=True):
            wide = gradient.double()
            total += wide
            self.squares += float(wide.square().sum())

    def _square(self) -> float:
        """‖ḡ‖² with the bias of a mean."""
        return sum(float(total.square().sum()) for total in self.sums) / self.count**2

    def variance(self) -> float:
        return max(0.0, self.squares - self.count * self._square()) / (self.count - 1)

    def gradient(self) -> float:
        return max(0.0, self._square() - self.variance() / self.count) ** 0.5
