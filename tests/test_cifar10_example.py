"""The trainer docs/examples/cifar10.py, on generated pictures in the format of CIFAR-10."""

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hosm_losses as hosm

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
SMALL = ["--sde", "vp", "--size", "tiny", "--batch", "4", "--lr", "1e-3", "--warmup", "0"]
SMALL += ["--log-every", "1", "--validate", "2"]


class Squares(torch.nn.Module):
    """A loss without random numbers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x0, return_terms):
        squares = (self.weight * x0).square().sum(1)
        return squares.mean(), hosm.DSMTerms(squares)


def test_it_trains_goes_on_where_it_was_killed_and_evaluates(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers").UNet2DModel  # noqa: B018  (imported by the attribute)
    torch.set_default_dtype(torch.float32)  # as a user has it; tests/conftest.py sets it back
    monkeypatch.syspath_prepend(str(FOLDER))
    example, data = importlib.import_module("cifar10"), tmp_path / "pictures"
    example.write_pictures(data, 20)

    def train(out, *more):
        example.main(["train", str(data), str(tmp_path / out), *SMALL, *map(str, more)])
        lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
        return example.load(tmp_path / out), [*map(json.loads, lines)]

    found = []
    for parts in (1, 2):  # of three samples, one has two and one has one
        loss, x0 = Squares(), torch.arange(6.0).reshape(3, 2)
        means = example.add_gradients(loss, x0, SimpleNamespace(parts=parts, bf16=False))
        found.append([loss.weight.grad, means["loss"], means["first"]])
    torch.testing.assert_close(*found)

    update = example.Training.update

    def killed(run):
        if run.step == 3:
            raise KeyboardInterrupt
        return update(run)

    stage = ["--steps", 4, "--save-every", 2, "--dropout", 0.5]
    whole, entries = train("whole", *stage)
    monkeypatch.setattr(example.Training, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        train("one", *stage)
    monkeypatch.setattr(example.Training, "update", update)
    one, resumed = train("one", *stage)  # the third step is taken twice, with the same draws
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 3, 4]
    assert resumed[:3] + resumed[4:] == entries == resumed[:2] + resumed[3:]
    for name, weight in whole["ema"].items():
        torch.testing.assert_close(one["ema"][name], weight, rtol=0, atol=0)
    assert ["validation" in entry for entry in entries] == [False, True, False, True]
    assert entries[3]["validation"][-1] == pytest.approx(1, abs=0.5)  # of noise alone
    with pytest.raises(ValueError, match="expected the options of"):
        train("one", *stage, "--seed", 1)

    after = ["--init-from", tmp_path / "one", "--steps", 2]
    state, (first, _) = train("more", *after)
    name = "conv_out.bias"  # Adam's first step of 1e-3, nine tenths of which are in the average
    moved = state["ema"][name] - one["ema"][name]
    assert first["lr"] == 1e-3
    assert float(moved.abs().max()) == pytest.approx(1e-3, rel=1)
    _, entries = train("three", *after, "--loss", "paired3", "--parts", 2, "--weights", 1, 2, 3, 4)
    terms = [entries[0][term] for term in ("first", "second", "trace", "third")]
    expected = sum(weight * term for weight, term in enumerate(terms, 1))
    assert entries[0]["loss"] == pytest.approx(expected, rel=1e-5)

    for part in ("weight", "bias"):
        one["ema"][f"conv_out.{part}"].zero_()
    torch.save(one, tmp_path / "one" / "checkpoint.pt")
    runs = [str(tmp_path / name) for name in ("one", "three")]
    example.main(["evaluate", str(data), *runs, "--limit", "3", "--batch", "2", "--steps", "32"])
    assert f"{runs[1]} less {runs[0]}: " in capsys.readouterr().out
    bits = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    # It predicts no noise, so the ODE takes x to α x: the density of x is that of α x under the
    # prior times α^d, in the units of a level 2/256.
    log_alpha = -(0.1 * (1 - 1e-5) + 9.95 * (1 - 1e-10)) / 2
    x = (example.read_images(data, example.TEST)[:3].double() + 0.5) / 128 - 1
    square = (x * math.exp(log_alpha)).square().mean((1, 2, 3))
    exact = ((square + math.log(2 * math.pi)) / 2 - log_alpha) / math.log(2) + 7
    torch.testing.assert_close(exact.new_tensor(bits["ODE"]), exact, rtol=0, atol=1e-3)
    assert (exact.new_tensor(bits["SDE, bound"]) > exact).all()
