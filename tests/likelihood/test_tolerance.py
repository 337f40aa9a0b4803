"""ToTolerance takes the coarsest grid that is within the tolerance, for each sample."""

import math
import warnings

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.likelihood import solvers
from tests.cases import VP
from tests.oracles import mixture_noise, ring

EXACT = {"divergence": "exact"}
GRIDS = (16, 32, 64, 128)


def model_of(network):
    return hosm.ScoreModel(network, VP)


def exact_model():
    return model_of(mixture_noise(ring(), VP))


def points(count=6):
    return ring().sample(count, torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def coarse_grids(monkeypatch):
    monkeypatch.setattr(solvers, "GRIDS", GRIDS)


class Stiff(nn.Module):
    """A network that is harder for samples of a larger rate, with a table for all of them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2).eval()
        self.norm.running_mean += torch.tensor([0.3, -0.2])
        self.calls = []

    def forward(self, x, t, rate, table):
        self.calls.append(len(x))
        return rate[:, None] * self.norm(x).tanh() + table.sum()


RATES = torch.tensor([0.5, 2.0, 0.5, 0.5, 3.0, 0.5])


def solved(model, x, solver, solve=hosm.ode_nll, rates=RATES, seed=1, **options):
    """The result, and all of it that belongs to single samples, with the gradient in x."""
    table = hosm.Shared(torch.full_like(rates, 0.3 / len(rates)))
    options |= {"model_kwargs": {"rate": rates, "table": table}, "solver": solver}
    options |= {"generator": torch.Generator().manual_seed(seed) if type(seed) is int else seed}
    if options.get("enable_grad"):
        x = x.clone().requires_grad_()
    found = solve(model, x, **options)
    own = {name: each for name, each in vars(found).items() if isinstance(each, torch.Tensor)}
    if x.requires_grad:
        (own["gradient"],) = torch.autograd.grad(found.nll.sum(), x)
    return found, own


LEVELS = torch.tensor([[9, 200], [90, 91], [3, 7], [0, 255], [128, 60], [30, 30]]).byte()
USES = {
    "nll": {"enable_grad": True},
    "a companion": {"companion": True, "enable_grad": True},
    "a prior": {"log_prior": lambda latent: -latent.abs().sum(1), "enable_grad": True},
    "clean": {"clean": True},
    "images": {"x": LEVELS, "dequantization": hosm.Uniform()},
    "images, truncated": {"x": LEVELS, "dequantization": hosm.TruncatedNormal()},
    "samples": {"solve": hosm.ode_sample, "companion": True, "tolerance": 3.0},
    "an error of the prior": {"data_mean": 0.1, "data_std": 0.6},
}


@pytest.mark.parametrize("use", USES)
def test_a_sample_has_the_numbers_of_the_coarsest_grid_within_the_tolerance(use):
    """Those of the first grid to the bit, as it is not solved for them again."""
    options, model = {"x": points()} | USES[use], model_of(Stiff())
    tolerance = options.pop("tolerance", 0.02)
    how = {name: options.pop(name) for name in ("data_mean", "data_std") if name in options}
    how["companion"] = options.pop("companion", False)
    found, numbers = solved(model, solver=hosm.ToTolerance(tolerance, **how), **options, **EXACT)
    if not found.nll.requires_grad:  # or they are called again in the backward pass
        assert sum(model.network.calls) == int(found.nfe.sum())
    left, nfe, products = torch.ones(6, dtype=torch.bool), int("clean" in options), 0
    for steps in GRIDS:
        grid = hosm.FixedGrid(steps, **how)
        _, expected = solved(model, solver=grid, **options, **EXACT)
        nfe, products = nfe + expected["nfe"], products + expected["products"]
        nfe = nfe - int("clean" in options)  # noise is added once
        done = left & (expected["solver_error"] <= tolerance)
        bits = 0 if steps == GRIDS[0] else 1e-12
        for name, each in (expected | {"nfe": nfe, "products": products}).items():
            torch.testing.assert_close(numbers[name][done], each[done], rtol=bits, atol=bits)
        left = left & ~done
    assert not left.any()
    assert len(found.steps.unique()) > 1


@pytest.mark.parametrize("companion", [False, True])
def test_what_is_solved_again_has_new_probes_of_its_own(companion):
    """As if these rows were solved alone after the others, from the same generator."""
    options = {"divergence": hosm.Hutchinson(2)}
    model, x, seed = model_of(Stiff()), points(), torch.Generator().manual_seed(1)
    solver = hosm.ToTolerance(0.01, companion=companion)
    found, numbers = solved(model, x, solver, seed=seed, **options)
    after, rows, seed = torch.rand(1, generator=seed), torch.arange(6), seed.manual_seed(1)
    for steps in GRIDS:
        grid = hosm.FixedGrid(steps, companion=companion)
        alone = {**options, "rates": RATES[rows]}
        _, expected = solved(model, x[rows], grid, seed=seed, **alone)
        done = expected["solver_error"] <= 0.01
        for name in expected.keys() - {"nfe", "products"}:
            torch.testing.assert_close(numbers[name][rows[done]], expected[name][done])
        rows = rows[~done]
        if not len(rows):
            break
    assert torch.equal(torch.rand(1, generator=seed), after)
    assert found.steps[0] < steps == found.steps.max()


def test_one_stiff_sample_costs_its_own_rows():
    """Of 16 + 2, 32 + 2 and so on evaluations, the first alone are of the whole batch."""
    model, x = model_of(Stiff()), points(1).repeat(100, 1)
    rates = torch.where(torch.arange(100) == 7, 3.0, 0.5)
    found, _ = solved(model, x, hosm.ToTolerance(0.02, companion=False), rates=rates, **EXACT)
    most = int(found.steps[7])
    assert (found.steps == 16).sum() == 99
    assert most >= 32
    own = sum(steps + 2 for steps in GRIDS[1:] if steps <= most)
    assert sum(model.network.calls) == 100 * (16 + 2) + own
    assert found.nfe.tolist() == [16 + 2 + own * (row == 7) for row in range(100)]


def test_the_exact_divergence_has_to_be_within_it_with_its_quadrature():
    """A tolerance between the error of the path and that of path and quadrature."""
    model, x = model_of(lambda x, t: x.sin()), points()
    exact = hosm.ode_nll(model, x, solver=hosm.FixedGrid(16), **EXACT).solver_error.max()
    probe = {"divergence": hosm.Hutchinson()}
    path = hosm.ode_nll(model, x, solver=hosm.FixedGrid(16), **probe).solver_error.max()
    assert float(path) < float(exact)
    solver = hosm.ToTolerance(float(path + exact) / 2, companion=False)
    assert bool((hosm.ode_nll(model, x, solver=solver, **probe).steps == 16).all())
    assert int(hosm.ode_nll(model, x, solver=solver, **EXACT).steps.max()) > 16


def test_a_later_batch_starts_from_what_most_of_the_first_one_took():
    easy, hard, x = 0.5, 3.0, points()
    solver = hosm.ToTolerance(0.02, companion=False)

    def steps(*rates):
        model = model_of(Stiff())
        options = {"rates": torch.tensor(rates), "batch_size": 3, **EXACT}
        found, _ = solved(model, x[:1].repeat(len(rates), 1), solver, **options)
        assert sum(model.network.calls) == int(found.nfe.sum())
        return found.steps.tolist()

    few, many = steps(easy, hard)
    assert few < many
    assert steps(easy, easy, hard, easy, hard, easy) == [few, few, many, few, many, few]
    assert steps(hard, hard, easy, easy, hard, easy) == [many, many, few, many, many, many]


def test_a_tolerance_out_of_reach_is_said_of_the_users_line():
    with pytest.warns(UserWarning, match="at most 1e-12 nats") as told:
        result = hosm.ode_nll(exact_model(), points(), solver=hosm.ToTolerance(1e-12))
    assert result.steps.tolist() == [128] * 6
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosm.ode_nll(exact_model(), points(), solver=hosm.ToTolerance(1.0))


def test_a_sample_without_a_finite_error_is_given_up_after_two_grids():
    """ε̂ of a sample is NaN, and another one needs more than the coarsest grid."""
    rates = RATES.index_fill(0, torch.tensor([2]), math.nan)
    solver, x = hosm.ToTolerance(0.02), points()
    found, _ = solved(model_of(Stiff()), x, solver, rates=rates, **EXACT)
    whole, _ = solved(model_of(Stiff()), x, solver, **EXACT)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found.steps[others], whole.steps[others])
    assert found.failed.tolist() == [False, False, True, False, False, False]
    assert int(found.steps[2]) == GRIDS[1]
    lost, _ = solved(model_of(Stiff()), x, solver, rates=rates * math.nan, **EXACT)
    assert lost.failed.all()
