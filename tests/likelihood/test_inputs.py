"""Which numbers both likelihoods take, what has failed, and what stays as it was."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.likelihood.inputs import mark_failed
from tests.likelihood.test_result import full
from tests.oracles import Function, networks


def test_numbers_and_arrays_of_numpy_are_taken():
    network, shape = networks()["mlp"]
    model, x = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(3, *shape)
    mean, std = np.full(shape, 0.25), np.full(shape, 0.5, dtype=np.float32)

    def both(whole, real, array):
        options = {"data_mean": array(mean), "data_std": array(std), "batch_size": whole(2)}
        seed = torch.Generator().manual_seed
        return [
            hosm.ode_nll(model, x, steps=whole(8), probes=whole(2), generator=seed(0), **options),
            hosm.ode_nll(
                model, x, method="adaptive", tolerance=real(0.25), generator=seed(0), **options
            ),
            hosm.variational_nll(model, x, samples=whole(4), generator=seed(0), **options),
        ]

    plain = both(int, float, torch.from_numpy)
    for ours, theirs in zip(plain, both(np.int64, np.float32, np.asarray), strict=True):
        assert torch.equal(ours.nll, theirs.nll)


def test_moments_made_in_inference_mode_are_taken():
    network, shape = networks()["mlp"]
    model, x = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(3, *shape)
    with torch.inference_mode():
        moments = {"data_mean": torch.zeros(shape), "data_std": torch.ones(shape)}
    x.requires_grad_()
    nll = hosm.ode_nll(model, x, steps=4, enable_grad=True, **moments).nll.sum()
    (gradient,) = torch.autograd.grad(nll, x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("nll", "error", "dtype", "failed"),
    [
        (1.0, 999.0, torch.float32, False),
        (1.0, 1001.0, torch.float32, True),
        (1.0, math.nan, torch.float32, True),
        (math.nan, 0.0, torch.float32, True),
        (math.inf, 0.0, torch.float64, True),
        (1e38, 0.0, torch.float32, False),
        (1e39, 0.0, torch.float32, True),
        (-1e39, 0.0, torch.bfloat16, True),
        (1e39, 0.0, torch.float64, False),
        (1e5, 0.0, torch.float16, False),
    ],
)
def test_what_failed_has_nan(nll, error, dtype, failed):
    parts = {
        "nll": torch.tensor([nll, 2.0]),
        "solver_error": torch.tensor([error, 0.0]),
        "latent": torch.zeros(2, 4, dtype=dtype),
    }
    marked = mark_failed(full(n=2, **parts))
    assert marked.failed.tolist() == [failed, False]
    assert marked.nll.isnan().tolist() == [failed, False]
    assert marked.bits_per_dim().isnan().tolist() == [failed, False]


def test_the_solver_may_be_off_by_a_tenth_of_a_nat_an_element():
    parts = {"n": 2, "solver_error": torch.tensor([1999.0, 2001.0])}
    assert mark_failed(full(d=20_000, **parts)).failed.tolist() == [False, True]


def test_what_the_solver_saw_fail_stays_failed():
    marked = mark_failed(full(failed=torch.tensor([True, False, False])))
    assert marked.nll.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("likelihood", [hosm.ode_nll, hosm.variational_nll])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_network_that_writes_to_its_conditions_does_not_write_to_the_callers(
    likelihood, batch_size
):
    def network(x, t, label):
        label += 1
        return 0.5 * x

    label = torch.zeros(3)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    likelihood(model, torch.randn(3, 2), batch_size=batch_size, model_kwargs={"label": label})
    assert torch.equal(label, torch.zeros(3))


# No module tells of a function.
NORMS = {
    "module": nn.InstanceNorm2d(4),
    "function": Function(nn.functional.instance_norm),
    "of torch": Function(lambda x: torch.instance_norm(x, *[None] * 4, True, 0.1, 1e-5, False)),
    "of aten": Function(
        lambda x: torch.ops.aten.instance_norm(x, *[None] * 4, True, 0.1, 1e-5, False)
    ),
}


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"divergence": "exact"}], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_one_sample_in_channels_last_has_the_right_gradient_of_an_instance_norm(norm, options):
    """PyTorch's own is off by more than its size there, at first order already."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), NORMS[norm], nn.SiLU(), nn.Conv2d(4, 2, 1)
    network = nn.Sequential(*layers).double()
    model = hosm.ScoreModel(network, hosm.VPSchedule(), call=lambda network, x, t: network(x))
    x = torch.randn(2 if "batch_size" in options else 1, 2, 4, 3, dtype=torch.float64)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=layout)
        generator = torch.Generator().manual_seed(1)
        found.append(hosm.ode_nll(model, x, steps=8, generator=generator, **options).nll)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)


def in_rows(network, x, t):
    """A call that makes images of data of another shape."""
    return network(x.reshape(len(x), 2, 4, 3)).reshape(x.shape)


def one_by_one(network, x, t):
    """A call that gives the network one sample after the other."""
    return torch.cat([network(each[None]) for each in x])


@pytest.mark.parametrize(
    ("norm", "call", "shape"),
    [
        ("function", in_rows, (1, 24)),
        ("function", in_rows, (1, 8, 3)),
        ("module", one_by_one, (2, 2, 4, 3)),
    ],
)
def test_so_it_has_where_the_network_makes_one_image_of_its_data(norm, call, shape):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), NORMS[norm], nn.SiLU(), nn.Conv2d(4, 2, 1)
    network = nn.Sequential(*layers).double()
    model = hosm.ScoreModel(network, hosm.VPSchedule(), call=call)
    x, found = torch.randn(shape, dtype=torch.float64), []
    for layout in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=layout)
        generator = torch.Generator().manual_seed(1)
        found.append(hosm.ode_nll(model, x, steps=8, generator=generator).nll)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)
