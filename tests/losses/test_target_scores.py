"""Scores of the data in the targets: the paper's objective, with less noise.

What is expected is written from definitions: the posterior of x₀ on a grid, sums over j, and
Gaussian data.
"""

import math

import pytest
import torch

import hosm_losses as hosm
from tests.cases import (
    FUNCTIONS,
    MLP,
    MODULES,
    SCHEDULES,
    assert_same,
    gradients,
    randomise,
)
from tests.oracles import GaussianMixture, sign_vectors

PAIRED, EXACT = {"probes": hosm.Paired()}, {"probes": "exact"}
LOSSES = [
    (1, {}),
    (2, {"probes": 3, "engine": "reverse"}),
    *((2, each) for each in (PAIRED, EXACT)),
    *((3, each) for each in ({}, {"engine": "reverse"}, PAIRED, EXACT)),
]
SETTINGS = [
    ("vp", "epsilon", 0.3),
    ("vp", "v", 0.6),
    ("ve", "score", 0.5),
    ("edm", "x0", 0.8),
    ("flow", "velocity", 0.4),
]
PLANE = GaussianMixture(
    [[-0.6, 0.3], [0.5, -0.2]],
    [[[0.5, 0.1], [0.1, 0.3]], [[0.35, -0.05], [-0.05, 0.3]]],
    [0.4, 0.6],
)
ONE, ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
F_PLANE = torch.tensor([[2.5, -1.0], [-1.0, 4.0]], dtype=torch.float64)
INFORMATION = {"number": 3.0, "zero": 0.0, "elements": torch.tensor([2.0, 5.0]), "matrix": F_PLANE}


def score_of(mixture):
    return lambda x: mixture.score(x, ONE, ZERO)


def model_of(schedule="vp", prediction="epsilon", d=2):
    network = MLP(d)
    randomise(network)
    return hosm.ScoreModel(network, SCHEDULES[schedule], prediction)


def posterior(mixture, schedule, t, x, span=6.5, nodes=45):
    """Data on a grid that leads to x at t, with its noise and its probability."""
    d = mixture.means.shape[1]
    line = torch.linspace(-span, span, nodes)
    x0 = torch.cartesian_prod(*[line] * d).reshape(-1, d)
    alpha, sigma = schedule(torch.tensor(t))
    noise = (x - alpha * x0) / sigma
    log_joint = mixture.log_density(x0, ONE, ZERO) - noise.square().sum(1) / 2
    weights = log_joint.softmax(0)
    likely = weights > 1e-20
    return x0[likely], noise[likely], weights[likely]


def draws(seed=3):
    return torch.Generator().manual_seed(seed)


def probes_of(order, options, d=2):
    """Vectors (K, n, d): pairs of signs with the mean of all pairs, else K drawn ones, n = 1."""
    probes = options.get("probes", 1)
    if order == 1 or probes == "exact":
        return None
    if not isinstance(probes, hosm.Paired):
        return torch.randn(probes, 1, d, generator=draws())
    signs = sign_vectors(d)[: 2 ** (d - 1)]  # every term is even in each probe
    return signs[torch.cartesian_prod(*[torch.arange(len(signs))] * 2)].transpose(0, 1)


def conditional_mean(model, order, options, x0, noise, weights, t, targets=None):
    """Of the gradient in the parameters, given x, over x₀ and where they are paired the probes."""
    probe = probes_of(order, options, x0.shape[1])
    pairs = 1 if probe is None else probe.shape[1]
    inputs = {"t": torch.full((len(x0) * pairs,), t), **options}
    if probe is not None:
        inputs["probe"] = probe.repeat_interleave(len(x0), 1)
    if targets is not None:
        inputs["targets"] = hosm.TargetScores(targets.scores.repeat(pairs, 1), targets.information)
    x0, noise, weights = x0.repeat(pairs, 1), noise.repeat(pairs, 1), weights.repeat(pairs) / pairs
    loss = FUNCTIONS[order](model, x0, noise=noise, **inputs, reduction="none")
    return torch.cat([g.flatten() for g in gradients((weights * loss).sum(), model)])


@pytest.mark.parametrize(("order", "options"), LOSSES)
@pytest.mark.parametrize(("schedule", "prediction", "t"), SETTINGS)
def test_the_conditional_mean_of_the_gradient_is_the_papers(
    schedule, prediction, t, order, options
):
    """Given x, over the posterior of x₀, for a network that is wrong in every order."""
    model = model_of(schedule, prediction)
    parts = *posterior(PLANE, model.schedule, t, torch.tensor([0.3, -0.4])), t
    plain, g = conditional_mean(model, order, options, *parts), score_of(PLANE)(parts[0])
    for name, information in INFORMATION.items():
        targets = hosm.TargetScores(g, information)
        found = conditional_mean(model, order, options, *parts, targets)
        assert float((found - plain).abs().max()) < 1e-12 * max(float(plain.abs().max()), 1), name


