"""One table of errors: every public call, each of its arguments, what is refused, and as what.

An argument of one name means the same in every call, so its bad values are written once, in `BAD`;
`MORE` has those of single calls. What is asserted is the class of the error and the name at the
start of its message, not the wording, but for the messages in `TOLD` by which users act.
"""

import inspect
import math
import re
from dataclasses import replace
from operator import attrgetter
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses import interop
from hosm_losses.likelihood.result import Quantization
from tests.cases import MLP, Detaches
from tests.schedules.checks import own

NAN, INF = math.nan, math.inf
X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
CORNERS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
T = torch.full((4,), 0.5, dtype=torch.float64)
PROBES = torch.stack([X, -X])
NORMAL = torch.distributions.Normal(0.0, 1.0)  # of numbers
ROWS = torch.distributions.Normal(torch.zeros(2), 1.0)  # of as many as a sample has
VP, TABLE = hosm.VPSchedule(), hosm.DiscreteSchedule([0.9, 0.5, 0.1])
NETWORK = MLP(2).double()
MODEL = hosm.ScoreModel(NETWORK, VP)
WRAPPED = hosm.ScoreModel(nn.DataParallel(NETWORK), VP)
SCALE = nn.Parameter(torch.ones((), dtype=torch.float64))
LEARNED = hosm.ScoreModel(NETWORK, own(sigma=lambda t: SCALE.to(t.dtype) * t))


def bad(error, *values, named=None):
    """Rows of bad values, the class of the error, and what it names if not the argument."""
    return [(value, error, named) for value in values]


def result(**changes):
    zero = torch.zeros(2)
    parts = {"nll": zero, "latent": torch.zeros(2, 3), "nfe": zero, "standard_error": zero}
    return hosm.NLLResult(**parts | {"solver_error": zero, "failed": zero > 0} | changes)


# Objects of other projects, by their attributes.
def scheduler(kind="epsilon", table=(0.9, 0.5, 0.1), **config):
    config = SimpleNamespace(prediction_type=kind, **config)
    return SimpleNamespace(alphas_cumprod=torch.tensor(table), config=config)


def flow(steps=1000, **config):
    config = SimpleNamespace(num_train_timesteps=steps, **config)
    return type("FlowMatchEulerDiscreteScheduler", (), {"config": config})()


def diffusion(table=(0.9, 0.5, 0.1), mean="EPSILON", objective="pred_noise", **more):
    kinds = {"model_mean_type": SimpleNamespace(name=mean), "model_var_type": "FIXED"}
    parts = {"alphas_cumprod": torch.tensor(table), "model": NETWORK, "objective": objective}
    return SimpleNamespace(**parts, **kinds, **more)


def module(name, **attributes):
    """A network of a class of this name."""
    return type(name, (nn.Module,), {"forward": NETWORK.forward, **attributes})()


STEPS = module("Net", config=SimpleNamespace(training=SimpleNamespace(continuous=False)))
DRAWN = hosm.SampleResult(**vars(result()), x=torch.zeros(2, 3))
EIGHT_BITS = result(quantization=Quantization(256, -1.0, 1.0))
OTHERS = [EIGHT_BITS, result(latent=torch.zeros(2, 4)), result(standard_error=None)]
OTHERS += [result(widening=2.0), result(steps=64)]
SDE = SimpleNamespace(beta_0=0.1, beta_1=20.0, discrete_betas=0)
OTHER_SDE = SimpleNamespace(beta_0=0.1, beta_1=20.0, marginal_prob=lambda x, t: (x, t))
ZERO = (0.9, 0.5, 0.0)

