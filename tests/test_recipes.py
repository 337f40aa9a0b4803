"""The recipes of docs/examples run as their first lines say, on two processes where they do."""

import dataclasses
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hosm_losses

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*command):
    """Standard output of a Python process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def packages(*names):
    for name in names:
        pytest.importorskip(name)


def numbers(text):
    return [float(found) for found in re.findall(r"-?\d+\.\d+", text)]


def test_the_likelihood_of_two_processes_is_that_of_one():
    """37 images in batches of 8: the second process pads its last batch, which must not count."""
    packages("accelerate")
    script = [EXAMPLES / "likelihood_many_gpus.py", "--cpu", "--divergence", "exact"]
    alone, together = run(*script), run(*LAUNCH, *script)
    assert "over 37 samples" in alone
    assert re.findall(r"[-\d.]+", together) == re.findall(r"[-\d.]+", alone)


def test_ddp_keeps_one_network():
    assert "2 processes, the same weights: True" in run(*LAUNCH, EXAMPLES / "ddp.py")


def test_the_metric_of_two_processes_is_that_of_one():
    packages("torchmetrics")
    script = EXAMPLES / "nll_metric.py"
    assert numbers(run(*LAUNCH, script)) == numbers(run(script))


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "exact", "dequantization": "uniform"},  # whose bits are those of integers
        {"probes": 1, "dequantization": "uniform"},  # of which no standard error is known
        {"method": "adaptive", "probes": 4, "dequantization": "uniform"},  # with Student's factor
    ],
)
def test_the_metric_says_what_the_summary_says(options, monkeypatch):
    packages("torchmetrics")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("nll_metric")
    model = hosm_losses.ScoreModel(lambda x, t: torch.tanh(x), hosm_losses.VPSchedule())
    images = torch.randint(0, 256, (6, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    metric = example.ODELikelihood(model, **options)
    metric.update(images)
    torch.manual_seed(0)
    expected = hosm_losses.ode_nll(model, images, **options).summary()
    assert metric.compute() == dataclasses.asdict(expected)


ONE_BATCH = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from hosm_losses import ScoreModel, VPSchedule
from nll_metric import ODELikelihood, dist
dist.init_process_group("gloo")
torch.manual_seed(0)
model = ScoreModel(lambda x, t: torch.tanh(x), VPSchedule())
metric = ODELikelihood(model, divergence="exact", dequantization="uniform", steps=16)
if dist.get_rank() == 0:
    metric.update(torch.randint(0, 256, (6, 4), dtype=torch.uint8))
print(f"bits {metric.compute()['bits_per_dim']}\\n", end="", flush=True)
dist.destroy_process_group()
"""


def test_the_metric_of_a_process_without_a_batch(tmp_path):
    """It ended in an error, and would not have known of the integers: 7 bits too few."""
    packages("torchmetrics")
    script = tmp_path / "one_batch.py"
    script.write_text(ONE_BATCH, encoding="utf-8")
    found = re.findall(r"bits ([\d.]+)", run(*LAUNCH, script, EXAMPLES))
    assert len(found) == 2
    assert found[0] == found[1]
    assert 7 < float(found[0]) < 20


def test_diffusers_training_loop_brings_every_term_down():
    packages("accelerate", "diffusers")
    lines = run(EXAMPLES / "diffusers_accelerate.py", "--cpu").splitlines()
    assert lines[-1].startswith("40 ")
    assert numbers(lines[-1])[0] < numbers(lines[0])[0]


def test_lightning_trains_and_validates_in_inference_mode():
    packages("pytorch_lightning")
    before, after = numbers(run(EXAMPLES / "lightning_module.py").splitlines()[-1])
    assert after < before - 1


def test_the_trainer_of_lucidrains():
    packages("denoising_diffusion_pytorch")
    assert "20 steps with a last loss of" in run(EXAMPLES / "lucidrains_trainer.py")


def test_fine_tuning_lowers_the_nats_of_the_ode():
    first, fine_tuned = numbers(run(EXAMPLES / "fine_tuning.py"))
    assert fine_tuned < first


