"""Results that are not finite: an error on the CPU that says where they come from."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import FUNCTIONS, VP


class Holed(hosm.VPSchedule):
    """Not finite where no check looks when a model is built."""

    def sigma(self, t):
        return torch.where((t > 0.535) & (t < 0.54), torch.nan, super().sigma(t))


def broken(value):
    return lambda x, t: torch.where(t[:, None] > 0.25, x * 0 + value, x.sin())


def sine(x, t):
    return x.sin()


ZEROS, T = torch.zeros(4, 3, dtype=torch.float64), (0.1, 0.4, 0.2, 0.3)
LOST = "network: expected finite outputs.*for 2 of 4 samples, at t from 0.3 to 0.4"
HOLE = "network: .*for 2 of 4 samples, at t from 0.537 to 0.538. Check"
HALF = "network: .*for 4 of 4 samples, at t from 1 to 1.*range of x"
CASES = [
    *((broken(value), VP, ZEROS, T, LOST) for value in (torch.nan, torch.inf)),
    (sine, Holed(), ZEROS, (0.1, 0.537, 0.9, 0.538), HOLE),
    (sine, hosm.VESchedule(sigma_max=1e6), ZEROS.half(), (1.0,) * 4, HALF),
]


@pytest.mark.parametrize("order", FUNCTIONS)
@pytest.mark.parametrize(("network", "schedule", "x0", "t", "told"), CASES)
def test_samples_that_are_lost_are_counted_with_their_times(network, schedule, x0, t, told, order):
    model = hosm.ScoreModel(network, schedule)
    given = {"t": torch.tensor(t).to(torch.promote_types(x0.dtype, torch.float32))}
    loss, fraction = FUNCTIONS[order], {"fraction": 0.5} if order > 1 else {}
    calls = [(loss, each) for each in (fraction, {"reduction": "none"}, {"weighting": "native"})]
    for call, options in [*calls, (hosm.dsm_terms, {"order": order})]:
        with pytest.raises(ValueError, match=told):
            call(model, x0, **given, **options)


@pytest.mark.parametrize("engine", ["taylor", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
def test_derivatives_that_are_not_finite_are_told_from_outputs(order, engine):
    model = hosm.ScoreModel(lambda x, t: x.square().sqrt(), VP)
    given = {"t": torch.tensor(T), "noise": ZEROS}
    with pytest.raises(hosm.DerivativeError, match=r"second, trace.* up to 0\.0e\+00, .*a root"):
        FUNCTIONS[order](model, ZEROS, engine=engine, **given)
    assert float(hosm.first_order_dsm(model, ZEROS, **given)) == 0


@pytest.fixture
def _warned_again():
    """PyTorch warns of some things only once in a process."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("_warned_again")
def test_no_warning_about_gradients_takes_the_place_of_an_error():
    layer, t = nn.Linear(3, 3), torch.tensor(T, requires_grad=True)

    def call(network=lambda x, t: layer(x), **options):
        hosm.second_order_dsm(hosm.ScoreModel(network, VP), ZEROS, noise=ZEROS, **options)

    with pytest.raises(hosm.DerivativeError, match="a root"):
        call(lambda x, t: layer(x) * x.square().sqrt())
    with pytest.raises(ValueError, match="expected finite outputs"):
        call(lambda x, t: layer(x) / 0, t=t)
    with pytest.raises(ValueError, match=r"got values in \[0\.3, 1\.2\]"):
        call(t=3 * t)
    with pytest.raises(ValueError, match=r"weighting.*got -0\.4"):
        call(weighting=lambda _: -t)
    with pytest.raises(ValueError, match=r"weights: .*got -1"):
        call(weights=(1, layer.bias[0] * 0 - 1, 1))


def test_a_training_that_diverges_is_told_from_a_root():
    """The third term has the sixth power of the error, and overflows first."""
    model, x0 = hosm.ScoreModel(lambda x, t: 1e7 + x.sin(), VP), ZEROS.float()
    with pytest.raises(hosm.DerivativeError, match=r"third are not.*up to 1\.0e\+14, .*rate"):
        hosm.third_order_dsm(model, x0)


def test_weights_that_overflow_are_told_from_both():
    x0 = torch.full((2, 3), 9.0, dtype=torch.float32)
    with pytest.raises(ValueError) as caught:
        hosm.second_order_dsm(hosm.ScoreModel(sine, VP), x0, weights=(3e38, 3e38, 3e38))
    assert type(caught.value) is ValueError
