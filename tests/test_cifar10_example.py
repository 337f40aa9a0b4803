"""The trainer of docs/examples/cifar10, on generated pictures in the format of CIFAR-10."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hosm_losses.losses.options import check_weights

FOLDER = Path(__file__).parent.parent / "docs" / "examples" / "cifar10"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ["--size", "tiny", "--sde", "vp", "--batch", "4", "--log-every", "1"]
SMALL += ["--lr", "1e-3", "--warmup", "0", "--dropout", "0"]  # a step that can be seen
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
    scripts.cifar.write_stand_in(folder, records=20)
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
    every = [{key: entry[key] for key in entry if key != "images_per_second"} for entry in entries]
    return [entry for entry in every if "loss" in entry]


def lines(out, name):
    """What the log has beside the losses."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if name in entry]


def assert_same_curve(resumed, whole):
    assert [entry["step"] for entry in resumed] == [entry["step"] for entry in whole]
    for one, other in zip(resumed, whole, strict=True):
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


@pytest.mark.filterwarnings("ignore:the gradient of the term")
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(scripts, run, loss):
    """What is logged as the loss is the weighted sum of what is logged of its terms."""
    terms, more = LOSSES[loss]
    more = [*more.split(), "--loss", loss, "--batch", 2, "--steps", 2, "--warmup", 4]
    state, entries = run(*more)
    assert state["step"] == 2
    assert [(entry["step"], entry["lr"]) for entry in entries] == [(1, 0.00025), (2, 0.0005)]
    for entry in entries:
        assert [*entry] == ["step", "loss", *terms, "grad_norm", "lr", "flops"]
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


@pytest.mark.filterwarnings("ignore:the gradient of the term")
def test_a_run_goes_on_with_its_options(run, tmp_path):
    """To the bit, in a stage that was itself continued, with all that is logged."""
    run("--steps", 1, "--validate", 1, out="one")
    more = ["--loss", "second", "--batch", 2, "--steps", 3, "--dropout", 0.5]
    more += ["--init-from", tmp_path / "one" / "checkpoint.pt", "--validate", 1]
    more += ["--shares-every", 2]
    state, whole = run(*more, "--keep-every", 1)
    go_on(tmp_path / "run", tmp_path / "b", 1)
    for other in (["--lr", 0.5], ["--steps", 4]):  # of a cosine that has begun
        with pytest.raises(ValueError, match=f"got {other[0]} {other[1]} where it has"):
            run(*more, *other, out="b")
    resumed, curve = run(*more, out="b")
    assert_same_curve(curve, whole)
    for name in ("shares", "validation"):
        assert lines(tmp_path / "b", name) == lines(tmp_path / "run", name)
    assert [entry["step"] for entry in lines(tmp_path / "b", "shares")] == [1, 3]
    for part in ("objective", "ema"):
        for name, tensor in state[part].items():
            torch.testing.assert_close(resumed[part][name], tensor, rtol=0, atol=0)
    assert resumed["flops"] == state["flops"] == 3 * whole[0]["flops"]


def test_a_continued_stage_has_a_rate_and_an_average_of_its_own(scripts, run, tmp_path):
    """Half a cosine behind the warm-up, and an average over a tenth of the steps."""
    first, _ = run("--steps", 1, out="one")
    assert first["options"]["ema"] == 0.9999
    assert not first["options"]["cosine"]
    start = ["--init-from", tmp_path / "one" / "checkpoint.pt", "--flip"]
    state, entries = run(*start, "--steps", 4, "--warmup", 2)
    cosine = [1, (1 + 0.5**0.5) / 2, 1 / 2, (1 - 0.5**0.5) / 2]
    rates = [1e-3 * factor * part for factor, part in zip(cosine, (0.5, 1, 1, 1), strict=True)]
    assert [entry["lr"] for entry in entries] == pytest.approx(rates)
    assert state["origin"] == scripts.checkpoints.digest(first["ema"])
    options = scripts.options.read(["--data", "d", "--init-from", "c", "--steps", "20000"])
    assert options.ema == 1 - 1 / 2000
    options = scripts.options.read(["--data", "d", "--init-from", "c", "--ema", "0.999"])
    assert options.ema == 0.999


