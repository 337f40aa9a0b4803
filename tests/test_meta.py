"""On the device "meta" no value can be read, and two devices cannot meet: both would be errors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hosm_losses as hosm
from tests.oracles import networks

VP = hosm.VPSchedule()
MODULES = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}
ENGINES = ("auto", "taylor", "reverse")
SCHEDULES = {
    "vp": VP,
    "ve": hosm.VESchedule(),
    "subvp": hosm.SubVPSchedule(),
    "cosine": hosm.CosineSchedule(),
    "edm": hosm.EDMSchedule(),
    "flow": hosm.LinearFlowSchedule(t_min=1e-3, t_max=0.999),
    "discrete": hosm.DiscreteSchedule(torch.linspace(0.99, 0.01, 20)),
}


class OneDevice(TorchDispatchMode):
    """Stops where a tensor on meta meets one of another device, or becomes one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        # A number on the CPU may meet any device.
        devices = {leaf.device.type for leaf in (*given, *made) if leaf.ndim}
        if "meta" in devices and devices != {"meta"}:
            raise AssertionError(f"{func} on {devices}")
        return out


def seen(schedule):
    """A table has its copy on a device from its first use there on."""
    schedule(torch.zeros(1, device="meta"))
    return schedule


def setting(name="mlp", size=4):
    network, shape = networks()[name]
    return network.to("meta"), torch.empty(size, *shape, device="meta")


def passes(order, options, name="mlp", schedule=VP, prediction="epsilon", **inputs):
    """The loss and its gradients are on meta."""
    network, x0 = setting(name)
    model = hosm.ScoreModel(network, seen(schedule), prediction)
    with OneDevice():
        loss, terms = MODULES[order](model, **options)(x0, return_terms=True, **inputs)
    assert loss.device.type == "meta"
    assert loss.shape == ((4,) if options.get("reduction") == "none" else ())
    assert sum(term is not None for term in terms) == (1 if order == 1 else order + 1)
    loss.sum().backward()
    assert network.get_parameter("inner.weight" if name != "conv" else "last.weight").grad.is_meta


def test_the_mode_stops_where_two_devices_meet():
    with OneDevice(), pytest.raises(AssertionError, match="_to_copy"):
        torch.zeros(2).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros(2, device="meta").sum().item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighting", ["noise", "native", "likelihood", torch.exp])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_weightings_and_reductions(order, weighting, reduction):
    passes(order, {"weighting": weighting, "reduction": reduction})


