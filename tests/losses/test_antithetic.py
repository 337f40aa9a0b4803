"""Pairs of opposite noises: the means of two calls, one with ε and one with −ε.

What each of the two is comes from dense arrays in `test_random_options`, pairs among them.
"""

import pytest
import torch

import hosm_losses as hosm
from tests.cases import FUNCTIONS, MLP, MODULES, PREDICTIONS, SCHEDULES, assert_same, gradients
from tests.oracles import sign_vectors

B, D = 6, 3


class Labelled(MLP):
    """A network with a condition for each sample, which keeps what it was called with."""

    def __init__(self):
        super().__init__(D)
        self.calls = []

    def forward(self, x, t, label):
        self.calls.append((x.detach(), t.detach(), label))
        return super().forward(x, t) * label[:, None]


def score(x):
    return torch.sin(2 * x) - x


REFERENCE = torch.randn(20, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
MASK = torch.rand(B, B, generator=torch.Generator().manual_seed(6)) < 0.6
AVERAGED = {
    "batch": hosm.AveragedTargets(same=lambda kwargs: MASK),
    "reference": hosm.AveragedTargets(REFERENCE, same=lambda kwargs: torch.ones(B, 20) > 0),
}
MATRIX = torch.tensor([[2.0, 0.5, 0.0], [0.5, 3.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
TARGETS = {
    "paper": None,
    **AVERAGED,
    "scores": hosm.TargetScores(score),
    "a matrix": hosm.TargetScores(score, MATRIX),
    "both": hosm.TargetScores(score, averaged=AVERAGED["batch"]),
    "both, reference": hosm.TargetScores(score, 2.0, AVERAGED["reference"]),
}
ZERO, T = torch.zeros(B, D, dtype=torch.float64), torch.full((B,), 0.5, dtype=torch.float64)
PROBES = [1, 3, "exact", hosm.Paired(), hosm.Paired(4, "gaussian")]


def case(order, prediction="epsilon", schedule="vp"):
    torch.manual_seed(order)
    model = hosm.ScoreModel(Labelled(), SCHEDULES[schedule], prediction)
    x0, noise = torch.randn(2, B, D)
    t = SCHEDULES[schedule].t_min + (0.1 + 0.8 * torch.rand(B)) * SCHEDULES[schedule].t_max / 2
    return model, x0, {"t": t, "model_kwargs": {"label": torch.rand(B) + 0.5}}, noise


def settings():
    places = 0
    for order in (1, 2, 3):
        for targets in TARGETS:
            for probes in PROBES[: 1 if order == 1 else None]:
                for engine in ("taylor", "reverse")[: 1 if order == 1 else None]:
                    options = {} if order == 1 else {"probes": probes, "engine": engine}
                    options["reduction"] = ("mean", "sum", "none")[places % 3]
                    options["weighting"] = ("noise", "native", hosm.EDMWeighting())[places % 3]
                    places += 1
                    if order > 1 and options["reduction"] != "none" and places % 2:
                        options["fraction"] = 0.5
                    yield order, targets, PREDICTIONS[places % len(PREDICTIONS)], options


@pytest.mark.parametrize(("order", "targets", "prediction", "options"), list(settings()))
def test_a_pair_is_the_mean_of_two_calls(order, targets, prediction, options):
    schedule = {"v": "flow", "velocity": "flow", "x0": "edm", "score": "ve"}.get(prediction, "vp")
    model, x0, inputs, noise = case(order, prediction, schedule)
    inputs |= {"targets": TARGETS[targets], **options}

    def loss(noise, **more):
        generator = torch.Generator().manual_seed(2)  # of the rows and of the probes
        inputs["generator"] = generator
        return FUNCTIONS[order](model, x0, noise=noise, **inputs, **more)

    halves = [loss(noise), loss(-noise)]
    found, wanted = loss(noise, antithetic=True), (halves[0] + halves[1]) / 2
    assert found.shape == wanted.shape
    assert_same(found, wanted, 1e-12)
    found, wanted = (gradients(each.sum(), model) for each in (found, wanted))
    assert_same(found, wanted, 1e-11, least=max(float(each.abs().max()) for each in wanted))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_terms_are_per_sample_and_the_random_numbers_those_without_pairs(order):
    model, x0, inputs, _ = case(order)
    del inputs["t"]

    def drawn(**options):
        objective = MODULES[order](model, reduction="none", **options)
        generator = torch.Generator().manual_seed(3)
        return *objective(x0, return_terms=True, generator=generator, **inputs), generator

    single, terms, before = drawn()
    pairs, terms_of_pairs, after = drawn(antithetic=True)
    assert torch.equal(terms_of_pairs.t, terms.t)
    assert torch.equal(before.get_state(), after.get_state())
    assert [each.shape for each in terms_of_pairs[:order]] == [(B,)] * order
    assert pairs.shape == single.shape
    (first, *_), (both, *_) = model.network.calls[0], model.network.calls[-1]
    assert len(both) == 2 * len(first)
    torch.testing.assert_close(both[:B], first, rtol=1e-14, atol=1e-14)
    alpha, _ = model.schedule(terms.t)
    torch.testing.assert_close(both[B:], 2 * alpha[:, None] * x0 - first)


def test_one_call_of_the_network_and_of_the_scores_with_the_rows_of_both():
    model, x0, inputs, noise = case(1)
    seen = []
    scores = hosm.TargetScores(
        lambda x: seen.append(len(x)) or score(x), averaged=AVERAGED["reference"]
    )
    hosm.first_order_dsm(model, x0, noise=noise, antithetic=True, targets=scores, **inputs)
    ((x, t, label),) = model.network.calls
    assert len(x) == 2 * B
    assert torch.equal(t, inputs["t"].repeat(2))
    assert torch.equal(label, inputs["model_kwargs"]["label"].repeat(2))
    assert seen == [B, len(REFERENCE)]


def test_for_every_sign_of_the_noise_the_sums_are_those_without_pairs():
    """Over all ε with ±1 entries, exactly: the mean of the loss and of its gradient."""
    model, _, _, _ = case(3)
    signs, t = sign_vectors(D), torch.full((2**D,), 0.3)
    x0 = torch.tensor([[0.3, -1.0, 0.5]]).expand(2**D, D)
    inputs = {"t": t, "noise": signs, "probes": "exact"}
    inputs["model_kwargs"] = {"label": torch.ones(2**D)}
    plain, pairs = (
        hosm.third_order_dsm(model, x0, antithetic=each, **inputs) for each in (False, True)
    )
    assert_same(pairs, plain, 1e-12)
    assert_same(gradients(pairs, model), gradients(plain, model), 1e-11)


def test_the_noise_of_a_smooth_network_cancels_where_sigma_is_small():
    """The gradient's part of order ε/σ is gone: what is left falls with σ."""
    model, _, _, _ = case(1)
    noise, x0 = torch.randn(2, 400, D)
    inputs = {"noise": noise, "model_kwargs": {"label": torch.ones(400)}, "reduction": "none"}
    for t, most in ((1e-3, 5e-3), (1e-2, 5e-2)):
        parts = []
        for antithetic in (False, True):
            inputs |= {"t": torch.full((400,), t), "antithetic": antithetic}
            loss = hosm.first_order_dsm(model, x0, **inputs)
            rows = [
                torch.autograd.grad(one, model.network.outer.bias, retain_graph=True)[0]
                for one in loss
            ]
            parts.append(torch.stack(rows).var(0).sum())
        assert parts[1] < most * parts[0]


def test_a_tensor_of_targets_belongs_to_one_noise_and_is_refused():
    model, x0, inputs, noise = case(1)
    with pytest.raises(ValueError, match="antithetic=True; got a tensor, which belongs to"):
        hosm.first_order_dsm(model, x0, noise=noise, targets=noise, antithetic=True, **inputs)
    with pytest.raises(TypeError, match="antithetic: expected True or False"):
        hosm.first_order_dsm(model, x0, antithetic=1, **inputs)


@pytest.mark.parametrize("given", [{"t": T}, {"noise": ZERO}])
def test_a_tensor_of_targets_is_refused_without_what_it_belongs_to(given):
    model, x0 = hosm.ScoreModel(MLP(D), hosm.VPSchedule()), torch.randn(B, D)
    with pytest.raises(ValueError, match="targets: expected t and noise beside a tensor"):
        hosm.first_order_dsm(model, x0, targets=torch.zeros(B, D), **given)


def test_a_loss_that_is_not_finite_names_samples_and_not_rows():
    model = hosm.ScoreModel(
        lambda x, t: torch.where(x[:, :1] > 2, torch.nan, x), hosm.VPSchedule()
    )
    x0 = torch.tensor([[9.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="for 1 of 2 samples"):
        hosm.first_order_dsm(
            model, x0, t=torch.tensor([0.01, 0.01]), noise=torch.ones(2, 2), antithetic=True
        )
