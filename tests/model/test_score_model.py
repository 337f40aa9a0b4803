"""ScoreModel: predictions seen as noise, what the network is given, what the module is."""

import copy
import functools
import operator
import pickle
import sys
from typing import get_args

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import hosm_losses as hosm
from hosm_losses.model import Prediction
from tests.oracles import MLP, OfX, networks, noise_by_solving

VP = hosm.VPSchedule()
PREDICTIONS = get_args(Prediction)


class Labelled(nn.Module):
    """A network that records what it was called with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen = None

    def forward(self, x, t, **kwargs):
        self.seen = (t, kwargs)
        return self.layer(x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_score_and_denoise_are_those_of_the_prediction(prediction):
    network, shape = networks()["mlp"]
    model = hosm.ScoreModel(network, VP, prediction)
    x, t = torch.randn(3, *shape), torch.tensor([0.1, 0.5, 0.9])
    noise = model.noise(x, t)
    torch.testing.assert_close(model(x, t), noise)
    for row in range(3):
        alpha, sigma = VP(t[row])
        raw = network(x[row : row + 1], t[row : row + 1])[0]
        expected = noise_by_solving(prediction, raw, x[row], alpha, sigma, VP.rates(t[row]))
        torch.testing.assert_close(noise[row], expected)
        torch.testing.assert_close(model.score(x, t)[row], -expected / sigma)
        torch.testing.assert_close(model.denoise(x, t)[row], (x[row] - sigma * expected) / alpha)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_prediction_without_a_formula_is_an_error_and_not_another_formula(order):
    """As one that is set after construction, or added to `Prediction` alone."""
    model = hosm.ScoreModel(MLP(3), VP)
    model.prediction = "x0"
    loss = (hosm.first_order_dsm, hosm.second_order_dsm, hosm.third_order_dsm)[order - 1]
    with pytest.raises(ValueError):
        loss(model, torch.randn(2, 3))
    with pytest.raises(ValueError):
        model.native_weight(torch.tensor([0.5]), torch.zeros(1, 3))


def test_an_edm_denoiser_is_a_sample_under_its_schedule():
    def denoiser(x, sigma):
        return x / (1 + sigma[:, None] ** 2)

    model = hosm.ScoreModel(denoiser, hosm.EDMSchedule(), "sample")
    x, sigma = torch.randn(2, 3), torch.tensor([0.5, 2.0])
    expected = (x - denoiser(x, sigma)) / sigma[:, None]
    torch.testing.assert_close(model.noise(x, sigma), expected)


@pytest.mark.parametrize(
    ("time", "expected"), [(None, 0.5), (999.0, 499.5), (2, 1.0), (lambda t: 1 - t, 0.5)]
)
def test_time_is_what_the_network_wants(time, expected):
    network = Labelled()
    model = hosm.ScoreModel(network, VP, time=time)
    model.noise(torch.zeros(1, 2), torch.tensor([0.5]))
    assert float(network.seen[0]) == expected


def test_keyword_arguments_reach_the_network_as_they_are():
    network = Labelled()
    model = hosm.ScoreModel(network, VP)
    states, table = torch.randn(4, 7, 5), torch.randn(3)
    given = {"states": states, "table": table, "flag": True, "none": None}
    hosm.first_order_dsm(model, torch.zeros(4, 2), model_kwargs=given)
    kwargs = network.seen[1]
    assert kwargs["states"] is states
    assert kwargs["table"] is table
    assert (kwargs["flag"], kwargs["none"]) == (True, None)


def test_per_sample_arguments_follow_their_samples():
    """Into folded probes and fractions; nested; tensors of another length unchanged."""
    seen = []

    def network(x, t, label, extra):
        seen.append((len(x), len(label), len(extra["deep"][0]), len(extra["table"])))
        return x * label[:, None] * extra["deep"][0][:, None]

    model = hosm.ScoreModel(network, VP)
    kwargs = {
        "label": torch.arange(4.0),
        "extra": {"deep": [torch.ones(4)], "table": torch.ones(5)},
    }
    hosm.third_order_dsm(model, torch.randn(4, 2), probes=3, model_kwargs=kwargs)
    assert seen == [(12, 12, 12, 5)]
    seen.clear()
    hosm.third_order_dsm(model, torch.randn(4, 2), fraction=0.25, model_kwargs=kwargs)
    assert seen == [(1, 1, 1, 5), (3, 3, 3, 5)]


def test_folded_rows_keep_their_own_conditions():
    network, shape = networks()["attention"]
    model = hosm.ScoreModel(network, VP)
    x0, noise, t = torch.randn(3, *shape), torch.randn(3, *shape), torch.rand(3) * 0.8 + 0.1
    probe, label = torch.randn(2, 3, *shape), torch.randn(3)
    inputs = {"t": t, "noise": noise, "model_kwargs": {"label": label}}
    together = hosm.dsm_terms(model, x0, probe=probe, derivative="reverse", **inputs)
    apart = [hosm.dsm_terms(model, x0, probe=probe[k], **inputs) for k in range(2)]
    for index, term in enumerate(together):
        torch.testing.assert_close(term, (apart[0][index] + apart[1][index]) / 2)


def test_output_picks_the_prediction_out():
    layer = nn.Linear(2, 4)

    class Output:
        def __init__(self, sample):
            self.sample = sample

    model = hosm.ScoreModel(
        lambda x, t: Output(layer(x)[:, :2]), VP, output=operator.attrgetter("sample")
    )
    x, t = torch.zeros(1, 2), torch.tensor([0.5])
    torch.testing.assert_close(model.noise(x, t), layer.bias[None, :2])
    model = hosm.ScoreModel(lambda x, t: layer(x), VP, output=lambda out: out[:, :2])
    torch.testing.assert_close(model.noise(x, t), layer.bias[None, :2])


def test_state_dict_is_the_networks_and_nothing_else():
    network = MLP(2)
    model = hosm.ScoreModel(network, hosm.DiscreteSchedule([0.9, 0.5, 0.1]))
    model.noise(torch.zeros(1, 2), torch.tensor([1.0]))
    assert set(model.state_dict()) == {f"network.{key}" for key in network.state_dict()}
    assert list(model.buffers()) == []
    assert model.network is network


def test_deepcopy_is_an_independent_average():
    model = hosm.ScoreModel(MLP(2), VP)
    average = copy.deepcopy(model)
    x0, noise, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.2, 0.5, 0.7])
    before = hosm.third_order_dsm(average, x0, t=t, noise=noise, probe=noise)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    after = hosm.third_order_dsm(average, x0, t=t, noise=noise, probe=noise)
    moved = hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=noise)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert float((moved - before).detach().abs()) > 1e-3


def test_pickle_and_safetensors(tmp_path):
    model = hosm.ScoreModel(MLP(2), VP, "v_prediction", time=999.0)
    x, t = torch.randn(2, 2), torch.tensor([0.2, 0.7])
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(x, t), model(x, t), rtol=0, atol=0)
    save_model(model, tmp_path / "model.safetensors")
    other = hosm.ScoreModel(MLP(2), VP, "v_prediction", time=999.0)
    load_model(other, tmp_path / "model.safetensors")
    torch.testing.assert_close(other(x, t), model(x, t), rtol=0, atol=0)


class OfTime(nn.Module):
    """Joins x and t and meets its parameters with both."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=dtype)

    def forward(self, x, t):
        return self.layer(torch.cat([x, t[:, None]], 1))