def test_the_average_has_its_horizon(scripts, run, tmp_path):
    """With a decay of 0.15 the third step's average is 0.15 of the second's, past the warm-up."""
    more = ["--steps", 3, "--ema", 0.15, "--keep-every", 1]
    last, _ = run(*more)
    second = scripts.checkpoints.load(tmp_path / "run" / "checkpoint-2.pt")
    for name, average in second["ema"].items():
        weight = last["objective"][f"model.network.{name}"]
        torch.testing.assert_close(last["ema"][name], 0.15 * average + 0.85 * weight)


def test_held_out_images_are_not_trained_on(scripts, run, tmp_path, monkeypatch):
    batches = []
    prepared = scripts.train.prepared

    def listed(images, **options):
        batches.append(images)
        return prepared(images, **options)

    monkeypatch.setattr(scripts.train, "prepared", listed)
    run("--steps", 24, "--batch", 4, "--log-every", 24, "--validate", 24)  # a whole epoch of 98
    *trained, held_out = batches
    assert len(held_out) == 2
    assert not any(torch.equal(a, b) for a in torch.cat(trained) for b in held_out)
    (entry,) = lines(tmp_path / "run", "validation")
    assert len(entry["validation"]) == len(entry["log_sigma_hat"]) == 8
    run("--steps", 1, out="all")
    with pytest.raises(ValueError, match="was trained on all training images"):
        run("--init-from", tmp_path / "all" / "checkpoint.pt", "--validate", 1, out="b")


def test_the_loss_of_a_validation_is_that_of_its_level(scripts, run, tmp_path, monkeypatch):
    """A network that predicts no noise has the mean of ε² at every level, about 1."""
    monkeypatch.setattr(scripts.train.Run, "update", lambda run: silent(run))

    def silent(run):
        for weight in run.average.parameters():
            weight.zero_()
        run.step += 1
        return torch.ones(())

    run("--steps", 1, "--validate", 1)
    (entry,) = lines(tmp_path / "run", "validation")
    error = (2 / (2 * 3072)) ** 0.5  # of ε², whose variance is 2
    assert entry["validation"] == pytest.approx([1.0] * 8, abs=5 * error)
    low, high = scripts.networks.score_model("vp", "tiny").schedule.log_sigma_hat_range
    assert entry["log_sigma_hat"][0] == pytest.approx(low + (high - low) / 16)