# Kinds of arguments.
TENSORS = [
    *bad(TypeError, X.byte(), X.long(), X + 0j, X.numpy(), None),
    *bad(ValueError, X[:0], X[:, :0], X.sum(), X * NAN, X / 0),
]
# Tensors that are none of a sample of X.
INFORMATION = [X, X[0], T[:1], torch.ones(2, device="meta")]
INFORMATION += [torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.4, 1.0]])]
NO_WHOLE = True, 2.0, "2", np.array([1, 2])
WHOLE = bad(ValueError, 0, -1) + bad(TypeError, *NO_WHOLE)
NO_NUMBER = None, "1", True, torch.tensor(0.5)
NUMBER = bad(TypeError, *NO_NUMBER) + bad(ValueError, NAN, INF, -INF)
POSITIVE = NUMBER + bad(ValueError, 0.0, -1.0)
NAME = bad(ValueError, "other") + bad(TypeError, 1, ["exact"])
FLAG = bad(TypeError, None, 1, "yes", torch.ones(2))
NUMBERS = bad(ValueError, [], [0.9], [0.5, NAN], [NAN, 0.5], [INF, 0.5], [0.5, -INF])
# What nothing is checked of: Python, PyTorch or a type checker names what is wrong.
UNCHECKED = {
    *("companion", "compiled", "clean", "progress", "enable_grad"),
    *("primitives", "scaled", "time_first"),
    *("function", "is_random", "network", "time", "output", "call", "solver"),
    *("generator", "model_kwargs", "dequantization", "values", "levels", "low", "high"),
    *("steps", "offset", "model", "draws", "first", "last", "batch_size"),
    *("tolerance", "step_tolerance"),
    # A schedule's numbers are checked where a model is built.
    *("t_min", "t_max", "beta_min", "beta_max", "sigma_min", "sigma_max", "log_mean", "log_std"),
}
BAD = {
    # Of the losses.
    "return_terms": FLAG,
    "model": bad(TypeError, None, NETWORK, lambda x, t: x),
    **dict.fromkeys(("x0", "x", "data"), TENSORS + bad(TypeError, [1.0])),
    "noise": [
        *bad(TypeError, 0.0, X.numpy(), X.float(), X.long(), X + 0j),
        *bad(ValueError, X[:3], X[:1], X[:, :1], X[None], X * NAN, X * INF, X.to("meta")),
    ],
    "probe": [
        *bad(TypeError, 0.0, "rademacher", PROBES.numpy(), PROBES.float(), PROBES + 0j),
        *bad(ValueError, PROBES[:, :3], PROBES[..., :1], PROBES[:0], PROBES[:, :, None]),
        *bad(ValueError, PROBES * NAN, PROBES.to("meta")),
    ],
    "t": [
        *bad(TypeError, 0.5, T.numpy(), T.float(), T.half(), T.long(), T > 0),
        *bad(ValueError, T[:, None], T[:1], T * 0, T + 0.500001, T * NAN, T.to("meta")),
    ],
    "order": bad(ValueError, 0, 4),
    "weights": [
        *bad(TypeError, b"1111", 1.0, torch.tensor(1.0), np.array(1.0), iter([1] * 4)),
        *bad(TypeError, dict.fromkeys(range(4), 1), MappingProxyType({0: 1}), {1.0, 0.5, 0.1, 2}),
        *bad(ValueError, "1111", (1, 1), (1,) * 5, np.ones(5), torch.ones(5), torch.ones(4, 2)),
        *bad(TypeError, (1, 1, "1", 1), (1, None, 1, 1), (True, 1, 1, 1), (1, 1, 1j, 1)),
        *bad(TypeError, np.array([1, 1j, 1, 1]), np.ones((4, 1))),
        *bad(ValueError, (0, 0.0, 0, 0), (1, 1, 1, NAN), (1, INF, 1, 1), (1, -0.5, 1, 1)),
        *bad(ValueError, np.array([1, NAN, 1, 1])),
        *bad(ValueError, torch.tensor([1, NAN, 1, 1]), (1, 1, 1, torch.tensor(-2.0))),
    ],
    "weighting": [
        *bad(TypeError, None, 1, ("noise", torch.exp)),
        *bad(ValueError, "snr"),
    ],
    "sigma_data": POSITIVE,
    "time_sampler": bad(ValueError, "uniform") + bad(TypeError, 1),
    "targets": bad(TypeError, "averaged", True, hosm.AveragedTargets),
    **dict.fromkeys(("own", "antithetic"), FLAG),
    "same": bad(TypeError, 1, "y"),
    "scores": bad(TypeError, None, 1.0, X.numpy(), X.long()) + bad(ValueError, X[:0], X * NAN),
    "information": [
        *bad(TypeError, "all", True, 1j, X.long(), [1.0, 2.0], torch.tensor(1j), X[0, 0] > 0),
        *bad(ValueError, NAN, -1.0, -INF, X / 0, X[:0], torch.tensor(-1.0), torch.tensor(NAN)),
        *bad(ValueError, *INFORMATION),
    ],
    "averaged": bad(TypeError, True, "batch", hosm.AveragedTargets, X),
    "matrix": FLAG,
    "particles": bad(ValueError, 0, 1, 3) + bad(TypeError, True, 2.0, "2"),
    "probes": [
        *bad(TypeError, None, True, False, 2.0, np.array([1, 2]), hosm.Hutchinson),
        *bad(ValueError, 0, -1, "2", "all"),
    ],
    "count": WHOLE + bad(TypeError, "exact", None),
    "fraction": bad(TypeError, *NO_NUMBER) + bad(ValueError, NAN, 0.0, 1.5, -0.5),
    **dict.fromkeys(("distribution", "engine"), NAME + bad(TypeError, None)),
    **dict.fromkeys(("reduction", "method"), NAME + bad(TypeError, None)),
    # Of the likelihoods.
    "latent": [
        *bad(TypeError, X.byte(), X.long(), X + 0j),
        *bad(ValueError, X[:0], X[:, :0], X.sum(), X * NAN, X / 0, (5, 0), (), []),
        *bad(TypeError, 64, None, X.numpy()),
    ],
    "samples": bad(ValueError, 0, -2, 7),
    "log_prior": bad(ValueError, NORMAL, ROWS),
    "divergence": bad(TypeError, 4, hosm.Hutchinson) + bad(ValueError, "hutchinson"),
    "data_mean": bad(ValueError, NAN, INF, -INF, X[0] * NAN),
    "data_std": bad(ValueError, NAN, INF, 0.0, -1.0, X[0] * 0),
    "result": [
        *bad(TypeError, X, result()),
        *bad(ValueError, replace(DRAWN, nll=None), named="nll"),
        *bad(ValueError, replace(DRAWN, standard_error=None)),
    ],
    "log_target": [
        *bad(TypeError, lambda x: 0.0),
        *bad(ValueError, lambda x: x, lambda x: x[:, 0] * NAN, lambda x: x[:, 0] + INF),
    ],
    "reference": [
        *bad(TypeError, "truth", X.byte(), X + 0j),
        *bad(ValueError, torch.tensor(1.0), X[:0], X * NAN),
    ],
    "results": bad(ValueError, [], *([result(), other] for other in OTHERS), named="cat"),
    # Of models and schedules.
    "schedule": bad(TypeError, None, "vp", object(), hosm.VPSchedule),
    "prediction": bad(TypeError, None, 1) + bad(ValueError, "noise"),
    "project": bad(ValueError, abs, torch.neg),
    "shape": bad(ValueError, (5000,)),
    "alphas_cumprod": NUMBERS + bad(ValueError, [0.5, 0.6], [1.0, 0.5], ZERO, [0.9, 0.5, 0.5]),
    "betas": bad(
        ValueError, [], [0.9], [0.1, -0.1], [0.0, 0.1], [0.1, 1.0], named="alphas_cumprod"
    ),
    **dict.fromkeys(
        ("beta_start", "beta_end", "max_beta"), bad(ValueError, 0.0, 1.0, named="alphas_cumprod")
    ),
}

