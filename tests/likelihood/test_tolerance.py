"""ToTolerance takes the coarsest grid that is within the tolerance on the first batch."""

import warnings

import pytest
import torch
import torch.distributed as dist

import hosm_losses as hosm
from hosm_losses.likelihood import multistep
from tests.cases import VP
from tests.oracles import mixture_noise, ring

EXACT = {"divergence": "exact"}


def model_of(network):
    return hosm.ScoreModel(network, VP)


def exact_model():
    return model_of(mixture_noise(ring(), VP))


def points(count=6):
    return ring().sample(count, torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def coarse_grids(monkeypatch):
    monkeypatch.setattr(multistep, "GRIDS", (16, 32, 64, 128))


@pytest.mark.parametrize("companion", [False, True])
@pytest.mark.parametrize("options", [EXACT, {}], ids=str)
@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_the_numbers_are_those_of_the_fewest_steps_within_the_tolerance(
    tolerance, options, companion
):
    model, x = exact_model(), points().requires_grad_()
    options = {"enable_grad": True, **options}

    def solve(solver):
        generator = torch.Generator().manual_seed(1)
        result = hosm.ode_nll(model, x, solver=solver, generator=generator, **options)
        (gradient,) = torch.autograd.grad(result.nll.sum(), x)
        return result, [result.nll, gradient, result.nfe, torch.rand(1, generator=generator)]

    found, numbers = solve(hosm.ToTolerance(tolerance, companion=companion))
    _, same = solve(hosm.FixedGrid(found.steps, companion=companion))
    assert all(map(torch.equal, numbers, same))  # the trials drew nothing, and have no graph
    fewer, _ = solve(hosm.FixedGrid(found.steps // 2, companion=companion))
    # A companion's estimate depends on the probes, of which the trials have their own.
    slack = 1.5 if companion and not options.keys() & EXACT.keys() else 1.0
    assert float(found.solver_error.max()) <= slack * tolerance
    assert tolerance < slack * float(fewer.solver_error.max())


def test_the_exact_divergence_has_to_be_within_it_with_its_quadrature():
    """A tolerance between the error of the path and that of path and quadrature."""
    model, x = model_of(lambda x, t: x.sin()), points()
    exact = hosm.ode_nll(model, x, solver=hosm.FixedGrid(16), **EXACT).solver_error.max()
    probe = {"divergence": hosm.Hutchinson()}
    path = hosm.ode_nll(model, x, solver=hosm.FixedGrid(16), **probe).solver_error.max()
    assert float(path) < float(exact)
    solver = hosm.ToTolerance(float(path + exact) / 2, companion=False)
    assert hosm.ode_nll(model, x, solver=solver, **probe).steps == 16
    assert hosm.ode_nll(model, x, solver=solver, **EXACT).steps > 16


def test_what_the_first_batch_found_is_kept():
    """The network is harder for the samples of a larger rate."""
    rates, x = torch.tensor([2.0, 2.0, 4.0, 4.0]), points(4)
    model = model_of(lambda x, t, rate: rate[:, None] * x.tanh())
    options = {"solver": hosm.ToTolerance(0.002, companion=False), **EXACT}

    def taken(*rows, **more):
        kwargs, rows = {"rate": rates[list(rows)]}, list(rows)
        return hosm.ode_nll(model, x[rows], model_kwargs=kwargs, **options, **more)

    easy, hard = taken(0, 1).steps, taken(2, 3).steps
    assert easy < hard
    for rows, steps in (((0, 1, 2, 3), easy), ((2, 3, 0, 1), hard)):
        found = taken(*rows, batch_size=2)
        assert found.steps == steps
        assert found.nfe.tolist() == [steps + 2] * 4


def test_a_tolerance_out_of_reach_is_said_of_the_users_line():
    with pytest.warns(UserWarning, match="at most 1e-12 nats") as told:
        result = hosm.ode_nll(exact_model(), points(), solver=hosm.ToTolerance(1e-12))
    assert result.steps == 128
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosm.ode_nll(exact_model(), points(), solver=hosm.ToTolerance(1.0))


def test_a_sample_that_fails_on_two_grids_does_not_decide():
    """ε̂ of a sample is NaN, and another one needs more than the coarsest grid."""
    x, rates = points(4), torch.tensor([1.0, torch.nan, 3.0, 1.0])
    model = model_of(lambda x, t, rate: rate[:, None] * x.tanh())

    def solved(rows):
        options = {"solver": hosm.ToTolerance(0.01), "model_kwargs": {"rate": rates[rows]}}
        return hosm.ode_nll(model, x[rows], **options, **EXACT)

    found = solved([0, 1, 2, 3])
    assert found.steps == solved([0, 2, 3]).steps
    assert found.failed.tolist() == [False, True, False, False]
    with pytest.warns(UserWarning, match="no finite error"):
        lost = solved([1, 1])
    assert lost.failed.all()


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def with_another(other, monkeypatch):
    """A reduction with the number of another process, which is a stand-in."""
    kinds = {dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.SUM: torch.add}
    kinds[dist.ReduceOp.MIN] = torch.minimum

    def all_reduce(mine, op=dist.ReduceOp.SUM, group=None):
        (reduce,) = (each for kind, each in kinds.items() if kind == op)
        mine.copy_(reduce(mine, mine.new_tensor(other)))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)


@pytest.mark.parametrize("solve", [hosm.ode_nll, hosm.ode_sample])
def test_the_steps_of_a_group_are_those_of_its_largest_error(solve, group, monkeypatch):
    model, x = exact_model(), points()
    error = float(solve(model, x, solver=hosm.FixedGrid(32)).solver_error.max())
    for other, steps in ((0.0, 32), (error, 32), (3 * error, 128)):
        with_another(other, monkeypatch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the other one stays above the tolerance
            solver = hosm.ToTolerance(1.5 * error, group=group, companion=False)
            assert solve(model, x, solver=solver).steps == steps


def test_a_process_of_which_all_samples_fail_leaves_the_steps_to_the_others(group, monkeypatch):
    with_another(1e-9, monkeypatch)
    model = model_of(lambda x, t: x * torch.nan)
    found = hosm.ode_nll(model, points(2), solver=hosm.ToTolerance(group=group))
    assert found.steps == multistep.GRIDS[1]
    assert bool(found.failed.all())


def test_a_group_is_compared_by_identity(group):
    solver = hosm.ToTolerance(group=group)
    assert solver == hosm.ToTolerance(group=group) != hosm.ToTolerance()
    assert hash(solver) == hash(hosm.ToTolerance(group=group))
