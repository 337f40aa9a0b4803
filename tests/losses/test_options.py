"""Options and weights that are taken: numbers of NumPy, arrays, tensors, trained ones."""

import numpy as np
import torch

import hosm_losses as hosm
from hosm_losses.losses.options import LossOptions

VP = hosm.VPSchedule()


def test_numbers_of_numpy_are_numbers():
    options = LossOptions(order=np.int64(3), probes=np.int32(2), fraction=np.float32(0.5))
    assert options == LossOptions(order=3, probes=2, fraction=0.5)
    kinds = [type(getattr(options, name)) for name in ("order", "probes", "fraction")]
    assert kinds == [int, int, float]


def test_arrays_and_tensors_are_weights():
    layer = torch.nn.Linear(3, 3)
    model = hosm.ScoreModel(lambda x, t: layer(x).tanh(), VP)
    x0, noise, probe = torch.randn(3, 2, 3)
    inputs = {"t": torch.tensor([0.2, 0.6]), "noise": noise, "probe": probe}
    expected = hosm.third_order_dsm(model, x0, weights=(0.5, 1.0, 2.0, 0.25), **inputs)
    for weights in (
        np.array([0.5, 1.0, 2.0, 0.25]),
        torch.tensor([0.5, 1.0, 2.0, 0.25]),
        torch.tensor([[0.5], [1.0], [2.0], [0.25]]),
        [np.float32(0.5), np.int64(1), torch.tensor([2]), torch.tensor([[0.25]])],
    ):
        loss = hosm.third_order_dsm(model, x0, weights=weights, **inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
        none = hosm.third_order_dsm(model, x0, weights=weights, reduction="none", **inputs)
        assert none.shape == (2,)


def test_a_trained_weight_has_its_gradient():
    model = hosm.ScoreModel(lambda x, t: x.sin(), VP)
    x0, noise, probe = torch.randn(3, 2, 3)
    inputs = {"t": torch.tensor([0.2, 0.6]), "noise": noise, "probe": probe}
    weight = torch.tensor([0.3], requires_grad=True)
    hosm.third_order_dsm(model, x0, weights=(1, 1, weight, 1), **inputs).backward()
    trace = hosm.dsm_terms(model, x0, **inputs).trace.mean()
    torch.testing.assert_close(weight.grad, trace.detach().reshape(1), rtol=1e-13, atol=0)
