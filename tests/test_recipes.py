"""The recipes of docs/examples run as their first lines say, on two processes where they do."""

import dataclasses
import importlib
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import hosm_losses

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*command):
    """Standard output of a Python process of its own."""
    options = {"capture_output": True, "text": True, "check": False, "timeout": 300}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


NUMBER = r"-?\d+\.\d+"


def numbers(text, pattern=NUMBER):
    return [float(found) for found in re.findall(pattern, text)]


def falls(text, pattern=NUMBER):
    """The first number is the largest."""
    first, *others = numbers(text, pattern)
    return len(others) > 0 and max(others) < first


def gains_by_order_two(text):
    one, two, data = numbers(text)
    return data < two < one


def trains_every_member(text):
    first, *members = text.splitlines()
    smallest, largest, mean = numbers(first)
    return 0 < smallest < largest > mean > 0 and len(members) == 4 and all(map(falls, members))


def takes_few_bits(text):
    """Without a model a level of 17 takes log₂ 17 bits."""
    bits = numbers(text, r"NLL ([\d.]+) bits/dim")
    return len(bits) == 2 and all(1 < each < math.log2(17) for each in bits)


def has_two_kl(text):
    """One of each loss, or four, and no less than zero by much."""
    return len(found := numbers(text, r"KL (\S+) ±")) % 2 == 0 and min(found) > -0.5


def gradients_agree(text):
    """Ours is that of differences."""
    differences, ours, *_ = numbers(text)
    return ours == pytest.approx(differences, abs=2e-3)


def first_and_last_fall(text):
    lines = text.splitlines()
    return numbers(lines[-1])[0] < numbers(lines[0])[0]


LONGEST = {"checkerboard.py": 105, "cifar10.py": 375, "gap_1d.py": 90, "inverse_problem.py": 85}
LONGEST |= {"many_well.py": 75, "alanine.py": 105, "equivariant.py": 75}
nats_fall = partial(falls, pattern=r"(\S+) nats ±")
fisher_falls = partial(falls, pattern=r"j_fisher: ([\d.]+)")  # what order one leaves
# A command, the packages that it needs, and what is true of what it prints.
RECIPES = [
    ("diffusers_accelerate.py --cpu", "accelerate diffusers", first_and_last_fall),
    ("lightning_module.py", "pytorch_lightning", lambda text: falls(text.splitlines()[-1])),
    ("lucidrains_trainer.py", "denoising_diffusion_pytorch", lambda text: "20 steps with" in text),
    ("fine_tuning.py --steps 300", "", falls),
    ("velocity_2d.py --steps 600", "", gains_by_order_two),
    ("mixed_precision.py", "", falls),
    ("latents_and_text.py", "diffusers", lambda text: ", n = 4; " in text),
    ("fine_tune_unet.py --steps 20 --tuning 4 --held-out 8", "diffusers", nats_fall),
    ("gap_1d.py --steps 100 --nodes 3", "matplotlib tqdm", fisher_falls),
    ("digits.py --seconds 1 --held-out 8", "matplotlib sklearn tqdm", takes_few_bits),
    ("many_well.py --steps 40 --samples 40", "matplotlib tqdm", has_two_kl),
    ("inverse_problem.py --seconds 0.5", "matplotlib tqdm", has_two_kl),
    ("pytorch_fault.py", "", gradients_agree),
    ("torch_func.py --steps 20", "", trains_every_member),
    ("nll_metric.py", "torchmetrics", numbers),
    ("../tutorials/molecule.py --quick", "matplotlib openmm tqdm", lambda text: "kT from" in text),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "packages", "holds"), RECIPES, ids=lambda each: str(each)[:16]
)
def test_a_recipe(command, packages, holds):
    for name in packages.split():
        pytest.importorskip(name)
    script, *options = command.split()
    text = run(EXAMPLES / script, *options)
    assert holds(text), text


@pytest.mark.slow
def test_the_numbers_of_two_processes_are_those_of_one():
    """37 images in batches of 8: the second process pads its last batch, which must not count."""
    pytest.importorskip("accelerate")
    script = [EXAMPLES / "likelihood_many_gpus.py", "--cpu", "--exact"]
    alone = run(*script)
    assert ", n = 37; " in alone
    assert numbers(run(*LAUNCH, *script)) == numbers(alone)


