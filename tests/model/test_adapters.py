"""OnSubspace: the coordinates of a subspace, and all that is computed in them.

The network of x (B, 3, 2) has, besides its part in the subspace, one off it and junk that depends
on what lies off it.
"""

import math
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, TransformedDistribution

import hosm_losses as hosm
from hosm_losses.model.adapters import LARGEST, _basis
from tests.cases import (
    FUNCTIONS,
    MLP,
    PREDICTIONS,
    SCHEDULES,
    VP,
    assert_same,
    with_gradients,
)
from tests.likelihood.problems import gaussian, marginals, total

PARTICLES = (3, 2)  # their number and dimensions
EXACT = {"divergence": "exact"}


def centred(x):
    """The projection of particles (n, 3, 2) that takes their centre of mass away."""
    return x - x.mean(1, keepdim=True)


def by_mask(mask):
    return lambda x: x * mask.to(x.dtype)


def by_matrix(matrix):
    return lambda x: (x.flatten(1) @ matrix.to(x.dtype)).reshape(x.shape)


def turned(rank):
    """The projection onto a random subspace."""
    normal = torch.randn(6, rank, generator=torch.Generator().manual_seed(rank)).double()
    Q = torch.linalg.qr(normal)[0]
    return by_matrix(Q @ Q.T)


MASK = torch.tensor([[1, 0], [1, 1], [0, 1]])
PROJECTIONS = {
    "centred": (centred, 4),
    "masked": (by_mask(MASK), 4),
    "all": (lambda x: x, 6),
    **{f"turned {rank}": (turned(rank), rank) for rank in (1, 3, 5)},
}
each_projection = pytest.mark.parametrize("name", PROJECTIONS)


def around(network, project=centred):
    return hosm.OnSubspace(network, project, PARTICLES)


def plain(x, t):
    return 0.5 * x


def basis(project):
    """Q (6, d − k): its rows are the coordinates of the unit vectors' projections."""
    space = around(plain, project)
    return space.reduce(space.project(torch.eye(6, dtype=torch.float64).reshape(6, *PARTICLES)))


def points(count=4, r=4, seed=0):
    return torch.randn(count, r, generator=torch.Generator().manual_seed(seed)).double()


class Outside(nn.Module):
    """A network of y (B, r) as one of x (B, 3, 2), with junk."""

    def __init__(self, inside, project=centred):
        super().__init__()
        self.inside, self.own, self.Q = inside, project, basis(project)

    def forward(self, x, t):
        junk = torch.cos(x + 1).sum(1, keepdim=True) + x.square()
        value = (self.inside(x.flatten(1) @ self.Q, t) @ self.Q.T).reshape(x.shape)
        return value + 3 * (x - self.own(x)) + junk - self.own(junk)


@each_projection
def test_coordinates_of_samples(name):
    project, rank = PROJECTIONS[name]
    space, Q, x = around(plain, project), basis(project), points(5, 6).reshape(5, *PARTICLES)
    assert space.dimensions == rank
    assert_same(Q.T @ Q, torch.eye(rank, dtype=torch.float64), 1e-14)
    assert_same(space.project(x), project(x), 1e-14)
    y = space.reduce(project(x))
    assert_same(y, x.flatten(1) @ Q, 1e-14)
    assert_same(space.expand(y), project(x), 1e-14)


def off_means(x):
    """Doubly centred matrices, whose columns are orthogonal to whatever is linear in the index."""
    return x - x.mean(1, keepdim=True) - x.mean(2, keepdim=True) + x.mean((1, 2), keepdim=True)


MATRICES = {
    "symmetric": lambda x: (x + x.mT) / 2,
    "antisymmetric": lambda x: (x - x.mT) / 2,
    "mirrored": lambda x: (x + x.flip(-1)) / 2,
    "doubly centred": off_means,
    "both": lambda x: off_means(x + x.mT) / 2,
}


@pytest.mark.parametrize("name", [*PROJECTIONS, *MATRICES])
def test_the_basis_does_not_depend_on_rounding(name):
    """Without W, any rotation of Q would do, and another computer may find another."""
    shape, size = (PARTICLES, 1e-9) if name in PROJECTIONS else ((20, 20), 1e-15)
    project, d = (PROJECTIONS.get(name) or (MATRICES[name],))[0], math.prod(shape)
    P = project(torch.eye(d, dtype=torch.float64).reshape(d, *shape)).flatten(1)
    noise = size * points(d, d)
    for other in (P + noise + noise.T, P - noise - noise.T):
        assert_same(_basis(by_matrix(other), shape), _basis(project, shape), 1e-6)


def test_the_basis_is_saved_with_the_state():
    """Another computer, or a later version, may find another basis."""
    space, other = around(MLP(3, 2)), around(MLP(3, 2))
    other._basis = -other._basis
    y = points()
    assert_same(other.expand(y), -space.expand(y), 1e-14)
    other.load_state_dict(space.state_dict())
    assert torch.equal(other.expand(y), space.expand(y))
    for project in (by_mask(MASK), turned(3)):
        with pytest.raises(ValueError, match="state_dict: expected the Q of this subspace"):
            around(MLP(3, 2), project).load_state_dict(space.state_dict())


