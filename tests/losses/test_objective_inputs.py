"""Every bad input is an error that says what was expected, what came and what to do."""

import pytest
import torch

import hosm_losses as hosm
from tests.oracles import MLP

VP = hosm.VPSchedule()
TABLE = hosm.DiscreteSchedule([0.9, 0.5, 0.1])
X0 = torch.randn(4, 2, dtype=torch.float64)
T = torch.full((4,), 0.5, dtype=torch.float64)
NAN, INF = float("nan"), float("inf")


def unreached(x, t, **kwargs):
    raise AssertionError("the network was called")


def model(schedule=VP):
    return hosm.ScoreModel(MLP(2), schedule)


BAD = [
    ({"x0": [1.0]}, TypeError, r"x0: expected a floating-point tensor \(B, \*\); got an object"),
    (
        {"x0": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)},
        TypeError,
        r"x0: expected a floating-point.*torch.uint8.*Scale integer images.*127\.5 - 1",
    ),
    ({"x0": torch.zeros(0, 2)}, ValueError, "x0: expected a batch.*drop_last in the loader"),
    ({"x0": torch.zeros(2, 0)}, ValueError, "at least one sample and one element"),
    ({"x0": torch.tensor(1.0)}, ValueError, "x0: expected a batch"),
    ({"x0": X0.to_sparse()}, TypeError, r"x0: expected a dense.*sparse_coo.*x0\.to_dense\(\)"),
    ({"x0": X0 + 0j}, TypeError, r"x0: expected a real floating.*complex128.*view_as_real"),
    ({"x0": X0 * NAN}, ValueError, "x0: expected finite values; got 8 NaN or infinite of 8"),
    ({"noise": X0.float()}, TypeError, "noise: expected torch.float64, to go with x0"),
    ({"noise": X0[:3]}, ValueError, r"noise: expected shape \(4, 2\).*Nothing is broadcast"),
    ({"noise": X0[:1]}, ValueError, r"noise: expected shape \(4, 2\), that of x0"),
    ({"noise": X0 + INF}, ValueError, "noise: expected finite values"),
    ({"noise": X0.to_sparse()}, TypeError, r"noise: expected a dense.*noise\.to_dense\(\)"),
    ({"noise": X0 + 0j}, TypeError, "noise: expected torch.float64, to go with x0"),
    ({"noise": 0.0}, TypeError, "noise: expected a tensor of shape"),
    ({"t": 0.5}, TypeError, r"t: expected a tensor of shape \(4,\); got 0.5"),
    ({"t": T[:, None]}, ValueError, r"t: expected shape \(4,\).*got a torch.float64 tensor of"),
    ({"t": T[:1]}, ValueError, r"t: expected shape \(4,\), that of the batch dimension of x0"),
    ({"t": T.float()}, TypeError, "t: expected torch.float64"),
    ({"t": T.long()}, TypeError, r"t: expected a torch.float64 tensor in \[1e-05, 1\].*Only a D"),
    ({"t": T > 0}, TypeError, "t: expected a torch.float64 tensor"),
    ({"t": T + 1}, ValueError, r"t: expected values in \[1e-05, 1\].*\[1.5, 1.5\].*time="),
    ({"t": T * 0 + 1.000001}, ValueError, r"got values in \[1.000001, 1.000001\]"),
    ({"t": T * 0}, ValueError, r"t: expected values in \[1e-05, 1\]"),
    ({"t": T * NAN}, ValueError, r"t: expected values in \[1e-05, 1\]"),
    ({"probe": X0[:, :1]}, ValueError, r"probe: expected shape \(1, 4, 2\)"),
    ({"probe": X0[None, :, None]}, ValueError, r"probe: expected shape \(1, 4, 2\)"),
    ({"probe": X0[None][:0]}, ValueError, r"probe: expected shape \(1, 4, 2\)"),
    ({"probe": X0.float()}, TypeError, "probe: expected torch.float64"),
    ({"probe": X0 * NAN}, ValueError, "probe: expected finite values"),
    ({"probe": "rademacher"}, TypeError, "probe: expected a tensor"),
    ({"probe": X0, "probes": 2}, ValueError, "probe: expected as many as probes=2.*got 1"),
    ({"probe": X0, "probes": "exact"}, ValueError, "probe: expected as many as probes='exact'"),
    ({"generator": 0}, TypeError, r"generator: expected a torch\.Generator or None; got 0"),
    ({"generator": torch.manual_seed}, TypeError, "generator: expected a torch.Generator"),
    ({"model_kwargs": [1]}, TypeError, "model_kwargs: expected a mapping.*type list"),
    ({"model_kwargs": "y"}, TypeError, "model_kwargs: expected a mapping.*got 'y'"),
    ({"model_kwargs": {"x": X0}}, ValueError, "model_kwargs: expected none of 'x', 't'.*got 'x'"),
    ({"model_kwargs": {"t": T}}, ValueError, "model_kwargs: expected none of 'x', 't'.*got 't'"),
    ({"model_kwargs": {1: T}}, TypeError, "model_kwargs: expected names of keyword.*got 1"),
    ({"model": MLP(2)}, TypeError, r"model: expected a ScoreModel; got an object of type MLP"),
]