COVARIANCE = torch.tensor([[1.5, 0.6], [0.6, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([0.5, -2.0], dtype=torch.float64)


@pytest.mark.parametrize(("schedule", "prediction", "t"), SETTINGS)
@pytest.mark.parametrize("averaged", [None, hosm.AveragedTargets()])
def test_gaussian_data_leave_no_noise(schedule, prediction, t, averaged):
    """In order one for any network, in orders two and three for the true score."""
    model = model_of(schedule, prediction)
    alpha, sigma = model.schedule(torch.tensor(t))
    F = torch.linalg.inv(COVARIANCE)
    x0, noise = MEAN + torch.randn(6, 2), torch.randn(6, 2)  # wherever they are drawn
    targets = hosm.TargetScores(lambda x: (MEAN - x) @ F, F, averaged)
    inputs = {"t": torch.full((6,), t), "noise": noise, "targets": targets}
    precision = torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2))

    def true_noise(x):
        return sigma * (x - alpha * MEAN) @ precision

    x = alpha * x0 + sigma * noise
    first = hosm.dsm_terms(model, x0, order=1, **inputs).first
    error = (model.noise(x, inputs["t"]) - true_noise(x)).square().mean(1)
    assert_same(first, error, 1e-12)
    truth = hosm.ScoreModel(lambda x, t: true_noise(x), model.schedule)
    for options in ({}, EXACT, PAIRED):
        terms = hosm.dsm_terms(truth, x0, **inputs, **options)
        assert max(float(term.detach().abs().max()) for term in terms) < 1e-20, options


WIDE = hosm.VESchedule(sigma_min=1e-4, sigma_max=1e3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("averaged", [None, hosm.AveragedTargets()])
@pytest.mark.parametrize("information", [None, 2.0, F_PLANE, "no scores"])
def test_short_types_lose_no_digits_at_any_noise(dtype, averaged, information):
    """A network that is zero leaves the targets alone, of which almost all cancels at small σ̂.

    The data differ in their last digits.
    """
    model = hosm.ScoreModel(lambda x, t: 0 * x, WIDE)
    x0, noise, g = torch.randn(3, 40, 2).to(dtype)
    x0 = 1 + 0.02 * x0
    probe, found = torch.randn(2, 40, 2).to(dtype), []
    for kind, autocast in ((dtype, dtype == torch.float32), (torch.float64, False)):
        t = torch.linspace(1e-5, 1, 40, dtype=torch.promote_types(kind, torch.float32))
        inputs = {"t": t, "noise": noise.to(kind), "probe": probe.to(kind)}
        inputs["targets"] = averaged
        if information != "no scores":
            inputs["targets"] = hosm.TargetScores(g.to(kind), information, averaged)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            terms = hosm.dsm_terms(model, x0.to(kind), **inputs)
            paired = hosm.dsm_terms(model, x0.to(kind), **inputs, **PAIRED)
        found.append([[each.double() for each in part] for part in (terms, paired)])
    (terms, paired), (wide_terms, wide_paired) = found
    torch.testing.assert_close(terms, wide_terms, rtol=3e-5, atol=0)
    torch.testing.assert_close(paired, wide_paired, rtol=3e-5, atol=3e-6)


def energy(x):
    return x.pow(4).sum(1) - 3 * x.square().sum(1)


CALLABLES = {
    "closed form": lambda x: 6 * x - 4 * x**3,
    "autograd": lambda x: -torch.autograd.grad(energy(x.requires_grad_()).sum(), x)[0],
    "torch.func": lambda x: -torch.func.grad(lambda x: energy(x).sum())(x),
    "in place": lambda x: x.mul_(6 - 4 * x**2),
    "a product": lambda x: (x @ torch.eye(2, dtype=x.dtype)) * 6 - 4 * x**3,
}


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_that_are_computed_are_those_of_a_tensor(name, mode, autocast):
    """Under autocast too, without its short types; in a module's constructor and in a call."""
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 2).float()
    model = model_of().float()
    inputs = {"t": torch.linspace(0.1, 0.6, 5).float(), "noise": noise}
    module = hosm.ThirdOrderDSM(model, targets=hosm.TargetScores(CALLABLES[name], 2.0))
    g = 6 * x0 - 4 * x0**3
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = x0 * 1  # inside of the mode, as a validation loop makes it
        loss = module(made, **inputs, generator=draws())
        targets = hosm.TargetScores(g * 1, 2.0)
        other = hosm.third_order_dsm(model, x0, **inputs, targets=targets, generator=draws())
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
    assert loss.requires_grad == (mode is torch.enable_grad)
    assert not made.requires_grad
    assert torch.equal(made, x0)
    module(x0, **inputs, targets=targets).backward()  # which can be trained on


def test_nothing_of_the_targets_has_a_gradient():
    """Nor has ε, where it is given, through them: as with averaged targets."""
    weight, model = torch.tensor(2.0, requires_grad=True), model_of()
    x0, noise = torch.randn(5, 2), torch.randn(5, 2)
    kept = [x0.clone().requires_grad_() for _ in "ab"]
    F = torch.tensor([2.0, 1.0], requires_grad=True)
    for g in (lambda x: weight * x, weight * x0):
        targets = hosm.TargetScores(g, F, hosm.AveragedTargets())
        inputs = {"t": torch.full((5,), 0.4), "noise": noise, "targets": targets}
        loss = hosm.third_order_dsm(model, kept[0], **inputs, generator=draws())
        assert loss.requires_grad
        assert torch.autograd.grad(loss, [weight, F], allow_unused=True) == (None, None)


def test_gradients_of_every_sample_by_torch_func():
    """A sample by itself has no others to take the information from."""
    model, x0, g, noise, probe = model_of(), *torch.randn(4, 5, 2)
    module, t = hosm.ThirdOrderDSM(model), torch.linspace(0.1, 0.6, 5)
    parameters = dict(module.named_parameters())

    def loss(parameters, information, *row):
        x0, g, t, noise, probe = (part[None] for part in row)
        targets = hosm.TargetScores(g, information)
        inputs = {"t": t, "noise": noise, "probe": probe, "targets": targets}
        return torch.func.functional_call(module, parameters, (x0,), inputs)

    number = torch.tensor(2.0)  # whose value is not read under vmap
    for information, alone in ((F_PLANE, F_PLANE), (None, math.inf), (number, 2.0)):
        batched = torch.func.vmap(torch.func.grad(loss), (None, None, *[0] * 5))
        found = batched(parameters, information, x0, g, t, noise, probe)
        targets = hosm.TargetScores(g, alone)
        inputs = {"t": t, "noise": noise, "probe": probe, "targets": targets}
        whole = gradients(module(x0, **inputs), module)
        assert_same([each.mean(0) for each in found.values()], whole, 1e-10)


few = pytest.mark.filterwarnings("ignore:TargetScores.information_of. expected enough samples")
SINGLE, DOUBLE, SHORT = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    ("made", "kept", "used"),
    [
        (SINGLE, None, SINGLE),
        (SINGLE, None, DOUBLE),
        (SINGLE, SINGLE, SINGLE),
        (SINGLE, DOUBLE, DOUBLE),
        (SHORT, None, SHORT),
        ("six decimals", None, DOUBLE),
    ],
)
@few
@pytest.mark.parametrize("as_function", [False, True])
def test_rounding_of_the_scores_is_no_information(made, kept, used, as_function):
    """Along the normal of a plane the target is ε, whatever has been converted since.

    The scores are rounded to `made`. The matrix is the user's own in `kept`, with the error of a
    sum in float32, or for None that of `information_of`, and the loss is computed in `used`.
    """
    Q = torch.linalg.qr(torch.randn(3, 3)).Q
    x0, normal = torch.randn(4000, 2) @ Q[:2], Q[2]
    x0 = x0.round(decimals=6) if isinstance(made, str) else x0.to(made)
    if kept is None:
        F = hosm.TargetScores.information_of(x0, -x0, matrix=True)
    else:
        F = (Q[:2].T @ Q[:2] + 1e-7 * torch.eye(3)).to(kept)
    x0, eps = x0[:5].to(used), torch.randn(5, 3).to(used)
    targets = hosm.TargetScores(torch.neg if as_function else -x0, F)
    t = torch.full((5,), 0.8, dtype=torch.promote_types(used, SINGLE))
    inputs = {"t": t, "noise": eps, "targets": targets, "order": 1}
    along, found = (eps.double() @ normal)[:, None] * normal, []
    for noise in (0 * along, along):
        model = hosm.ScoreModel(lambda x, t, noise=noise: noise.to(x.dtype), hosm.VESchedule())
        found.append(hosm.dsm_terms(model, x0, **inputs).first.double())
    # ‖e‖² − ‖e − (ε·n) n‖² is (ε·n)² where e·n = ε·n, and its negative where e·n = 0.
    torch.testing.assert_close(found[0] - found[1], along.square().mean(1), rtol=0.05, atol=0.02)