@pytest.mark.parametrize("engine", ["auto", "taylor", "reverse"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_data_of_a_dtype_that_the_network_cannot_take_are_explained(order, engine):
    model = hosm.ScoreModel(OfTime(torch.float32), VP)
    function = (hosm.first_order_dsm, hosm.second_order_dsm, hosm.third_order_dsm)[order - 1]
    options = {"derivative": engine} if order > 1 else {}
    message = (
        r"network: its call failed \(.*The data are torch.float64 and its parameters torch.fl"
    )
    with pytest.raises(TypeError, match=message) as caught:
        function(model, torch.zeros(4, 2), **options)
    assert type(caught.value.__cause__) is RuntimeError
    function(model, torch.zeros(4, 2).float(), **options)


class LooksUp(torch.nn.Module):
    """A table of what t is added to x, and the way it is read."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.table = kind, torch.nn.Embedding(10, 2)

    def forward(self, x, t):
        table = self.table.weight
        if self.kind == "embedding":
            return x + self.table(t)
        if self.kind == "gather":
            return x + table.gather(0, t[:, None].expand(-1, 2))
        return x + table[t]


@pytest.mark.parametrize("kind", ["embedding", "indices", "gather"])
@pytest.mark.parametrize("function", [hosm.ode_nll, hosm.variational_nll, hosm.ode_sample])
def test_a_network_that_looks_t_up_is_told_of_what_is_between(function, kind):
    network, schedule = LooksUp(kind), hosm.DiscreteSchedule.linear(10, 0.01, 0.9)
    model, x = hosm.ScoreModel(network, schedule), torch.randn(4, 2)
    hosm.third_order_dsm(model, x)
    with pytest.raises(TypeError, match=r"network: its call failed \(.*ask between.*interpolate"):
        function(model, x)
    # The remedy.
    nearest = hosm.ScoreModel(network, schedule, time=lambda t: t.round().long())
    assert not bool(function(nearest, x).failed.any())
    hosm.third_order_dsm(nearest, x)


def test_an_index_that_is_wrong_for_another_reason_is_passed_on():
    model = hosm.ScoreModel(lambda x, t: torch.ones(3)[torch.tensor(9)] * x, hosm.VPSchedule())
    with pytest.raises(IndexError, match="out of bounds"):
        hosm.ode_nll(model, torch.randn(4, 2))


def test_times_of_a_dtype_that_the_network_cannot_take_are_explained():
    x0 = torch.zeros(4, 2, dtype=torch.bfloat16)
    network = OfTime(torch.bfloat16)
    with pytest.raises(TypeError, match=r"t is torch.float32: convert t with ScoreModel.*time="):
        hosm.third_order_dsm(hosm.ScoreModel(network, VP), x0)
    model = hosm.ScoreModel(network, VP, time=lambda t: t.to(torch.bfloat16))
    hosm.third_order_dsm(model, x0).backward()


def test_other_errors_of_a_network_come_as_they_are():
    def network(x, t):
        raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match=r"^its own$"):
        hosm.first_order_dsm(hosm.ScoreModel(network, VP), torch.zeros(4, 2))

    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, dtype=torch.float32)

        def forward(self, x, t):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        hosm.first_order_dsm(hosm.ScoreModel(Full(), VP), torch.zeros(4, 2))


def test_a_network_that_casts_by_itself_may_return_another_dtype():
    inner = MLP(2).float()
    model = hosm.ScoreModel(lambda x, t: inner(x.float(), t.float()), VP)
    hosm.third_order_dsm(model, torch.randn(4, 2)).backward()
    assert inner.outer.weight.grad is not None


@pytest.mark.parametrize("kind", ["function", "partial", "method"])
def test_a_model_around_a_function_works_and_is_not_copied(kind):
    layers = OfX(nn.Linear(2, 2))
    network = {
        "function": lambda x, t: layers(x, t),
        "partial": functools.partial(layers),
        "method": layers.forward,
    }[kind]
    model, x0 = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(4, 2)
    hosm.third_order_dsm(model, x0).backward()
    assert all(each.grad is not None for each in layers.parameters())
    hosm.check_derivatives(model, x0)
    for each in (model, hosm.ThirdOrderDSM(model)):
        with pytest.raises(TypeError, match=r"network: .*ScoreModel\(module, .*call=lambda"):
            copy.deepcopy(each)
    model.eval()
    assert layers.training


def test_a_copy_has_weights_of_its_own():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    given = hosm.ScoreModel(layers, hosm.VPSchedule(), call=lambda layers, x, t: layers(x))
    copied = copy.deepcopy(given.train())
    assert layers.training
    x, t = torch.randn(3, 2), torch.full((3,), 0.5)
    before = copied.eval().noise(x, t)
    with torch.no_grad():
        layers[0].weight.add_(1.0)
    assert torch.equal(copied.noise(x, t), before)
    assert layers.training


def test_a_copy_of_a_model_compiled_in_place_is_its_own():
    layer = nn.Linear(2, 2)
    model = hosm.ScoreModel(layer, hosm.VPSchedule(), call=lambda layer, x, t: layer(x))
    model.compile(backend="eager")
    copied, x, t = copy.deepcopy(model), torch.randn(3, 2), torch.full((3,), 0.5)
    before = copied(x, t)
    with torch.no_grad():
        layer.weight.add_(1)
    torch.testing.assert_close(copied(x, t), before)


def test_fractions_of_the_first_step_of_a_table():
    model = hosm.ScoreModel(lambda x, t: 0.1 * x, hosm.DiscreteSchedule.linear(1000))
    x0 = torch.randn(8, 3)
    with pytest.warns(UserWarning, match="t: expected indices from 0 to 999"):
        hosm.first_order_dsm(model, x0, t=torch.rand(8))
    with pytest.warns(UserWarning, match="t: expected indices from 0 to 999"):
        hosm.second_order_dsm(model, x0, time_sampler=lambda n, _: torch.rand(n))
    for t in (999 * torch.rand(8) + 2, torch.zeros(8), torch.ones(8, dtype=torch.int64)):
        hosm.first_order_dsm(model, x0, t=t.clamp(max=999))


def test_an_object_of_a_class_that_was_loaded_again(monkeypatch):
    """As by autoreload in a notebook: the names of both classes are the same."""
    old = hosm.ScoreModel(lambda x, t: x, hosm.VPSchedule())
    new = type("ScoreModel", (nn.Module,), {"__module__": hosm.ScoreModel.__module__})
    monkeypatch.setattr(sys.modules[new.__module__], "ScoreModel", new)
    with pytest.raises(TypeError, match=r"of type ScoreModel, loaded again since: make it anew"):
        hosm.first_order_dsm(old, torch.zeros(2, 3))


def test_a_network_that_was_made_in_inference_mode():
    with torch.inference_mode():
        layer = nn.Linear(3, 3)

    def call(network, x, t):
        return network(x)

    model, x = hosm.ScoreModel(layer, hosm.VPSchedule(), call=call), torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"made in inference mode\. .*copy\.deepcopy\(network\)"):
        hosm.ode_nll(model, x)
    hosm.ode_nll(hosm.ScoreModel(copy.deepcopy(layer), hosm.VPSchedule(), call=call), x)