# The calls, with the arguments that they need.
LOSSES = FIRST, SECOND, THIRD = hosm.first_order_dsm, hosm.second_order_dsm, hosm.third_order_dsm
MODULES = hosm.FirstOrderDSM, hosm.SecondOrderDSM, hosm.ThirdOrderDSM
FORWARD = hosm.ThirdOrderDSM.forward  # of order two as well
OF_FIRST = hosm.FirstOrderDSM.forward
SOLVERS = hosm.ode_nll, hosm.ode_sample
FEW = hosm.FixedGrid(4)
PARAMETRIC = (hosm.VPSchedule, hosm.SubVPSchedule, hosm.VESchedule)
PARAMETRIC += (hosm.CosineSchedule, hosm.LinearFlowSchedule, hosm.EDMSchedule)
CALLS = {
    **{call: {"model": MODEL, "x0": X} for call in (*LOSSES, hosm.dsm_terms)},
    **{call: {"model": MODEL} for call in MODULES},
    FORWARD: {"self": hosm.ThirdOrderDSM(MODEL), "x0": X},
    OF_FIRST: {"self": hosm.FirstOrderDSM(MODEL), "x0": X},
    hosm.denoising_posterior: {"model": MODEL, "x": X, "t": T},
    hosm.ode_nll: {"model": MODEL, "x": X, "solver": FEW},
    hosm.ode_sample: {"model": MODEL, "latent": X, "solver": FEW},
    **{value: {} for value in (hosm.FixedGrid, hosm.ToTolerance, hosm.Adaptive, hosm.Uniform)},
    hosm.TruncatedNormal: {},
    hosm.importance_weights: {"result": DRAWN, "log_target": lambda x: x[:, 0]},
    hosm.variational_nll: {"model": MODEL, "x": X, "samples": 2},
    hosm.check_derivatives: {"model": MODEL, "x0": X},
    hosm.check_wrapping: {"model": MODEL, "x0": X.repeat(4, 1)},
    hosm.NLLResult.cat: {"results": [result(), result()]},
    hosm.NLLResult.from_dict: {"values": result().to_dict()},
    **{getattr(hosm.NLLResult, name): {"self": result()} for name in ("bits_per_dim", "summary")},
    **{value: {} for value in (hosm.AveragedTargets, hosm.EDMWeighting)},
    hosm.TargetScores: {"scores": -X},
    hosm.DivergenceFunction: {"function": lambda x, t: (x, x[:, 0])},
    hosm.TargetScores.information_of: {"data": CORNERS, "scores": -0.75 * CORNERS},
    **{value: {} for value in (hosm.Hutchinson, hosm.Paired)},
    hosm.ScoreModel: {"network": NETWORK, "schedule": VP},
    hosm.OnSubspace: {"network": NETWORK, "project": torch.clone, "shape": (2,)},
    hosm.DiscreteSchedule: {"alphas_cumprod": [0.9, 0.1]},
    hosm.DiscreteSchedule.from_betas: {"betas": [0.1, 0.5]},
    **{call: {} for call in (*PARAMETRIC, TABLE.linear, TABLE.cosine)},
    interop.from_diffusers: {"model": NETWORK, "scheduler": scheduler()},
    interop.from_guided_diffusion: {"model": NETWORK, "diffusion": diffusion()},
    interop.from_denoising_diffusion: {"diffusion": diffusion()},
    interop.from_score_sde: {"model": NETWORK, "sde": SDE},
    interop.from_edm: {"net": module("EDMPrecond", sigma_min=0.0, sigma_max=INF)},
    interop.from_flow_matching: {"network": NETWORK, "data_at": 1},
}
SCORES = [
    *bad(TypeError, *map(hosm.TargetScores, (X.float(), lambda x: None, lambda x: x.float()))),
    *bad(ValueError, hosm.TargetScores(X[:3]), hosm.TargetScores(X[:, :1])),
    *bad(ValueError, hosm.TargetScores(lambda x: x * NAN), hosm.TargetScores(X.to("meta"))),
    *bad(ValueError, *(hosm.TargetScores(torch.neg, each) for each in INFORMATION)),
]
TO_AVERAGE = [
    *SCORES,
    *bad(TypeError, hosm.AveragedTargets(X.float()), hosm.AveragedTargets(same=lambda _: X @ X.T)),
    *bad(ValueError, hosm.AveragedTargets(X[:, :1]), hosm.AveragedTargets(X.to("meta"))),
    *bad(ValueError, hosm.AveragedTargets(same=lambda _: T > 0)),
]
# The bad values of an argument in one call, which for other projects are all.
MORE = {
    **{(call, "targets"): TO_AVERAGE + BAD["noise"][1:] for call in (FIRST, OF_FIRST)},
    **{
        (call, "targets"): TO_AVERAGE + bad(TypeError, X)
        for call in (SECOND, THIRD, hosm.dsm_terms, FORWARD)
    },
    **{(call, "targets"): bad(TypeError, X, hosm.TargetScores(X)) for call in MODULES},
    (hosm.Paired, "count"): bad(ValueError, 1),
    (hosm.FixedGrid, "steps"): WHOLE + bad(ValueError, 3) + bad(TypeError, None),
    (hosm.ode_nll, "divergence"): bad(TypeError, None),
    **{(call, "weights"): bad(TypeError, nn.Parameter(torch.ones(4))) for call in MODULES},
    (SECOND, "weights"): bad(ValueError, "balanced", (0, 0, 0, 1)),
    (THIRD, "weights"): bad(ValueError, "balanced"),
    (hosm.check_derivatives, "order"): bad(ValueError, 1),
    (hosm.check_wrapping, "x0"): bad(ValueError, X, X.repeat(4, 1) * 0, X.repeat(4, 1) * 1e-9),
    (hosm.check_wrapping, "samples"): bad(ValueError, 15) + bad(TypeError, *NO_WHOLE),
    (interop.from_diffusers, "model"): bad(TypeError, SimpleNamespace(scheduler=0)),
    (interop.from_diffusers, "scheduler"): [
        *bad(TypeError, object()),
        *bad(ValueError, scheduler(None), scheduler("other")),
        *bad(ValueError, scheduler(table=ZERO), flow(stages=3)),
        *bad(ValueError, type("LCMScheduler", (), vars(scheduler()))()),
        *bad(ValueError, flow(invert_sigmas=True), named="model"),
    ],
    (interop.from_guided_diffusion, "diffusion"): [
        *bad(TypeError, object()) + bad(ValueError, diffusion(ZERO), diffusion(mean="PREVIOUS_X")),
    ],
    (interop.from_denoising_diffusion, "diffusion"): [
        *bad(TypeError, object()) + bad(ValueError, diffusion(ZERO), diffusion(objective="other")),
        *bad(ValueError, diffusion(self_condition=True)),
    ],
    (interop.from_score_sde, "model"): bad(ValueError, STEPS, named="continuous"),
    (interop.from_score_sde, "sde"): bad(TypeError, object(), OTHER_SDE),
    (interop.from_score_sde, "continuous"): bad(ValueError, False),
    (interop.from_edm, "net"): bad(TypeError, object()),
    (interop.from_flow_matching, "schedule"): bad(TypeError, 1),
    (interop.from_flow_matching, "data_at"): bad(ValueError, 0.5, -1, "1"),
}
BOTH = (*MODULES[1:], SECOND, THIRD, hosm.dsm_terms)
IMAGES = {"x": X.byte(), "dequantization": hosm.Uniform()}
PAIRED, AVERAGED = {"probes": hosm.Paired()}, hosm.AveragedTargets()
TURNED = {"model": module("Lumina2"), "scheduler": flow()}
DISCRETE = {"sde": SimpleNamespace(sigma_min=0.01, sigma_max=50.0), "continuous": False}
NLL, SAMPLE = SOLVERS
BITS = hosm.NLLResult.bits_per_dim
# Arguments of which one is bad beside the others.
TOGETHER = [
    (BOTH[:-1], ValueError, "fraction", {"fraction": 0.5, "reduction": "none"}),
    *((BOTH[2:], ValueError, "probe", {**PAIRED, "probe": each}) for each in (X, X[None])),
    *((BOTH[2:], ValueError, "probe", {"probe": X, "probes": each}) for each in (2, "exact")),
    (BOTH[2:], ValueError, "probe", {"probe": PROBES, "probes": hosm.Paired(3)}),
    ((SECOND, THIRD), ValueError, "weights", {"weights": None, "weighting": "likelihood"}),
    ((*BOTH, hosm.check_derivatives), TypeError, "network", {"model": WRAPPED}),
    (LOSSES, TypeError, "t", {"model": hosm.ScoreModel(NETWORK, TABLE), "t": T > 0}),
    (LOSSES, ValueError, "t", {"model": hosm.ScoreModel(NETWORK, TABLE), "t": T.long() + 3}),
    (LOSSES, TypeError, "t", {"x0": X.bfloat16(), "t": T.bfloat16()}),
    (LOSSES, ValueError, "targets", {"targets": AVERAGED, "model_kwargs": {"y": T}}),
    ([SAMPLE], ValueError, "latent", {"latent": (4, 2), "log_prior": torch.sum}),
    *[
        ([hosm.FixedGrid], ValueError, "companion", {"companion": True, "steps": n})
        for n in (6, 63)
    ],
    (SOLVERS, ValueError, "data_std", {"solver": hosm.FixedGrid(data_std=(1.0, 2.0, 3.0))}),
    (SOLVERS, ValueError, "data_mean", {"solver": hosm.Adaptive(data_mean=X[None])}),
    ([TABLE.linear], ValueError, "alphas_cumprod", {"beta_start": -0.1, "scaled": True}),
    (SOLVERS, ValueError, "schedule", {"model": LEARNED, "enable_grad": True}),
    ([NLL, hosm.variational_nll], TypeError, "x", {"dequantization": hosm.Uniform()}),
    ([NLL], TypeError, "x", IMAGES | {"x": X.long()}),
    (
        [NLL],
        ValueError,
        "dequantization",
        IMAGES | {"dequantization": hosm.Uniform(2), "divergence": hosm.Hutchinson()},
    ),
    ([FIRST], TypeError, "first_order_dsm", {"probe": X}),
    ([SECOND], TypeError, "second_order_dsm", {"n_probes": 2}),
    ([THIRD], TypeError, "third_order_dsm", {"n_probes": 2}),
    ([hosm.dsm_terms], TypeError, "dsm_terms", {"weights": (1, 1, 1, 1)}),
    (MODULES[:1], TypeError, "FirstOrderDSM", {"weights": (1,)}),
    (MODULES[1:2], TypeError, "SecondOrderDSM", {"n_probes": 2}),
    ([OF_FIRST], TypeError, "FirstOrderDSM.forward", {"probe": X}),
    ([FORWARD], TypeError, "ThirdOrderDSM.forward", {"order": 2}),
    ([BITS], ValueError, "bits_per_dim", {"low": -1.0}),
    ([BITS], ValueError, "bits_per_dim", {"levels": 16, "low": 1.0}),
    ([BITS], ValueError, "bits_per_dim", {"self": EIGHT_BITS, "levels": 16}),
    ([BITS], ValueError, "bits_per_dim", {"self": EIGHT_BITS, "levels": 256, "high": 255}),
    ([interop.from_diffusers], ValueError, "model", TURNED),
    ([interop.from_diffusers], TypeError, "model", {**TURNED, "model": lambda x, timestep: x}),
    ([interop.from_score_sde], ValueError, "continuous", DISCRETE),
]
CALLING = [*LOSSES, *SOLVERS, hosm.variational_nll, hosm.check_derivatives]
CALL = attrgetter("__qualname__")


