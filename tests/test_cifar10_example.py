"""The trainer of docs/examples/cifar10, on generated pictures in the format of CIFAR-10."""

import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hosm_losses import NLLResult, ScoreModel, VPSchedule

FOLDER = Path(__file__).parent.parent / "docs" / "examples" / "cifar10"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ["--size", "tiny", "--sde", "vp", "--batch", "4", "--log-every", "1"]
SMALL += ["--lr", "1e-3", "--warmup", "0"]  # a step that can be seen
FILES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


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


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def curve(out):
    """What was logged of every step, without the time it took."""
    return [
        {key: value for key, value in entry.items() if key != "images_per_second"}
        for entry in log(out)
    ]


def assert_same_curve(found, expected):
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


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


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _without_a_record(path):
    path.write_bytes(path.read_bytes()[:-3073])


def _of_cifar100(path):
    path.write_bytes(b"\x63" + path.read_bytes()[1:])


def _python_version(path):
    path.rename(path.with_suffix(""))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_cut, ValueError, "whole records of 3073 bytes.*30730000 bytes; got 24583 bytes, 7 rec"),
        (_without_a_record, ValueError, r"as many records.*got .*data_batch_2\.bin 7, "),
        (_of_cifar100, ValueError, "label from 0 to 9.*got 99"),
        (Path.unlink, FileNotFoundError, r"data_batch_2\.bin, of 10000 records; there is none"),
        (_python_version, FileNotFoundError, "data_batch_2 is a pickle"),
    ],
)
def test_a_damaged_file_is_an_error_that_says_what_was_expected(
    scripts, data, tmp_path, damage, error, message
):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "data_batch_2.bin")
    with pytest.raises(error, match=message):
        scripts.cifar.load(tmp_path, train=True)


def test_an_epoch_has_every_image_once_whatever_the_processes(scripts):
    def epoch(number, ranks):
        steps = range(4 * number, 4 * number + 4)
        rows = [
            scripts.cifar.batch_rows(12, seed=1, step=step, batch=3, rank=rank, ranks=ranks)
            for step in steps
            for rank in range(ranks)
        ]
        return np.concatenate(rows).tolist()

    assert sorted(epoch(0, 1)) == sorted(epoch(0, 3)) == list(range(12))
    assert set(epoch(0, 1)[:3]) == set(epoch(0, 3)[:3])
    assert epoch(0, 1) != epoch(1, 1)


def test_images_are_dequantized_within_their_levels(scripts):
    images = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(1, 3, 32, 32)
    x = scripts.cifar.prepared(images, flip=False)
    inside = (x + 1) * 128 - images
    assert -1e-4 < inside.min() < 0.01 < 0.99 < inside.max() < 1 + 1e-4
    flipped = (scripts.cifar.prepared(images.repeat(50, 1, 1, 1), flip=True) + 1) * 128 - 0.5
    as_is, mirrored = (
        ((flipped - each).abs() < 0.5 + 1e-4).flatten(1).all(1)
        for each in (images, images.flip(3))
    )
    assert torch.equal(as_is, ~mirrored)
    assert 10 < int(mirrored.sum()) < 40


# Losses

WEIGHTS = (1.0, 0.5, 0.25, 0.125)
SECOND = ("first", "second", "trace")
THIRD = (*SECOND, "third")


