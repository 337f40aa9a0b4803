"""The recipes of docs/examples run as their first lines say, on two processes where they say so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_recipes_are_short_and_on_the_page():
    page = (EXAMPLES.parent / "recipes.md").read_text(encoding="utf-8")
    page += (EXAMPLES.parent / "likelihood.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        if path.name == "mixture_1d.py":
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        assert sum(bool(line.strip()) for line in lines) < 60
        assert f"examples/{path.name}" in page