class Terms(torch.nn.Module):
    """A loss whose terms have known gradients."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

    def forward(self, x0, *, return_terms, weights):
        first, second, trace = self.weight * torch.tensor([3.0, 4.0, 100.0])
        terms = SimpleNamespace(_asdict=lambda: {"first": first})
        return sum(
            w * each for w, each in zip(weights, (first, second, trace), strict=True)
        ), terms


def test_the_norms_of_terms_by_hand(scripts):
    """Of 2·3 w₁ + 4 w₂ the gradients are 6 and 4; a term of weight 0 is not paid for."""
    loss = Terms()
    args = SimpleNamespace(weights=[2.0, 1.0, 0.0], parts=1, bf16=False)
    optimizer = torch.optim.SGD(loss.parameters(), 1.0)
    stand_in = SimpleNamespace(args=args, model=loss, optimizer=optimizer)
    norms = scripts.train.term_norms(stand_in, loss, torch.zeros(2, 3), 0)
    assert {name: float(norm) for name, norm in norms.items()} == {"first": 6.0, "second": 4.0}


def test_terms_that_are_paid_for_in_vain_are_warned_of(run, tmp_path):
    more = ["--loss", "second", "--batch", 2, "--steps", 1, "--weights", 1, 1e-9, 1]
    with pytest.warns(UserWarning, match="term 'second' has less than 1%"):
        run(*more)
    (entry,) = lines(tmp_path / "run", "shares")
    assert [*entry["shares"]] == ["first", "second", "trace"]


def test_the_gradients_of_terms_add_up_to_that_of_the_step(scripts, run, monkeypatch):
    """They have the draws of the step, dropout and rows of a fraction among them."""
    gradients, add = [], scripts.train.add_gradients

    def listed(loss_of, x0, args, **options):
        means = add(loss_of, x0, args, **options)
        flat = [weight.grad.flatten() for weight in loss_of.parameters()]
        gradients.append(torch.cat(flat).double())
        return means

    monkeypatch.setattr(scripts.train, "add_gradients", listed)
    more = ["--loss", "third", "--dropout", 0.5, "--fraction", 0.5, "--batch", 4, "--steps", 1]
    run(*more, "--weights", 1, 100, 0, 10000, "--parts", 2)
    *terms, whole = gradients
    assert len(terms) == 3
    torch.testing.assert_close(sum(terms), whole, rtol=1e-4, atol=1e-5 * float(whole.norm()))


def test_default_weights_are_those_of_the_library(scripts):
    for loss, order in (("second", 2), ("third", 3), ("paired2", 2), ("paired3", 3)):
        weights = [float(w) for w in check_weights(None, order, 3072)]
        assert scripts.networks.WEIGHTS[loss] == weights[: order + 1]


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


def test_every_option_of_the_page_is_run():
    root = FOLDER.parent.parent.parent
    page = (root / "docs" / "howto" / "cifar10.md").read_text(encoding="utf-8")
    options = {*re.findall(r"--[a-z][a-z-]+", page)} - {"--help"}
    stage = (root / ".ci" / "run").read_text(encoding="utf-8")
    stage = stage[stage.index("train_cifar10() (") : stage.index("build_site() {")]
    here = Path(__file__).read_text(encoding="utf-8")
    run = {*re.findall(r"--[a-z][a-z-]+", stage), *re.findall(r'"(--[a-z][a-z-]+)', here)}
    assert options <= run, options - run
    assert {"--init-from", "--beside", "--score-sde-checkpoint"} <= options


def test_the_table_of_costs_is_that_of_the_page(scripts):
    """Its first row, counted again; hours are FLOPs over 10¹⁴ a second."""
    page = (FOLDER.parent.parent / "howto" / "cifar10.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| order one, 500000 steps \| (.*) \|$", page, re.MULTILINE)
    flops, _, memory, *hours = map(float, row.split(" | "))
    counted, taken = scripts.cost.step("ve", "deep", "first")
    assert flops == pytest.approx(counted / 1e9, rel=5e-3)
    assert memory == pytest.approx(taken / 2**20, rel=0.1)  # other versions keep other tensors
    one = counted * 128 * 500_000 / 1e14 / 3600
    assert hours == pytest.approx([one, one / 8], rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["alone", "two processes"])
def test_sigterm_saves(scripts, data, tmp_path, launcher):
    """The processes agree on a step, and what is saved is finished up to it."""
    more = ["--steps", 10_000, "--cosine"]
    script = [*launcher, FOLDER / "train.py", *command(data, tmp_path / "run", *more)]
    script = [sys.executable, *script]
    process = subprocess.Popen([*map(str, script)], env=ENVIRONMENT, stdout=subprocess.PIPE)
    lines = tmp_path / "run" / "log.jsonl"
    until = time.monotonic() + 300
    while not (lines.exists() and lines.read_text().count("\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM or launcher
    state = scripts.checkpoints.load(tmp_path / "run" / "checkpoint.pt")
    assert 3 <= state["step"] == log(tmp_path / "run")[-1]["step"] < 10_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the gradient of the term")
def test_two_processes_hold_one_network(data, run, tmp_path):
    more = "--loss", "second", "--steps", 2
    script = [*TORCHRUN, FOLDER / "train.py", *command(data, tmp_path / "two", *more)]
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 300}
    done = subprocess.run([sys.executable, *map(str, script)], check=False, **options)
    assert "2 process(es) with one network at step 2" in done.stdout, done.stderr[-3000:]
    # Each process has images and noise of its own: the mean is not the loss of one of them.
    _, alone = run(*more)
    assert alone[0]["loss"] != pytest.approx(log(tmp_path / "two")[0]["loss"], rel=1e-4)


# Networks of score_sde

CHECKOUT = {
    "sde_lib.py": """