@pytest.mark.parametrize(
    ("order", "change", "error", "message"),
    [(order, *case) for order in (1, 2, 3) for case in BAD if order > 1 or "probe" not in case[0]],
)
def test_bad_input_is_a_clear_error(order, change, error, message):
    function = (hosm.first_order_dsm, hosm.second_order_dsm, hosm.third_order_dsm)[order - 1]
    arguments = {"model": hosm.ScoreModel(unreached, VP), "x0": X0} | change
    with pytest.raises(error, match=message):
        function(arguments.pop("model"), arguments.pop("x0"), **arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["x0", "noise", "probe"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_an_error(name, layout):
    nested = torch.nested.nested_tensor(list(X0), layout=layout)
    told = f"{name}: expected a dense tensor.*; got a torch.float64 tensor.*samples of one shape"
    with pytest.raises(TypeError, match=told):
        hosm.second_order_dsm(model(), **{"x0": X0, name: nested})


def test_the_device_is_checked():
    with pytest.raises(ValueError, match=r"noise: expected device cpu.*Move it with noise\.to"):
        hosm.first_order_dsm(model(), X0, noise=X0.to("meta"))
    with pytest.raises(ValueError, match="t: expected device cpu"):
        hosm.first_order_dsm(model(), X0, t=T.to("meta"))


class Elsewhere(torch.Generator):
    """Stands for one on an accelerator, which this machine may lack."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("function", [hosm.first_order_dsm, hosm.third_order_dsm])
def test_a_generator_of_another_device_is_an_error(function):
    with pytest.raises(ValueError, match=r"generator: expected one on cpu.*got one on cuda:0"):
        function(hosm.ScoreModel(unreached, VP), X0, generator=Elsewhere())


def test_integer_times_are_the_tables_alone_and_within_it():
    table = model(TABLE)
    hosm.first_order_dsm(table, X0, t=torch.tensor([0, 1, 2, 2]))
    with pytest.raises(ValueError, match=r"t: expected values in \[0, 2\]"):
        hosm.first_order_dsm(table, X0, t=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(TypeError, match=r"t: expected a torch\.float64 tensor"):
        hosm.first_order_dsm(table, X0, t=T > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", [VP, TABLE, hosm.CosineSchedule(), hosm.EDMSchedule()])
def test_both_ends_of_the_schedule_are_inside_it(schedule, dtype):
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=dtype)
    own = hosm.ScoreModel(lambda x, t: x, schedule)
    hosm.first_order_dsm(own, torch.ones(2, 2, dtype=dtype), t=ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_data_takes_float32_times(dtype):
    own = hosm.ScoreModel(lambda x, t: x, VP)
    x0 = torch.randn(4, 2, dtype=dtype)
    terms = hosm.dsm_terms(own, x0, t=T.float(), noise=x0, probe=x0)
    assert all(term.dtype == torch.float32 for term in terms)
    hosm.third_order_dsm(own, x0)
    with pytest.raises(TypeError, match=r"t: expected torch\.float32"):
        hosm.first_order_dsm(own, x0, t=T.to(dtype))