def test_coordinates_of_a_mask_are_its_elements():
    """So that numbers per element keep their meaning: data_std, and the information."""
    space, x = around(plain, by_mask(MASK)), torch.randn(5, *PARTICLES)
    assert torch.equal(space.reduce(space.project(x)), x[:, MASK.bool()])


@each_projection
@pytest.mark.parametrize("engine", ["taylor", "reverse"])
def test_losses_are_those_of_the_network_in_coordinates(name, engine):
    project, rank = PROJECTIONS[name]
    inside = MLP(rank).double()
    networks, y = (around(Outside(inside, project), project), inside), points(4, rank)
    inputs = {"t": torch.linspace(0.1, 0.9, 4).double(), "noise": points(4, rank, 1)}
    for order in (1, 3):
        options = {"engine": engine, "probe": points(8, rank, 2).reshape(2, 4, rank)}
        options = inputs | (options if order > 1 else {})
        found, expected = (
            with_gradients(FUNCTIONS[order](hosm.ScoreModel(network, VP), y, **options), inside)
            for network in networks
        )
        assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_the_density_without_a_centre_of_mass(name, prediction):
    """Three particles in two dimensions, normal in the four that are left, in closed form."""
    schedule, std = SCHEDULES[name], torch.tensor([0.1, 0.3, 0.5, 1.0]).double().sqrt()
    space = around(Outside(gaussian(schedule, std=std, prediction=prediction).network))
    model = hosm.ScoreModel(space, schedule, prediction)
    start, end = marginals(schedule, std=std)
    x = (std * points() @ basis(centred).T).reshape(4, *PARTICLES)
    exact = -total(start.log_prob(x.flatten(1) @ basis(centred)))
    options = {"solver": hosm.FixedGrid(128, data_std=0.7), **EXACT}
    options["log_prior"] = lambda latent: total(end.log_prob(latent))
    found = hosm.ode_nll(model, space.reduce(x), **options)
    torch.testing.assert_close(found.nll, exact, rtol=0, atol=1e-6)
    drawn = hosm.ode_sample(model, found.latent, **options)
    torch.testing.assert_close(space.expand(drawn.x), x, rtol=0, atol=1e-6)


def normal(x, t):
    """The exact noise of data N(0, 1/4), and junk off the subspace without a centre of mass."""
    alpha, sigma = (part[:, None, None] for part in VP(t))
    return sigma * x / (alpha**2 / 4 + sigma**2) + x.mean(1, keepdim=True) + 1


@pytest.mark.parametrize("matrix", [False, True])
def test_projected_forces_leave_no_noise_of_normal_data(matrix):
    """With exact scores and information, all residuals of the exact network are zero."""
    space = around(normal)

    def forces(x):
        return -4 * x + 7  # which push at the centre of mass, too

    def score(y):
        return space.reduce(space.project(forces(space.expand(y))))

    y = points(20_000) / 2
    information = hosm.TargetScores.information_of(y, score(y), matrix=matrix)
    of_x = [space.expand(part) for part in (y, score(y))]
    found = hosm.TargetScores.information_of(*of_x, matrix=True).diagonal().sum()
    assert_same(found, information.diagonal().sum() if matrix else information.sum())
    exact = 4 * torch.eye(4, dtype=torch.float64) if matrix else 4.0
    targets = hosm.TargetScores(score, exact)
    loss = hosm.third_order_dsm(hosm.ScoreModel(space, VP), y[:64], targets=targets)
    assert loss < 1e-20


def test_a_projection_that_changes_later_changes_nothing():
    """Neither the dimension nor the network then belong to another subspace than the data."""
    state = {"mask": torch.ones(3, 2)}

    def project(x):
        return x * state["mask"].to(x.dtype)

    space, x = around(plain, project), points(4, 6).reshape(4, *PARTICLES)
    y, t = space.reduce(x), torch.full((4,), 0.5).double()
    before = space(y, t)
    state["mask"] = MASK
    assert torch.equal(space.project(x), x)
    assert torch.equal(space.reduce(x), y)
    assert torch.equal(space(y, t), before)
    assert around(plain, project).dimensions == 4


def test_a_transformed_distribution_scales_as_many_dimensions_as_there_are():
    space = around(normal)
    q = hosm.ODEDistribution(
        hosm.ScoreModel(space, VP), (space.dimensions,), solver=hosm.FixedGrid(data_std=0.5)
    )
    scaled = TransformedDistribution(q, AffineTransform(0.0, 10.0, event_dim=1))
    y = points()
    exact = torch.distributions.Normal(0.0, 5.0).log_prob(y).sum(1)
    with torch.no_grad():
        assert_same(scaled.log_prob(y), exact, 1e-4)