class VPSDE:
    def __init__(self, beta_min, beta_max, N):
        self.beta_0, self.beta_1, self.N, self.discrete_betas = beta_min, beta_max, N, ()


class VESDE:
    def __init__(self, sigma_min, sigma_max, N):
        self.sigma_min, self.sigma_max, self.N = sigma_min, sigma_max, N
""",
    "models/utils.py": """
import torch

MODELS = {}


def create_model(config):
    return torch.nn.DataParallel(MODELS[config.model.name](config))
""",
    "models/tiny.py": """
import torch
from torch import nn

from . import utils


class Tiny(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.one = nn.Conv2d(3, 3, 1)
        self.frequencies = nn.Parameter(torch.randn(3), requires_grad=False)
        self.two = nn.Conv2d(3, 3, 1)
        self.register_buffer("sigmas", torch.zeros(4))

    def forward(self, x, labels):
        if not self.config.data.centered:
            x = 2 * x - 1
        h = torch.sin(self.one(x)) + (labels[:, None] * self.frequencies).cos()[:, :, None, None]
        h = self.two(h)
        return h if self.config.data.centered else h / labels[:, None, None, None]


utils.MODELS["tiny"] = Tiny
""",
    "configs/vp/tiny.py": """
from types import SimpleNamespace as Part


def get_config():
    model = Part(name="tiny", beta_min=0.1, beta_max=20.0, num_scales=1000)
    training = Part(sde="vpsde", continuous=True)
    return Part(model=model, training=training, data=Part(centered=True))
""",
    "configs/ve/tiny.py": """
from types import SimpleNamespace as Part


def get_config():
    model = Part(name="tiny", sigma_min=0.01, sigma_max=50.0, num_scales=1000)
    training = Part(sde="vesde", continuous=True)
    return Part(model=model, training=training, data=Part(centered=False))
""",
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A stand-in for the project's code; what is imported of it is forgotten afterwards."""
    folder = tmp_path / "score_sde_pytorch"
    for name, text in CHECKOUT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("models", "configs", "sde_lib"):
            del sys.modules[name]


def score_sde_checkpoint(network, path, **changed):
    """A checkpoint as the project writes it; return its averages by name."""
    trained = [(name, w) for name, w in network.named_parameters() if w.requires_grad]
    averages = {name: torch.randn_like(w) for name, w in trained}
    state = {f"module.{name}": w + 1 for name, w in network.state_dict().items()}
    ema = {"decay": 0.9999, "num_updates": 7, "shadow_params": [*averages.values()]}
    state = {"optimizer": {}, "model": state, "ema": ema, "step": 7}
    torch.save({**state, **changed}, path)
    return averages


def test_averages_of_score_sde_are_read_in_the_order_of_trained_parameters(
    scripts, checkout, tmp_path
):
    """`one` and `two` have the same shapes: any other order would go unnoticed."""
    network = scripts.score_sde.score_sde_model(checkout, "vp/tiny").network
    path = tmp_path / "checkpoint_8.pth"
    averages = score_sde_checkpoint(network, path)
    frequencies = network.frequencies + 1
    scripts.score_sde.load_score_sde(network, path)
    for name, average in averages.items():
        torch.testing.assert_close(network.get_parameter(name).data, average, rtol=0, atol=0)
    torch.testing.assert_close(network.frequencies, frequencies)
    assert (network.sigmas == 1).all()
    shadow = {"shadow_params": [*averages.values()][1:]}
    for changed in ({"ema": shadow}, {"ema": None}, {"model": None}):
        score_sde_checkpoint(network, path, **changed)
        with pytest.raises(ValueError, match=r"checkpoint_8.pth: expected"):
            scripts.score_sde.load_score_sde(network, path)


def test_a_network_of_the_unit_interval_has_the_score_of_our_range(scripts, checkout):
    """x = 2 y - 1: s(x) = s(y)/2 under twice the σ, so the noise is the same."""
    model = scripts.score_sde.score_sde_model(checkout, "ve/tiny")
    t, x = torch.tensor([0.2, 0.7]), torch.randn(2, 3, 32, 32)
    small = 0.01 * 5000**t
    torch.testing.assert_close(model.schedule.sigma(t), 2 * small)
    with torch.no_grad():
        score = model.network((x + 1) / 2, small)
        torch.testing.assert_close(model.noise(x, t), -small[:, None, None, None] * score)


@pytest.mark.filterwarnings("ignore:the gradient of the term")
def test_a_start_from_score_sde(scripts, checkout, data, tmp_path, capsys):
    """Start, higher order and control, of one network, compared by the evaluation."""
    network = scripts.score_sde.score_sde_model(checkout, "vp/tiny").network
    path = tmp_path / "checkpoint_8.pth"
    averages = score_sde_checkpoint(network, path)
    code = ["--score-sde-code", checkout]
    more = ["--data", data, "--score-sde-config", "vp/tiny", "--batch", 4, "--no-dequantize"]
    more += [*code, "--log-every", 1, "--warmup", 0, "--score-sde-checkpoint", path]

    def train(out, *options):
        arguments = [*more, "--out", tmp_path / out, *options]
        scripts.train.main([*map(str, arguments)])
        return scripts.checkpoints.load(tmp_path / out / "checkpoint.pt")

    start = train("one", "--steps", 0)
    for name, average in averages.items():
        torch.testing.assert_close(start["ema"][name], average, rtol=0, atol=0)
    high = train("high", "--steps", 2, "--loss", "second", "--shares-every", 3)
    train("more", "--steps", 2)
    assert high["origin"] == scripts.checkpoints.digest(start["ema"])
    assert "ok: orders 1 and 2" in capsys.readouterr().out
    few = ["--data", data, *code, "--limit", 3, "--levels", 2, "--samples", 0, "--steps", 4]
    for out in ("one", "more", "high"):
        beside = ["--beside", tmp_path / "one", tmp_path / "more"] if out == "high" else []
        arguments = ["--checkpoint", tmp_path / out / "checkpoint.pt", *few, *beside]
        with suppress(SystemExit):  # paths of random weights in four steps
            scripts.evaluate.main([*map(str, arguments)])
    assert f"{tmp_path / 'high'} less {tmp_path / 'more'}" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="expected score_sde_pytorch's code"):
        train("b", "--steps", 1, "--score-sde-config", "vp/other")


