"""Every loss against dense Jacobians, under options that are drawn together."""

import copy
import math
import pickle
from numbers import Integral
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import nn

import hosm_losses as hosm
from hosm_losses.losses import targets as averages
from tests.cases import (
    ENGINES,
    FUNCTIONS,
    MLP,
    MODULES,
    PREDICTIONS,
    SCHEDULES,
    AttentionNet,
    ConvNet,
    Learned,
    assert_same,
    gradients,
)
from tests.oracles import (
    TARGETS,
    dense_derivatives,
    dense_paired_terms,
    dense_terms,
    rates_of,
)

LOSSES = {
    "first": (FUNCTIONS[1], MODULES[1], 1),
    "second": (FUNCTIONS[2], MODULES[2], 2),
    "third": (FUNCTIONS[3], MODULES[3], 3),
    "terms": (hosm.dsm_terms, None, None),
}


def fading(t):
    return 1 / (1 + t.double())


EDM = hosm.EDMWeighting(0.3)
WEIGHTINGS = ["noise", "native", "likelihood", fading, EDM]


class Conditioned(nn.Module):
    """A network that is moved by what is deep in a container, part of it shared by all samples.

    Its `own` tensor is in a list, where no module knows of it.
    """

    def __init__(self, network):
        super().__init__()
        self.network, self.own = network, [torch.rand(())]

    def forward(self, x, t, given):
        gain, (shift, table) = given["gain"], given["rest"]
        gain = gain.reshape(-1, *[1] * (x.ndim - 1))
        return gain * self.network(x + shift, t) + table.sum() + self.own[0] * x.sin()


class Sampler:
    """A time sampler of the user's own, whose times count as given."""

    def __init__(self, t):
        self.t = t

    def __call__(self, batch, generator):
        assert batch == len(self.t)
        return self.t


class Pick:
    """Draws by hypothesis, which shrinks them towards the first of what is offered."""

    def __init__(self, data):
        self.data = data

    def choice(self, offered):
        return self.data.draw(st.sampled_from(offered))

    def now_and_then(self):
        return self.data.draw(st.integers(0, 2)) == 2


def drawn_options(pick, loss):
    """Options that go together; what the library refuses is not among them."""
    options = {"order": pick.choice([1, 2, 3])} if loss == "terms" else {}
    if loss in ("first", "second", "third"):
        options["weighting"] = pick.choice(WEIGHTINGS)
        # Of no effect on a t that is given.
        samplers = [None, "schedule", "log_sigma_hat", hosm.AdaptiveTimes()]
        options["time_sampler"] = pick.choice(samplers)
    options["antithetic"] = pick.choice([False, True])
    if loss != "terms":
        options["reduction"] = pick.choice(["mean", "sum", "none"])
    if loss == "first":
        return options
    paired = pick.now_and_then()
    count = pick.choice([2, 3, 4] if paired else [1, 2, np.int32(3), "exact"])
    distribution = pick.choice(["rademacher", "gaussian", "sphere", "dct"])
    if count != "exact" and (distribution != "rademacher" or pick.now_and_then()):
        count = hosm.Hutchinson(count, distribution)
    options["probes"] = count
    if paired:
        drawn = getattr(count, "count", count)
        options["probes"] = hosm.Paired(drawn, distribution)
    options["engine"] = pick.choice(ENGINES)
    if loss != "terms":
        part = 1 if options["reduction"] == "none" else pick.choice([1, 0.34, np.float32(0.67)])
        options["fraction"] = part
    return options


def value_of(probes):
    """The value that a whole number stands for."""
    return hosm.Hutchinson(int(probes)) if isinstance(probes, Integral) else probes