def arguments(call):
    """The names of a call's arguments."""
    return [name for name in inspect.signature(call).parameters if name != "self"]


def wrong(call, given, error, named):
    """What came in place of the error that is expected of a call, None if nothing did."""
    try:
        call(**given)
    except Exception as found:
        # Schedules and values name themselves first.
        start = rf"({call.__name__}(: expected .*|\.))?{named}\b"
        named_first = re.match(start, str(found).partition("; got")[0])
        whole = "expected None;" not in str(found)  # where nothing was said
        return None if type(found) is error and named_first and whole else found
    return "no error"


@pytest.fixture
def _unreached(monkeypatch):
    """A network that fails: what is bad is refused before any work."""

    def unreached(x, t, **kwargs):
        raise AssertionError("the network was called")

    monkeypatch.setattr(NETWORK, "forward", unreached)


@pytest.mark.filterwarnings("ignore:TargetScores.information_of. expected enough samples")
@pytest.mark.parametrize("call", CALLS, ids=CALL)
def test_the_call_without_a_bad_argument_passes(call):
    call(**CALLS[call])


@pytest.mark.usefixtures("_unreached")
@pytest.mark.parametrize("call", CALLS, ids=CALL)
def test_every_bad_argument_is_named(call):
    found = []
    for name in arguments(call):
        rows = [*MORE.get((call, name), [])]
        rows += [] if CALL(call).startswith("from_") else BAD.get(name, [])
        for value, error, named in rows:
            got = wrong(call, {**CALLS[call], name: value}, error, named or name)
            found += [] if got is None else [(name, value, error, got)]
        assert rows or name in UNCHECKED, name
    assert not found


