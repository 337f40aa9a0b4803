"""How noisy is the gradient of each loss term and of each third-order estimator, against σ̂?

python -m benchmarks gradient_variance [--full]
"""

import pytest
import torch
from docs.examples import mixture_1d as example
from tqdm import tqdm

from benchmarks import trained
from benchmarks.fields import LEVELS
from benchmarks.gradients import estimators, measure

# The size of a minibatch, and the kinds of probes beside signs.
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "mixture": (256, ()),
    "digits": (16, ("gaussian",)),
    "images": (2, ("gaussian", "dct")),
    "large images": (2, ("gaussian", "dct")),
}


def mixture(steps: int) -> trained.Problem:
    """The example's network, trained with order three under VP."""
    job = example.Job("vp", 3, steps, seed=0)
    model = example.new_model(job)
    for _ in tqdm(example.training(model, job), "mixture", job.steps, leave=False):
        pass
    data = trained.mixture(trained.HELD_OUT, torch.Generator().manual_seed(0))
    return trained.Problem(model, data, example.DATA_STD, trained.mixture)


@pytest.mark.parametrize("name", CASES)
def test_gradient_variance(record, choose, name):
    if name == "large images" and not choose(False, False, True):
        pytest.skip("with --full")
    batch, distributions = CASES[name]
    if name == "mixture":
        problem = mixture(choose(2, 1000, 2000))
    else:
        problem = trained.trained(name, choose(2, None if name == "digits" else 300, None))
    elements = problem.data[0].numel()
    minibatches = choose(8, 8, 16 if name == "large images" else 48)
    levels, terms = choose(LEVELS[2:3], LEVELS, LEVELS), estimators(elements, distributions)
    found = measure(problem, levels, terms, minibatches=minibatches, batch=batch)
    assert all(share == (0, 0, 0) for share in found["probe share"]["first"].values())
    if elements == 1:
        del found["probe share"]  # of signs, which are exact there
    record({**found, "elements": elements})