def test_the_gap_is_that_of_closed_forms(monkeypatch):
    """Of N(m, s²) taken for another Gaussian: the ODE makes a third one of its prior."""
    for name in ("matplotlib", "tqdm"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("gap_1d")
    schedule, data, taken = hosm_losses.VPSchedule(), (0.3, 0.6), (0.1, 0.9)

    def moments(t, mean, std):
        alpha, sigma = schedule(t)
        return alpha * mean, (alpha * std) ** 2 + sigma**2

    def of_ode(t):  # (x − α m)/std stays as it is from t_max on, where p is N(0, 1)
        (mean, variance), (last, widest) = (moments(each, *taken) for each in (t, schedule.t_max))
        return mean - (variance / widest).sqrt() * last, variance / widest

    def model(mean, std):
        def noise(x, t):
            centre, variance = moments(t[:, None], mean, std)
            return schedule.sigma(t)[:, None] * (x - centre) / variance

        return hosm_losses.ScoreModel(noise, schedule)

    def kl(t):
        (mean, variance), (other, width) = moments(t, *data), of_ode(t)
        return ((variance + (mean - other) ** 2) / width - 1 - (variance / width).log()) / 2

    u = torch.linspace(*schedule.log_sigma_hat_range, 4001)
    t = schedule.time(u)
    mean, variance = moments(t, *data)

    def error(centre, width):  # E of σ² times the square of a linear score less the true one
        slope = variance.sqrt() * (1 / width - 1 / variance)
        squared = slope**2 + ((mean - centre) / width) ** 2
        return float(torch.trapezoid(schedule.sigma(t) ** 2 * squared, u))

    low, high = torch.tensor(schedule.t_min), torch.tensor(schedule.t_max)
    expected = {
        "j_sm": error(*moments(t, *taken)),
        "j_ode": float(kl(low) - kl(high)),
        "j_fisher": error(*of_ode(t)),
    }
    x0 = data[0] + data[1] * torch.randn(2000, 1)
    levels = [*example.errors(model(*taken), model(*data), x0, 12)]
    for name, value in expected.items():
        found = sum(weight * integrands[name] for _, weight, integrands in levels)
        assert abs(float(found.mean()) - value) < 4 * float(found.std()) / 2000**0.5, name


@pytest.mark.slow
def test_ddp_keeps_one_network():
    assert "2 processes, the same weights: True" in run(*LAUNCH, EXAMPLES / "ddp.py")


@pytest.mark.slow
def test_the_checkerboard_is_learned():
    """Few steps lower the KL divergence from the 0.72 nats of one step, at every order."""
    for name in ("matplotlib", "tqdm"):
        pytest.importorskip(name)
    script = [EXAMPLES / "checkerboard.py", "--side", "12"]
    for order, line in enumerate(run(*script, "--steps", "40").splitlines(), 1):
        assert line.startswith(f"order {order}: KL ")
        assert 0 < numbers(line)[0] < 0.59


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "exact"},  # whose standard error is zero
        {},  # of which no standard error is known
        {  # with Student's factor
            "solver": hosm_losses.Adaptive(),
            "divergence": hosm_losses.Hutchinson(4),
        },
    ],
)
def test_the_metric_says_what_the_summary_says(options, monkeypatch):
    """In a process beside one without a batch as well; bits are those of integers."""
    options = {"dequantization": hosm_losses.Uniform(), **options}
    pytest.importorskip("torchmetrics")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("nll_metric")
    model = hosm_losses.ScoreModel(lambda x, t: torch.tanh(x), hosm_losses.VPSchedule())
    images = torch.randint(0, 256, (6, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    metric = example.ODELikelihood(model, **options)
    metric.update(images)
    torch.manual_seed(0)
    expected = hosm_losses.ode_nll(model, images, **options).summary()
    metric.compute_with_cache = False
    metric.dist_sync_fn = lambda part, group: [part[:0], part]
    for together in (False, True):
        metric.distributed_available_fn = lambda together=together: together
        assert metric.compute() == dataclasses.asdict(expected)


def test_recipes_are_short_and_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in EXAMPLES.parent.rglob("*.md"))
    for path in {*EXAMPLES.glob("*.py")} - {EXAMPLES / "mixture_1d.py"}:
        lines = path.read_text(encoding="utf-8").splitlines()
        longest = LONGEST.get(path.name, 60)
        assert sum(bool(line.strip()) for line in lines) < longest
        assert path.name in text
