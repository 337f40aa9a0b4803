"""Which second and third derivatives are right, by operator, here and in PyTorch itself.

python -m benchmarks.upstream [--smoke] [WORD ...]

PyTorch's issue 198017 lists operators whose higher derivatives are silently wrong. For these, and
for about a hundred others, the derivatives of w·f(x + s v) in s are taken at s = 0 in three ways:
    library   `taylor.jet`, and a backward pass through its second derivative
    jvp       nested torch.func.jvp
    backward  repeated torch.autograd.grad
The referee is a central difference of high order, in float64, of f itself: it trusts no derivative
of PyTorch's. It counts only where two steps, of which one is half the other, agree to UNCERTAIN. A
way is right within RIGHT of it, wrong beyond WRONG, and refused if it raises an error. Between
these limits there is no verdict but an error, as for a function with a kink near x.

Into results/upstream.json under the version of PyTorch, so run it with each; it takes a minute.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import results
from benchmarks.experiment import Row, alone, begin, parser, seeded
from hosm_losses import DerivativeError
from hosm_losses.taylor import jet

FILE = results.DIRECTORY / "upstream.json"
ORDERS = {2: "second", 3: "third"}
UNCERTAIN, RIGHT, WRONG = 1e-7, 1e-6, 1e-4  # of the larger of 1 and |derivative|
STEP = 0.02
# Weights of f at the steps 0 to 4, on either side with the sign (−1)^order.
STENCILS = {
    2: (-205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560),
    3: (0, -488 / 240, 338 / 240, -72 / 240, 7 / 240),
}
ISSUES = {
    "linalg.det": (192540, 196696),
    "linalg.slogdet": (192540, 196697),
    "logdet": (192540,),
    "linalg.solve": (192540, 196695),
    "cholesky_inverse": (196682,),
    "cholesky_solve": (196694,),
    "linalg.householder_product": (196698,),
    "layer_norm": (175754, 196700),
    "batch_norm, training": (186256, 196699),
    "cumprod at a zero": (196701,),
    "autograd.Function with jvp": (197867,),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


GENERATOR = seeded(0)
X, V, W = draw(2, 12), 0.5 * draw(2, 12), draw(12, 12)
ROWS, LABELS, SIGNS = W[:2], torch.tensor([1, 2]), W[:2].sign()
INDEX = torch.tensor([2, 0, 1, 3, 5, 4, 7, 6, 9, 8, 11, 10])


def images(x: Tensor) -> Tensor:
    return x.reshape(2, 3, 2, 2)


def tokens(x: Tensor) -> Tensor:
    return x.reshape(2, 4, 3)


def square(x: Tensor) -> Tensor:
    """Matrices that are far from singular, and without symmetry."""
    return x[:, :9].reshape(2, 3, 3) + 3 * torch.eye(3)


def symmetric(x: Tensor) -> Tensor:
    return square(x) @ square(x).mT


def positive(x: Tensor) -> Tensor:
    return x * x + 0.5


def apart(x: Tensor) -> Tensor:
    """Elements far enough from each other that their order does not change."""
    return INDEX + x.sigmoid() / 2


def with_zero(x: Tensor) -> Tensor:
    """x with an element in each row that passes zero at X."""
    return torch.cat([x[:, :4], x[:, 4:5] - X[:, 4:5], x[:, 5:]], 1)


def heads(x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values (2, 2, 2, 3)."""
    x = x.reshape(2, 2, 2, 3)
    return x, x.sin(), x.cos()


