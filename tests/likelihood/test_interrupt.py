"""A KeyboardInterrupt carries the result of the batches that are done."""

import pytest
import torch

import hosm_losses as hosm
from tests.likelihood.problems import gaussian

SCHEDULE, GRID = hosm.VESchedule(sigma_max=200.0), hosm.FixedGrid(8, data_std=1.0)
X = torch.randn((6, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(stops_at):
    """The exact noise of N(0, 1), interrupted at a call of the network."""
    exact, calls = gaussian(SCHEDULE, std=1.0), iter(range(1, 10_000))

    def call(network, x, t):
        if next(calls) == stops_at:
            raise KeyboardInterrupt
        return network(x, t)

    return hosm.ScoreModel(exact.network, SCHEDULE, call=call)


CALLS = {
    "nll": lambda model: hosm.ode_nll(model, X, solver=GRID, batch_size=2),
    "to a tolerance": lambda model: hosm.ode_nll(
        model, X, solver=hosm.ToTolerance(1e-5, data_std=0.3), batch_size=2
    ),
    "samples": lambda model: hosm.ode_sample(model, X, solver=GRID, batch_size=2),
    "samples alone": lambda model: hosm.ode_sample(
        model, X, solver=GRID, divergence=None, batch_size=2
    ),
    "bound": lambda model: hosm.variational_nll(
        model, X, samples=4, batch_size=2, generator=torch.Generator().manual_seed(0)
    ),
}


def calls_of(call):
    """How often a whole call evaluates the network."""
    count = []
    counted = model(0)
    network = counted.network
    counted.network = lambda *args: count.append(1) or network(*args)
    call(counted)
    return len(count)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_interrupt_has_the_result_of_the_batches_that_are_done(call):
    whole, calls = call(model(0)), calls_of(call)
    with pytest.raises(KeyboardInterrupt) as raised:
        call(model(calls))  # in the last of three batches
    result = raised.value.result
    assert type(result) is type(whole)
    for name, value in vars(whole[:4]).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(result, name), value)
    assert "The first 4 samples are done" in raised.value.__notes__[0]


def test_before_the_first_batch_there_is_none():
    with pytest.raises(KeyboardInterrupt) as raised:
        CALLS["nll"](model(1))
    assert raised.value.result is None
    assert "The first 0 samples are done" in raised.value.__notes__[0]


@pytest.mark.parametrize(("done", "rows", "draws"), [(2, 4, 1), (4, 6, 1), (5, 6, 1), (7, 6, 2)])
def test_draws_that_are_whole_are_weighed(done, rows, draws):
    """Three draws of three batches, of which so many are done."""
    images = torch.randint(0, 256, (6, 1, 2), dtype=torch.uint8)

    def call(stops_at, count=3):
        dequantization = hosm.Uniform(draws=count)
        return hosm.ode_nll(
            model(stops_at),
            images,
            solver=GRID,
            dequantization=dequantization,
            divergence="exact",
            batch_size=2,
            generator=torch.Generator().manual_seed(0),
        )

    each = round(float(call(0, 1).nfe[0]))
    with pytest.raises(KeyboardInterrupt) as raised:
        call(done * each + 3)
    expected = call(0, draws)[:rows]
    assert torch.equal(raised.value.result.nll, expected.nll)
    assert torch.equal(raised.value.result.nfe, expected.nfe)