@pytest.mark.parametrize(
    ("loss", "terms", "more"),
    [
        ("first", ("first",), ["--sde", "ve"]),
        ("second", SECOND, ["--times", "schedule"]),
        ("third", THIRD, ["--fraction", "0.5", "--parts", "2", "--sde", "ve"]),
        ("paired2", SECOND, ["--bf16"]),
        ("paired3", THIRD, ["--parts", "2", "--dropout", "0.1"]),
        ("stein", ("first", "rate"), ["--probes", "2"]),
    ],
)
def test_every_loss_trains(scripts, data, tmp_path, loss, terms, more):
    """What is logged as the loss is the weighted sum of what is logged of its terms."""
    weights = WEIGHTS[: len(terms)]
    if loss == "stein":
        more = [*more, "--weights", 0.5]
    elif loss != "first":
        more = [*more, "--weights", *weights]
    more = ["--loss", loss, "--batch", 2, "--steps", 2, "--warmup", 4, *more]
    scripts.train.main(command(data, tmp_path, *more))
    entries = log(tmp_path)
    assert [entry["step"] for entry in entries] == [1, 2]
    assert [entry["lr"] for entry in entries] == [0.00025, 0.0005]
    logged = ["step", "loss", *terms, "grad_norm", "lr", "images_per_second"]
    assert list(entries[0]) == logged
    for entry in entries:
        expected = sum(w * entry[term] for w, term in zip(weights, terms, strict=True))
        if loss == "stein":  # in nats: an integral over u = ½ log(exp B − 1)
            ends = (0.1 * t + 9.95 * t * t for t in (1e-5, 1.0))
            low, high = (math.log(math.expm1(b)) / 2 for b in ends)
            expected *= high - low
        assert entry["loss"] == pytest.approx(expected, rel=1e-3)
    state = scripts.checkpoints.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 2


def test_the_page_says_how_many_weights_a_size_has(scripts):
    page = (FOLDER.parent.parent / "cifar10.md").read_text(encoding="utf-8")
    said = r"`(\w+)` \(([\d.]+) (?:or|to) ([\d.]+)(?: million weights)?\)"
    found = {size: sorted(map(float, numbers)) for size, *numbers in re.findall(said, page)}
    assert found.keys() == scripts.networks.SIZES.keys()
    for size, numbers in found.items():
        with torch.device("meta"):
            models = [scripts.networks.score_model(sde, size) for sde in ("vp", "ve")]
        for model, number in zip(models, numbers, strict=True):
            weights = sum(each.numel() for each in model.parameters()) / 1e6
            assert weights == pytest.approx(number, abs=0.05 if size == "tiny" else 0.5)


def test_log_sigma_hat_is_uniform_for_vp(scripts):
    """A draw and its mirror image have the middle of the range as their mean."""
    model = scripts.networks.score_model("vp", "tiny")
    objective = scripts.networks.objective(model, "second", times="log_sigma_hat")
    torch.manual_seed(0)
    t = objective.options.time_sampler(1000, None)
    torch.manual_seed(0)
    unit = torch.rand(1000)
    ends = [math.log(math.expm1(0.1 * t + 9.95 * t * t)) / 2 for t in (1e-5, 1.0)]
    expected = ends[0] + unit * (ends[1] - ends[0])
    torch.testing.assert_close(model.schedule.log_sigma_hat(t), expected, rtol=1e-4, atol=1e-4)


def test_ve_predicts_the_noise_by_the_last_layer(scripts):
    """The UNet is given σ and divides by it, so the noise is minus what it had before."""
    model = scripts.networks.score_model("ve", "tiny")
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.1, 0.9])
    sigma = 0.02 * 5000**t
    with torch.no_grad():
        h = sigma[:, None, None, None] * model.network(x, sigma).sample
        torch.testing.assert_close(model.noise(x, t), -h, rtol=1e-4, atol=1e-5)


def test_balanced_weights_are_kept(scripts, data, tmp_path):
    more = ["--loss", "second", "--weights", "balanced", "--batch", 2]
    scripts.train.main(command(data, tmp_path / "a", "--steps", 2, "--keep-every", 1, *more))
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "checkpoint-1.pt", tmp_path / "b" / "checkpoint.pt")
    shutil.copy(tmp_path / "a" / "log.jsonl", tmp_path / "b" / "log.jsonl")
    scripts.train.main(command(data, tmp_path / "b", "--steps", 2, *more))
    assert_same_curve(curve(tmp_path / "b"), curve(tmp_path / "a"))


