r"""The field f(x) = −ε̂(x, t) with t and the conditions bound, and its derivatives.

Formula:
    Every prediction is affine in what the network returns and x, ε̂ = p · prediction + q x, so
    D_f = −(p D + q w), G_f = −p G and C_f = −p C, with D, G and C of the network alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hosm_losses._checks import (
    DerivativeError,
    check_like,
    check_prediction,
    complaint,
    over_elements,
)
from hosm_losses._torch_internals import COMPILED_PART, normal
from hosm_losses.derivatives import (
    Derivatives,
    Products,
    derive,
    derive_with_products,
    quadratic_forms,
)
from hosm_losses.model.conditions import bind, map_tensors, per_sample, rows_note
from hosm_losses.model.score_model import ScoreModel, apply_affine
from hosm_losses.taylor import GIVE_THE_SOURCE, Jet, safe_primitives


@dataclass(frozen=True, eq=False)  # torch.compile of PyTorch 2.6 hashes it before it is made
class NoiseField:
    """f(x) = −ε̂(x, t): a score model with its conditions bound to a batch, at times t.

    Engines differentiate `network()`, its part that is the network alone, so that the part of x in
    f cannot hide that a network has lost its own graph.

    Attributes:
        model: the score model.
        kwargs: the network's keyword arguments, bound to the batch: see `conditions`.
        primitives: whether the safe primitives are put in.
        batch: the number of samples in the batch that the arguments were bound to.
        t: the times (B,); None until `at` gives them.
        value_only: whether it is for its value alone, which is not differentiated in x.
        without_qx: whether values are those of f + q x; derivatives are those of f.
        network_only: whether it is what the network predicts.
        one_sample: whether it is one sample on the CPU, of which a first derivative may be wrong.
    """

    model: ScoreModel
    kwargs: dict[str, Any]
    primitives: bool
    batch: int
    t: Any = None
    value_only: bool = False
    without_qx: bool = False
    network_only: bool = False
    one_sample: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate f, or the network, at x (B, *)."""
        if not self.network_only:
            return self._of_value(self.network()(x), x, *self.model.affine(self.t, x))
        if torch.compiler.is_compiling():
            return self._predicted(x)
        try:
            return self._predicted(x)
        except Exception as error:
            if len(x) != self.batch:
                error.add_note(rows_note(self.kwargs, len(x), self.batch))
            raise

    def _predicted(self, x: Tensor) -> Tensor:
        # At order one the network is given what it was given by the trainer, once.
        if not self.kwargs or (self.value_only and len(x) == self.batch):
            return self._with_primitives(x, self.kwargs)
        # Its own copies, shared ones too: it may write to them, and is called several times.
        return self._with_primitives(x, map_tensors(self.kwargs, Tensor.clone))

    def _with_primitives(self, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        # A Jet has rules of its own, and what is not differentiated in x needs no primitives.
        needed = self.primitives and not (self.value_only or isinstance(x, Jet))
        with safe_primitives(needed or self.one_sample, of_one_sample=not needed):
            return self.model.predict(x, self.t, **kwargs)

    def _of_value(self, value: Tensor, x: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
        return -apply_affine(value, None if self.without_qx else x, p, q)

    @property
    def owner(self) -> object:
        """The network."""
        return self.model.network

    @property
    def native(self) -> "NoiseField":
        """The network with PyTorch's operators, whose values and first derivatives are right."""
        return self._copy(primitives=False, network_only=True, one_sample=False)

    def _copy(self, **changed: Any) -> "NoiseField":
        # Not by dataclasses.replace, which torch.compile of 2.6 does not follow.
        return NoiseField(*(changed.get(name, getattr(self, name)) for name in FIELDS))

    def network(self) -> "NoiseField":
        """Return the field of what the network predicts."""
        return self._copy(network_only=True)

    def for_value(self) -> "NoiseField":
        """Return the field for its value alone."""
        return self._copy(value_only=True)

    def drop_qx(self) -> "NoiseField":
        """Return the field whose values leave q x out, which cancels in a residual."""
        return self._copy(without_qx=True)

    def at(self, t: Tensor) -> "NoiseField":
        """Return the field at other times (B,)."""
        return self._copy(t=normal(t))

    def rows(self, index: Tensor | slice) -> "NoiseField":
        """Return the field of the samples at `index`."""
        kwargs = _select(self.kwargs, lambda tensor: tensor[index])
        return self._copy(kwargs=kwargs, t=None if self.t is None else normal(self.t[index]))

    def repeat(self, count: int) -> "NoiseField":
        """Return the field of `count` copies of the batch, one after the other."""

        def copies(tensor: Tensor) -> Tensor:
            return tensor.repeat(count, *(1,) * (tensor.ndim - 1))

        return self._copy(t=copies(self.t), kwargs=_select(self.kwargs, copies))

    def derive(self, x: Tensor, direction: Tensor, **options: Any) -> Derivatives:
        """f, D and G or C at x along directions (K, B, *); options as in `derivatives.derive`."""
        return self._of_field(derive(self.network(), x, direction, **options), x, direction)

    def derive_with_products(
        self,
        x: Tensor,
        direction: Tensor,
        cotangent: Callable[[Tensor], Tensor],
        **options: Any,
    ) -> Products:
        """The same with (∂f/∂x)ᵀ c, and if it is pushed ∂f/∂x c; c = cotangent(f), held fixed."""
        p, q = self.model.affine(self.t, x)

        def of_network(value: Tensor) -> Tensor:
            return cotangent(self._of_value(value, x, p, q)).to(value.dtype)

        derived, c, pulled, pushed = derive_with_products(
            self.network(), x, direction, of_network, **options
        )
        return Products(
            self._of_field(derived, x, direction),
            c,
            -apply_affine(pulled, c, p, q),
            None if pushed is None else -apply_affine(pushed, c, p, q),
        )

    def _of_field(self, derived: Derivatives, x: Tensor, direction: Tensor) -> Derivatives:
        """The derivatives of f, from those of the network."""
        value, directional, third = derived
        p, q = self.model.affine(self.t, x)
        return Derivatives(
            self._of_value(value, x, p, q),
            -apply_affine(directional, direction, p, q),
            None if third is None else -apply_affine(third, None, p, q),
        )

    def quadratic_forms(self, x: Tensor, directions: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """f at x and wᵀ ∂f/∂x w for chunks (k, B, *) of directions, the forms (K, B)."""
        p, q = self.model.affine(self.t, x)
        squares: list[Tensor] = []

        def watched() -> Iterator[Tensor]:
            for w in directions:
                if q is not None:
                    squares.append(over_elements(w.square()))
                yield w

        # PyTorch's first gradient of instance norm is wrong for one sample in channels_last.
        one = self.model.primitives and len(x) == 1 and x.device.type == "cpu"
        field = self.network()._copy(one_sample=one)
        value, forms = quadratic_forms(field, x, watched())
        of_x = torch.cat(squares) if squares else None
        return -apply_affine(value, x, p, q), -apply_affine(forms, of_x, *_by_sample(p, q))

    def forms_along(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """The same in one evaluation with its derivatives, (K, B, *) at once; no activation stays.

        A DerivativeError where the taylor engine cannot take the network.
        """
        # The engine makes a graph whatever the mode; it holds nothing here unless one is wanted.
        empty = saved_tensors_hooks(lambda _: None, _refuse_a_pass_back)
        try:
            with nullcontext() if torch.is_grad_enabled() else empty:
                value, along, _ = self.derive(x, directions, order=2, engine="taylor")
        except DerivativeError as error:
            raise DerivativeError(
                f"divergence: expected mode='reverse' for this network; got 'forward'. {error}"
            ) from error
        return value[0], over_elements(along * directions)

    def with_divergence_of(self, function: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
        """f at x and ∇·f, (1, B), by a function that gives both of the prediction."""
        arguments = self.model.network_arguments(x, self.t, self.kwargs)
        found = function(*arguments[:2], **arguments[2])
        if not isinstance(found, tuple) or len(found) != 2:
            expected = "two tensors, the prediction (B, *) and its divergence (B,)"
            raise TypeError(complaint("divergence(x, t)", expected, found))
        prediction, divergence = found
        check_prediction(prediction, x)
        dtype = getattr(divergence, "dtype", x.dtype)
        check_like("divergence(x, t)[1]", divergence, (len(x),), dtype, x.device, "x")
        p, q = self.model.affine(self.t, x)
        elements = torch.full_like(divergence, x[0].numel())
        divergence = apply_affine(divergence, elements, *_by_sample(p, q))
        return -apply_affine(prediction, x, p, q), -divergence[None]


FIELDS = [each.name for each in fields(NoiseField)]


def _by_sample(*coefficients: Tensor | None) -> list[Tensor | None]:
    """Coefficients (B, 1, …) of a batch as (B,), for numbers of its samples; None stays."""
    return [None if each is None else each.flatten() for each in coefficients]


def _refuse_a_pass_back(_: object) -> Tensor:
    raise DerivativeError("It takes a gradient itself.")


def _select(kwargs: dict[str, Any], select: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Apply a function to the conditions that belong to the samples."""
    return per_sample(kwargs, lambda _, tensor: select(tensor)) if kwargs else kwargs


def condition(
    model: ScoreModel,
    batch: int,
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    primitives: bool | None = None,
) -> NoiseField:
    """Bind keyword arguments of the network to a batch; the model's own `primitives` if None."""
    kwargs = map_tensors(bind(model_kwargs, batch), normal) if model_kwargs else {}
    safe = model.primitives if primitives is None else primitives
    return NoiseField(model, kwargs, safe, batch)


def noise_field(
    model: ScoreModel, t: Tensor, model_kwargs: Mapping[str, Any] | None = None
) -> NoiseField:
    """f(x) = −ε̂(x, t) at times (B,) and conditions, to be differentiated in x."""
    return condition(model, len(t), model_kwargs).at(t)


SCRIPTED = "ScriptModule"  # of torch.jit, traced or scripted
# Names of classes, for which nothing of torch.distributed is imported.
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"}
WRAPPERS |= {"OptimizedModule", SCRIPTED}
WRAP_THE_LOSS = (
    "Wrap the loss module as a whole, with DistributedDataParallel, fully_shard or torch.compile "
    "around ThirdOrderDSM(ScoreModel(network, schedule)), and give it the network inside, such as "
    "model.module."
)


def refuse_wrapped(network: object) -> None:
    """Raise TypeError for a network in DDP, or with compiled, scripted or sharded parts."""
    parts = list(network.modules()) if isinstance(network, nn.Module) else [network]
    found = {base.__name__ for kind in set(map(type, parts)) for base in kind.__mro__} & WRAPPERS
    if any(getattr(part, COMPILED_PART, None) is not None for part in parts):
        found.add("a part compiled by its own .compile()")
    for name in sorted(found):
        expected = "a bare network where it is differentiated twice"
        remedy = GIVE_THE_SOURCE if name == SCRIPTED else WRAP_THE_LOSS
        raise TypeError(complaint("network", expected, network, remedy, got=name))