@pytest.mark.parametrize("prediction", ["epsilon", "score", "sample", "v_prediction"])
@pytest.mark.parametrize("weighting", ["noise", "native", "likelihood"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("order", [1, 3])
def test_schedules_and_predictions(order, schedule, weighting, prediction):
    options = {"weighting": weighting}
    passes(order, options, schedule=SCHEDULES[schedule], prediction=prediction)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_flows_own_prediction(schedule):
    passes(3, {"weighting": "native"}, schedule=SCHEDULES[schedule], prediction="flow_prediction")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weights", [None, "balanced"])
@pytest.mark.parametrize("order", [2, 3])
def test_paired_probes(order, weights, engine):
    passes(order, {"derivative": engine, "estimator": "paired", "weights": weights}, "conv")


@pytest.mark.parametrize("options", [{}, {"fraction": 0.5, "weight": 0.3, "probes": 3}])
def test_stein(options):
    network, x0 = setting()
    with OneDevice():
        loss = hosm.SteinDSM(hosm.ScoreModel(network, VP), **options)(x0)
    loss.backward()
    assert network.get_parameter("inner.weight").grad.is_meta


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("probes", [1, 2, "exact"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", [2, 3])
def test_engines_and_probes(order, engine, probes, name):
    passes(order, {"derivative": engine, "probes": probes}, name)


@pytest.mark.parametrize("probes", [1, 2, "exact"])
@pytest.mark.parametrize("engine", ["auto", "taylor"])
def test_the_laplacian(engine, probes):
    passes(3, {"derivative": engine, "probes": probes, "third": "laplacian"}, "attention")


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere", "dct"])
@pytest.mark.parametrize("third", ["exact", "laplacian"])
def test_distributions(third, distribution, name):
    passes(3, {"distribution": distribution, "third": third, "probes": 2}, name)


@pytest.mark.parametrize("third", ["exact", "laplacian"])
@pytest.mark.parametrize("engine", ["auto", "taylor", "reverse"])
def test_fractions(engine, third):
    if third != "exact" and engine == "reverse":
        third = "exact"
    passes(3, {"derivative": engine, "third": third, "weighting": "likelihood", "fraction": 0.5})


@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_the_caller_gives(order):
    _, x0 = setting()
    inputs = {"t": torch.empty(4, device="meta"), "noise": x0.clone()}
    options = {}
    if order > 1:
        inputs |= {"probe": torch.empty(2, *x0.shape, device="meta")}
        options = {"weights": torch.empty(4, device="meta")}
    passes(order, options, **inputs)
    table = {"t": torch.empty(4, device="meta", dtype=torch.int64), "noise": x0.clone()}
    passes(order, {}, schedule=SCHEDULES["discrete"], **table)


@pytest.mark.parametrize("order", [2, 3])
def test_conditions(order):
    network, x0 = setting("attention")
    model = hosm.ScoreModel(network, VP)
    kwargs = {"label": torch.empty(4, device="meta")}
    for options in ({}, {"fraction": 0.5, "probes": 2}):
        function = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}[order]
        assert function(model, x0, model_kwargs=kwargs, **options).is_meta


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_without_gradients(order, mode):
    network, x0 = setting("attention")
    with mode():
        terms = hosm.dsm_terms(hosm.ScoreModel(network, VP), x0, order=order)
    assert all(term.is_meta for term in terms if term is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_shorter_dtypes(order, dtype):
    network, x0 = setting("conv")
    model = hosm.ScoreModel(network.to(dtype), VP, time=lambda t: t.to(dtype))
    x0 = x0.to(dtype)
    loss = MODULES[order](model)(x0)
    assert (loss.dtype, loss.device.type) == (torch.float32, "meta")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_the_likelihood_on_a_fixed_grid(divergence, schedule):
    network, x = setting()
    model = hosm.ScoreModel(network, seen(SCHEDULES[schedule]))
    with OneDevice():
        result = hosm.ode_nll(model, x, method="fixed", divergence=divergence, steps=8)
    assert result.nll.is_meta
    assert result.nll.shape == (4,)


def test_the_likelihood_has_gradients():
    network, x = setting("conv")
    model = hosm.ScoreModel(network, VP)
    options = {"method": "fixed", "steps": 8, "probes": 2, "enable_grad": True}
    with OneDevice():
        result = hosm.ode_nll(model, x, **options)
    result.nll.sum().backward()
    assert network.last.weight.grad.is_meta


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, source: hosm.ode_nll(model, x, steps=8, generator=source).nll,
        lambda model, x, source: hosm.variational_nll(model, x, generator=source).nll,
        lambda model, x, source: hosm.ode_sample(model, x, steps=8, generator=source).x,
        lambda model, x, source: hosm.likelihood_gap(
            model, x, reference=model, nodes=2, steps=8, generator=source
        ).to_dict(),
        lambda model, x, source: hosm.check_derivatives(model, x),
    ],
    ids=("ode_nll", "variational_nll", "ode_sample", "gap", "check"),
)
def test_evaluation_follows_the_data_and_not_the_default_device(call):
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 2)
    model = hosm.ScoreModel(network, VP, call=lambda network, x, t: network(x).sin())
    x = torch.randn(3, 2)
    expected = call(model, x, torch.Generator().manual_seed(1))
    with torch.device("meta"):
        got = call(model, x, torch.Generator("cpu").manual_seed(1))
    assert str(got) == str(expected)
