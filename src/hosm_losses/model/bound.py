r"""A score model bound to times and conditions: the network's prediction as a function of x.

Formula:
    ε̂ is affine in the network's prediction and in x: ε̂ = p · prediction + q x. Let D and G be the
    derivatives of the prediction along w, as defined in `derivatives.engines`. The corresponding
    derivatives of f = −ε̂ are D_f = −(p D + q w) and G_f = −p G.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hosm_losses._checks import error_message, widest_dtype
from hosm_losses._torch_internals import COMPILED_PART, leave_inference_mode
from hosm_losses.derivatives import (
    Derivatives,
    Products,
    derive,
    derive_with_products,
    quadratic_forms,
)
from hosm_losses.model.conditions import bind, map_tensors, per_sample, rows_note
from hosm_losses.model.score_model import Affine, ScoreModel, apply_affine
from hosm_losses.taylor import GIVE_THE_SOURCE, Jet, safe_primitives

# Which safe primitives are active: all, those for the first derivative of one sample, or none.
Primitives = Literal["all", "one sample", "none"]


# With eq=True, torch.compile of PyTorch 2.6 would hash an instance before its fields are set.
@dataclass(frozen=True, eq=False)
class BoundModel:
    """The network's prediction as a function of x (B, *) alone.

    Engines differentiate the prediction rather than f = −ε̂. The term q x of f would connect f to
    x in the autograd graph, so an engine would not detect that a network detaches its prediction.

    Attributes:
        model: the score model.
        t: the times (B,), or None if they have not been set yet.
        kwargs: the network's keyword arguments, bound to the batch as described in `conditions`.
        batch: the number of samples in the batch to which the arguments were bound.
        primitives: which of the safe primitives are active.
        known: (p, q) at the times t, if already computed; the schedule is then not evaluated.
        answers: a set to which the dtypes of the predictions are added, or None.
    """

    model: ScoreModel
    t: Any
    kwargs: dict[str, Any]
    batch: int
    primitives: Primitives
    known: Affine | None = None
    answers: set[torch.dtype] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the prediction at x; the network is called with copies of its arguments."""
        # A Jet uses its own rules instead of the primitives.
        all_of_them = self.primitives == "all" and not isinstance(x, Jet)
        # PyTorch's own gradient of instance norm is wrong for one sample in channels_last.
        one_sample = self.primitives == "one sample" and len(x) == 1 and x.device.type == "cpu"
        # A network is called several times, and may write to its arguments, even to shared ones.
        kwargs = map_tensors(self.kwargs, Tensor.clone) if self.kwargs else self.kwargs
        with safe_primitives(all_of_them or one_sample, of_one_sample=one_sample):
            if torch.compiler.is_compiling() or len(x) == self.batch:
                return self.model.predict(x, self.t, **kwargs)
            try:
                return self.model.predict(x, self.t, **kwargs)
            except Exception as error:
                error.add_note(rows_note(self.kwargs, len(x), self.batch))
                raise

    @property
    def owner(self) -> object:
        """The network."""
        return self.model.network

    @property
    def native(self) -> "BoundModel":
        """This model with PyTorch's own operators, which suffice for first derivatives."""
        return self._with(self.t, self.kwargs, "none")

    def _with(self, t: Any, kwargs: Any, primitives: Primitives | None = None) -> "BoundModel":
        # torch.compile of PyTorch 2.6 does not support dataclasses.replace.
        return BoundModel(self.model, t, kwargs, self.batch, primitives or self.primitives)

    def at(
        self, t: Tensor, known: Affine | None = None, answers: set[torch.dtype] | None = None
    ) -> "BoundModel":
        """Return the same model at times t (B,); `known` is (p, q) at t, if already computed."""
        t = leave_inference_mode(t)
        return BoundModel(self.model, t, self.kwargs, self.batch, self.primitives, known, answers)

    def rows(self, index: Tensor | slice) -> "BoundModel":
        """Return the same model for the samples at `index`."""
        t = None if self.t is None else leave_inference_mode(self.t[index])
        return self._with(t, per_sample(self.kwargs, lambda _, tensor: tensor[index]))

    def repeat(self, count: int) -> "BoundModel":
        """Return the same model, bound to the batch repeated `count` times."""

        def copies(tensor: Tensor) -> Tensor:
            return tensor.repeat(count, *(1,) * (tensor.ndim - 1))

        return self._with(copies(self.t), per_sample(self.kwargs, lambda _, own: copies(own)))

    def f(self, x: Tensor) -> Tensor:
        """Return f = −ε̂ at x."""
        return -apply_affine(self._noted(self(x)), x, *self.affine(x))

    def _noted(self, prediction: Tensor) -> Tensor:
        if self.answers is not None:
            self.answers.add(prediction.dtype)
        return prediction

    def affine(self, like: Tensor) -> Affine:
        """Return (p, q) at the times t, in a shape (B, 1, …) that broadcasts to `like`."""
        return self.model.affine(self.t, like) if self.known is None else self.known

    def derive(self, x: Tensor, w: Tensor, **options: Any) -> Derivatives:
        """Return f and its derivatives at x along w (K, B, *); see `derivatives.derive`."""
        return self.of_f(derive(self, x, w, **options), x, w)

    def of_f(self, prediction: Derivatives, x: Tensor | None, w: Tensor) -> Derivatives:
        """Convert the derivatives of the prediction to the derivatives of f.

        If x is None, the returned `value` is f + q x rather than f.
        """
        p, q = self.affine(prediction.value[0])
        third = prediction.third
        return Derivatives(
            -apply_affine(prediction.value, x, p, q),
            -apply_affine(prediction.directional, w, p, q),
            None if third is None else -apply_affine(third, None, p, q),
        )

    def quadratic_forms(self, x: Tensor, directions: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the prediction at x, and vᵀ ∂prediction/∂x v (K, B) in `widest_dtype(x)`.

        `directions` yields the directions v in chunks (k, B, *).
        """
        prediction, forms = quadratic_forms(self, x, directions)
        return prediction, forms.to(widest_dtype(x))

    def f_and_divergence(
        self, x: Tensor, prediction: Tensor, forms: Tensor, squares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return f at x, and vᵀ ∂f/∂x v (K, B) for every direction v.

        `forms` is vᵀ ∂prediction/∂x v, and `squares` is ‖v‖², both (K, B). If `forms` and
        `squares` are sums over the standard basis vectors v, with shape (1, B), the second result
        is ∇·f.
        """
        p, q = self.affine(x)
        p_rows = None if p is None else p.flatten()
        q_rows = None if q is None else q.flatten()
        f = -apply_affine(self._noted(prediction), x, p, q)
        return f, -apply_affine(forms, squares, p_rows, q_rows)

    def derive_with_products(
        self, x: Tensor, w: Tensor, cotangent: Callable[[Tensor], Tensor], **options: Any
    ) -> Products:
        """Return derivatives of f, and products of f's Jacobian with c = cotangent(f + q x).

        The attribute `value` of the derivatives contains f + q x, not f.
        """
        p, q = self.affine(x)

        def of_prediction(value: Tensor) -> Tensor:
            return cotangent(-apply_affine(value, None, p, q)).to(value.dtype)

        derived, c, vjp_c, jvp_c = derive_with_products(self, x, w, of_prediction, **options)
        return Products(
            self.of_f(derived, None, w),
            c,
            -apply_affine(vjp_c, c, p, q),
            None if jvp_c is None else -apply_affine(jvp_c, c, p, q),
        )


def bind_model(
    model: ScoreModel,
    batch: int,
    model_kwargs: Mapping[str, Any] | None = None,
    t: Tensor | None = None,
    *,
    graph: bool = True,
) -> BoundModel:
    """Bind the network's keyword arguments and the times t (B,) to a batch.

    `graph` says whether the network's derivatives will themselves be differentiated.
    """
    kwargs = map_tensors(bind(model_kwargs, batch), leave_inference_mode) if model_kwargs else {}
    primitives = ("all" if graph else "one sample") if model.primitives else "none"
    return BoundModel(
        model, None if t is None else leave_inference_mode(t), kwargs, batch, primitives
    )


SCRIPTED = "ScriptModule"  # the class of traced and scripted modules in torch.jit
# Classes are recognised by name, so torch.distributed need not be imported.
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"}
WRAPPERS |= {"OptimizedModule", SCRIPTED}
WRAP_THE_LOSS = (
    "Wrap the loss module as a whole: put DistributedDataParallel, fully_shard or torch.compile "
    "around ThirdOrderDSM(ScoreModel(network, schedule)), where network is the inner network, "
    "such as model.module."
)


def refuse_wrapped(network: object) -> None:
    """Raise TypeError if any part of the network is wrapped.

    A part counts as wrapped if it is compiled, scripted or sharded, or inside DDP or DataParallel.
    """
    wrappers, kinds = set[str](), set[type]()
    for part in network.modules() if isinstance(network, nn.Module) else [network]:
        kinds.add(type(part))
        if getattr(part, COMPILED_PART, None) is not None:
            wrappers.add("a part compiled by its own .compile()")
    for kind in kinds:
        for base in kind.__mro__:
            if base.__name__ in WRAPPERS:
                wrappers.add(base.__name__)
    for name in sorted(wrappers):
        expected = "a bare network where it is differentiated twice"
        remedy = GIVE_THE_SOURCE if name == SCRIPTED else WRAP_THE_LOSS
        raise TypeError(error_message("network", expected, network, remedy, got=name))
