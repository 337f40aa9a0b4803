r"""`ScoreModel` combines a network with its noise schedule and predicts the noise.

Purpose:
    Predictions of every kind are converted to ε̂(x, t), an estimate of the noise ε in
    x = α x₀ + σ ε. Outside this module, only the ODE solver (to choose its grid and order) and
    `check_wrapping` depend on the kind of prediction.

Formula:
    epsilon            ε̂ = network
    score              ε̂ = −σ s
    x0                 ε̂ = (x − α x̂₀)/σ              for example, an EDM denoiser (EDMSchedule)
    v                  ε̂ = (α v + σ x)/(α² + σ²)     v = α ε − σ x₀
    velocity           ε̂ = (α u − α′ x)/(α σ′ − α′ σ)        u = α′ x₀ + σ′ ε

    If the network's target is a x₀ + b ε, let w = α b − σ a. Then ε̂ = p · prediction + q x with
    p = α/w and q = −a/w. The formula for x̂₀ is the same, but with p = −σ/w and q = b/w.

    For "x0", ε̂ is a difference divided by σ, so ε̂ and its derivatives lose significant digits
    as σ → 0.

Source:
    v is from Salimans and Ho, arXiv 2202.00512; u is from Lipman et al., arXiv 2210.02747.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from traceback import walk_tb
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hosm_losses._checks import (
    can_read_values,
    check_choice,
    check_like,
    check_prediction,
    check_range,
    error_message,
    expand_right,
    shown,
    warn,
)
from hosm_losses._torch_internals import in_functorch
from hosm_losses.model.adapters import Wrapper
from hosm_losses.model.conditions import unmark
from hosm_losses.schedules import Schedule, check_schedule
from hosm_losses.taylor import Jet, transformable

Kind = Literal["epsilon", "score", "x0", "v", "velocity"]
Prediction = Kind | Literal["sample", "denoiser", "v_prediction", "flow_prediction"]
"""The predicted quantity; the last four names are synonyms, three of them from diffusers."""
Affine = tuple[Tensor | None, Tensor | None]  # (p, q); None means p = 1 or q = 0
Coefficient = float | Tensor
Rates = Callable[[], tuple[Tensor, Tensor]]


class Target(NamedTuple):
    """A kind of prediction, whose target is a x₀ + b ε."""

    # α, σ and a function that returns their rates α′ and σ′ → (a, b)
    coefficients: Callable[[Tensor, Tensor, Rates], tuple[Coefficient, Coefficient]]
    synonyms: tuple[str, ...] = ()


TARGETS = {
    "epsilon": Target(lambda *_: (0.0, 1.0)),
    "score": Target(lambda _, sigma, __: (0.0, -1 / sigma)),
    "x0": Target(lambda *_: (1.0, 0.0), ("sample", "denoiser")),
    "v": Target(lambda alpha, sigma, _: (-sigma, alpha), ("v_prediction",)),
    "velocity": Target(lambda _, __, rates: rates(), ("flow_prediction",)),
}
NAMES = {name: kind for kind, row in TARGETS.items() for name in (kind, *row.synonyms)}
UNSHARD = (
    "If the network is wrapped in fully_shard, its parameters are sharded between steps: call "
    "unshard() on the sharded loss module in every process before this call, and reshard() after."
)
CALLED = (
    "The network was called as network(x, t{}); other arguments belong in model_kwargs. If its "
    "signature differs, set ScoreModel(..., call=lambda network, x, t, **kwargs: network(x)), for "
    "example; set time= if it uses another time, and output= if it returns more than the "
    "prediction."
)


class ScoreModel(Wrapper):
    """A network, its noise schedule and the quantity that the network predicts.

    A network that is an nn.Module is registered as the submodule `network`. Unless `time`,
    `output` or `call` is also an nn.Module, the model has no parameters or buffers besides the
    network's, and its state_dict is the network's with "network." prepended to every key.

    Args:
        network: an nn.Module or any other callable, called as `network(x, t, **kwargs)` with x of
            shape (B, *) and t of shape (B,). If the network is a function that calls a module, the
            module is not part of the model: `train()`, `eval()`, `to()` and `parameters()` do not
            reach the module, and copy.deepcopy(model) raises TypeError.
        schedule: the noise schedule with which the network was trained.
        prediction: what the network predicts: "epsilon", "score", "x0" (also "sample" or
            "denoiser"), "v" (α ε − σ x₀; also "v_prediction") or "velocity" (α′ x₀ + σ′ ε, from
            data to noise; also "flow_prediction"). Synonyms are replaced by the main name: with
            "sample", the model's `prediction` is "x0".
        time: converts t to the network's time: a factor by which t is multiplied, or a callable
            that is applied to t. If None, the network receives t itself.
        output: a callable that selects the prediction from the network's output, for example
            `operator.attrgetter("sample")`. If None, the output is the prediction.
        call: a callable, called as `call(network, x, time, **kwargs)`, that evaluates a network
            with a different signature. If None, the network is called as
            `network(x, time, **kwargs)`.
        primitives: whether the safe primitives may replace PyTorch's operators when the network
            is differentiated, as in the losses of orders two and three.

    Raises:
        TypeError: if the schedule is not a `Schedule`, if its methods do not return tensors with
            the shape, dtype and device of t, or if `prediction` is not a string.
        ValueError: if `prediction` is not a known name, or if the schedule's σ/α is not finite or
            does not grow with t.

    Example:
        >>> from hosm_losses import VPSchedule
        >>> model = ScoreModel(lambda x, t: x, VPSchedule())
        >>> model.noise(torch.ones(2, 3), torch.tensor([0.1, 0.5])).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: Schedule,
        prediction: Prediction = "epsilon",
        *,
        time: float | Callable[[Tensor], Tensor] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        call: Callable[..., Any] | None = None,
        primitives: bool = True,
    ) -> None:
        super().__init__()
        check_schedule(schedule)
        check_choice("prediction", prediction, [*NAMES])
        self.network = network
        self.schedule, self.prediction = schedule, NAMES[prediction]
        self.time, self.output, self.call = time, output, call
        self.primitives = primitives

    def extra_repr(self) -> str:
        """Return the constructor's arguments for printing, omitting modules and most defaults."""
        parts = [f"schedule={self.schedule!r}", f"prediction={self.prediction!r}"]
        for name in ("network", "time", "output", "call"):
            if (value := vars(self).get(name)) is not None:
                parts.append(f"{name}={shown(value)}")
        return ", ".join(parts + ["primitives=False"] * (not self.primitives))

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return the predicted noise ε̂(x, t), as `noise` does."""
        return self.noise(x, t, **kwargs)

    def noise(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return ε̂(x, t), the predicted noise.

        Args:
            x: the noised batch (B, *).
            t: the times (B,) of x, in the schedule's units.
            kwargs: keyword arguments that are passed to the network.

        Returns:
            ε̂, with the shape of x.

        Raises:
            TypeError: if the network does not return a real tensor, or if t contains integers and
                the schedule is not a table.
            ValueError: if the network's output differs in shape from x, or if t is out of range.
        """
        self._check_times(t)
        return apply_affine(self.predict(x, t, **kwargs), x, *self.affine(t, x))

    def _check_times(self, t: Tensor) -> None:
        if not (t.is_floating_point() or self.schedule.integer_time):
            expected = "floating-point times, since only a DiscreteSchedule takes indices"
            raise TypeError(error_message("t", expected, t))
        check_range("t", t, self.schedule.t_min, self.schedule.t_max)

    def affine(self, t: Tensor, like: Tensor) -> Affine:
        """Return (p, q) such that ε̂ = p · prediction + q x, shaped to broadcast to `like`.

        A p of None means 1, and a q of None means 0.
        """
        if self.prediction == "epsilon":
            return None, None
        alpha, sigma, a, b = self._target(t, like)
        if self.prediction == "score":
            return -sigma, None
        wronskian = alpha * b - sigma * a
        return alpha / wronskian, -a / wronskian

    def affine_of_data(self, t: Tensor, like: Tensor) -> Affine:
        """Return (p, q) such that x̂₀ = p · prediction + q x, shaped to broadcast to `like`.

        A p of None means 1, and a q of None means 0.
        """
        if self.prediction == "x0":
            return None, None
        alpha, sigma, a, b = self._target(t, like)
        wronskian = alpha * b - sigma * a
        return -sigma / wronskian, b / wronskian

    def noise_without_x(self, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """Return ε − q x at x = α x₀ + σ ε; this difference is p times the network's target."""
        if self.prediction in ("epsilon", "score"):
            return noise
        alpha, sigma, a, b = self._target(t, x0)
        return alpha / (alpha * b - sigma * a) * (a * x0 + b * noise)

    def _target(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Coefficient, Coefficient]:
        """Return α, σ, a and b for the target a x₀ + b ε, shaped to broadcast to `like`."""

        def expanded(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return expand_right(pair[0], like), expand_right(pair[1], like)

        def rates() -> tuple[Tensor, Tensor]:
            return expanded(self.schedule.rates(self.time_in(t, like)))

        alpha, sigma = expanded(self.coefficients(t, like))
        return alpha, sigma, *TARGETS[self.prediction].coefficients(alpha, sigma, rates)

    def native_weight(self, t: Tensor, like: Tensor) -> Tensor:
        """Return the ratio (B,) of the prediction's squared error to the squared error of ε̂."""
        p, _ = self.affine(t, like)
        return torch.ones_like(self.time_in(t, like)) if p is None else 1 / p.flatten().square()

    def score(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return s(x, t) = −ε̂/σ, the estimate of ∇ log q_t(x)."""
        return -self.noise(x, t, **kwargs) / expand_right(self.coefficients(t, x)[1], x)

    def denoise(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return x̂₀(x, t) = (x − σ ε̂)/α, the estimated mean of the data given x."""
        self._check_times(t)
        return apply_affine(self.predict(x, t, **kwargs), x, *self.affine_of_data(t, x))

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ at t, each (B,), in the dtype of t or in float32, whichever is wider.

        If t contains integers, the dtype of `like` is used instead of the dtype of t.
        """
        return self.schedule(self.time_in(t, like))

    def time_in(self, t: Tensor, like: Tensor) -> Tensor:
        """Return t in a floating-point dtype, as the schedule requires.

        Integer indices are converted to the dtype of `like` or to float32, whichever is wider.
        """
        return t if t.is_floating_point() else t.to(torch.promote_types(like.dtype, torch.float32))

    def predict(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return the network's prediction, with the shape of x."""
        x, network_time, kwargs = self.network_arguments(x, t, kwargs)
        call = self.network if self.call is None else partial(self.call, self.network)
        if torch.compiler.is_compiling():  # it cannot resume after a graph break in `try`
            returned = call(x, network_time, **kwargs)
        else:
            try:
                with transformable(x) if self.primitives and in_functorch() else nullcontext():
                    returned = call(x, network_time, **kwargs)
            except (RuntimeError, IndexError) as error:
                if note := self._note(x.dtype, network_time.dtype, error):
                    error.add_note(note)
                raise
            except TypeError as error:
                if self.call is None and _raised_by_the_call(error):
                    error.add_note(CALLED.format("".join(f", {name}=..." for name in kwargs)))
                raise
        predicted = returned if self.output is None else self.output(returned)
        check_prediction(predicted, x)
        return predicted

    def network_arguments(
        self, x: Tensor, t: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return x, the times and the keyword arguments as they are passed to the network."""
        # Copies, because a network may write to its arguments. A Jet is created for this call
        # only.
        x, network_time = x if isinstance(x, Jet) else x.clone(), t.clone()
        if callable(self.time):
            network_time = self.time(network_time)
        elif self.time is not None:
            network_time = network_time * self.time
        return x, network_time, unmark(kwargs) if kwargs else kwargs

    def _note(self, of_x: torch.dtype, of_t: torch.dtype, error: Exception) -> str | None:
        """Return a note if wrong dtypes or sharded parameters may have caused the error."""
        if "DTensor" in str(error):
            return UNSHARD
        dtypes = (p.dtype for p in self.parameters() if p.is_floating_point())
        own = next(dtypes, of_x)
        called = f"It was called with x in {of_x} and t in {of_t}; its parameters are in {own}."
        if own != of_x:
            return f"{called} Convert the data with .to({own}), or the network with .to({of_x})."
        if self.schedule.integer_time and of_t.is_floating_point:
            return (
                f"{called} t may lie between the indices of the table: if the network looks up t, "
                "set ScoreModel(..., time=lambda t: t.round().long()), or let the network "
                "interpolate."
            )
        if of_t.is_floating_point and of_t != of_x:
            return f"{called} Convert t with ScoreModel(..., time=lambda t: t.to({of_x}))."
        return None


def _raised_by_the_call(error: TypeError) -> bool:
    """Return whether the TypeError was raised before any code of the network ran."""
    behind = error.__traceback__ and error.__traceback__.tb_next
    names = {frame.f_globals.get("__name__") for frame, _ in walk_tb(behind)}
    return names <= {nn.Module.__module__}


def apply_affine(part: Tensor, of_x: Tensor | None, p: Tensor | None, q: Tensor | None) -> Tensor:
    """Return p · part + q x for (p, q) from `ScoreModel.affine` or `affine_of_data`.

    A p of None means 1; a q or an x of None means 0.
    """
    scaled = part if p is None else p * part
    return scaled if q is None or of_x is None else scaled + q * of_x


def check_model(value: object) -> ScoreModel:
    """Return `value` if it is a ScoreModel; otherwise, raise TypeError."""
    if not isinstance(value, ScoreModel):
        remedy = "Wrap your network: ScoreModel(network, VPSchedule(), prediction='epsilon')."
        if isinstance(value, AveragedModel):
            remedy = "Pass its .module, the copy of your ScoreModel."
        raise TypeError(error_message("model", "a ScoreModel", value, remedy))
    return value


def check_time(model: ScoreModel, x0: Tensor, t: object) -> Tensor:
    """Return t (B,) after checking that its times, or its indices into the table, are in range."""
    schedule = model.schedule
    dtype = torch.promote_types(x0.dtype, torch.float32)
    if schedule.integer_time and isinstance(t, Tensor) and not t.is_floating_point():
        dtype = torch.int64 if t.dtype == torch.bool else t.dtype
    time = check_like("t", t, (len(x0),), dtype, x0.device, "the batch dimension of x0")
    check_range("t", time, schedule.t_min, schedule.t_max)
    fractions = schedule.integer_time and time.is_floating_point() and schedule.t_max > 1
    if (
        fractions
        and can_read_values(time)
        and bool((time <= 1).all() & (time != time.round()).any())
    ):
        warn(
            f"t: expected indices from 0 to {schedule.t_max:g}, the last of the table; got only "
            "fractions of the first step. Multiply times in [0, 1] by the last index."
        )
    return time