@pytest.mark.usefixtures("_unreached")
def test_arguments_that_do_not_go_together_are_refused():
    for calls, error, named, changes in TOGETHER:
        for call in calls:
            assert wrong(call, {**CALLS[call], **changes}, error, named) is None, (call, changes)


RETURNED = [
    ("weighting", TypeError, lambda t: 1.0, lambda t: t.float()),
    ("weighting", ValueError, lambda t: t[:, None], lambda t: -t, lambda t: t * NAN),
    ("time_sampler", TypeError, lambda *_: 0.5, lambda *_: T.float()),
    ("time_sampler", ValueError, lambda *_: T[:2], lambda *_: 2 + T),
    ("log_prior", TypeError, lambda z: 0.0, lambda z: torch.zeros(4, dtype=torch.float32)),
    ("log_prior", ValueError, lambda z: z, lambda z: z[:2, 0]),
    ("network", TypeError, lambda x, t: (x, x), lambda x, t: {"sample": x}, lambda x, t: x + 0j),
    ("network", TypeError, lambda x, t: x.long()),
    ("network", ValueError, lambda x, t: x.repeat(1, 2), lambda x, t: x.sum(1)),
    ("network", ValueError, lambda x, t: x.to("meta")),
]


@pytest.mark.parametrize("call", CALLING, ids=CALL)
def test_results_of_the_users_functions_are_checked(call):
    for name, error, *functions in RETURNED:
        for each in functions if name in ("network", *arguments(call)) else ():
            changes = {name: each} if name != "network" else {"model": hosm.ScoreModel(each, VP)}
            named = "t" if name == "time_sampler" else name
            assert wrong(call, {**CALLS[call], **changes}, error, named) is None


