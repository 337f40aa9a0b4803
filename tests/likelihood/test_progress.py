"""The bar: what it is told."""

import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import hosm_losses as hosm
from hosm_losses._checks import progress_bar
from tests.cases import MLP, VP

MODEL, X = hosm.ScoreModel(MLP(3).double(), VP), torch.linspace(-1, 1, 15).double().reshape(5, 3)
FEW = hosm.FixedGrid(8)
IMAGES = {"dequantization": hosm.Uniform(3), "solver": FEW}
USES = [
    partial(hosm.ode_nll, x=X, solver=FEW),
    partial(hosm.ode_nll, x=X, solver=hosm.Adaptive()),
    partial(hosm.ode_sample, latent=X, solver=hosm.FixedGrid(8, companion=True)),
    partial(hosm.ode_nll, x=X, solver=hosm.ToTolerance(1.0), divergence="exact"),
    partial(hosm.variational_nll, x=X, samples=4),
    lambda model, progress, **_: hosm.check_wrapping(model, X.repeat(4, 1), progress=progress),
    partial(hosm.ode_nll, x=(127 * X).byte(), divergence="exact", **IMAGES),
]


def test_tqdm_is_imported_where_a_bar_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    hosm.ode_nll(MODEL, X, solver=FEW)
    with pytest.raises(ImportError, match="tqdm"):
        hosm.ode_nll(MODEL, X, solver=FEW, progress=True)


@pytest.mark.parametrize("use", USES)
def test_the_bar_arrives_at_its_total_and_not_beyond(use, monkeypatch):
    told = []

    @contextmanager
    def bar(total, unit, bar_format):
        yield SimpleNamespace(update=told.append)
        told.append(total)

    monkeypatch.setattr("tqdm.auto.tqdm", bar)
    use(MODEL, progress=True, batch_size=2)
    assert len(told) > 3
    assert min(told) >= 0
    assert sum(told[:-1]) == pytest.approx(told[-1])


def test_a_real_bar_prints_samples(capsys):
    with progress_bar(True, 4, "sample") as advance:
        for _ in range(12):
            advance(1 / 3)
    assert "4/4" in capsys.readouterr().err
