"""steps=None takes the coarsest grid that is within the tolerance on the first batch."""

import warnings

import pytest
import torch
import torch.distributed as dist

import hosm_losses as hosm
from hosm_losses.likelihood import multistep
from tests.oracles import mixture_noise, ring

SCHEDULE = hosm.VPSchedule()
LIKELIHOODS = {
    "nll": lambda model, x, **options: hosm.ode_nll(model, x, **options),
    "sample": lambda model, x, **options: hosm.ode_sample(model, x, **options),
}


def exact_model():
    return hosm.ScoreModel(mixture_noise(ring(), SCHEDULE), SCHEDULE)


def points(count=6):
    return ring().sample(count, torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def coarse_grids(monkeypatch):
    monkeypatch.setattr(multistep, "GRIDS", (16, 32, 64, 128))


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_the_numbers_are_those_of_the_fewest_steps_within_the_tolerance(tolerance, divergence):
    model, x = exact_model(), points()

    def solve(**options):
        generator = torch.Generator().manual_seed(1)
        result = hosm.ode_nll(model, x, divergence=divergence, generator=generator, **options)
        return result, torch.rand(1, generator=generator)

    found, drawn = solve(steps=None, tolerance=tolerance)
    same, drawn_too = solve(steps=found.steps)
    assert torch.equal(found.nll, same.nll)
    assert torch.equal(drawn, drawn_too)  # the trials drew nothing
    assert torch.equal(found.nfe, same.nfe)
    assert float(found.solver_error.max()) <= tolerance
    fewer, _ = solve(steps=found.steps // 2)
    assert float(fewer.solver_error.max()) > tolerance


def test_the_exact_divergence_has_to_be_within_it_with_its_quadrature():
    """A tolerance between the error of the path and that of path and quadrature."""
    model, x = hosm.ScoreModel(lambda x, t: x.sin(), SCHEDULE), points()
    options = {"steps": 16}
    exact = hosm.ode_nll(model, x, divergence="exact", **options).solver_error.max()
    path = hosm.ode_nll(model, x, **options).solver_error.max()
    assert float(path) < float(exact)
    between = float(path + exact) / 2
    options["steps"] = None
    assert hosm.ode_nll(model, x, tolerance=between, **options).steps == 16
    assert hosm.ode_nll(model, x, divergence="exact", tolerance=between, **options).steps > 16


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_what_the_first_batch_found_is_kept(kind):
    """The network is harder for the samples of a larger rate."""
    rates = torch.tensor([2.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    model = hosm.ScoreModel(lambda x, t, rate: rate[:, None] * x.tanh(), SCHEDULE)
    x, solve = points(4), LIKELIHOODS[kind]
    options = {"steps": None, "tolerance": 0.06, "divergence": "exact"}

    def evaluations(rows, **more):
        return solve(model, x[rows], model_kwargs={"rate": rates[rows]}, **options, **more).nfe

    easy, hard = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert int(evaluations(easy)[0]) < int(evaluations(hard)[0])
    kept = evaluations(torch.cat([easy, hard]), batch_size=2)
    assert kept.tolist() == [int(evaluations(easy)[0])] * 4
    kept = evaluations(torch.cat([hard, easy]), batch_size=2)
    assert kept.tolist() == [int(evaluations(hard)[0])] * 4


def test_samples_without_a_density_find_their_steps_by_the_path():
    model, latent = exact_model(), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    options = {"steps": None, "tolerance": 0.01}
    found = hosm.ode_sample(model, latent.double(), divergence=None, **options)
    same = hosm.ode_sample(model, latent.double(), **options)
    assert found.nfe.tolist() == same.nfe.tolist() == [found.steps + 10] * 5
    assert found.steps == same.steps


def test_a_tolerance_out_of_reach_is_said_of_the_users_line():
    with pytest.warns(UserWarning, match="at most tolerance=1e-12 nats on a grid of") as told:
        result = hosm.ode_nll(exact_model(), points(), steps=None, tolerance=1e-12)
    assert result.steps == 128
    assert told[0].filename == __file__


def test_a_sample_that_fails_on_two_grids_does_not_decide():
    """ε̂ of a sample is NaN, and of another one it is stiff on the coarsest grid alone."""
    x = points(4)
    rates = torch.tensor([1.0, torch.nan, 3.0, 1.0], dtype=torch.float64)
    model = hosm.ScoreModel(lambda x, t, rate: rate[:, None] * x.tanh(), SCHEDULE)
    options = {"divergence": "exact", "steps": None, "tolerance": 0.5}

    def steps(rows):
        kwargs = {"rate": rates[rows]}
        return hosm.ode_nll(model, x[rows], model_kwargs=kwargs, **options)

    without, found = steps([0, 2, 3]), steps([0, 1, 2, 3])
    assert found.steps == without.steps
    assert found.failed.tolist() == [False, True, False, False]


def test_the_default_tolerance_is_a_hundredth_of_a_nat():
    model, x = exact_model(), points()
    found = hosm.ode_nll(model, x, steps=None)
    assert found.steps == hosm.ode_nll(model, x, steps=None, tolerance=0.01).steps


def test_vmap_is_told_to_find_the_steps_outside():
    model = exact_model()
    with pytest.raises(ValueError):
        torch.func.vmap(lambda x: hosm.ode_nll(model, x[None], steps=None).nll)(points())


def test_vmap_is_told_of_the_adaptive_method():
    model = exact_model()
    with pytest.raises(ValueError):
        torch.func.vmap(lambda x: hosm.ode_nll(model, x[None], method="adaptive").nll)(points())


def test_the_gradient_of_torch_func_is_that_of_the_steps_that_are_found():
    model, x = exact_model(), points()
    options = {"divergence": "exact", "enable_grad": True, "tolerance": 0.05}

    def gradient(steps):
        return torch.func.grad(lambda x: hosm.ode_nll(model, x, steps=steps, **options).nll.sum())(
            x
        )

    steps = hosm.ode_nll(model, x, steps=None, **options).steps
    assert torch.equal(gradient(None), gradient(steps))


def test_the_claim_carries_no_graph():
    options = {"steps": 16, "divergence": "exact", "enable_grad": True}
    result = hosm.ode_nll(exact_model(), points().requires_grad_(), **options)
    assert result.nll.requires_grad
    assert not result.solver_error.requires_grad


def test_a_network_of_nan_is_said_and_fails():
    model = hosm.ScoreModel(lambda x, t: x * torch.nan, SCHEDULE)
    with pytest.warns(UserWarning, match="got no finite error of any sample there"):
        result = hosm.ode_nll(model, points(), steps=None)
    assert result.failed.all()
    assert "not finite" in result.failures()[0]


def test_the_graph_is_that_of_the_grid_that_was_taken():
    model, x = exact_model(), points().requires_grad_()
    options = {"divergence": "exact", "enable_grad": True}
    found = hosm.ode_nll(model, x, steps=None, tolerance=0.05, **options)
    (gradient,) = torch.autograd.grad(found.nll.sum(), x)
    same = hosm.ode_nll(model, x, steps=found.steps, **options)
    assert torch.equal(gradient, torch.autograd.grad(same.nll.sum(), x)[0])


def test_results_say_their_steps():
    model, x = exact_model(), points(2)
    assert hosm.ode_nll(model, x, steps=8).steps == 8
    assert hosm.ode_nll(model, x, method="adaptive", steps=None).steps is None
    assert hosm.variational_nll(model, x, samples=4).steps is None


@pytest.mark.parametrize("options", [{}, {"method": "adaptive"}, {"steps": 64}], ids=str)
@pytest.mark.parametrize("solve", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_a_group_has_no_use_but_for_steps_none(solve, options):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError):
            solve(exact_model(), points(2), group=dist.group.WORLD, **options)
    finally:
        dist.destroy_process_group()


def test_nothing_is_said_where_the_tolerance_is_met():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosm.ode_nll(exact_model(), points(), steps=None, tolerance=1.0)


def test_a_process_of_which_all_samples_fail_leaves_the_steps_to_the_others(monkeypatch):
    """The reduction is a stand-in, for another process whose samples meet the tolerance at once."""
    model = hosm.ScoreModel(lambda x, t: x * torch.nan, SCHEDULE)
    monkeypatch.setattr(dist, "all_reduce", lambda mine, *_: mine.clamp_(min=1e-9))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = hosm.ode_nll(model, points(2), steps=None, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert found.steps == multistep.GRIDS[1]
    assert bool(found.failed.all())