def drawn_weights(pick, loss):
    """Numbers, some of them 0, or tensors with a gradient; None where the loss takes none."""
    if loss not in ("second", "third"):
        return None
    values = [0.6, *(pick.choice([0, 0.3, 2.0]) for _ in range(2)), 1.5]
    values = pick.choice([values, [*values[1:3], 0.6, 1.5], [*values[:3], 0], [0.6, 0, 0, 0]])
    tensor = torch.tensor(values, requires_grad=True)
    array = tensor.detach().numpy()
    odd = [np.float32(values[0]), np.int64(2), *tensor.detach()[2:, None]]
    plain = tensor.detach()
    return pick.choice(
        [
            *(None, "paper", "paper-toy", values, tensor, array, plain[:, None], odd),
            *(tuple(tensor), (tensor[0], *values[1:])),
        ]
    )


def drawn_targets(pick, x0, order, antithetic):
    """Averaged targets whose references any sample may miss, scores, both, or a tensor."""
    kind = pick.choice([None, "batch", "batch", None, "tensor", "reference", "all"])
    if kind == "tensor" and order == 1 and not antithetic:
        return torch.randn_like(x0)
    averaged = reference = None
    if kind in ("batch", "reference", "all"):
        reference = None if kind == "batch" else torch.cat([x0.detach(), torch.randn_like(x0)])
        mask = torch.rand(len(x0), len(x0) if reference is None else len(reference)) < 0.7
        if kind == "all":  # which say that they contain each sample
            mask.fill_diagonal_(True)
        averaged = hosm.AveragedTargets(reference, own=kind != "all", same=lambda kwargs: mask)
    if not pick.choice([False, True]):
        return averaged
    scores = score_of if reference is not None else pick.choice([score_of, score_of(x0.detach())])
    return hosm.TargetScores(scores, drawn_information(pick, x0), averaged)


def score_of(x):
    """Of no data, and 0 in the last element, as of a coordinate that is constant."""
    flat = x.reshape(len(x), -1)
    scores = torch.sin(2 * flat) - 0.3 * flat.flip(1) ** 3
    return torch.cat([scores[:, :-1], 0 * scores[:, -1:]], 1).reshape(x.shape)


def drawn_information(pick, x0):
    """Of every kind; a matrix and what is by element may be 0 along directions."""
    d, kind = x0[0].numel(), pick.choice([None, "number", "elements", "matrix"])
    if kind == "number":
        return pick.choice([0.7, torch.tensor(2), torch.tensor(2.0), 0.0, math.inf])
    if kind == "elements":
        return 3 * torch.cat([torch.rand(d - 1), torch.zeros(1)]).reshape(x0.shape[1:])
    root = torch.randn(d, pick.choice([d, d - 1]))
    return kind and (root @ root.T).to(pick.choice([torch.float64, torch.float32]))