NOTHING = [0, 0.0, torch.tensor(0.0), torch.tensor(0), torch.zeros(2), torch.zeros(2, 2)]


@pytest.mark.parametrize("none", [*NOTHING, math.inf, torch.tensor(math.inf)], ids=str)
def test_no_information_and_infinite_information_are_the_papers_target(none):
    x0, model = torch.randn(5, 2), model_of()
    inputs = {"t": torch.full((5,), 0.4), "noise": torch.randn(5, 2)}
    found = [
        hosm.third_order_dsm(model, x0, **inputs, targets=targets, generator=draws())
        for targets in (hosm.TargetScores(-x0, none), hosm.TargetScores(minus, none), None)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("F", "got"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], "a least eigenvalue of -1 and an asymmetry of 0"),
        ([[1.0, 0.5], [0.4, 1.0]], "a least eigenvalue of 0.6 and an asymmetry of 0.1"),
    ],
)
def test_a_matrix_is_refused_as_soon_as_it_is_known_to_be_one(F, got):
    """With a function of scores that is in a loss, as it may be by element of 2 × 2 samples."""
    x0, F = torch.randn(4, 2), torch.tensor(F)
    message = rf"information: expected a symmetric, positive semidefinite matrix; got {got}\. "
    with pytest.raises(ValueError, match=f"^{message}"):
        hosm.TargetScores(-x0, F)
    targets = hosm.TargetScores(minus, F)
    with pytest.raises(ValueError, match=rf"^targets\.{message}"):
        hosm.first_order_dsm(model_of(), x0, targets=targets)
    hosm.first_order_dsm(model_of(d=4), torch.randn(4, 2, 2), targets=targets)