def test_diagnostics_take_the_adapter_for_a_network():
    space, y = around(normal), points(200) / 2
    assert hosm.check_wrapping(hosm.ScoreModel(space, VP), y).ok
    assert not hosm.check_wrapping(hosm.ScoreModel(space, VP, "v"), y).ok
    report = hosm.check_derivatives(hosm.ScoreModel(space, VP), y[:4])
    assert "Parameter gradients were not checked" in str(report)
    report = hosm.check_derivatives(hosm.ScoreModel(around(Outside(MLP(4).double())), VP), y[:4])
    assert "Parameter gradients were not checked" not in str(report)


slanted = torch.eye(6)
slanted[0, 1] = 1
slanted[1, 1] = 0
ANOTHER = "project: expected an orthogonal projection of each sample, .*; got another"
REFUSED = {
    "scaled": (lambda x: 0.9 * x, ANOTHER),
    "slanted": (by_matrix(slanted), ANOTHER),
    "of the batch": (lambda x: x - x.mean(0, keepdim=True), ANOTHER),
    "shifted": (lambda x: centred(x) + 1, ANOTHER),
    "zero": (lambda x: 0 * x, ANOTHER),
    "NaN of some": (lambda x: torch.where(x < 0, math.nan, x), ANOTHER),
    "shape": (lambda x: x.mean(1, keepdim=True), r"project\(x\): expected shape \(6, 3, 2\)"),
    "dtype": (lambda x: centred(x).float(), r"project\(x\): expected torch.float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_map_that_is_no_projection_of_each_sample_is_refused(name):
    project, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=words):
        around(plain, project)


def test_large_samples_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"shape: expected at most 4096 .*; got 4098\. Write a"):
        hosm.OnSubspace(plain, centred, (LARGEST // 3 + 1, 3))


def test_other_samples_are_refused():
    space, y = around(plain), points()
    x, t = space.expand(y), torch.full((4,), 0.5).double()
    model = hosm.ScoreModel(space, VP)
    with pytest.raises(
        ValueError, match="x: expected samples on the subspace; got some that lie 1 off"
    ):
        space.reduce(x + 1)
    for call in (hosm.first_order_dsm, hosm.third_order_dsm, hosm.ode_nll, hosm.check_wrapping):
        with pytest.raises(ValueError, match=r"y: expected shape \(\d+, 4\), to match OnSubspace"):
            call(model, x.repeat(4, 1, 1))
    for function in (space.reduce, space.project):
        with pytest.raises(ValueError, match=r"x: expected shape \(4, 3, 2\), to match"):
            function(y)
    assert_same(space.reduce(centred(1000 + x.float()).double()), y, 1e-3)  # with its rounding
    for network, kind in ((lambda x, t: (x, x), TypeError), (lambda x, t: x[:, :2], ValueError)):
        model = hosm.ScoreModel(around(network), VP, output=operator.itemgetter(0))
        with pytest.raises(kind, match=r"network: expected floating-point .* in an nn\.Module"):
            model.noise(y, t)


def test_the_basis_keeps_its_digits_in_any_dtype():
    space, y = around(Outside(MLP(4))), points()
    x = space.expand(y)
    space.to(torch.bfloat16)
    model = hosm.ScoreModel(space, VP)
    small = y.to(torch.bfloat16)
    assert space.expand(small).dtype == torch.bfloat16
    assert_same(space.reduce(space.expand(small)).double(), y, 0.02)
    with pytest.raises(ValueError, match="x: expected samples on the subspace"):
        space.reduce(space.expand(small) + 0.5)
    space.double()
    assert torch.equal(space.expand(y), x)
    assert list(model.buffers()) == []
    assert {key[:23] for key in model.state_dict()} == {
        "network._extra_state",
        "network.network.inside.",
    }
    expected = space.expand(y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(space.expand(y.float()), expected)


def test_copies_of_the_basis_stay_where_they_were_made():
    """Neither those of inference mode nor of a transform are kept, nor those of a pickle."""
    space, y = around(plain), points().float()
    model = hosm.ScoreModel(space, VP)
    with torch.inference_mode():
        space.expand(y)
    space.expand(y.requires_grad_()).sum().backward()
    space = model.network = around(plain)
    t, y = torch.full((4,), 0.5, dtype=torch.float32), y.detach()
    noises = torch.stack([y, 2 * y])

    def loss(noise):
        return hosm.first_order_dsm(model, y, t=t, noise=noise)

    gradients = torch.func.vmap(torch.func.grad(loss))(noises)  # in which a copy is made first
    assert_same(gradients[1], torch.func.grad(loss)(noises[1]), 1e-6)
    assert loss(noises[1]).isfinite()
    loaded = pickle.loads(pickle.dumps(model)).network
    assert space._copies
    assert not loaded._copies
    assert torch.equal(loaded.expand(y), space.expand(y))
    with torch.inference_mode():
        made = around(plain)
    made.expand(y.requires_grad_()).sum().backward()


def test_nothing_global_changes_and_a_projection_may_write_to_its_argument():
    def in_place(x):
        x -= x.mean(1, keepdim=True)
        return x

    before = torch.get_rng_state()
    assert torch.equal(around(plain, in_place)._basis, around(plain)._basis)
    assert torch.equal(torch.get_rng_state(), before)