def drawn_case(data):
    """A model, what its loss is given, and all that may have a gradient."""
    pick, seed = Pick(data), data.draw(st.integers(0, 10_000))
    torch.manual_seed(seed)
    loss = pick.choice(["first", "second", "third", "third", "terms"])
    options, weights = drawn_options(pick, loss), drawn_weights(pick, loss)
    if weights is None and loss in ("second", "third") and options["weighting"] == "likelihood":
        weights = "paper"  # required there
    networks = [(MLP(3), (3,)), (ConvNet(), (2, 2, 1)), (AttentionNet(2), (2, 2)), (MLP(1), ())]
    network, shape = pick.choice(networks)
    schedule = pick.choice([*SCHEDULES.values(), Learned(torch.tensor(3.0, requires_grad=True))])
    model = hosm.ScoreModel(Conditioned(network), schedule, pick.choice(PREDICTIONS))
    trained = pick.choice(["all", "all", "a part", "none"])
    for place, part in enumerate(model.parameters()):
        part.requires_grad_(trained == "all" or (trained == "a part" and place == seed % 4))
    size, span = pick.choice([1, 2, 3]), schedule.t_max - schedule.t_min
    x0, noise, shift = torch.randn(3, size, *shape).unbind()
    t = schedule.t_min + span * (0.2 + 0.6 * torch.rand(size))
    gain, table = torch.rand(2, size).unbind()
    leaves, some = [x0, t, noise, gain, shift, model.network.own[0]], pick.choice([True, False])
    for leaf in leaves:
        leaf.requires_grad_(some and pick.now_and_then())
    if schedule is SCHEDULES["discrete"] and pick.now_and_then():
        t = t.detach().long()
    if "time_sampler" in options and not t.requires_grad and pick.now_and_then():
        options["time_sampler"] = Sampler(t)
    leaves += [*model.parameters(), getattr(schedule, "rate", None)]
    leaves += weights if isinstance(weights, tuple) else [weights]
    leaves = [each for each in leaves if isinstance(each, torch.Tensor) and each.requires_grad]
    probe = None
    if options.get("probes", "exact") != "exact" and pick.now_and_then():
        probe = torch.randn(value_of(options["probes"]).count, size, *shape)
    order = options.get("order", LOSSES[loss][2])
    targets = drawn_targets(pick, x0, order, options["antithetic"])
    at_once = pick.choice([2**18, 2, 12])
    as_module = loss != "terms" and pick.choice([False, True])
    mode = pick.choice([None, None, torch.no_grad, torch.inference_mode])
    return SimpleNamespace(**locals())


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def evaluated(case, copied=lambda tensor: tensor, held=lambda module: module):
    """The library's loss, and its detached terms where a module returns them."""
    function, module, _ = LOSSES[case.loss]
    x0, t, noise, gain, shift = map(copied, (case.x0, case.t, case.noise, case.gain, case.shift))
    given = {"gain": gain, "rest": [shift, hosm.Shared(case.table)]}
    inputs = {"t": t, "noise": noise, "model_kwargs": {"given": given}}
    if isinstance(case.options.get("time_sampler"), Sampler):
        del inputs["t"]
    inputs["generator"] = torch.Generator().manual_seed(case.seed)
    if case.probe is not None:
        inputs["probe"] = case.probe
    if case.targets is not None:
        inputs["targets"] = case.targets
    if case.weights is not None:
        inputs["weights"] = case.weights
    with patch.dict(averages.LARGEST, cpu=case.at_once):  # elements of a piece of averages
        if case.as_module:
            return held(module(case.model, **case.options))(x0, return_terms=True, **inputs)
        found = function(case.model, x0, **case.options, **inputs)
    if case.loss == "terms":
        found = torch.stack([each for each in found if each is not None])
    return found, None


def drawn_directions(case):
    """The rows of the higher terms, with the probes of each."""
    generator = torch.Generator().manual_seed(case.seed)
    rows, part = torch.arange(case.size), case.options.get("fraction", 1)
    if part < 1:
        rows = torch.randperm(case.size, generator=generator)[: max(1, round(part * case.size))]

    probes = case.options.get("probes", "exact")
    v = torch.empty(1, len(rows), 1)  # of "exact", whose dense form needs none
    if case.probe is not None:
        v = case.probe[:, rows]
    elif probes != "exact":
        like, how = case.x0.detach()[rows], value_of(probes)
        v = how.draw(like, generator)
    return rows, v.reshape(*v.shape[:2], -1)


