"""weights="balanced": the higher terms at the scale of the first, at every noise level."""

import copy

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.losses.balance import BINS, DECAY, PRIOR, Balance
from tests.cases import MLP, default_dtype
from tests.versions import tells_hooks

D = 3


def setting(**options):
    model = hosm.ScoreModel(MLP(D), hosm.VPSchedule())
    options = {"probes": hosm.Paired(), "weights": "balanced"} | options
    return hosm.ThirdOrderDSM(model, **options), torch.randn(16, D)


def draws(seed):
    return torch.Generator().manual_seed(seed)


def test_the_weights_are_ratios_of_running_means():
    """Two steps by hand: the sizes of the terms in bins of log σ̂, and the prior of all bins."""
    balance = Balance(2)
    sums, counts = torch.zeros(2, BINS), torch.zeros(2, BINS)
    for seed in (0, 1):
        generator = draws(seed)
        terms = torch.randn((2, 40), generator=generator) * torch.tensor([[1.0], [30.0]])
        level = torch.rand(40, generator=generator)
        found = balance(tuple(terms), level, None)
        sums, counts = sums * DECAY, counts * DECAY
        for sample in range(40):
            place = min(int(float(level[sample]) * BINS), BINS - 1)
            sums[:, place] += terms[:, sample].abs()
            counts[:, place] += 1
    overall = sums.sum(1, keepdim=True) / counts.sum(1, keepdim=True)
    means = (sums + PRIOR * overall) / (counts + PRIOR)
    place = (level * BINS).long()
    torch.testing.assert_close(found[0], torch.ones(40))
    torch.testing.assert_close(found[1], (means[0] / means[1]).sqrt()[place], rtol=1e-5, atol=0)


def test_the_loss_is_the_sum_with_these_weights():
    loss, x0 = setting(fraction=0.5, weighting="likelihood")
    value, terms = loss(x0, generator=draws(0), return_terms=True)
    loss.eval()
    again = loss(x0, generator=draws(0))
    torch.testing.assert_close(again, value)  # the same sizes, taken up once
    low, high = loss.model.schedule.log_sigma_hat_range
    level = (loss.model.schedule.log_sigma_hat(terms.t) - low) / (high - low)
    weights = loss.balance(terms, level, terms.rows)
    nats = (high - low) * D
    expected = nats * terms.first.mean() + sum(
        nats * (weight * term).mean() for weight, term in zip(weights[1:], terms[1:], strict=True)
    )
    torch.testing.assert_close(value, expected)


def test_a_term_that_is_not_finite_is_left_out():
    balance = Balance(2)
    first = torch.ones(4)
    balance((first, torch.tensor([1.0, float("nan"), float("inf"), 3.0])), torch.zeros(4), None)
    assert torch.isfinite(balance.running[0]).all()
    assert float(balance.running[1, 1, 0]) == 2


def test_before_any_step_every_weight_is_one():
    loss, x0 = setting()
    plain = hosm.ThirdOrderDSM(loss.model, probes=hosm.Paired(), weights="paper")
    expected = plain(x0, generator=draws(0))
    torch.testing.assert_close(loss.eval()(x0, generator=draws(0)), expected)
    torch.testing.assert_close(loss.train()(x0, generator=draws(0), weights="paper"), expected)
    assert float(loss.balance.running[1].sum()) == 0


def test_the_means_are_in_float32():
    """In bfloat16 a count of 256 would not grow by one, nor shrink by a thousandth."""
    with default_dtype(torch.bfloat16):  # as where a trainer makes its modules
        balance = Balance(2)
    for _ in range(3):
        balance((torch.full((200,), 1e6), torch.ones(200)), torch.zeros(200), None)
    assert float(balance.running[1, 0, 0]) == pytest.approx(200 * (1 + DECAY + DECAY**2))
    before = balance.running.clone()
    assert torch.equal(balance.half().bfloat16().running, before)
    halves = {name: value.bfloat16() for name, value in balance.state_dict().items()}
    for assign in (True, False):
        loaded = Balance(2)
        loaded.load_state_dict(halves, assign=assign)
        assert loaded.running.dtype == torch.float32
        assert torch.equal(loaded.running, halves["running"].float())


def test_what_was_made_without_data_starts_without_means():
    """`to_empty` leaves what was in memory, and a checkpoint of order one has no means."""

    def fill(tensor):
        return torch.full_like(tensor, 7, device="cpu")  # as to_empty, with what was there

    with torch.device("meta"):
        filled, assigned = Balance(2), Balance(2)
    for balance in (filled._apply(fill), assigned):
        balance.load_state_dict({}, assign=balance is assigned)
        for mean in (balance.running[0], balance.running[1]):
            assert (mean.dtype, mean.is_meta) == (torch.float32, False)
            assert not mean.any()


def test_the_ends_of_the_range_have_bins_of_their_own():
    """Also a level that rounding puts outside."""
    balance = Balance(2)
    terms = torch.ones(4), torch.full((4,), 4.0)
    balance(terms, torch.tensor([-0.1, 0.0, 1.0, 1.1]), None)
    expected = torch.zeros(BINS)
    expected[0] = expected[-1] = 2
    assert torch.equal(balance.running[1, 1], expected)
    loss = hosm.SecondOrderDSM(
        hosm.ScoreModel(MLP(D), hosm.DiscreteSchedule.linear(50)), weights="balanced"
    )
    loss(torch.randn(8, D), t=torch.full((8,), 49))  # of level 1 exactly
    assert float(loss.balance.running[1, 0, -1]) == 8


@tells_hooks
def test_what_would_take_a_step_up_twice_is_refused():
    loss, x0 = setting()
    with pytest.raises(ValueError):
        torch.utils.checkpoint.checkpoint(loss, x0, use_reentrant=False)
    parameters = dict(loss.named_parameters())

    def function(parameters):
        return torch.func.functional_call(loss, parameters, (x0,))

    with pytest.raises(ValueError):
        torch.func.grad(function)(parameters)
    loss.balance.eval()
    assert len(torch.func.grad(function)(parameters)) == len(parameters)


def test_the_state_is_kept_and_training_alone_moves_it():
    loss, x0 = setting()
    loss(x0, generator=draws(0))
    state = copy.deepcopy(loss.state_dict())
    assert "balance.running" in state
    other, _ = setting()
    other.load_state_dict(state)
    torch.testing.assert_close(
        other.eval()(x0, generator=draws(1)), loss.eval()(x0, generator=draws(1))
    )
    for name, value in loss.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_numbers_given_to_forward_multiply_them():
    loss, x0 = setting()
    loss(x0, generator=draws(0))
    loss.eval()
    value = loss(x0, generator=draws(1))
    first = loss(x0, generator=draws(1), weights=(1, 0, 0, 0))
    half = loss(x0, generator=draws(1), weights=(1, 0.5, 0.5, torch.tensor(0.5)))
    torch.testing.assert_close(half, (value + first) / 2)


def test_a_checkpoint_of_a_loss_without_means_is_loaded():
    loss, x0 = setting()
    loss(x0).backward()
    means = loss.balance.running.clone()
    plain = hosm.FirstOrderDSM(hosm.ScoreModel(MLP(D), hosm.VPSchedule()))
    loss.load_state_dict(plain.state_dict())
    assert torch.equal(loss.balance.running, means)
    for name, value in plain.state_dict().items():
        assert torch.equal(loss.state_dict()[name], value)
    with pytest.raises(RuntimeError):
        loss.load_state_dict({})