@pytest.mark.parametrize("dtype", [SHORT, SINGLE, DOUBLE])
def test_a_matrix_is_not_refused_for_its_rounding(dtype):
    root = torch.randn(40, 30)
    hosm.TargetScores(torch.randn(4, 40), (root @ root.T).to(dtype))


def minus(x):
    return -x


@pytest.mark.parametrize("order", [1, 2, 3])
def test_scores_of_one_batch_are_refused_where_a_module_is_made(order):
    model, x0 = model_of(), torch.randn(4, 2)
    targets = hosm.TargetScores(-x0)
    expected = "targets: expected a callable in a constructor, or the scores of the batch in each"
    with pytest.raises(TypeError, match=expected):
        MODULES[order](model, targets=targets)
    module = MODULES[order](model, targets=hosm.TargetScores(minus, 1.0))
    assert "targets=TargetScores(scores=minus, information=1.0, averaged=None)" in repr(module)
    inputs = {"t": torch.full((4,), 0.3), "noise": x0}
    found = [module(x0, **inputs, generator=draws()).item()]
    given = hosm.TargetScores(-x0, 1.0)
    found.append(module(x0, **inputs, targets=given, generator=draws()).item())
    assert found[0] == found[1]


def test_a_given_reference_needs_scores_of_its_own():
    x0, reference = torch.randn(4, 2), hosm.AveragedTargets(torch.randn(3, 2))
    with pytest.raises(TypeError, match="scores: expected a callable if there is a reference"):
        hosm.TargetScores(-x0, averaged=reference)
    hosm.third_order_dsm(model_of(), x0, targets=hosm.TargetScores(minus, averaged=reference))


def data_and_scores(count=20_000, seed=3):
    x = PLANE.sample(count, draws(seed))
    return x, score_of(PLANE)(x)


@few
def test_without_information_that_of_the_other_samples_is_used():
    model, x0, g, noise = model_of(), *torch.randn(3, 5, 2)
    inputs = {"t": torch.linspace(0.1, 0.6, 5), "noise": noise}
    found = hosm.dsm_terms(model, x0, order=1, targets=hosm.TargetScores(g), **inputs).first
    for row in range(5):
        others = torch.cat([g[:row], g[row + 1 :]]).square().mean(0)
        targets = hosm.TargetScores(g, others)
        known = hosm.dsm_terms(model, x0, order=1, targets=targets, **inputs).first
        assert_same(found[row], known[row], 1e-12)


@few
def test_information_is_the_mean_of_products():
    x, g = data_and_scores(50)
    found = hosm.TargetScores.information_of(x.reshape(50, 1, 2), g.reshape(50, 1, 2))
    assert_same(found, (g**2).mean(0)[None], 1e-14)
    found = hosm.TargetScores.information_of(x.float(), g.float(), matrix=True)
    assert found.dtype == torch.float64
    assert_same(found, sum(torch.outer(one, one) for one in g) / 50, 1e-6)


@few
def test_a_matrix_takes_enough_samples():
    x, g = data_and_scores(8)
    hosm.TargetScores.information_of(x, g, matrix=True)
    with pytest.raises(ValueError, match="expected 4 d = 8 samples or more for a matrix; got 7"):
        hosm.TargetScores.information_of(x[:7], g[:7], matrix=True)
