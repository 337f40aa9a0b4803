"""ScoreModel: predictions seen as noise, what the network is given, what the module is."""

import copy
import functools
import operator
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

import hosm_losses as hosm
from tests.cases import MLP, PREDICTIONS, SCHEDULES, VP, OfX, networks
from tests.oracles import noise_by_solving

TABLE = hosm.DiscreteSchedule.linear(10, 0.01, 0.9)
LIKELIHOODS = [hosm.ode_nll, hosm.variational_nll, hosm.ode_sample]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_score_and_denoise_are_those_of_the_prediction(prediction, schedule):
    network, shape = networks()["mlp"]
    model = hosm.ScoreModel(network, schedule, prediction)
    span = schedule.t_max - schedule.t_min
    x, t = torch.randn(3, *shape), schedule.t_min + span * torch.tensor([0.1, 0.5, 0.9])
    noise = model.noise(x, t)
    torch.testing.assert_close(model(x, t), noise)
    for row in range(3):
        alpha, sigma = schedule(t[row])
        raw = network(x[row : row + 1], t[row : row + 1])[0]
        rates = schedule.rates(t[row])
        expected = noise_by_solving(prediction, raw, x[row], alpha, sigma, rates)
        torch.testing.assert_close(noise[row], expected)
        torch.testing.assert_close(model.score(x, t)[row], -expected / sigma)
        torch.testing.assert_close(model.denoise(x, t)[row], (x[row] - sigma * expected) / alpha)


def test_times_outside_the_range_are_an_error_that_names_clip():
    """As of a solver that steps over the end; a table is looked up by no prediction of epsilon."""
    x = torch.randn(2, 3)
    for schedule in (VP, TABLE):
        model = hosm.ScoreModel(lambda x, t: x, schedule)
        for name in ("noise", "score", "denoise"):
            for t in (-0.1, schedule.t_max * 1.01, torch.nan):
                times = torch.full((2,), t)
                with pytest.raises(ValueError, match=r"t: .*range.*schedule\.clip\(t\)"):
                    getattr(model, name)(x, times)
            times = schedule.clip(torch.tensor([schedule.t_min, schedule.t_max * 1.01]).float())
            assert bool(getattr(model, name)(x, times).isfinite().all())


def test_other_words_for_a_prediction_are_stored_as_the_one():
    words = {"sample": "x0", "denoiser": "x0", "v_prediction": "v", "flow_prediction": "velocity"}
    for word, kind in words.items():
        model, same = (hosm.ScoreModel(MLP(3), VP, each) for each in (word, kind))
        assert model.prediction == kind
        assert repr(model) == repr(same)


@pytest.mark.parametrize(
    ("time", "expected"), [(None, 0.5), (999.0, 499.5), (2, 1.0), (lambda t: 1 - t, 0.5)]
)
def test_the_network_is_called_as_it_wants(time, expected):
    layer, seen = nn.Linear(2, 4), []

    class Output:
        def __init__(self, sample):
            self.sample = sample

    def call(network, x, t, **kwargs):
        seen.append((t, kwargs))
        return Output(network(x)[:, :2])

    model = hosm.ScoreModel(layer, VP, time=time, output=operator.attrgetter("sample"), call=call)
    found = model.noise(torch.zeros(1, 2), torch.tensor([0.5]), flag=True)
    assert seen == [(torch.tensor([expected]), {"flag": True})]
    torch.testing.assert_close(found, layer.bias[None, :2])


@pytest.mark.parametrize("adapt", [lambda f: f, lambda f: hosm.OnSubspace(f, torch.clone, (2,))])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_has_weights_of_its_own(compiled, adapt):
    """As that of an EMA; what .compile() has put into a model calls the original."""
    layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model = hosm.ScoreModel(adapt(OfX(layers)), VP, call=lambda network, x, t: network(x, t))
    if compiled:
        model.compile(backend="eager")
    copied = copy.deepcopy(model).eval()
    assert layers.training
    x, t = torch.randn(3, 2), torch.full((3,), 0.5)
    before = copied(x, t)
    with torch.no_grad():
        layers[0].weight.add_(1.0)
    assert torch.equal(copied(x, t), before)
    assert not torch.equal(model.eval()(x, t), before)


def test_what_is_saved_is_the_networks_and_nothing_else(tmp_path):
    model = hosm.ScoreModel(MLP(2), TABLE, "v_prediction", time=999.0)
    x, t = torch.randn(2, 2), torch.tensor([0.2, 7.0])
    expected = model(x, t)
    assert set(model.state_dict()) == {f"network.{key}" for key in model.network.state_dict()}
    assert list(model.buffers()) == []
    copied = pickle.loads(pickle.dumps(model))
    other = hosm.ScoreModel(MLP(2), TABLE, "v_prediction", time=999.0)
    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    for each in (copied, other):
        torch.testing.assert_close(each(x, t), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["function", "partial", "method", "on a subspace"])