def test_starts_that_contradict_each_other_are_refused(scripts, capsys):
    code = "--score-sde-code c --score-sde-config vp/d"
    bad = ["--score-sde-code c", "--score-sde-checkpoint f", f"{code} --sde vp"]
    bad += [
        f"{code} --score-sde-checkpoint f {more}" for more in ("--init-from g", "--validate 9")
    ]
    for more in bad:
        with pytest.raises(SystemExit):
            scripts.options.read(["--data", "d", *more.split()])
        assert "expected" in capsys.readouterr().err


# Evaluation


def evaluated(scripts, data, path, *more):
    few = ["--limit", 4, "--batch", 2, "--steps", 4, "--levels", 2, "--samples", 0]
    arguments = ["--checkpoint", path, "--data", data, *few, *more]
    scripts.evaluate.main([*map(str, arguments)])


def test_a_failed_evaluation_leaves_its_numbers_and_names_the_images(
    scripts, data, run, tmp_path, monkeypatch, capsys
):
    """Where one batch raises, and where every path fails."""
    state, _ = run("--steps", 1)
    path = tmp_path / "run" / "checkpoint.pt"
    for name in ("conv_out.weight", "conv_out.bias"):
        state["ema"][name].zero_()
    scripts.checkpoints.save(path, state)
    ode_nll, calls = scripts.evaluate.ode_nll, []

    def breaks(model, x, **options):
        calls.append(x)
        if len(calls) == 2:
            raise MemoryError("out of it")
        return ode_nll(model, x, **options)

    monkeypatch.setattr(scripts.evaluate, "ode_nll", breaks)
    evaluated(scripts, data, path)
    report = json.loads((path.parent / "evaluation.json").read_text())
    assert [bits is None for bits in report["uniform"]["bits"]] == [False, False, True, True]
    expected = dict.fromkeys(("2", "3"), "MemoryError: out of it")
    assert report["uniform"]["failures"] == expected
    assert not any(report[name]["failures"] for name in ("truncated normal", "clean", "bound"))
    assert "failed images 2, 3; image 2: MemoryError: out of it" in capsys.readouterr().out
    state["ema"]["conv_out.bias"].fill_(math.nan)
    scripts.checkpoints.save(path, state)
    with pytest.raises(SystemExit, match="got none of uniform"):
        evaluated(scripts, data, path)
    report = json.loads((path.parent / "evaluation.json").read_text())
    assert report["clean"]["bits"] == [None] * 4
    assert [*report["clean"]["failures"]] == ["0", "1", "2", "3"]
    assert "failed images 0, 1, 2, 3" in capsys.readouterr().out