class Square(torch.autograd.Function):
    """A square whose derivatives are written by hand, as PyTorch's documentation has it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * ctx.saved_tensors[0] * cotangent

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


linalg, special = torch.linalg, torch.special
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # Linear algebra.
    "linalg.det": lambda x: linalg.det(square(x)),
    "linalg.slogdet": lambda x: linalg.slogdet(square(x))[1],
    "logdet": lambda x: torch.logdet(symmetric(x)),
    "linalg.inv": lambda x: linalg.inv(square(x)),
    "linalg.solve": lambda x: linalg.solve(square(x), tokens(x), left=False),
    "linalg.tensorsolve": lambda x: linalg.tensorsolve(square(x)[0], x[0, :3]),
    "linalg.solve_triangular": lambda x: linalg.solve_triangular(
        square(x).tril(), tokens(x).mT, upper=False
    ),
    "linalg.cholesky": lambda x: linalg.cholesky(symmetric(x)),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(square(x).tril()),
    "cholesky_solve": lambda x: torch.cholesky_solve(W[:2, :2], square(x)[:, :2, :2].tril()),
    "linalg.householder_product": lambda x: linalg.householder_product(square(x), x[:, 9:]),
    "linalg.eigh": lambda x: linalg.eigh(symmetric(x))[0],
    "linalg.svdvals": lambda x: linalg.svdvals(square(x)),
    "linalg.qr": lambda x: linalg.qr(square(x))[1],
    "linalg.lu_factor": lambda x: linalg.lu_factor(square(x))[0],
    "linalg.matrix_exp": lambda x: linalg.matrix_exp(0.3 * square(x)),
    "linalg.matrix_power": lambda x: linalg.matrix_power(square(x), 3),
    "linalg.pinv": lambda x: linalg.pinv(tokens(x)),
    "linalg.cross": lambda x: linalg.cross(tokens(x), tokens(x).sin()),
    "einsum": lambda x: torch.einsum("bij,bik->bjk", tokens(x), tokens(x).cos()),
    "matmul": lambda x: tokens(x) @ tokens(x).mT,
    # Norms and distances.
    "linalg.vector_norm": lambda x: linalg.vector_norm(tokens(x), dim=-1),
    "linalg.matrix_norm, nuclear": lambda x: linalg.matrix_norm(square(x), "nuc"),
    "norm, p = 3": lambda x: torch.norm(tokens(x), 3, dim=-1),
    "normalize": lambda x: F.normalize(tokens(x), dim=-1),
    "renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
    "cdist": lambda x: torch.cdist(tokens(x), tokens(x)),
    "pdist": lambda x: F.pdist(tokens(x)[0]),
    "pairwise_distance": lambda x: F.pairwise_distance(tokens(x), W[:4, :3]),
    "cosine_similarity": lambda x: F.cosine_similarity(tokens(x), W[:4, :3], dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, (12,), W[0], W[1]),
    "batch_norm, training": lambda x: F.batch_norm(tokens(x), None, None, training=True),
    "instance_norm": lambda x: F.instance_norm(images(x)),
    "group_norm": lambda x: F.group_norm(images(x), 3),
    "rms_norm": lambda x: F.rms_norm(x, (12,), eps=1e-6),
    "local_response_norm": lambda x: F.local_response_norm(images(x), 2),
    "weight_norm": lambda x: torch._weight_norm(x, x[:, :1].cos() + 2, 0),
    "std": lambda x: x.std(1),
    # Activations.
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "prelu": lambda x: F.prelu(x * x - 9, W[0, :1]),
    "glu": lambda x: F.glu(x),
    # Special functions.
    "erf": torch.erf,
    "erfinv": lambda x: torch.erfinv(x.tanh()),
    "lgamma": lambda x: torch.lgamma(positive(x)),
    "digamma": lambda x: torch.digamma(positive(x)),
    "special.i0": special.i0,
    "special.i1e": special.i1e,
    "special.bessel_j0": special.bessel_j0,
    "special.airy_ai": special.airy_ai,
    "special.gammainc": lambda x: special.gammainc(positive(ROWS), positive(x)),
    "special.zeta": lambda x: special.zeta(positive(x) + 1, positive(x)),
    "special.ndtri": lambda x: special.ndtri(x.sigmoid()),
    "special.log_ndtr": special.log_ndtr,
    "special.xlog1py": lambda x: special.xlog1py(x, positive(x)),
    "special.entr": lambda x: special.entr(positive(x)),
    "sinc": torch.sinc,
    "logit": lambda x: torch.logit(x.sigmoid()),
    "logaddexp": lambda x: torch.logaddexp(x, x.sin()),
    "logsumexp": lambda x: x.logsumexp(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "atan2": lambda x: torch.atan2(x, x.cos()),
    "hypot": lambda x: torch.hypot(x, x.cos()),
    "pow": lambda x: positive(x) ** x,
    "copysign": lambda x: torch.copysign(x * x, ROWS),
    "heaviside": lambda x: x * x * torch.heaviside(x * x + 1, ROWS),
    # Losses.
    "cross_entropy": lambda x: F.cross_entropy(x, LABELS, reduction="none"),
    "kl_div": lambda x: F.kl_div(x.log_softmax(1), ROWS.softmax(1), reduction="none"),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), ROWS.sigmoid()),
    "mse_loss": lambda x: F.mse_loss(x, x.sin(), reduction="none"),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, ROWS, reduction="none", beta=9.0),
    "huber_loss": lambda x: F.huber_loss(x, ROWS, reduction="none", delta=9.0),
    "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, ROWS, positive(x) + 2),
    "poisson_nll_loss": lambda x: F.poisson_nll_loss(x, positive(ROWS), reduction="none"),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, SIGNS, reduction="none"),
    "triplet_margin_loss": lambda x: F.triplet_margin_loss(x, ROWS, -ROWS, margin=9.0),
    # Elements that are chosen, moved or multiplied.
    "gather": lambda x: (x * x).gather(1, INDEX.expand(2, 12)),
    "scatter_add": lambda x: (x * x).scatter_add(1, INDEX.expand(2, 12) % 3, x.sin()),
    "scatter_reduce, product": lambda x: x.scatter_reduce(1, INDEX.expand(2, 12) % 3, x, "prod"),
    "index_add": lambda x: (x * x).index_add(1, INDEX, x.sin()),
    "masked_fill": lambda x: (x * x).masked_fill(ROWS > 0, x[0, 0]),
    "take_along_dim": lambda x: torch.take_along_dim(x * x, INDEX.expand(2, 12), 1),
    "embedding_bag": lambda x: F.embedding_bag(LABELS[None] - 1, x * x, mode="sum"),
    "sort": lambda x: apart(x).sort(1)[0],
    "cummax": lambda x: apart(x).cummax(1)[0],
    "prod": lambda x: x.prod(1),
    "prod at a zero": lambda x: with_zero(x).prod(1),
    "cumprod at a zero": lambda x: with_zero(x).cumprod(1),
    "conv2d": lambda x: F.conv2d(images(x), images(x).cos(), padding=1),
    "max_pool2d": lambda x: F.max_pool2d(images(apart(x)), 2),
    "interpolate, bicubic": lambda x: F.interpolate(images(x * x), (3, 3), mode="bicubic"),
    "grid_sample": lambda x: F.grid_sample(
        images(x), 0.5 * x.tanh()[:, :8].reshape(2, 2, 2, 2), align_corners=True
    ),
    # Attention, recurrence, and a function with derivatives of its own.
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(*heads(x)),
    "multi_head_attention_forward": lambda x: F.multi_head_attention_forward(
        *[tokens(x)] * 3, 3, 1, W[:9, :3], None, None, None, False, 0.0, W[:3, :3], None
    )[0],
    "gru_cell": lambda x: torch.gru_cell(x, x[:, :4], W / 3, W[:, :4] / 3),
    "autograd.Function with jvp": lambda x: Square.apply(Square.apply(x)),
}


def differences(value: Callable[[float], Tensor], order: int, step: float) -> float:
    """A derivative at 0 of a function of a number, by a central difference of high order."""
    sides = [
        weight * float(value(k * step) + (-1) ** order * value(-k * step))
        for k, weight in enumerate(STENCILS[order])
    ]
    return (sum(sides) - sides[0] / 2) / step**order


def by_library(f: Callable[[Tensor], Tensor], weight: Tensor, order: int) -> Tensor:
    x = X.clone().requires_grad_()
    second = jet(f, x, V[None], "squares")[2]
    assert second is not None
    value = (weight * second[0]).sum()
    return value if order == 2 else (torch.autograd.grad(value, x)[0] * V).sum()


def by_jvp(f: Callable[[Tensor], Tensor], weight: Tensor, order: int) -> Tensor:
    for _ in range(order):
        f = lambda x, f=f: torch.func.jvp(f, (x,), (V,))[1]  # noqa: E731
    return (weight * f(X)).sum()


def by_backward(f: Callable[[Tensor], Tensor], weight: Tensor, order: int) -> Tensor:
    s = torch.zeros((), dtype=X.dtype, requires_grad=True)
    # s⁴ adds nothing at zero, but keeps the graph, as the rest of a network would.
    value = (weight * f(X + s * V)).sum() + s**4
    for _ in range(order):
        (value,) = torch.autograd.grad(value, s, create_graph=True)
    return value


VERDICTS = ("right", "wrong", "NaN", "refused")
WAYS = {"library": by_library, "jvp": by_jvp, "backward": by_backward}


def verdict(value: float, right: float) -> str:
    """Whether a derivative is right or wrong, or NaN.

    Raises:
        ValueError: where it is too near to be wrong, and too far to be right.
    """
    if math.isnan(value):
        return "NaN"
    error = abs(value - right) / max(1.0, abs(right))
    if RIGHT < error < WRONG:
        raise ValueError(f"expected {right}, or something far from it; got {value}.")
    return "right" if error <= RIGHT else "wrong"


def measure(name: str, f: Callable[[Tensor], Tensor]) -> Row:
    """The second and third derivative of a function in every way, with a verdict on each."""
    generator, value = seeded(1), f(X)
    weight = torch.randn(value.shape, generator=generator, dtype=X.dtype) / value.numel() ** 0.5
    found: Row = {}
    for order, ordinal in ORDERS.items():
        right, half = (
            differences(lambda s: (weight * f(X + s * V)).sum(), order, step)
            for step in (STEP, STEP / 2)
        )
        if not abs(right - half) <= UNCERTAIN * max(1.0, abs(right)):
            raise ValueError(f"{name}: expected a smooth function; got {right} and {half}.")
        row: Row = {"differences": right}
        for way, derivative in WAYS.items():
            try:
                value = float(derivative(f, weight, order).detach())
                row[way] = {"value": value, "verdict": verdict(value, right)}
            except (DerivativeError, RuntimeError) as error:
                sentence = f"{type(error).__name__}: {error}".partition("\n")[0]
                row[way] = {"reason": sentence.partition(". ")[0], "verdict": "refused"}
        found[ordinal] = row
    return found


def answer(words: list[str] | None = None) -> Row:
    """The rows of the functions whose names hold one of these words; of all without any."""
    names = [name for name in FUNCTIONS if not words or any(word in name for word in words)]
    with warnings.catch_warnings(action="ignore"):
        return {name: measure(name, FUNCTIONS[name]) for name in names}


def tally(rows: Row) -> dict[str, dict[str, int]]:
    """How often each verdict was given on each way, by order."""
    return {
        f"{ordinal}, {way}": {
            each: sum(row[ordinal][way]["verdict"] == each for row in rows.values())
            for each in VERDICTS
        }
        for ordinal in ORDERS.values()
        for way in WAYS
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("words", nargs="*", metavar="WORD", help="of names; default: all")
    options, where = begin(arguments)
    words = ["norm"] if options.smoke else options.words
    rows: Any = alone(answer, words)
    report = {"environment": where, "tally": tally(rows), "found": rows}
    results.show(f"PyTorch {torch.__version__}", report["tally"])
    if not words:
        results.keep(FILE, {torch.__version__.partition("+")[0]: report})


if __name__ == "__main__":
    main()