# Going on after a kill


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on_as_if_it_had_not_been(scripts, data, tmp_path):
    """SIGKILL to a process at a step that is drawn, in the middle of whatever it does there."""
    at = random.Random(7).randint(4, 9)
    options = ["--loss", "second", "--dropout", "0.1", "--batch", 2, "--save-every", 3]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    started = [sys.executable, FOLDER / "train.py", *command(data, killed, *options)]
    with subprocess.Popen(
        [*started, "--steps", "100000"], env=environment(), stdout=subprocess.DEVNULL
    ) as process:
        path, end = killed / "log.jsonl", time.monotonic() + 120
        while not path.exists() or path.read_text().count("\n") < at:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = scripts.checkpoints.load(killed / "checkpoint.pt")["step"]
    assert kept >= 3
    with path.open("a") as file:
        file.write('{"step": 9999')  # a line that the kill cut off
    for out in (killed, whole):
        scripts.train.main(command(data, out, *options, "--steps", kept + 2))
    assert [entry["step"] for entry in log(killed)] == list(range(1, kept + 3))
    assert_same_curve(curve(killed), curve(whole))
    one, other = (scripts.checkpoints.load(out / "checkpoint.pt") for out in (killed, whole))
    for name, weight in one["ema"].items():
        torch.testing.assert_close(weight, other["ema"][name])