def test_an_evaluation_that_breaks_off_leaves_what_it_had(
    scripts, data, run, tmp_path, monkeypatch
):
    run("--sde", "ve", "--steps", 20)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(scripts.evaluate, "variational_nll", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(scripts, data, tmp_path / "run" / "checkpoint.pt", "--limit", 1)
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {"uniform", "clean"} <= report.keys()
    assert "bound" not in report


def test_a_schedule_that_starts_at_more_noise_than_a_cell_leaves_truncated_normal_out(
    scripts, data, run, tmp_path
):
    run("--sde", "ve", "--steps", 20)
    evaluated(scripts, data, tmp_path / "run" / "checkpoint.pt", "--limit", 1, "--steps", 32)
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["truncated normal"] == {"left_out": "σ/α starts at 0.02 > 0.0013"}
    assert report["clean"]["bits"] != report["uniform"]["bits"]  # noise of 2.5 levels is added


def evaluation(bits, *, origin="start", weights="other", steps=10, **settings):
    quantities = {"uniform": {"bits": bits}, "truncated normal": {"left_out": "no"}}
    settings = {"seed": 0, **settings}
    runs = {"step": steps, "flops": 1e3 * steps, "origin": origin, "weights": weights}
    return {**runs, "settings": settings, **quantities}


def test_the_table_by_hand(scripts):
    """Differences are of single images, of those that all runs have."""
    runs = {
        "one": evaluation([1.0, 2.0, 3.0, 5.0], origin=None, weights="start", steps=500),
        "more": evaluation([1.0, 2.5, 3.0, None]),
        "dear": evaluation([0.5, 2.0, 2.0, 9.0], steps=40),
        "three": evaluation([0.0, 1.0, 2.0, 7.0]),
    }
    third, sixth = 1 / 3, 1 / 6  # standard deviations over √3, of (1, 1.5, 1) and (.5, 1, 0)
    rows = [
        ["", "one", "more", "dear", "three"],
        ["---"] * 5,
        ["steps", "500", "10", "40", "10"],
        ["flops", "5e+05", "1e+04", "4e+04", "1e+04"],
        ["uniform, 3 images", "2.0000 ± 0.5774", "2.1667 ± 0.6009", "1.5000 ± 0.5000",
         "1.0000 ± 0.5774"],
    ]  # fmt: skip
    rows[0] += ["three less one", "three less more", "three less dear"]
    rows[1] += ["---"] * 3
    rows[2] += [""] * 3
    rows[3] += [""] * 3
    difference = f"{-3.5 * third:.4f} ± {sixth:.4f}"
    rows[4] += ["-1.0000 ± 0.0000", difference, f"-0.5000 ± {0.5 / 3**0.5:.4f}"]
    expected = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    assert scripts.compare.table(runs) == expected


def test_what_is_not_a_pair_is_not_compared(scripts):
    start = evaluation([1.0, 2.0], origin=None, weights="start")
    with pytest.raises(ValueError, match="differ in seed"):
        scripts.compare.table({"one": start, "three": evaluation([1.0, 2.0], seed=1)})
    for stranger in (evaluation([1.0, 2.0], origin="elsewhere"), {**start, "weights": "third"}):
        runs = {"one": start, "more": stranger, "three": evaluation([1.0, 2.0])}
        with pytest.raises(ValueError, match="went on from one checkpoint"):
            scripts.compare.table(runs)


def test_the_bits_of_a_network_that_predicts_no_noise(scripts, data, run, tmp_path, capsys):
    """Its ODE only scales: x goes to α x.

    So the density of x is that of α x under the prior times α^d, in the units of a level 2/256.
    """
    state, _ = run("--steps", 1)
    path = tmp_path / "run" / "checkpoint.pt"
    for name in ("conv_out.weight", "conv_out.bias"):
        state["ema"][name].zero_()
    scripts.checkpoints.save(path, state)
    few = ["--limit", "4", "--batch", "3", "--steps", "32", "--levels", "4", "--samples", "5"]
    scripts.evaluate.main(["--checkpoint", str(path), "--data", str(data), *few])
    report = json.loads((path.parent / "evaluation.json").read_text())
    bits = {name: report[name]["bits"] for name in scripts.compare.QUANTITIES}
    _, high = scripts.networks.score_model("vp", "tiny").schedule.log_sigma_hat_range
    levels = scripts.cifar.load(data, train=False)[:4].double()
    # The centre of a cell: of Uniform's, and of those of levels that go from -1 to 1.
    log_alpha = -(0.1 * (1 - 1e-5) + 9.95 * (1 - 1e-10)) / 2
    x = (levels + 0.5) / 128 - 1
    square = (x * math.exp(log_alpha)).square().mean((1, 2, 3))
    exact = ((square + math.log(2 * math.pi)) / 2 - log_alpha) / math.log(2) + 7
    torch.testing.assert_close(exact.new_tensor(bits["uniform"]), exact, rtol=0, atol=1e-3)
    # From where σ/α is a sixth of a cell, the noise of its start: its entropy is that of a normal
    # one truncated at three σ, in cells of six σ.
    cell, mass = 2 / 255, math.erf(3 / 2**0.5)
    variance = 1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / mass
    entropy = math.log(mass * math.sqrt(2 * math.pi)) + variance / 2 - math.log(6)
    end = math.log1p(math.exp(2 * high)) / -2
    x = (2 * levels / 255 - 1) * math.exp(end)
    square = x.square().mean((1, 2, 3)) + variance * (math.exp(end) * cell / 6) ** 2
    density = (square + math.log(2 * math.pi)) / 2 - end - math.log(cell)
    exact = (density - entropy) / math.log(2)
    # By five standard deviations of the mean of u²/2 over 3072 pixels, u a normal one up to three.
    truncated = exact.new_tensor(bits["truncated normal"])
    torch.testing.assert_close(truncated, exact, rtol=0, atol=5 * 0.7 / (3072**0.5 * math.log(2)))
    gap = np.subtract(bits["bound"], bits["clean"])
    assert bits["gap"] == pytest.approx(gap)
    assert report["uniform"]["failures"] == {}
    assert "truncated normal, 4 images" in capsys.readouterr().out
    with importlib.import_module("PIL.Image").open(path.parent / "samples.png") as picture:
        assert picture.size == (3 * 34, 2 * 34)
