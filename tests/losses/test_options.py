"""Options and weights: what is taken, what is refused, and that nothing is done before."""

import re
from types import MappingProxyType

import numpy as np
import pytest
import torch

import hosm_losses as hosm
from hosm_losses.losses.options import LossOptions, check_weights

VP = hosm.VPSchedule()
FUNCTIONS = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}
NAN, INF = float("nan"), float("inf")


def unreached(x, t):
    raise AssertionError("the network was called")


OPTIONS = [
    ({"probes": 0}, r"probes \(or 'exact'\): expected a whole number of at least 1; got 0"),
    ({"probes": True}, r"probes \(or 'exact'\): expected a whole number.*got True"),
    ({"probes": 2.0}, r"probes \(or 'exact'\): expected a whole number.*got 2\.0"),
    ({"probes": "all"}, r"probes \(or 'exact'\): expected a whole number.*got 'all'"),
    ({"probes": np.array([1, 2])}, r"probes \(or 'exact'\).*got an object of type ndarray"),
    ({"fraction": "half"}, r"fraction: expected a number in \(0, 1\]; got 'half'"),
    ({"fraction": NAN}, r"fraction: expected a number in \(0, 1\]; got nan"),
    ({"fraction": True}, r"fraction: expected a number in \(0, 1\]; got True"),
    ({"fraction": None}, r"fraction: expected a number in \(0, 1\]; got None"),
    ({"fraction": 0.0}, r"fraction: expected a number in \(0, 1\]; got 0\.0"),
    ({"fraction": 1.5}, r"fraction: expected a number in \(0, 1\]; got 1\.5"),
    ({"fraction": 0.5, "reduction": "none"}, "fraction: expected 1 with reduction='none'"),
    ({"distribution": "cauchy"}, "distribution: expected one of 'rademacher', 'gaussian'"),
    ({"distribution": ["dct"]}, "distribution: expected one of.*an object of type list"),
    (
        {"distribution": "dct", "probes": "exact"},
        "distribution: expected 'rademacher' with probes='exact', which draws none; got 'dct'",
    ),
    ({"weighting": "snr"}, r"weighting \(or a callable of t\): expected one of 'noise'"),
    ({"derivative": "jvp"}, "derivative: expected one of 'auto', 'taylor', 'reverse'; got"),
    ({"derivative": None}, "derivative: expected one of 'auto'.*got None"),
    ({"reduction": "avg"}, "reduction: expected one of 'mean', 'sum', 'none'; got 'avg'"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
@pytest.mark.parametrize("order", [2, 3])
def test_bad_options_are_an_error_at_construction_and_in_the_function(order, options, message):
    model = hosm.ScoreModel(unreached, VP)
    module = {2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}[order]
    with pytest.raises(ValueError, match=message):
        module(model, **options)
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[order](model, torch.zeros(2, 3), **options)


@pytest.mark.parametrize("order", [0, 4, True, "3", None, 2.0])
def test_another_order_is_an_error(order):
    with pytest.raises(ValueError, match="order: expected"):
        hosm.dsm_terms(hosm.ScoreModel(unreached, VP), torch.zeros(2, 3), order=order)


def test_numbers_of_numpy_are_numbers():
    options = LossOptions(order=np.int64(3), probes=np.int32(2), fraction=np.float32(0.5))
    assert options == LossOptions(order=3, probes=2, fraction=0.5)
    kinds = [type(getattr(options, name)) for name in ("order", "probes", "fraction")]
    assert kinds == [int, int, float]


WEIGHTS = [
    ("1111", TypeError, "expected four numbers.*got '1111'"),
    (b"1111", TypeError, "expected four numbers"),
    (1.0, TypeError, r"expected four numbers.*got 1\.0"),
    ({"first": 1, "second": 1, "trace": 1, "third": 1}, TypeError, "got an object of type dict"),
    (MappingProxyType({0: 1, 1: 1, 2: 1, 3: 1}), TypeError, "expected four numbers"),
    (iter([1, 1, 1, 1]), TypeError, "expected four numbers"),
    ({1.0, 0.5, 0.1, 0.2}, TypeError, "expected four numbers"),
    (torch.tensor(1.0), TypeError, r"got a torch.float32 tensor of shape"),
    (np.array(1.0), TypeError, "got an object of type ndarray"),
    ((1, 1), ValueError, "expected four numbers.*got 2 at order 3"),
    ((1,) * 5, ValueError, "got 5 at order 3"),
    (np.ones(5), ValueError, "got 5 at order 3"),
    (torch.ones(5), ValueError, "got 5 at order 3"),
    ((0, 0.0, 0, 0), ValueError, "expected one at least that is not 0"),
    ((1, 1, 1, NAN), ValueError, "expected finite numbers of at least 0; got nan"),
    ((1, INF, 1, 1), ValueError, "expected finite numbers of at least 0; got inf"),
    ((1, 1, 1j, 1), ValueError, "expected finite numbers of at least 0; got 1j"),
    ((1, 1, "1", 1), ValueError, "expected finite numbers of at least 0; got '1'"),
    ((1, None, 1, 1), ValueError, "expected finite numbers of at least 0; got None"),
    ((True, 1, 1, 1), ValueError, "expected finite numbers of at least 0; got True"),
    ((1, -0.5, 1, 1), ValueError, r"expected numbers of at least 0; got -0\.5"),
    (np.array([1, NAN, 1, 1]), ValueError, "expected finite numbers of at least 0; got.*nan"),
    (np.ones((4, 1)), ValueError, "got an object of type ndarray"),
    (np.array([1, 1j, 1, 1]), ValueError, "expected finite numbers of at least 0"),
    (torch.tensor([1, NAN, 1, 1]), ValueError, "expected finite values; got 1 NaN or infinite"),
    ((1, 1, 1, torch.tensor(INF)), ValueError, "expected finite values; got 1 NaN or infinite"),
    ((1, 1, 1, torch.tensor(-2.0)), ValueError, r"expected numbers of at least 0; got -2\.0"),
    ((1, 1, 1, torch.tensor(1j)), TypeError, "expected real numbers; got a torch.complex"),
    ((1, 1, 1, torch.tensor(True)), TypeError, r"expected real numbers; got a torch\.bool"),
    ((1, 1, 1, torch.ones(3)), ValueError, r"expected numbers; got.*shape \(3,\)"),
    (torch.ones(4, 2), ValueError, r"expected numbers; got.*shape \(2,\)"),
    ((1, 1, 1, torch.ones((), device="meta")), ValueError, "or on the CPU; got one on meta"),
]


@pytest.mark.parametrize(("weights", "error", "message"), WEIGHTS)
def test_bad_weights_are_an_error_before_any_work(weights, error, message):
    model = hosm.ScoreModel(unreached, VP)
    with pytest.raises(error, match=f"weights: .*{message}"):
        hosm.third_order_dsm(model, torch.zeros(2, 3), weights=weights)


@pytest.mark.parametrize(("weights", "error", "message"), WEIGHTS[:-1])
@pytest.mark.parametrize("module", [hosm.SecondOrderDSM, hosm.ThirdOrderDSM])
def test_bad_weights_are_an_error_at_construction(module, weights, error, message):
    if module is hosm.SecondOrderDSM:
        message = message.replace("at order 3", "at order 2")
    with pytest.raises(error, match=f"weights: .*{message}"):
        module(hosm.ScoreModel(unreached, VP), weights=weights)


def test_at_order_two_one_of_the_first_three_is_not_zero():
    with pytest.raises(ValueError, match="expected one at least that is not 0"):
        check_weights((0, 0, 0, 1), 2)
    with pytest.raises(ValueError, match=re.escape("got 2 at order 2")):
        check_weights((1, 1), 2)


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