# Schedules of a user's class, and the package's in a range that is wrong, by the rule they break.
def holed(value):
    """t, but for a hole."""
    return lambda t: torch.where((t > 0.51) & (t < 0.53), value, t)


HELD = own(alpha=None, sigma=None)
HELD.alpha, HELD.sigma = torch.ones_like, torch.detach  # of the instance
FLOW = {"drift": lambda t: -1 / (1 - t), "squared_diffusion": lambda t: 2 * t / (1 - t)}
INHERITS_RATES = own(lambda t: 1 - t, torch.detach, (1e-3, 0.99), **FLOW)
SCHEDULES = {
    ValueError: [
        ("alpha, for", hosm.LinearFlowSchedule(t_max=1.0), hosm.CosineSchedule(t_max=1.0)),
        ("alpha, for", hosm.CosineSchedule(t_max=1.2), hosm.VPSchedule(t_max=999.0)),
        ("alpha, for", own(lambda t: torch.cos(np.pi / 2 * t))),
        (
            "alpha, for",
            own(torch.clone, lambda t: 1 - t, (0, 1)),
            own(lambda t: holed(NAN)(t) / t),
        ),
        ("sigma, for", hosm.LinearFlowSchedule(t_min=0.0), hosm.VPSchedule(t_min=0.0)),
        ("sigma, for", own(sigma=lambda t: (t - 0.5).square() - 0.01), own(sigma=holed(0.0))),
        ("sigma, for", own(sigma=lambda t: t / (1 - t)), own(sigma=lambda t: t + (t > 0.4) * NAN)),
        ("to grow", own(torch.clone, lambda t: 1 - t, (1e-3, 0.999)), own(sigma=torch.ones_like)),
        ("to grow", own(sigma=lambda t: t + 0.2 * torch.sin(6 * np.pi * t) + 0.3)),
        ("to grow", own(sigma=lambda t: (t - 2e-3).abs() + 1e-4)),
        ("to grow", own(sigma=lambda t: torch.where((t > 0.4) & (t < 0.6), 0.4, t))),
        ("t_min < t_max", own(ends=(1.0, 0.001)), own(ends=(1, 1)), hosm.VPSchedule(t_min=2.0)),
        ("sigma, for", hosm.VPSchedule(beta_min=-0.1), hosm.CosineSchedule(offset=-0.1)),
        ("alpha, for", hosm.VPSchedule(beta_max=NAN), hosm.CosineSchedule(offset=INF)),
        ("to grow", hosm.VESchedule(sigma_min=50.0, sigma_max=0.01)),
        ("t_min of", own(ends=(NAN, 1.0)), hosm.EDMSchedule(t_min=NAN)),
        ("t_max of", own(ends=(0.1, INF))),
        (
            "time of",
            own(sigma=torch.square, ends=None, base=hosm.EDMSchedule),
            own(sigma=torch.square, log_sigma_hat=torch.log),
        ),
        ("time of", own(time=torch.exp)),
        ("its rates", own(sigma=lambda t: (20_000 * t).round() / 20_000), HELD, INHERITS_RATES),
        ("its rates", own(lambda t: torch.exp(-t).detach())),
        ("its rates", own(sigma=torch.inference_mode()(lambda t: 1 * t))),
        ("its rates", own(squared_diffusion=torch.clone), own(rates=lambda t: (0 * t, 2 + 0 * t))),
    ],
    TypeError: [
        ("t_min of", own(ends=(torch.tensor(0.1), 1.0)), own(ends=None)),
        ("t_max of", own(ends=(0.1, True))),
        ("alpha to return", own(lambda t: 1.0), own(lambda t: torch.tensor(1.0))),
        ("sigma to return", own(sigma=torch.Tensor.float), own(sigma=lambda t: t.to("meta"))),
    ],
}