def dense_sample(case, row, sign):
    """The field, x, σ and ±ε of one sample, and the factors of its first and higher terms."""
    t, schedule, prediction = case.t[row], case.schedule, case.model.prediction
    alpha, sigma = schedule(t.double())
    rates = alpha_rate, sigma_rate = rates_of(schedule, t.double())
    # The network predicts a x₀ + b ε, of which x = α x₀ + σ ε is known: two equations for ε.
    a, b = TARGETS[prediction](alpha, sigma, rates)
    wronskian = alpha * b - a * sigma

    def field(point):
        given = {"gain": case.gain[row][None], "rest": [case.shift[row][None], case.table]}
        raw = case.model.network(point[None], case.t[row][None], given)[0]
        return -(alpha * raw - a * point) / wronskian

    def log_sigma_hat(t):
        alpha, sigma = schedule(t.clamp(schedule.t_min, schedule.t_max))
        return sigma.log() - alpha.log()

    if t.is_floating_point():  # a given t counts as uniform
        nats = case.span * (sigma_rate / sigma - alpha_rate / alpha)
    else:
        nats = (case.span + 1) * (log_sigma_hat(t + 0.5) - log_sigma_hat(t - 0.5))
    named = {
        EDM: 1 + (sigma / alpha / 0.3) ** 2,
        "noise": torch.tensor(1.0),
        "native": (wronskian / alpha) ** 2,
        "likelihood": nats * case.x0[row].numel(),
    }
    weighting = case.options.get("weighting", "noise")
    own = callable(weighting)  # of the higher terms as well
    factors = torch.stack([weighting(t)] * 2 if own else [named[weighting], named["noise"]])
    own = sign * case.noise[row]
    x = alpha * case.x0[row] + sigma * own
    return field, x, sigma, *noises(case, row, own, x.detach(), alpha, sigma), factors


def noises(case, row, own, x, alpha, sigma):
    """The target of order one, and of others than ε the (w_j, ε_j, ε_j − C z_j) and C."""
    targets = case.targets
    if targets is None or isinstance(targets, torch.Tensor):
        return own if targets is None else targets[row], None, 0.0
    known = isinstance(targets, hosm.TargetScores)
    averaged = targets.averaged if known else targets
    points, found = [], []
    if averaged is not None:
        mask = averaged.same({})[row].clone()
        if averaged.reference is None:
            mask[row] = False
        points = [*(case.x0 if averaged.reference is None else averaged.reference)[mask].detach()]
        found = [((x - alpha * each) / sigma).flatten().detach() for each in points]
    if averaged is None or averaged.own or not found:
        points.append(case.x0[row].detach())
        found.append(own.flatten().detach())
    weights = torch.stack([-0.5 * each.square().sum() for each in found]).softmax(0)
    quiet, C = found, 0.0
    if known:
        sigma_hat = (sigma / alpha).detach()
        C = control(targets.information, score_of(case.x0.detach()), row, sigma_hat)
        g = score_of(torch.stack(points)).reshape(len(points), -1)
        pairs = zip(found, g, strict=True)
        quiet = [each - C @ (each + sigma_hat * score) for each, score in pairs]
    triples = list(zip(weights, found, quiet, strict=True))
    return sum(weight * each for weight, _, each in triples).reshape(own.shape), triples, C


def control(information, scores, row, sigma_hat):
    """C = (I + σ̂² F)⁻¹ on the range of F, and 0 beside it."""
    d = scores[0].numel()
    if information is None:
        others = torch.cat([scores[:row], scores[row + 1 :]])
        information = others.square().sum(0) / max(len(others), 1)
    F = torch.as_tensor(information, dtype=torch.float64)
    if F.shape != (d, d) or F.shape == scores.shape[1:]:
        F = torch.eye(d) * F.flatten()
    if not bool(F.isfinite().all()):
        return torch.zeros(d, d)
    least = d * torch.finfo(torch.float32).eps  # of the largest, below which it counts as 0
    onto = F @ torch.linalg.pinv(F, rtol=least, hermitian=True)
    return onto @ torch.linalg.inv(torch.eye(d) + sigma_hat**2 * F) @ onto


def higher_terms(case, field, x, sigma, noise, triples, control, probes):
    """The terms of one sample above the first."""
    f, jacobian, second = dense_derivatives(field, x)
    # With σ inside, what is held fixed of them is so whole.
    a, second, noise = sigma * jacobian, sigma**2 * second, noise.flatten()
    held = f.detach()
    others = triples and [(w, held + each, held + quiet) for w, each, quiet in triples]
    options: dict = {"others": others, "control": control}
    if isinstance(case.options["probes"], hosm.Paired):
        return dense_paired_terms(f, a, second, noise, probes, **options)[: case.order]
    options["exact"] = case.options.get("probes") == "exact"
    held = (f + noise).detach(), a.detach()
    return dense_terms(f, a, second, 1.0, noise, probes, frozen=held, **options)[
        1 : case.order + 1
    ]


