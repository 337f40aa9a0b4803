"""loss_report: sizes and noise of each term's gradient, and nothing left behind."""

import json

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.oracles import MLP

D, BATCH = 3, 8


class Network(nn.Module):
    """One with buffers that a call in training changes, and dropout."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.network = nn.BatchNorm1d(D), nn.Dropout(0.1), MLP(D)

    def forward(self, x, t):
        return self.network(self.drop(self.norm(x)), t)


def setting(network=None):
    return hosm.ScoreModel(network or MLP(D), hosm.VPSchedule()), torch.randn(BATCH, D)


@pytest.mark.parametrize("options", [{}, {"estimator": "paired"}, {"fraction": 0.5}])
def test_the_numbers_are_those_of_the_gradients(options):
    model, x0 = setting()
    weights, draws = (1.0, 0.5, 2.0, 3.0), 5
    report = hosm.loss_report(
        model,
        x0,
        weights=weights,
        draws=draws,
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    parameters = list(model.parameters())
    found = {name: [] for name in ("first", "second", "trace", "third")}
    for _ in range(draws):
        module = hosm.ThirdOrderDSM(model, **options)
        state = generator.get_state()
        for place, name in enumerate(found):
            generator.set_state(state)
            alone = [w if each == place else 0 for each, w in enumerate(weights)]
            loss = module(x0, weights=alone, generator=generator)
            parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
            found[name].append(
                (float(loss.detach()), torch.cat([part.flatten() for part in parts]))
            )
    for place, (name, each) in enumerate(found.items()):
        values, gradients = zip(*each, strict=True)
        stacked = torch.stack(gradients)
        variance = stacked.var(0).sum()
        square = stacked.mean(0).square().sum() - variance / draws
        term = report.terms[name]
        assert term.weight == weights[place]
        assert term.value == pytest.approx(sum(values) / draws)
        assert term.noise == pytest.approx(float(variance.sqrt()))
        assert term.gradient == pytest.approx(float(square.clamp(0).sqrt()), abs=1e-12)
        assert term.share == pytest.approx(term.gradient / report.terms["first"].gradient)
    assert json.loads(json.dumps(report.to_dict()))["batch"] == BATCH


def test_nothing_is_left_behind():
    model, x0 = setting(Network())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    hosm.loss_report(model, x0, draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training


class Fails(Network):
    calls = 0

    def forward(self, x, t):
        self.calls += 1
        return super().forward(x, t) * (float("nan") if self.calls == 3 else 1.0)


def test_nothing_is_left_behind_by_a_failure():
    model, x0 = setting(Fails())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="expected finite outputs"):
        hosm.loss_report(model, x0, draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.network.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_they_are_off(mode):
    model, x0 = setting()
    expected = hosm.loss_report(model, x0, draws=2)
    with mode():
        assert hosm.loss_report(model, x0, draws=2) == expected


def test_the_table_says_which_term_does_nothing_and_which_drowns():
    model, x0 = setting()
    weights = (1.0, 1e-6, 1e5, 0.0)
    report = hosm.loss_report(model, x0.repeat(8, 1), weights=weights, draws=8)
    assert list(report.terms) == ["first", "second", "trace"]
    text = str(report)
    assert "second: its gradient is" in text
    assert "They are equal at a weight of about" in text
    assert "trace: its noise is" in text
    assert f"Noise of a batch of {8 * BATCH}, over 8 draws." in text
    equal = 1e-6 / report.terms["second"].share
    again = hosm.loss_report(model, x0.repeat(8, 1), weights=(1, equal, 0), draws=8, order=2)
    assert again.terms["second"].share == pytest.approx(1)


def test_what_cannot_be_told_from_noise_says_so():
    constant = hosm.TermReport(weight=1.0, value=1.0, gradient=0.0, noise=1.0, share=0.0)
    report = hosm.LossReport({"first": constant}, batch=1, draws=2)
    assert "first: its gradient cannot be told from its noise." in str(report)


def test_a_term_without_a_gradient_is_not_called_noisy():
    layer = torch.nn.Linear(2, 2)
    model = hosm.ScoreModel(layer, hosm.VPSchedule(), call=lambda layer, x, t: layer(x))
    report = hosm.loss_report(model, torch.randn(8, 2), draws=2)
    assert "third: it has no gradient, as the third of a network that is linear" in str(report)


def test_what_is_refused():
    model, x0 = setting()
    with pytest.raises(ValueError, match="draws: expected a whole number of at least 2"):
        hosm.loss_report(model, x0, draws=1)
    with pytest.raises(ValueError, match="one with parameters that require a gradient"):
        hosm.loss_report(hosm.ScoreModel(lambda x, t: x, hosm.VPSchedule()), x0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'reduction'"):
        hosm.loss_report(model, x0, reduction="none")
    with pytest.raises(ValueError, match="keep them"):
        hosm.loss_report(model, x0, weights="balanced")
