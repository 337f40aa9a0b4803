"""Nothing global is changed: after success, after an exception, and with an abandoned graph."""

import gc

import pytest
import torch
import torch._dynamo  # PyTorch wraps torch.manual_seed where this is first imported
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm


class Network(nn.Module):
    """Frozen and trained parts, in training and in evaluation mode; may fail half-way."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.2))
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
        {name: id(function) for name, function in vars(F).items()},
        {name: id(function) for name, function in vars(torch).items() if callable(function)},
        modules,
        parameters,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_rng_state().tolist(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.backends.cuda.flash_sdp_enabled(),
        len(torch.overrides._get_current_function_mode_stack()),
    )


def calls(model):
    x0 = torch.randn(4, 3)
    generator = torch.Generator()
    for engine in ("auto", "taylor", "reverse"):
        for probes in (1, 2, "exact"):
            options = {"derivative": engine, "probes": probes}
            yield lambda o=options: hosm.second_order_dsm(model, x0, generator=generator, **o)
            yield lambda o=options: hosm.third_order_dsm(model, x0, generator=generator, **o)
        options = {"derivative": engine, "estimator": "paired"}
        yield lambda o=options: hosm.third_order_dsm(model, x0, generator=generator, **o)
        yield lambda e=engine: hosm.stein_dsm(model, x0, generator=generator, derivative=e)
    yield lambda: hosm.first_order_dsm(model, x0, generator=generator)
    yield lambda: hosm.ThirdOrderDSM(model)(x0, generator=generator)
    for method in ("fixed", "adaptive"):
        for divergence in ("exact", "hutchinson"):
            options = {"method": method, "divergence": divergence, "steps": 4}
            yield lambda o=options: hosm.ode_nll(
                model, x0, generator=generator, tolerance=1e3, **o
            )


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fails", [False, True])
def test_the_world_is_as_it_was(fails, mode):
    model = hosm.ScoreModel(Network(), hosm.VPSchedule())
    # Dropout draws from the global generator, so it is off where that one is watched.
    model.network.inner[2].eval()
    model.network.fails = fails
    for call in calls(model):
        with mode():
            before = world(model)
            if fails:
                with pytest.raises(ArithmeticError, match="half-way"):
                    call()
            else:
                abandoned = call()
                assert world(model) == before
                del abandoned
                gc.collect()
            assert world(model) == before


def test_backward_touches_gradients_and_nothing_else():
    model = hosm.ScoreModel(Network(), hosm.VPSchedule())
    loss = hosm.third_order_dsm(model, torch.randn(4, 3))
    before = world(model)
    loss.backward()
    after = world(model)
    assert after[:3] == before[:3]
    assert after[4:] == before[4:]
    assert model.network.frozen.weight.grad is None
    assert model.network.inner[0].weight.grad is not None


def test_the_callers_tensors_are_not_written_to():
    model = hosm.ScoreModel(Network(), hosm.VPSchedule())
    tensors = [torch.randn(4, 3), torch.full((4,), 0.5), torch.randn(4, 3), torch.randn(4, 3)]
    copies = [tensor.clone() for tensor in tensors]
    x0, t, noise, probe = tensors
    for engine in ("auto", "taylor", "reverse"):
        loss = hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=probe, derivative=engine)
        loss.backward()
    hosm.ode_nll(model.eval(), x0, steps=4)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert not tensor.requires_grad
        assert tensor.grad is None
