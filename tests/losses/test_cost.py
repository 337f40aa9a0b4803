"""What a training step costs, counted: FLOPs of products and convolutions, calls, peak memory."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import hosm_losses as hosm
from hosm_losses import taylor
from tests.cases import FUNCTIONS, VP, CountFlops, OfX


class Residual(nn.Module):
    """Blocks of group norm, SiLU and convolution: almost all cost is in the middle."""

    def __init__(self, width=16):
        super().__init__()
        self.inner = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(8)
        )
        self.outer = nn.Conv2d(width, 1, 3, padding=1)
        self.calls = []

    def forward(self, x, t):
        self.calls.append(len(x))
        hidden = self.inner(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.outer(hidden)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside of it take at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: each for key, each in self.live.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return out


def flops(loss):
    with CountFlops() as count:
        loss().backward()
    return count.total


def peak(loss):
    with Peak() as memory:
        loss().backward()
    return memory.most


def ratio(order, x0=None, measure=flops, loss=None, **options):
    """What a step takes over one of order one, and the batches the network was called with."""
    network, x0 = Residual(), torch.randn(2, 1, 6, 6) if x0 is None else x0
    model, loss = hosm.ScoreModel(network, VP), loss or FUNCTIONS[order]
    first = measure(lambda: hosm.first_order_dsm(model, x0))
    network.calls.clear()
    higher = measure(lambda: loss(model, x0, **options))
    return higher / first, network.calls


def evaluations(loss, **options):
    """FLOPs of a step on an MLP of eight dimensions, in units where order one has three."""
    layers = [nn.Linear(8, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 8)]
    model, x0 = hosm.ScoreModel(OfX(nn.Sequential(*layers)), VP), torch.randn(8, 8)
    first = flops(lambda: hosm.first_order_dsm(model, x0))
    return 3 * flops(lambda: loss(model, x0, **options)) / first


@pytest.mark.parametrize(
    ("order", "options", "expected"),
    [
        (2, {"probes": 4}, 15),
        (2, {"probes": 4, "engine": "reverse"}, 16),
        # Which folds the probes into the batch, each with a value of its own.
        (3, {"probes": 4}, 48),
        (3, {"probes": "exact"}, 54),
        (2, {"probes": hosm.Paired(), "engine": "taylor"}, 18),
    ],
)
def test_several_probes_share_the_value(order, options, expected):
    """As the pages say: 3 (1 + K) and 6 (1 + d)."""
    assert evaluations(FUNCTIONS[order], **options) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("order", "options", "flops_at_most", "memory_at_most"),
    [
        (2, {}, 2.05, 2.2),
        (3, {}, 4.10, 4.5),
        (2, {"engine": "reverse"}, 2.7, 6.0),
        (3, {"engine": "reverse"}, 4.24, 9.0),
    ],
)
def test_flops_and_peak_memory_of_a_training_step(order, options, flops_at_most, memory_at_most):
    found, calls = ratio(order, **options)
    assert found < flops_at_most
    assert calls == [2]
    memory, _ = ratio(order, measure=peak, **options)
    assert memory < memory_at_most


@pytest.mark.parametrize(("order", "products"), [(1, 2), (2, 4), (3, 5)])
def test_averaged_targets_are_a_few_products_with_the_reference(order, products):
    """Weights and mean, the references along a probe, and a sum over them for each cumulant.

    The references have the own sample and two more columns beside them in the first product, one
    in the others.
    """
    model, x0 = hosm.ScoreModel(Residual(), VP), torch.randn(64, 1, 6, 6)
    plain = flops(lambda: FUNCTIONS[order](model, x0))
    found = flops(lambda: FUNCTIONS[order](model, x0, targets=hosm.AveragedTargets()))
    assert found - plain == 2 * 64 * 65 * (38 + 37 * (products - 1))
    assert found < 1.02 * plain


@pytest.mark.parametrize("order", [1, 3])
def test_pairs_cost_what_as_many_samples_cost_in_one_call(order):
    network, costs = Residual(), []
    model = hosm.ScoreModel(network, VP)
    for count, options in ((8, {}), (4, {"antithetic": True})):
        network.calls.clear()
        x0 = torch.randn(count, 1, 8, 8)
        costs.append((flops(lambda: FUNCTIONS[order](model, x0, **options)), [*network.calls]))  # noqa: B023
    assert costs[0] == costs[1]


def test_a_fraction_costs_its_part():
    x0 = torch.randn(8, 1, 6, 6)
    whole, _ = ratio(3, x0)
    quarter, calls = ratio(3, x0, fraction=0.25)
    assert quarter == pytest.approx(1 + 0.25 * (whole - 1), rel=1e-9)
    assert calls == [2, 6]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"probes": hosm.Paired()},
        {"probes": "exact"},
        {"fraction": 0.5},
    ],
)
@pytest.mark.parametrize(("weights", "lower"), [((1, 0, 0, 0), 1), ((1, 0.5, 0, 0), 2)])
def test_weights_of_zero_at_the_end_cost_nothing(weights, lower, options):
    """As where a ramp begins."""
    model, x0 = hosm.ScoreModel(Residual(), VP), torch.randn(4, 1, 6, 6)
    names = ("probes", "fraction") if lower > 1 else ()
    alone = {name: options[name] for name in options if name in names}
    found = flops(lambda: hosm.third_order_dsm(model, x0, weights=weights, **options))
    assert found == flops(lambda: FUNCTIONS[lower](model, x0, **alone))


def test_a_node_of_the_likelihood_is_one_call_and_a_pass_back():
    network, x = Residual(), torch.randn(2, 1, 6, 6)
    with torch.no_grad(), CountFlops() as forward:
        network(x, torch.ones(2))
    with CountFlops() as count:
        hosm.ode_nll(hosm.ScoreModel(network, VP), x, solver=hosm.FixedGrid(20))
    nodes = 20 + 2  # both ends, and node 1 twice
    assert count.total == pytest.approx(2 * nodes * forward.total, rel=0.01)


def test_pytorchs_own_counter_counts_every_kind_of_probe():
    """Its hooks on modules are given None for an output whose gradient nobody wants."""
    model, x0 = hosm.ScoreModel(Residual(), VP), torch.randn(2, 1, 6, 6)
    for probes in (1, hosm.Paired()):
        with FlopCounterMode(display=False) as counter:
            hosm.third_order_dsm(model, x0, probes=probes).backward()
        total = flops(lambda p=probes: hosm.third_order_dsm(model, x0, probes=p))
        assert counter.get_total_flops() == pytest.approx(total, rel=0.01)


def test_a_laplacian_takes_half_the_products_of_a_hessian():
    """Those of d + 2 and 2 d + 4 evaluations, as docs/wave_functions.md says."""
    d, width = 6, 64
    layers = [nn.Linear(d, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    function = nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))
    hessian = torch.func.vmap(torch.func.hessian(lambda row: function(row[None])[0]))
    counts = []
    for derive in (function, lambda x: taylor.laplacian(function, x), hessian):
        with torch.no_grad(), CountFlops() as count:
            derive(torch.randn(5, d))
        counts.append(count.total)
    one, ours, theirs = counts
    assert ours == pytest.approx((d + 2) * one, rel=0.02)
    assert theirs == pytest.approx((2 * d + 4) * one, rel=0.02)


class Operators(TorchDispatchMode):
    """How many operators run inside of it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_order_one_adds_few_operators_to_a_loss_by_hand():
    model, x0 = hosm.ScoreModel(lambda x, t: x * t[:, None], VP), torch.randn(4, 3)

    def by_hand():
        t = VP.t_min + (VP.t_max - VP.t_min) * torch.rand(4)
        alpha, sigma = (each[:, None] for each in VP(t))
        noise = torch.randn_like(x0)
        return (model.network(alpha * x0 + sigma * noise, t) - noise).square().mean()

    counts = []
    for loss in (by_hand, lambda: hosm.first_order_dsm(model, x0)):
        loss()
        with Operators() as operators:
            loss()
        counts.append(operators.count)
    # Two checks of values, copies of x and t, a clamp of t, a probe dimension, dtypes.
    assert counts[1] - counts[0] <= 13