@pytest.mark.parametrize("error", SCHEDULES)
def test_a_schedule_that_breaks_a_rule_is_refused_where_a_model_is_built(error):
    for rule, *schedules in SCHEDULES[error]:
        for schedule in schedules:
            given = {"network": NETWORK, "schedule": schedule}
            assert wrong(hosm.ScoreModel, given, error, f"schedule: .*{rule}") is None, rule


def test_times_are_checked_by_models_and_schedules():
    for name in ("noise", "score", "denoise"):
        for t, error in ((T.long(), TypeError), (500 * T, ValueError)):
            assert wrong(getattr(MODEL, name), {"x": X, "t": t}, error, "t") is None
    for name in ("__call__", "alpha", "sigma", "log_sigma_hat"):
        for t in (-1, 3, 2.5, NAN, torch.tensor([0, 3]), torch.tensor([-1.0, 1.0])):
            assert wrong(getattr(TABLE, name), {"t": t}, ValueError, "t") is None


# Public names that refuse nothing themselves, or are in tables of their own.
WITHOUT_ROWS = {
    *("DerivativeError", "DSMTerms", "LoggedTerms", "Schedule", "AdaptiveTimes"),
    *("NLLSummary", "SampleResult", "Shared", "checkpoint", "DivergenceEstimator"),
    *("Solver", "ODESolution"),
    *("WrappingCandidate", "WrappingReport", "DerivativeReport", "Weights"),
    *("DenoisingPosterior", "PosteriorCovariance", "ODEDistribution"),
    "NLLResult",  # whose methods are those of its base
    *("Divergence", "Prediction", "Probes", "Targets", "TermWeights", "TimeSampler", "Weighting"),
}


def test_every_public_name_has_its_rows():
    public = set(hosm.__all__) - {"taylor"}
    public |= {name for name in vars(interop) if name.startswith("from_")}
    assert public - {CALL(call).partition(".")[0] for call in CALLS} == WITHOUT_ROWS


def loss(network, **options):
    return hosm.third_order_dsm(hosm.ScoreModel(network, VP), X, **options)


def traced():
    norm = torch.jit.trace(nn.LayerNorm(2).double(), X)
    return loss(lambda x, t: norm(NETWORK(x, t)))