def test_a_velocity_network_gains_by_order_two():
    text = run(EXAMPLES / "velocity_2d.py", "--steps", "600")
    one, two, stein, data = numbers(text)
    assert data < two < one
    assert data < stein


def test_mixed_precision_trains():
    first, last = numbers(run(EXAMPLES / "mixed_precision.py"))
    assert last < first


def test_latents_with_text():
    packages("diffusers")
    assert "bits/dim" in run(EXAMPLES / "latents_and_text.py")


def test_the_gap_is_smaller_at_order_three(tmp_path):
    """Few steps suffice: J_Fisher, of the ODE's own score, is what order one leaves."""
    packages("matplotlib")
    text = run(EXAMPLES / "gap_1d.py", "--steps", "150", "--out", tmp_path)
    fisher = [float(found) for found in re.findall(r"j_fisher: ([\d.]+)", text)]
    assert fisher[1] < fisher[0]
    assert (tmp_path / "gap_1d_ve.png").exists()


def test_the_checkerboard_is_learned_and_drawn(tmp_path):
    """Few steps suffice to beat one step, at every order."""
    packages("matplotlib", "tqdm")
    script = [EXAMPLES / "checkerboard.py", "--side", "12", "--out", tmp_path]
    one, many = (run(*script, "--steps", steps).splitlines() for steps in ("1", "40"))
    for order, (before, after) in enumerate(zip(one, many, strict=True), 1):
        assert after.startswith(f"order {order}: KL ")
        assert 0 < numbers(after)[0] < numbers(before)[0] - 0.1
    assert (tmp_path / "checkerboard.png").exists()


def test_the_density_of_the_checkerboard(monkeypatch):
    """It is 1/2 inside the 8 squares that draw() fills, and integrates to one."""
    packages("matplotlib", "tqdm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    board = importlib.import_module("checkerboard")
    centres = (torch.floor(board.draw(1000) * 2) + 0.5) / 2
    filled, times = centres.unique(dim=0, return_counts=True)
    assert len(filled) == 8
    assert times.min() > 80
    half = torch.full((8,), math.log(0.5))
    torch.testing.assert_close(board.log_density(filled), half)
    axis = torch.linspace(-1.1, 1.1, 441)
    mass = board.log_density(torch.cartesian_prod(axis, axis)).exp().sum() * 0.005**2
    torch.testing.assert_close(mass, torch.tensor(1.0), rtol=0, atol=1e-6)


def test_digits_take_fewer_bits_than_their_levels_do(tmp_path):
    """Without a model a level of 17 takes log₂ 17 bits."""
    packages("matplotlib", "sklearn", "tqdm")
    options = ["--seconds", "1", "--held-out", "8", "--out", tmp_path]
    text = run(EXAMPLES / "digits.py", *options)
    bits = [float(found) for found in re.findall(r": ([\d.]+) ± [\d.]+ bits/dim, ", text)]
    assert len(bits) == 2
    assert all(1 < each < math.log2(17) for each in bits)
    assert "order two − order one: " in text
    assert (tmp_path / "digits_samples.png").exists()


def test_every_member_of_the_ensemble_is_trained():
    first, *members = run(EXAMPLES / "torch_func.py", "--steps", "20").splitlines()
    smallest, largest, mean = numbers(first)
    assert 0 < smallest < largest
    assert 0 < mean < largest
    assert len(members) == 4
    for before, after in map(numbers, members):
        assert after < before


def test_a_unet_of_diffusers_is_fine_tuned():
    packages("diffusers")
    text = run(EXAMPLES / "fine_tune_unet.py", "--steps", "20", "--tuning", "4", "--held-out", "8")
    first, *tuned = re.findall(r"(\S+) ± \S+ nats", text)
    assert len(tuned) == 2
    assert all(float(each) < float(first) for each in tuned)


def test_recipes_are_short_and_on_the_page():
    page = (EXAMPLES.parent / "recipes.md").read_text(encoding="utf-8")
    page += (EXAMPLES.parent / "likelihood.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        if path.name == "mixture_1d.py":
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        longest = 125 if path.name == "checkerboard.py" else 60
        assert sum(bool(line.strip()) for line in lines) < longest
        assert f"examples/{path.name}" in page