def test_two_processes_hold_one_network_and_go_on(scripts, data, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"

    def launch(out, *more):
        script = [FOLDER / "train.py", *command(data, out, "--loss", "second", *more)]
        done = subprocess.run(
            [sys.executable, *map(str, [*TORCHRUN, *script, "--steps", 4])],
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "2 process(es) with one network at step 4" in launch(one, "--keep-every", 2)
    other.mkdir()
    shutil.copy(one / "checkpoint-2.pt", other / "checkpoint.pt")
    shutil.copy(one / "log.jsonl", other / "log.jsonl")
    assert "from step 2" in launch(other)
    assert_same_curve(curve(other), curve(one))
    # Each process has images and noise of its own: the mean is not the loss of one of them.
    scripts.train.main(command(data, tmp_path / "alone", "--loss", "second", "--steps", 1))
    assert log(tmp_path / "alone")[0]["loss"] != pytest.approx(log(one)[0]["loss"], rel=1e-4)


def test_the_average_follows_the_weights(scripts, data, tmp_path):
    """After one step it has gone nine tenths of the way: the decay warms up."""
    scripts.train.main(command(data, tmp_path, "--steps", 1))
    state = scripts.checkpoints.load(tmp_path / "checkpoint.pt")
    torch.manual_seed(0)
    start = scripts.networks.score_model("vp", "tiny").network.state_dict()
    moved = 0.0
    for name, before in start.items():
        after = state["objective"][f"model.network.{name}"]
        torch.testing.assert_close(state["ema"][name], before + 0.9 * (after - before))
        moved = max(moved, float((after - before).abs().max()))
    assert moved == pytest.approx(1e-3, rel=0.1)  # Adam's first step


def test_the_gradient_is_clipped(scripts, data, tmp_path):
    """Far below the ε of Adam, 1e-8, a step is that of the gradient and as small."""
    scripts.train.main(command(data, tmp_path, "--steps", 1, "--clip", "1e-12"))
    after = scripts.checkpoints.load(tmp_path / "checkpoint.pt")["objective"]
    torch.manual_seed(0)
    for name, before in scripts.networks.score_model("vp", "tiny").network.state_dict().items():
        assert float((after[f"model.network.{name}"] - before).abs().max()) < 1e-6
    assert log(tmp_path)[0]["grad_norm"] > 0.01  # as it was before


def test_every_step_has_noise_of_its_own(scripts, tmp_path):
    """The pictures are all the same, and so are the weights, at a rate of 0."""
    for name in FILES:
        (tmp_path / name).write_bytes(bytes(3073 * 4))
    scripts.train.main(command(tmp_path, tmp_path, "--steps", 2, "--lr", 0))
    one, other = (entry["loss"] for entry in log(tmp_path))
    assert one != pytest.approx(other, rel=1e-4)


@pytest.fixture(scope="module")
def first_loss(scripts, data, tmp_path_factory):
    """The loss of the first step with some options."""

    def found(*more):
        out = tmp_path_factory.mktemp("run")
        scripts.train.main(command(data, out, "--steps", 1, *more))
        return log(out)[0]["loss"]

    return found


def test_options_reach_what_they_are_for(first_loss):
    plain = first_loss()
    assert first_loss() == plain
    others = ["--bf16", "--dropout 0.5", "--no-flip", "--seed 1", "--times schedule"]
    for other in others:
        assert first_loss(*other.split()) != plain, other
    assert first_loss("--bf16") == pytest.approx(plain, rel=0.02)


def test_fine_tuning_starts_from_the_average_with_a_fresh_optimizer(scripts, data, tmp_path):
    scripts.train.main(command(data, tmp_path / "one", "--steps", 2))
    kept = tmp_path / "one" / "checkpoint.pt"
    options = scripts.train.options
    args = options(command(data, tmp_path / "two", "--init-from", kept, "--loss", "paired3"))
    run = scripts.train.Run(args, torch.device("cpu"))
    for name, weight in scripts.checkpoints.load(kept)["ema"].items():
        assert torch.equal(run.model.network.state_dict()[name], weight)
    assert not run.optimizer.state
    assert run.step == 0
    other = options(command(data, tmp_path / "two", "--init-from", kept, "--size", "small"))
    with pytest.raises(ValueError, match="--size small where it has tiny"):
        scripts.train.Run(other, torch.device("cpu"))


def test_other_options_are_refused_when_a_run_goes_on(scripts, data, tmp_path):
    scripts.train.main(command(data, tmp_path, "--steps", 1))
    with pytest.raises(ValueError, match=r"--lr 0\.5 where it has 0\.001"):
        scripts.train.main(command(data, tmp_path, "--steps", 2, "--lr", 0.5))


def test_what_is_not_finite_never_becomes_a_checkpoint(scripts, data, tmp_path, monkeypatch):
    scripts.train.main(command(data, tmp_path, "--steps", 1))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    update = scripts.train.Run.update
    monkeypatch.setattr(scripts.train.Run, "update", lambda run: update(run) * math.nan)
    with pytest.raises(RuntimeError, match="finite gradients up to step 2"):
        scripts.train.main(command(data, tmp_path, "--steps", 2))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


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


class _Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(scripts, tmp_path):
    torch.save({"step": _Code(tmp_path / "made"), "options": {}, "ema": {}}, tmp_path / "bad.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "bad.pt").read_bytes()[:100])
    torch.save(torch.zeros(1), tmp_path / "other.pt")
    for name in ("bad.pt", "cut.pt", "other.pt"):
        with pytest.raises(ValueError, match=f"{name}: expected a checkpoint of train"):
            scripts.checkpoints.load(tmp_path / name)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--probes", "2"], "--probes: expected none with --loss first"),
        (["--loss", "third", "--weights", "1", "2"], "expected 4 with --loss third; got 2"),
        (
            ["--loss", "stein", "--weights", "balanced"],
            "--weights: expected a number with --loss st",
        ),
        (["--log-every", "0"], "--log-every: expected 1 or more; got 0"),
        (["--batch", "0"], "--batch: expected 1 or more; got 0"),
    ],
)
def test_options_that_a_loss_has_no_use_for_are_refused(scripts, data, capsys, more, message):
    with pytest.raises(SystemExit):
        scripts.train.main(command(data, "run", *more))
    assert message in capsys.readouterr().err


def test_a_batch_has_to_fit(scripts, data, tmp_path):
    with pytest.raises(ValueError, match="up to the 40 images; got 41"):
        scripts.train.main(command(data, tmp_path, "--batch", 41))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--levels", "5"], "--levels: expected an even number of 2 or more; got 5"),
        (["--images", "0"], "--images: expected 1 or more; got 0"),
    ],
)
def test_an_evaluation_is_refused_before_it_starts(scripts, data, capsys, more, message):
    with pytest.raises(SystemExit):
        scripts.evaluate.options(["--checkpoint", "none.pt", "--data", str(data), *more])
    assert message in capsys.readouterr().err