def checkpointed(x, t):
    return torch.utils.checkpoint.checkpoint(nn.LayerNorm(2).double(), x, use_reentrant=False)


def cubed(x, t):
    return Detaches.apply(NETWORK(x, t))


def energy(x, t):
    x = x.requires_grad_()
    return torch.autograd.grad(NETWORK(x, t).square().sum(), x, create_graph=True)[0]


# Messages that tell users what to write in place of what they wrote.
TOLD = [
    (lambda: hosm.ode_nll(MODEL, X.byte()), r"/ 127\.5 - 1; .*dequantization=Uniform\(\)"),
    # Other numbers than images are only converted.
    (lambda: hosm.TargetScores(X.long()), r"on cpu. Convert it with scores\.float\(\)\.$"),
    (lambda: hosm.ode_sample(MODEL, X.long()), r"on cpu. Convert it with latent\.float\(\)\.$"),
    (lambda: hosm.ode_nll(MODEL, X > 0), r"on cpu. Convert it with x\.float\(\)\.$"),
    (lambda: hosm.ode_nll(MODEL, X + 0j), r"on cpu. Pass real numbers, .*view_as_real\.$"),
    (lambda: hosm.ode_sample(MODEL, 64), r"such as \(64, \*sample shape\); got 64\.$"),
    (
        lambda: hosm.importance_weights(DRAWN, lambda x: torch.tensor([0.0, NAN])),
        r"got nan at x\[1\], and NaN or \+inf at 1 of 2\. Look at x there",
    ),
    (lambda: hosm.importance_weights(X, torch.sum), r"Pass result = ode_sample\(model, \.\.\.\)"),
    (
        lambda: hosm.ode_nll(MODEL, X, solver=hosm.FixedGrid(data_std=(1.0, 2.0, 3.0))),
        r"to that of a sample, \(2,\); got \(3,\)\. .*\(C, 1, 1\)",
    ),
    (lambda: hosm.FirstOrderDSM(NETWORK), r"Wrap your network: ScoreModel\(network, "),
    (lambda: hosm.ScoreModel(NETWORK, scheduler()), r"a schedule such as VPSchedule\(\)"),
    (lambda: hosm.ScoreModel(NETWORK, scheduler()), r"from_diffusers\(network, scheduler\)"),
    *[
        (lambda call=call: call(MODEL, X.numpy()), r"NumPy array .*torch\.from_numpy\(x0?\)")
        for call in (*LOSSES, hosm.dsm_terms, *SOLVERS[:1], hosm.check_derivatives)
    ],
    (lambda: loss(NETWORK, noise=X.numpy()), r"torch\.from_numpy\(noise\)"),
    (lambda: loss(NETWORK, t=T.numpy()), r"torch\.from_numpy\(t\)"),
    (lambda: hosm.AveragedTargets(X.numpy()), r"torch\.from_numpy\(reference\)"),
    *[
        (
            lambda y=y: FIRST(MODEL, X, targets=hosm.AveragedTargets(), model_kwargs={"y": y}),
            told,
        )
        for y, told in ((T > 0, r"kwargs\['y'\]\[:, None\] == labels"), (T, "leave out averaged"))
    ],
    (lambda: hosm.second_order_dsm(WRAPPED, X), r"such as model\.module"),
    (lambda: loss(module("OptimizedModule")), r"torch\.compile around ThirdOrderDSM"),
    (lambda: loss(module("FSDPModule")), "fully_shard or torch"),
    (traced, "Use the module that it was compiled from"),
    (lambda: loss(checkpointed, engine="reverse"), r"expected hosm_losses\.checkpoint inside"),
    (lambda: loss(energy, engine="taylor"), "a network that takes a gradient itself"),
    (
        lambda: loss(cubed, engine="reverse"),
        r"guided_diffusion.*ldm\.modules\.attention",
    ),
    (lambda: loss(lambda x, t: (x, t)), r"ScoreModel\(\.\.\., output="),
    (lambda: loss(lambda x, t: x.repeat(1, 2)), "the first channels"),
    (
        lambda: loss(MLP(2).float()),
        r"x in torch\.float64 .* parameters are in torch\.float32",
    ),
    (lambda: loss(NETWORK, t=500 * T), r"convert it with ScoreModel\(\.\.\., time="),
    (lambda: hosm.DiscreteSchedule(torch.linspace(1e-4, 0.02, 9)), "Pass betas to .*from_betas"),
    (lambda: hosm.DiscreteSchedule.cosine(max_beta=1.0), "A beta has to be above 0 and below 1"),
]


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize(("call", "told"), TOLD)
def test_messages_say_what_to_write_instead(call, told):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=told):
        call()
