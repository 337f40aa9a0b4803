"""`FixedGrid(compiled=True)`: the same numbers, and when it compiles."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hosm_losses as hosm
from hosm_losses.likelihood import compiled
from tests.cases import VP


class Network(nn.Module):
    """A small residual network of x and t, with a condition by sample and one that is shared."""

    def __init__(self, d=3, width=16):
        super().__init__()
        self.into, self.out = nn.Linear(d + 2, width), nn.Linear(width, d)

    def forward(self, x, t, shift=0.0, scale=1.0):
        t = t[:, None].to(x.dtype)
        hidden = self.into(torch.cat([x, t.sin(), t.cos()], 1))
        return self.out(torch.tanh(hidden)) * scale + 0.5 * x + shift


@pytest.fixture
def graphs(monkeypatch):
    """A list of the graphs that are compiled from now on; they run without a C++ compiler."""
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph.forward

    plain = partial(torch.compile, backend=backend)
    monkeypatch.setattr(compiled.torch, "compile", plain)
    return found


def network(seed=0, dtype=torch.float64, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(**options).to(dtype)


def points(count=6, d=3, dtype=torch.float64):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(1), dtype=dtype)


def both(model, x, *, call=hosm.ode_nll, steps=20, companion=False, **options):
    """The results without and with compiling, of the same probes."""
    return [
        call(
            model,
            x,
            solver=hosm.FixedGrid(steps, companion=companion, compiled=each),
            generator=torch.Generator().manual_seed(2),
            **options,
        )
        for each in (False, True)
    ]


def assert_same(plain, other, tolerance=1e-10):
    assert vars(plain).keys() == vars(other).keys()
    for name, value in vars(plain).items():
        found = vars(other)[name]
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert found == value


def product(x, t, **kwargs):
    return 0.3 * x, 0.3 * x.new_full(x.shape[:1], x.shape[1])


SETTINGS = {
    "exact": {},
    "one probe": {"divergence": hosm.Hutchinson()},
    "four probes, order five": {"divergence": hosm.Hutchinson(4), "steps": 64},
    "a function": {"divergence": product},
    "no density": {"call": hosm.ode_sample, "divergence": None},
    "samples": {"call": hosm.ode_sample},
    "samples with a way back": {"call": hosm.ode_sample, "companion": True},
    "companion": {"companion": True, "steps": 64, "divergence": hosm.Hutchinson()},
    "conditions": {"model_kwargs": {"shift": points(), "scale": hosm.Shared(torch.tensor(0.7))}},
    "clean": {"clean": True},
    "batches": {"batch_size": 3},
    "a flow, from the middle": {"schedule": hosm.LinearFlowSchedule(t_min=0.1)},
}


@pytest.mark.filterwarnings("ignore:schedule. expected α")
@pytest.mark.parametrize("name", SETTINGS)
def test_values_are_those_without_compiling(name, graphs):
    options = dict(SETTINGS[name])
    model = hosm.ScoreModel(network(), options.pop("schedule", VP), "velocity")
    assert_same(*both(model, points(), **options))
    assert len(graphs) in (2, 4)  # nodes at the start and later ones


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Skipping serialization")
@pytest.mark.parametrize(
    ("dtype", "d", "divergence", "tolerance"),
    [(torch.float64, 3, "exact", 1e-10), (torch.float32, 40, hosm.Hutchinson(2), 1e-5)],
)
def test_machine_code_gives_the_same_values(dtype, d, divergence, tolerance):
    model = hosm.ScoreModel(network(dtype=dtype, d=d), VP)
    assert_same(*both(model, points(d=d, dtype=dtype), divergence=divergence), tolerance)


def test_half_precision_has_its_rounding_error(graphs):
    model = hosm.ScoreModel(network(dtype=torch.bfloat16), VP)
    plain, other = both(model, points(dtype=torch.bfloat16))
    torch.testing.assert_close(other.solver_error, plain.solver_error, rtol=1e-6, atol=0)
    assert float(plain.solver_error.min()) > 0.01
    assert graphs


def test_later_calls_compile_nothing_and_see_new_weights(graphs):
    """With other numbers of steps, other data and another wrapper of the same network, too."""
    own = network()
    both(hosm.ScoreModel(own, VP), points())
    with torch.no_grad():
        own.out.weight.mul_(1.5)
    for steps in range(10, 30, 2):
        assert_same(*both(hosm.ScoreModel(own, VP), points() + 1, steps=steps))
    assert len(graphs) == 2
    both(hosm.ScoreModel(own, VP), points(4))
    assert len(graphs) == 4


def test_a_smaller_last_batch_and_gradients_are_not_compiled(graphs):
    model = hosm.ScoreModel(network(), VP)
    assert_same(*both(model, points(7), batch_size=3))
    assert len(graphs) == 2
    result = both(model, points().requires_grad_(), enable_grad=True)[1]
    (gradient,) = torch.autograd.grad(result.nll.sum(), model.network.into.weight)
    assert len(graphs) == 2
    assert float(gradient.norm()) > 0


def test_a_network_that_cannot_be_compiled_says_so_once(graphs):
    own, x = network(), points()

    def reads(x, t):
        return own(x, t) * (1.0 if float(t[0]) >= 0 else 2.0)

    model = hosm.ScoreModel(reads, VP)
    with pytest.warns(UserWarning, match="torch.compile can compile"):
        assert_same(*both(model, x))
    assert_same(*both(model, x))  # a second warning would be an error
    assert not graphs


def test_a_network_is_not_kept_alive(graphs):
    own = network()
    there = weakref.ref(own)
    both(hosm.ScoreModel(own, VP), points())
    assert own in compiled._PROGRAMS
    graphs.clear()
    del own
    gc.collect()
    assert there() is None


class Reads(TorchDispatchMode):
    """Counts the operators that read a tensor on the host, or that copy a list to a tensor."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found += function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.lift_fresh,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
        )
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson(2)], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
def test_no_step_waits_for_the_device(prediction, divergence):
    model, counts = hosm.ScoreModel(network(), hosm.LinearFlowSchedule(), prediction), []
    for steps in (16, 32, 34):
        with Reads() as reads:
            solver = hosm.FixedGrid(steps, companion=True)
            hosm.ode_nll(model, points(), solver=solver, divergence=divergence)
        counts.append(reads.found)
    assert counts[0] == counts[1] == counts[2]
