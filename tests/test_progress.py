"""The bar: what it is told, and what it says when it cannot be shown."""

import sys

import pytest
import torch

import hosm_losses as hosm
from hosm_losses._progress import progress_bar
from tests.oracles import networks


def test_nothing_is_shown_and_nothing_imported_unless_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with progress_bar(False, 3, "sample") as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_without_tqdm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    model = hosm.ScoreModel(lambda x, t: x, hosm.VPSchedule())
    with pytest.raises(ImportError, match=r"hosm-losses\[progress\]"):
        hosm.ode_nll(model, torch.zeros(2, 3), steps=4, progress=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda model, x: hosm.ode_nll(model, x, steps=8, progress=True, batch_size=2),
        lambda model, x: hosm.ode_nll(model, x, method="adaptive", progress=True, batch_size=2),
        lambda model, x: hosm.ode_nll(
            model, x, steps=None, tolerance=1.0, divergence="exact", progress=True, batch_size=2
        ),
        lambda model, x: hosm.variational_nll(model, x, samples=4, progress=True, batch_size=2),
        lambda model, x: hosm.ode_nll(
            model,
            ((x + 4) * 30).to(torch.uint8),
            steps=8,
            progress=True,
            divergence="exact",
            dequantization="uniform",
            dequantization_draws=3,
        ),
    ],
    ids=["fixed", "adaptive", "found", "variational", "draws"],
)
def test_the_bar_arrives_at_its_total_and_not_beyond(function, monkeypatch):
    told = []

    class Bar:
        def __init__(self, total, unit, bar_format):
            self.total = total

        def __enter__(self):
            return self

        def __exit__(self, *error):
            told.append(self.total)

        def update(self, amount):
            assert amount >= 0
            told.append(amount)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    network, shape = networks()["mlp"]
    function(hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(5, *shape))
    assert len(told) > 3
    assert sum(told[:-1]) == pytest.approx(told[-1])


def test_a_real_bar_prints_samples(capsys):
    with progress_bar(True, 4, "sample") as advance:
        for _ in range(12):
            advance(1 / 3)
    assert "4/4" in capsys.readouterr().err
