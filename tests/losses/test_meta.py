"""On the device "meta" no value can be read, and two devices cannot meet: both would be errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import hosm_losses as hosm
from tests.cases import PREDICTIONS, SCHEDULES, VP, networks
from tests.losses.test_random_options import LOSSES, Pick, drawn_options, drawn_weights, value_of


class OneDevice(TorchDispatchMode):
    """Stops where a tensor on meta meets one of another device, or becomes one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = [each for each in tree_leaves((args, kwargs, out)) if torch.is_tensor(each)]
        # A number on the CPU may meet any device.
        devices = {leaf.device.type for leaf in leaves if leaf.ndim}
        if "meta" in devices and devices != {"meta"}:
            raise AssertionError(f"{func} on {devices}")
        return out


def setting(name="mlp", dtype=torch.float64):
    network, shape = networks()[name]
    return network.to("meta", dtype), torch.empty(4, *shape, device="meta", dtype=dtype)


def seen(schedule):
    """A table has its copy on a device from its first use there on."""
    schedule(torch.zeros(1, device="meta"))
    return schedule


def test_the_mode_stops_where_two_devices_meet():
    with OneDevice(), pytest.raises(AssertionError, match="_to_copy"):
        torch.zeros(2).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros(2, device="meta").sum().item()


@settings(max_examples=30)
@given(st.data())
def test_a_loss_reads_no_value(data):
    pick = Pick(data)
    loss = pick.choice(["first", "second", "third"])
    options, weights = drawn_options(pick, loss), drawn_weights(pick, loss)
    schedule = pick.choice(list(SCHEDULES.values()))
    network, x0 = setting(pick.choice(["mlp", "attention"]))
    model = hosm.ScoreModel(network, seen(schedule), pick.choice(PREDICTIONS))
    # A gradient for them would be copied from meta.
    weights = tree_map(lambda each: each.detach() if torch.is_tensor(each) else each, weights)
    inputs = {} if weights is None else {"weights": weights}
    if pick.now_and_then():
        averaged = hosm.AveragedTargets(pick.choice([None, x0]))
        kinds = [None, 1.0, x0[0], x0[0].sum(), x0.flatten(1).T @ x0.flatten(1)]
        scores = hosm.TargetScores(torch.neg, pick.choice(kinds), averaged)
        inputs |= {"targets": pick.choice([averaged, scores, hosm.TargetScores(x0)])}
    if pick.now_and_then():
        inputs |= {"noise": x0.clone()}
        whole = schedule is SCHEDULES["discrete"] and pick.now_and_then()
        dtype = torch.int64 if whole else torch.float64
        inputs["t"] = torch.empty(4, device="meta", dtype=dtype)
        if options.get("probes", "exact") != "exact":
            count = value_of(options["probes"]).count
            inputs["probe"] = x0.expand(count, *x0.shape)
    if isinstance(options.get("time_sampler"), hosm.AdaptiveTimes):
        options["time_sampler"].to("meta")
    with OneDevice():
        value, _ = LOSSES[loss][1](model, **options)(x0, return_terms=True, **inputs)
    assert value.is_meta
    assert value.shape == ((4,) if options["reduction"] == "none" else ())
    value.sum().backward()
    assert next(network.parameters()).grad.is_meta


def test_the_basis_of_a_subspace_is_copied_once():
    network, y = setting()
    space = hosm.OnSubspace(network, torch.clone, y.shape[1:])
    assert space.reduce(space.expand(y)).is_meta
    with OneDevice():
        assert hosm.third_order_dsm(hosm.ScoreModel(space, VP), y).is_meta


def test_conditions():
    network, x0 = setting("attention")
    kwargs = {"label": torch.empty(4, device="meta", dtype=torch.float64)}
    options = {"fraction": 0.5, "probes": 2}
    loss = hosm.ThirdOrderDSM(hosm.ScoreModel(network, VP), **options)
    with OneDevice():
        assert loss(x0, model_kwargs=kwargs).is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shorter_dtypes(dtype):
    network, x0 = setting("conv", dtype)
    model = hosm.ScoreModel(network, VP, time=lambda t: t.to(dtype))
    loss = hosm.third_order_dsm(model, x0)
    assert (loss.dtype, loss.device.type) == (torch.float32, "meta")


@pytest.mark.parametrize(
    ("schedule", "divergence"), [("vp", "exact"), ("discrete", hosm.Hutchinson())]
)
def test_the_likelihood_on_a_fixed_grid(schedule, divergence):
    network, x = setting()
    model = hosm.ScoreModel(network, seen(SCHEDULES[schedule]))
    with OneDevice():
        result = hosm.ode_nll(
            model, x, solver=hosm.FixedGrid(4), divergence=divergence, enable_grad=True
        )
    assert result.nll.is_meta
    result.nll.sum().backward()
    assert network.inner.weight.grad.is_meta
