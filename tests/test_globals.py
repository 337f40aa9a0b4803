"""Random numbers come from where the caller says, and nothing global is changed.

After success, after an exception, and with an abandoned graph.
"""

from functools import partial

import pytest
import torch
import torch._dynamo  # PyTorch wraps torch.manual_seed where this is first imported
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from tests.cases import ENGINES, FUNCTIONS, MLP, MODULES, SCHEDULES, VP

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = (X.abs() * 100).to(torch.uint8)
FEW = hosm.FixedGrid(4)


def from_prior(model, **options):
    return hosm.ode_sample(model, (4, 3), solver=FEW, divergence=None, **options).x


def density(function, x=X, **fixed):
    return lambda model, **options: function(model, x, solver=FEW, **fixed, **options).nll


def loss(function, **fixed):
    return lambda model, **options: function(model, X, **fixed, **options)


# Everything public that draws, as a function of the model and a generator.
DRAWS = {
    **{f"order {order}": loss(FUNCTIONS[order]) for order in (1, 2, 3)},
    **{
        f"module {order}": lambda m, order=order, **o: MODULES[order](m)(X, **o)
        for order in (1, 3)
    },
    "fraction": loss(FUNCTIONS[2], fraction=0.5, probes="exact", t=X[:, 0] * 0 + 0.5, noise=X),
    "paired": loss(FUNCTIONS[3], probes=hosm.Paired()),
    "averaged": loss(FUNCTIONS[3], targets=hosm.AveragedTargets()),
    "scores": loss(FUNCTIONS[3], targets=hosm.TargetScores(-X)),
    "likelihood weighting": loss(FUNCTIONS[1], weighting="likelihood"),
    "terms": lambda model, **options: hosm.dsm_terms(model, X, **options).third,
    "nll": density(hosm.ode_nll, divergence=hosm.Hutchinson()),
    "nll, adaptive": lambda model, **options: (
        hosm.ode_nll(
            model, X, solver=hosm.Adaptive(1e3), divergence=hosm.Hutchinson(), **options
        ).nll
    ),
    "nll, clean": density(hosm.ode_nll, divergence="exact", clean=True),
    "nll, dequantized": density(
        hosm.ode_nll, IMAGES, divergence="exact", dequantization=hosm.Uniform()
    ),
    "nll, truncated": density(
        hosm.ode_nll, IMAGES, divergence="exact", dequantization=hosm.TruncatedNormal()
    ),
    "posterior": lambda model, **options: hosm.denoising_posterior(
        model, X, X[:, 0] * 0 + 0.5
    ).covariance.diagonal(hosm.Hutchinson(2), **options),
    "sample": from_prior,
    "bound": lambda model, **options: hosm.variational_nll(model, X, samples=2, **options).nll,
    **{
        f"times of {name}": lambda _, schedule=schedule, **o: schedule.sample_time(50, **o)
        for name, schedule in SCHEDULES.items()
    },
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_generator_decides_everything_and_the_global_one_is_left_alone(name):
    draw = partial(DRAWS[name], hosm.ScoreModel(MLP(3), VP))
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    one, two, three = (
        torch.as_tensor(draw(generator=each)).detach()
        for each in (generator, torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())
    # Without one the global one is used.
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(torch.as_tensor(draw()).detach())
    assert torch.equal(*found)
    assert not torch.equal(torch.get_rng_state(), before)


class Network(nn.Module):
    """Frozen and trained parts, in training and in evaluation mode; may fail half-way."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.2).eval())
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.outer = nn.Linear(4, 3)
        self.frozen.eval()
        self.fails = False

    def forward(self, x, t):
        hidden = self.frozen(self.inner(x) + t[:, None])
        if self.fails:
            raise ArithmeticError("half-way")
        return self.outer(hidden.sin())


def world(model):
    """Everything a call must leave as it found it."""
    modules = {name: (m.training, type(m), m.forward) for name, m in model.named_modules()}
    parameters = {
        name: (id(p), p.requires_grad, p.grad is None, p._version)
        for name, p in model.named_parameters()
    }
    return (
        modules,
        parameters,
        {
            name: id(each)
            for each in (F, torch)
            for name in ("relu", "softmax", "layer_norm", "sin")
        },
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_rng_state().tolist(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.backends.cuda.flash_sdp_enabled(),
        len(torch.overrides._get_current_function_mode_stack()),
    )


CALLS = [
    *(
        loss(FUNCTIONS[order], engine=engine, **options)
        for engine in ENGINES
        for order, options in ((2, {"probes": 2}), (3, {}), (3, {"probes": hosm.Paired()}))
    ),
    *(DRAWS[name] for name in ("order 1", "module 3", "nll", "nll, adaptive", "bound")),
    *(DRAWS[name] for name in ("sample", "nll, dequantized", "posterior")),
]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fails", [False, True])
def test_the_world_is_as_it_was(fails, mode):
    model = hosm.ScoreModel(Network(), VP)
    model.network.fails = fails
    for call in CALLS:
        with mode():
            before = world(model)
            generator = torch.Generator()
            if fails:
                with pytest.raises(ArithmeticError):
                    call(model, generator=generator)
            else:
                abandoned = call(model, generator=generator)
                assert world(model) == before
                del abandoned
            assert world(model) == before


def test_backward_writes_gradients_and_nothing_else():
    model = hosm.ScoreModel(Network(), VP)
    tensors = [torch.randn(4, 3), torch.full((4,), 0.5), torch.randn(4, 3), torch.randn(4, 3)]
    copies = [tensor.clone() for tensor in tensors]
    x0, t, noise, probe = tensors
    for engine in ENGINES:
        value = hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=probe, engine=engine)
        before = world(model)
        value.backward()
        after = world(model)
        assert after[0] == before[0]
        assert after[2:] == before[2:]
    assert model.network.frozen.weight.grad is None
    assert model.network.inner[0].weight.grad is not None
    hosm.ode_nll(model.eval(), x0, solver=FEW)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert not tensor.requires_grad
        assert tensor.grad is None