def test_a_model_around_a_function_works_and_is_not_copied(kind):
    layers = OfX(nn.Linear(2, 2))
    network = {
        "function": lambda x, t: layers(x, t),
        "partial": functools.partial(layers),
        "method": layers.forward,
        "on a subspace": hosm.OnSubspace(layers.forward, torch.clone, (2,)),
    }[kind]
    model, x0 = hosm.ScoreModel(network, VP), torch.randn(4, 2)
    hosm.third_order_dsm(model, x0).backward()
    assert all(each.grad is not None for each in layers.parameters())
    hosm.check_derivatives(model, x0)
    for each in (model, hosm.ThirdOrderDSM(model)):
        with pytest.raises(TypeError):
            copy.deepcopy(each)
    model.eval()
    assert layers.training


def test_the_model_in_an_averaged_model_is_named():
    averaged = AveragedModel(hosm.FirstOrderDSM(hosm.ScoreModel(MLP(3), VP)).model)
    for function in (hosm.ode_nll, hosm.first_order_dsm):
        with pytest.raises(TypeError, match=r"model: expected a ScoreModel; .*\.module"):
            function(averaged, torch.zeros(2, 3))
        function(averaged.module, torch.zeros(2, 3))


class OfTime(nn.Module):
    """Joins x and t and meets its parameters with both."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=dtype)

    def forward(self, x, t):
        return self.layer(torch.cat([x, t[:, None]], 1))


@pytest.mark.parametrize("engine", ["taylor", "reverse"])
def test_data_and_times_of_a_dtype_that_the_network_cannot_take_are_explained(engine):
    options = {"engine": engine}
    model = hosm.ScoreModel(OfTime(torch.float32), VP)
    with pytest.raises(RuntimeError, match=r"data with \.to\(torch\.float32\)"):
        hosm.third_order_dsm(model, torch.zeros(4, 2), **options)
    hosm.third_order_dsm(model, torch.zeros(4, 2).float(), **options)
    network, x0 = OfTime(torch.bfloat16), torch.zeros(4, 2).bfloat16()
    with pytest.raises(RuntimeError, match=r"time=lambda t: t\.to\(torch\.bfloat16\)"):
        hosm.third_order_dsm(hosm.ScoreModel(network, VP), x0, **options)
    # The remedy.
    model = hosm.ScoreModel(network, VP, time=torch.Tensor.bfloat16)
    hosm.third_order_dsm(model, x0, **options).backward()


LOOKS_UP = {
    "embedding": lambda table, t: nn.functional.embedding(t, table),
    "indices": lambda table, t: table[t],
    "gather": lambda table, t: table.gather(0, t[:, None].expand(-1, 2)),
}


@pytest.mark.parametrize("kind", LOOKS_UP)
def test_a_network_that_looks_t_up_is_told_of_what_is_between(kind):
    table, x = torch.randn(10, 2), torch.randn(4, 2)

    def network(x, t):
        return x + LOOKS_UP[kind](table, t)

    model = hosm.ScoreModel(network, TABLE)
    nearest = hosm.ScoreModel(network, TABLE, time=lambda t: t.round().long())
    for each in (model, nearest):
        hosm.third_order_dsm(each, x)
    for function in LIKELIHOODS:
        with pytest.raises(
            (RuntimeError, IndexError), match=r"time=lambda t: t\.round\(\)\.long\(\)"
        ):
            function(model, x)
        assert not bool(function(nearest, x).failed.any())


class Raises(nn.Module):
    """A network with a fault of its own inside."""

    def forward(self, x, t):
        return torch.sin(x, t)


@pytest.mark.parametrize("function", [hosm.first_order_dsm, hosm.third_order_dsm, hosm.ode_nll])
def test_a_network_that_cannot_be_called_is_said_to_have_been_called_as_it_was(function):
    def refused(network, **kwargs):
        model = hosm.ScoreModel(network, VP)
        with pytest.raises(TypeError) as caught:
            function(model, torch.randn(2, 3), model_kwargs=kwargs)
        return "".join(getattr(caught.value, "__notes__", ()))

    for network in (nn.Sequential(nn.Linear(3, 3)), lambda x: x, torch.sin, lambda x, t, z: x):
        note = refused(network)
        assert "called as network(x, t);" in note
        assert all(option in note for option in ("call=", "time=", "output=", "model_kwargs"))
    assert "network(x, t, y=...)" in refused(lambda x, t: x, y=1)
    # What a network's own code raises is left as it is.
    for network in (Raises(), lambda x, t: torch.sin(x, t), lambda x, t: nn.SiLU()(x, t)):
        assert refused(network) == ""