def dense_loss(case, rows, probes):
    """The loss, and its terms: (B,), or of the rows."""
    case.network.by_hand = True
    halves, signs = [], (1, -1) if case.options["antithetic"] else (1,)
    for sign in signs:
        samples = [dense_sample(case, row, sign) for row in range(case.size)]
        first = torch.stack([(f(x) + noise).square().sum() for f, x, _, noise, *_ in samples])
        terms = [first / case.x0[0].numel()]
        if case.order > 1:
            higher = []
            for place, row in enumerate(rows):
                higher.append(higher_terms(case, *samples[row][:-1], probes[:, place]))
            terms += [torch.stack(column) for column in zip(*higher, strict=True)]
        halves.append(terms)
    terms = [sum(parts) / len(signs) for parts in zip(*halves, strict=True)]
    case.network.by_hand = False
    if case.loss == "terms":
        return torch.stack(terms), terms
    squared = 0.1 * case.x0[0].numel() ** 2
    named = {"paper": [1.0] * 4, "paper-toy": [1.0, 0.5, 0.0, squared]}
    weights = named[case.weights] if isinstance(case.weights, str) else case.weights
    if weights is None:
        weights = [1.0, 0.5, 0.0, min(1.0, squared)]
    of_first, of_higher = torch.stack([sample[-1] for sample in samples], 1)
    factors = [of_first, *[of_higher[rows]] * 3]
    products = [w * term * each for w, term, each in zip(weights, terms, factors, strict=False)]
    if case.options["reduction"] == "none":
        return sum(products), terms
    mean = sum(product.mean() for product in products)
    return mean if case.options["reduction"] == "mean" else mean * case.size, terms


@settings(max_examples=200)
@given(st.data())
def test_the_loss_its_terms_and_gradients_are_those_of_dense_arrays(data):
    case = drawn_case(data)
    note(f"{case.loss}: {case.model.prediction}, {case.schedule}, {case.options}")
    found, logged = evaluated(case)
    rows, probes = drawn_directions(case)
    wanted, terms = dense_loss(case, rows, probes)
    assert_same(found, wanted, 1e-9)
    if not case.leaves:  # and backward raises
        assert not found.requires_grad
    if logged is not None:
        for held in (copy.deepcopy, pickled):
            assert torch.equal(evaluated(case, held=held)[0], found)
        assert torch.equal(logged.t, case.t)
        assert not any(term.requires_grad for term in (*logged, logged.t) if term is not None)
        assert logged.rows is None or torch.equal(logged.rows, rows)
        for mine, other in zip(logged, terms, strict=False):
            if mine is not None:  # as it may be with a weight of 0
                assert_same(mine, other.detach(), 1e-9)
    cotangent = torch.randn_like(wanted)
    mine, others = (gradients((loss * cotangent).sum(), case.leaves) for loss in (found, wanted))
    largest = max([float(each.abs().max()) for each in others], default=0.0)
    assert_same(mine, others, 1e-8, least=1e-3 * largest)
    if case.mode is not None:
        with case.mode():
            made = {}  # inside the mode, as a validation loop makes them
            validated, _ = evaluated(case, lambda tensor: made.setdefault(tensor, tensor.clone()))
        assert not validated.requires_grad
        torch.testing.assert_close(validated, found, rtol=1e-13, atol=1e-13)
        trained, _ = evaluated(case, made.get)  # and they can be trained on
        torch.testing.assert_close(trained, found)
        if case.trained == "all":
            trained.sum().backward()
