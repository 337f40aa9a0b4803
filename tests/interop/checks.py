"""What every ScoreModel made from foreign objects has to do."""

import copy
import pickle

import pytest
import torch

import hosm_losses as hosm


def check_all_from_one_line(model, x0, model_kwargs=None, pickles=True):
    """A training step at orders 1 to 3, the likelihood, a copy, and the keys of the network."""
    options = {"model_kwargs": model_kwargs}
    for function in (hosm.first_order_dsm, hosm.second_order_dsm, hosm.third_order_dsm):
        model.zero_grad()
        loss = function(model, x0, generator=torch.Generator().manual_seed(0), **options)
        loss.backward()
        gradients = [p.grad for p in model.network.parameters() if p.grad is not None]
        assert bool(torch.isfinite(loss))
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0
    result = hosm.ode_nll(
        model, x0, steps=6, generator=torch.Generator().manual_seed(0), **options
    )
    # On six steps the solver error of an untrained network may be thousands of nats.
    assert bool(torch.isfinite(result.solver_error).all())
    assert all(key.startswith("network.") for key in model.state_dict())
    t = model.schedule.sample_time(len(x0), torch.Generator().manual_seed(0)).to(
        x0.dtype if not model.schedule.integer_time else torch.int64
    )
    kwargs = model_kwargs or {}
    expected = model.noise(x0, t, **kwargs).detach()
    copies = [copy.deepcopy(model)]
    if pickles:
        copies.append(pickle.loads(pickle.dumps(model)))
    else:  # because the network itself does not
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(model.network)
    for same in copies:
        torch.testing.assert_close(same.noise(x0, t, **kwargs).detach(), expected)


def column(t):
    """(B,) beside images."""
    return t.reshape(-1, 1, 1, 1)


def noised(model, x0, t, noise):
    """Our x_t."""
    alpha, sigma = (part.reshape(-1, *(1,) * (x0.ndim - 1)) for part in model.schedule(t))
    return alpha.to(x0.dtype) * x0 + sigma.to(x0.dtype) * noise
