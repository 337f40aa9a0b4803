"""Calls of operators without a rule, and of functions that are constant in x, for random networks."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from tests.derivatives.taylor.table import MASK, OTHER, cube, several

INDEX = torch.tensor([[0, 2, 1, 1], [3, 0, 0, 2]]).expand(3, 2, 4)
ROWS = torch.linspace(-1, 1, 8, dtype=torch.float64)
CALLS = {
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, beta=2, threshold=10),
    "elu": lambda x: F.elu(x, alpha=0.7),
    "celu": F.celu,
    "selu": F.selu,
    "hardtanh": lambda x: F.hardtanh(x, -0.4, max_val=0.6),
    "hardswish": lambda x: F.hardswish(x),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "logsigmoid": F.logsigmoid,
    "erf": torch.erf,
    "atan": lambda x: x.atan() + torch.asinh(x) + x.expm1() + torch.log1p(x * x),
    "sinh and cosh": lambda x: x.sinh() * x.cosh() + x.tan().tanh(),
    "clamp": lambda x: x.clamp(min=-0.3) + torch.clamp(x, -0.5, 0.5) + x.clip(max=ROWS),
    "extremes": lambda x: torch.maximum(x, x.cos()) + x.minimum(ROWS) + x.amax(1, True),
    "largest of a row": lambda x: x.max(dim=1, keepdim=True).values + x.max() * x.min(0)[0],
    "sorted": lambda x: x.sort(descending=True).values + x.topk(8, dim=-1)[0],
    "middle": lambda x: x.median(1).values[:, None] * x + x.kthvalue(2, 0)[0],
    "logsumexp": lambda x: torch.logsumexp(x, (0, 1)) * x + x.logsumexp(dim=1, keepdim=True),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1) + torch.log_softmax(x, 0),
    "softmin": lambda x: F.softmin(x, dim=1),
    "cumulative": lambda x: x.cumsum(axis=1) + torch.cumsum(x, dim=-1),
    "product": lambda x: x.prod(1, keepdim=True) + torch.prod(cube(x), dim=-2).sum(),
    "products of matrices": lambda x: torch.addmm(ROWS, x, torch.outer(ROWS, ROWS.cos())),
    "products of vectors": lambda x: torch.dot(x[0], x[1]) * torch.mv(x, ROWS)[:, None] + x,
    "outer": lambda x: torch.outer(x[0], x[1]) + torch.kron(x[:1], x[1:2].T),
    "chained": lambda x: torch.linalg.multi_dot([x, x.T, x]) + torch.tensordot(x, x, 2),
    "turned": lambda x: (
        x.roll(1, dims=-1)
        + torch.flip(x, [0])
        + x.fliplr()
        + cube(x).rot90(1, (1, 2)).reshape(3, 8)
    ),
    "moved": lambda x: cube(x).movedim(source=1, destination=-1) + cube(x).moveaxis(1, 2),
    "stacked": lambda x: torch.hstack([x, x.sin()]) + torch.cat((x.cos(), x), axis=-1),
    "columns": lambda x: torch.column_stack((x, x)) + torch.vstack([x.T, x.T.sin()]).T,
    "parts": lambda x: several(x.tensor_split(3, dim=1)) + several(torch.hsplit(x, 2)),
    "gather": lambda x: (
        cube(x).gather(dim=2, index=INDEX) + torch.take_along_dim(cube(x), INDEX, 2)
    ),
    "selected": lambda x: x.index_select(1, INDEX[0, 0]) + x.take(INDEX[0]).reshape(-1)[:4],
    "masked": lambda x: torch.masked_select(x, MASK.reshape(3, 8)) * x.sum(),
    "scattered": lambda x: torch.zeros(3, 8).scatter_add(1, INDEX[:, 0], x[:, :4]) + x,
    "index_add": lambda x: x.index_add(1, INDEX[0, 0], x[:, :4], alpha=2),
    "windows": lambda x: x.unfold(1, 4, 2).sum(-1) * F.unfold(x.reshape(3, 2, 2, 2), 2).mean(),
    "triangles": lambda x: (
        torch.tril(x) + x.triu(1) + torch.diag_embed(x).diagonal(dim1=-2, dim2=-1)
    ),
    "interpolated": lambda x: torch.lerp(x, x.cos(), 0.3) + x.lerp(ROWS, weight=x.sigmoid()),
    "remainders": lambda x: torch.fmod(x, 0.3) + x.remainder(0.7),
    "hypot": lambda x: torch.hypot(x, ROWS + 2) + torch.atan2(x, ROWS * ROWS + 1),
    "powers": lambda x: 2**x + (x * x + 1) ** x + torch.float_power(x * x + 1, 2),
    "deviation": lambda x: x.var(dim=1, keepdim=True) * x + torch.var_mean(x, 0)[1],
    "dropout of torch": lambda x: torch.dropout(x, p=0.5, train=False) + F.alpha_dropout(x, 0.0),
    "pools": lambda x: F.max_pool1d(cube(x), 2) + F.adaptive_max_pool1d(cube(x), 2),
    "local norm": lambda x: F.local_response_norm(cube(x), 2),
    "attention of groups": lambda x: F.scaled_dot_product_attention(
        x.reshape(1, 4, 2, 3),
        x.reshape(1, 4, 2, 3)[:, :2],
        x.reshape(1, 4, 2, 3)[:, :2],
        enable_gqa=True,
    ),
    "bilinear": lambda x: F.bilinear(
        x, x.sin(), OTHER.reshape(1, 24)[:, : 64 // 8, None].expand(1, 8, 8)
    ),
    "real and numbers": lambda x: x.real * np.float64(2) + x * np.float32(0.5) + np.int64(1),
    # Of constant value.
    "comparisons": lambda x: x * (x > 0) + torch.where(x.lt(ROWS), x, 2) + (x != 0) * x,
    "counts": lambda x: x * (x > 0).sum() + x * torch.count_nonzero(x),
    "signs": lambda x: x * x.sign() + x * torch.floor(x) + x * x.round() + x * x.sgn(),
    "places": lambda x: x.gather(1, x.argmax(1, keepdim=True)) + x[:, x.argsort(-1)[0]],
    "patterns": lambda x: torch.zeros_like(x) + x.new_full((8,), 2.0) * x + torch.ones_like(x[0]),
    "sizes": lambda x: x * x.size(-1) + x.shape[0] * len(x) + x.dim() - x.numel(),
    "types": lambda x: (
        x.to(torch.result_type(x, 1)) + x.type(x.dtype) + x.new_ones(1, dtype=x.dtype)
    ),
    "numbers of places": lambda x: x * x.nonzero().sum() + x.isfinite().all() * x,
}