# Evaluation


def test_bits_per_dimension_are_printed_with_their_standard_error(scripts, data, tmp_path, capsys):
    """A network that predicts no noise has an ODE that only scales: x goes to α x.

    So the density of x is that of α x under the prior times α^d, in the units of a level 2/256.
    """
    scripts.train.main(command(data, tmp_path, "--steps", 1))
    state = scripts.checkpoints.load(tmp_path / "checkpoint.pt")
    for name in ("conv_out.weight", "conv_out.bias"):
        state["ema"][name].zero_()
    scripts.checkpoints.save(tmp_path / "checkpoint.pt", state)
    capsys.readouterr()
    few = ["--images", 4, "--batch", 3, "--steps", 32, "--levels", 4, "--samples", 5]
    chosen = ["--checkpoint", tmp_path / "checkpoint.pt", "--data", data, *few]
    scripts.evaluate.main([str(each) for each in chosen])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "evaluation.json").read_text())
    for line, name in zip(lines, ("ode", "sde_bound"), strict=True):
        bits = found[name]["bits"]
        mean, error = np.mean(bits), np.std(bits, ddof=1) / 2
        assert line.startswith(f"{name}: {mean:.4f} ± {error:.4f} bits/dim")
        assert f"over {len(bits)} samples" in line
    log_alpha = -(0.1 * (1 - 1e-5) + 9.95 * (1 - 1e-10)) / 2
    x = (scripts.cifar.load(data, train=False)[:4].double() + 0.5) / 128 - 1
    square = (x * math.exp(log_alpha)).square().mean((1, 2, 3))
    nats = (square + math.log(2 * math.pi)) / 2 - log_alpha
    exact = nats / math.log(2) + 7
    torch.testing.assert_close(exact.new_tensor(found["ode"]["bits"]), exact, rtol=0, atol=1e-3)
    with importlib.import_module("PIL.Image").open(tmp_path / "samples.png") as picture:
        assert picture.size == (3 * 34, 2 * 34)


class _OnePicture(torch.nn.Module):
    """The noise of data that is one picture alone, to which the ODE brings every latent."""

    def __init__(self, picture):
        super().__init__()
        self.picture = torch.nn.Parameter(picture)

    def forward(self, x, t):
        alpha, sigma = (each[:, None, None, None] for each in VPSchedule()(t))
        return (x - alpha * self.picture) / sigma


def test_samples_are_saved_as_pictures(scripts, data, tmp_path):
    levels = scripts.cifar.load(data, train=True)[0]
    model = ScoreModel(_OnePicture((levels + 0.5) / 128 - 1), VPSchedule())
    args = SimpleNamespace(samples=3, steps=32, batch=2, seed=0)
    scripts.evaluate.save_samples(model, tmp_path / "samples.png", args)
    with importlib.import_module("PIL.Image").open(tmp_path / "samples.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for place, (row, column) in enumerate([(0, 0), (0, 34), (34, 0), (34, 34)]):
        tile = pixels[:, row : row + 34, column : column + 34]
        white = torch.full_like(tile, 255)
        expected = white.clone()
        expected[:, 1:33, 1:33] = levels
        assert torch.equal(tile, white if place == 3 else expected)


def test_the_number_of_processes_does_not_change_the_numbers(scripts):
    def likelihood(x, *, dequantization, generator):
        nll = x.double().mean((1, 2, 3)) + torch.rand(len(x), generator=generator)
        zero = torch.zeros(len(x))
        return NLLResult(nll, x, zero, None, zero, zero > 0)

    def found(rank, count):
        device = torch.device("cpu")
        processes = SimpleNamespace(rank=rank, count=count, many=False, device=device)
        return scripts.evaluate.of_all(likelihood, images, args, processes).nll

    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    args = SimpleNamespace(batch=2, seed=3)
    alone = found(0, 1)
    assert (alone > 0).all()
    assert torch.equal(found(0, 2) + found(1, 2), alone)
