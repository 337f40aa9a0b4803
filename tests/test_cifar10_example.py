"""The trainer of docs/examples/cifar10, on generated pictures in the format of CIFAR-10."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "docs" / "examples" / "cifar10"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ["--size", "tiny", "--sde", "vp", "--batch", "4", "--log-every", "1"]
SMALL += ["--lr", "1e-3", "--warmup", "0"]  # a step that can be seen
FILES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def scripts():
    """The modules of the folder, by name, forgotten afterwards."""
    pytest.importorskip("diffusers").UNet2DModel  # noqa: B018  (imported by the attribute)
    pytest.importorskip("PIL.Image")
    names = [path.stem for path in FOLDER.glob("*.py")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _single_precision():
    torch.set_default_dtype(torch.float32)  # as a user has it; tests/conftest.py sets it back


@pytest.fixture(scope="module")
def data(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    scripts.cifar.write_stand_in(folder, records=8)
    return folder


def command(data, out, *more):
    return [*SMALL, "--data", str(data), "--out", str(out), *map(str, more)]


@pytest.fixture
def run(scripts, data, tmp_path):
    """Train with options and return the last checkpoint and the log, without its times."""

    def trained(*more, out="run"):
        scripts.train.main(command(data, tmp_path / out, *more))
        checkpoint = scripts.checkpoints.load(tmp_path / out / "checkpoint.pt")
        return checkpoint, log(tmp_path / out)

    return trained


def log(out):
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: entry[key] for key in entry if key != "images_per_second"} for entry in entries]


def assert_same_curve(found, expected):
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def start(scripts, sde="vp"):
    """The network that a run starts from."""
    torch.manual_seed(0)
    return scripts.networks.score_model(sde, "tiny")


def go_on(one, other, step):
    """Put a run into another folder as it was at a step."""
    other.mkdir()
    shutil.copy(one / f"checkpoint-{step}.pt", other / "checkpoint.pt")
    cut_off = '{"step": 9999'  # a line that a kill cut off
    (other / "log.jsonl").write_text((one / "log.jsonl").read_text() + cut_off)


# Data


def test_records_are_read_as_the_format_says(scripts, tmp_path):
    """Byte 1 + 1024 c + 32 y + x of a record is the pixel (c, y, x)."""
    records = np.random.default_rng(1).integers(0, 256, (6, 2, 3073), np.uint8)
    records[:, :, 0] = 9
    for name, part in zip(FILES, records, strict=True):
        (tmp_path / name).write_bytes(part.tobytes())
    images = scripts.cifar.load(tmp_path, train=True)
    assert images.shape == (10, 3, 32, 32)
    assert images[3, 2, 5, 7] == records[1, 1, 1 + 2 * 1024 + 5 * 32 + 7]
    assert scripts.cifar.load(tmp_path, train=False)[1, 0, 31, 0] == records[5, 1, 1 + 31 * 32]


def test_a_damaged_file_is_an_error(scripts, data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "data_batch_2.bin"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-3073], b"\x63" + whole[1:], b""):  # the third of CIFAR-100
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            scripts.cifar.load(tmp_path, train=True)


def test_an_epoch_has_every_image_once_whatever_the_processes(scripts):
    def epoch(number, ranks):
        options = [
            {"seed": 1, "step": step, "batch": 3, "rank": rank, "ranks": ranks}
            for step in range(4 * number, 4 * number + 4)
            for rank in range(ranks)
        ]
        return np.concatenate([scripts.cifar.batch_rows(12, **each) for each in options]).tolist()

    assert sorted(epoch(0, 1)) == sorted(epoch(0, 3)) == list(range(12))
    assert set(epoch(0, 1)[:3]) == set(epoch(0, 3)[:3])
    assert epoch(0, 1) != epoch(1, 1)


# Training

SECOND, THIRD = ("first", "second", "trace"), ("first", "second", "trace", "third")
LOSSES = {
    "first": (("first",), "--sde ve"),
    "second": (SECOND, "--times schedule --weights 1 0.5 0.25"),
    "third": (THIRD, "--fraction 0.5 --parts 2 --sde ve --weights 1 0.5 0.25 0.125"),
    "paired2": (SECOND, "--bf16 --weights 1 0.5 0.25"),
    "paired3": (THIRD, "--parts 2 --dropout 0.1 --weights 1 0.5 0.25 0.125"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(scripts, run, loss):
    """What is logged as the loss is the weighted sum of what is logged of its terms."""
    terms, more = LOSSES[loss]
    more = [*more.split(), "--loss", loss, "--batch", 2, "--steps", 2, "--warmup", 4]
    state, entries = run(*more)
    assert state["step"] == 2
    assert [(entry["step"], entry["lr"]) for entry in entries] == [(1, 0.00025), (2, 0.0005)]
    for entry in entries:
        assert [*entry] == ["step", "loss", *terms, "grad_norm", "lr"]
        expected = sum(0.5**place * entry[term] for place, term in enumerate(terms))
        assert entry["loss"] == pytest.approx(expected, rel=1e-3)


def test_ve_predicts_the_noise_by_the_last_layer(scripts):
    """The UNet is given σ and divides by it, so the noise is minus what it had before."""
    model = start(scripts, "ve")
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.1, 0.9])
    sigma = 0.02 * 5000**t
    with torch.no_grad():
        h = sigma[:, None, None, None] * model.network(x, sigma).sample
        torch.testing.assert_close(model.noise(x, t), -h, rtol=1e-4, atol=1e-5)


def test_the_average_follows_the_weights(scripts, run):
    """After one step it has gone nine tenths of the way: the decay warms up."""
    state, _ = run("--steps", 1)
    moved = 0.0
    for name, before in start(scripts).network.state_dict().items():
        after = state["objective"][f"model.network.{name}"]
        torch.testing.assert_close(state["ema"][name], before + 0.9 * (after - before))
        moved = max(moved, float((after - before).abs().max()))
    assert moved == pytest.approx(1e-3, rel=0.1)  # Adam's first step


def test_a_run_goes_on_with_its_options(run, tmp_path):
    more = ["--loss", "second", "--batch", 2, "--steps", 2]
    _, whole = run(*more, "--keep-every", 1)
    go_on(tmp_path / "run", tmp_path / "b", 1)
    with pytest.raises(ValueError):
        run(*more, "--lr", 0.5, out="b")
    assert_same_curve(run(*more, out="b")[1], whole)


def test_what_is_not_finite_never_becomes_a_checkpoint(scripts, run, tmp_path, monkeypatch):
    run("--steps", 1)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    update = scripts.train.Run.update
    monkeypatch.setattr(scripts.train.Run, "update", lambda run: update(run) * math.nan)
    with pytest.raises(RuntimeError, match="finite gradients up to step 2"):
        run("--steps", 2)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_write_that_breaks_off_leaves_the_old_checkpoint(scripts, tmp_path, monkeypatch):
    path, state = tmp_path / "checkpoint.pt", {"step": 1, "options": {}, "ema": {}}
    scripts.checkpoints.save(path, state)

    def half(_state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        scripts.checkpoints.save(path, {**state, "step": 2})
    assert scripts.checkpoints.load(path) == state


def test_options_that_a_loss_has_no_use_for_are_refused(scripts, data, capsys):
    bad = ["--probes 2", "--weights 1 2 --loss third", "--weights balanced --loss second"]
    for more in [*bad, "--log-every 0", "--batch 0"]:
        with pytest.raises(SystemExit):
            scripts.train.main(command(data, "run", *more.split()))
        assert f"error: {more.split()[0]}: expected" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_hold_one_network(data, run, tmp_path):
    more = "--loss", "second", "--steps", 2
    script = [*TORCHRUN, FOLDER / "train.py", *command(data, tmp_path / "two", *more)]
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 300}
    done = subprocess.run([sys.executable, *map(str, script)], check=False, **options)
    assert "2 process(es) with one network at step 2" in done.stdout, done.stderr[-3000:]
    # Each process has images and noise of its own: the mean is not the loss of one of them.
    _, alone = run(*more)
    assert alone[0]["loss"] != pytest.approx(log(tmp_path / "two")[0]["loss"], rel=1e-4)


# Evaluation


def test_the_bits_of_a_network_that_predicts_no_noise(scripts, data, run, tmp_path):
    """Its ODE only scales: x goes to α x.

    So the density of x is that of α x under the prior times α^d, in the units of a level 2/256.
    """
    state, _ = run("--steps", 1)
    path = tmp_path / "run" / "checkpoint.pt"
    for name in ("conv_out.weight", "conv_out.bias"):
        state["ema"][name].zero_()
    scripts.checkpoints.save(path, state)
    few = ["--images", "4", "--batch", "3", "--steps", "32", "--levels", "4", "--samples", "5"]
    scripts.evaluate.main(["--checkpoint", str(path), "--data", str(data), *few])
    found = json.loads((path.parent / "evaluation.json").read_text())
    assert len(found["sde_bound"]["bits"]) == 4
    log_alpha = -(0.1 * (1 - 1e-5) + 9.95 * (1 - 1e-10)) / 2
    x = (scripts.cifar.load(data, train=False)[:4].double() + 0.5) / 128 - 1
    square = (x * math.exp(log_alpha)).square().mean((1, 2, 3))
    exact = ((square + math.log(2 * math.pi)) / 2 - log_alpha) / math.log(2) + 7
    torch.testing.assert_close(exact.new_tensor(found["ode"]["bits"]), exact, rtol=0, atol=1e-3)
    with importlib.import_module("PIL.Image").open(path.parent / "samples.png") as picture:
        assert picture.size == (3 * 34, 2 * 34)
