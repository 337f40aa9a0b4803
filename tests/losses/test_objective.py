"""The terms against dense formulas, and their parameter gradients against central differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hosm_losses as hosm
from tests.oracles import (
    MLP,
    dense_derivatives,
    dense_terms,
    networks,
    noise_by_solving,
)

SCHEDULES = {
    "vp": hosm.VPSchedule(),
    "ve": hosm.VESchedule(),
    "subvp": hosm.SubVPSchedule(),
    "cosine": hosm.CosineSchedule(),
    "edm": hosm.EDMSchedule(t_max=3.0),
    "flow": hosm.LinearFlowSchedule(),
    "discrete": hosm.DiscreteSchedule(torch.linspace(0.99, 0.01, 20)),
}
PREDICTIONS = ("epsilon", "score", "sample", "v_prediction", "flow_prediction")
ENGINES = ("auto", "reverse", "taylor")


def rates_of(schedule, t):
    """(α′, σ′) by reverse mode, which the library does not use for it."""
    return tuple(
        torch.func.grad(function)(t.clone()) for function in (schedule.alpha, schedule.sigma)
    )


def dense(model, x0, t, noise, probe, *, exact=False, frozen=None, **options):
    """Terms of every sample by dense formulas, and what their detach holds fixed."""
    network, schedule = model.network, model.schedule
    network.by_hand = True
    terms, held = [], []
    for row in range(len(x0)):
        time = t[row].double()
        alpha, sigma = schedule(time)
        rates = rates_of(schedule, time)

        def field(point, row=row, alpha=alpha, sigma=sigma, rates=rates):
            raw = network(point[None], t[row : row + 1])[0]
            return -noise_by_solving(model.prediction, raw, point, alpha, sigma, rates)

        x = alpha * x0[row] + sigma * noise[row]
        f, jacobian, second = dense_derivatives(field, x)
        held.append((f + noise[row].reshape(-1), jacobian))
        terms.append(
            dense_terms(
                f,
                jacobian,
                second,
                sigma,
                noise[row],
                probe[:, row],
                exact=exact,
                frozen=None if frozen is None else frozen[row],
                **options,
            )
        )
    network.by_hand = False
    return [torch.stack(column) for column in zip(*terms, strict=True)], held


def batch(name, schedule, size=2, count=1):
    network, shape = networks()[name]
    span = schedule.t_max - schedule.t_min
    t = schedule.t_min + span * torch.linspace(0.3, 0.8, size)
    x0, noise = torch.randn(size, *shape), torch.randn(size, *shape)
    return network, x0, t, noise, torch.randn(count, size, *shape)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_terms_equal_the_dense_formulas(name, schedule, prediction, engine):
    schedule = SCHEDULES[schedule]
    network, x0, t, noise, probe = batch(name, schedule, count=2)
    model = hosm.ScoreModel(network, schedule, prediction)
    given_inputs = {"t": t, "noise": noise, "derivative": engine}
    expected, _ = dense(model, x0, t, noise, probe)
    got = hosm.dsm_terms(model, x0, probe=probe, **given_inputs)
    for term, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(term, reference, rtol=1e-10, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_exact_terms_equal_the_dense_formulas(name, engine):
    schedule = hosm.VPSchedule()
    network, x0, t, noise, probe = batch(name, schedule)
    model = hosm.ScoreModel(network, schedule)
    expected, _ = dense(model, x0, t, noise, probe, exact=True)
    got = hosm.dsm_terms(model, x0, t=t, noise=noise, probes="exact", derivative=engine)
    for term, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(term, reference, rtol=1e-10, atol=0)


LAPLACIAN = "ijk,j,k->i"  # ∂²f[v, v], in place of the gradient of vᵀ ∂f v


@pytest.mark.parametrize("engine", ["auto", "taylor"])
@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_the_laplacian_estimator_is_the_dense_formula(name, engine):
    schedule = hosm.VPSchedule()
    network, x0, t, noise, probe = batch(name, schedule, count=2)
    model = hosm.ScoreModel(network, schedule, "v_prediction")
    options = {"t": t, "noise": noise, "probe": probe, "derivative": engine}
    expected, _ = dense(model, x0, t, noise, probe, third=LAPLACIAN)
    got = hosm.dsm_terms(model, x0, third="laplacian", **options)
    for term, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(term, reference, rtol=1e-10, atol=0)
    exact = hosm.dsm_terms(model, x0, **options)
    assert (exact.third - got.third).abs().min() > 1e-3 * got.third.min()


def test_the_laplacian_estimator_has_the_gradient_of_a_difference():
    schedule = hosm.VPSchedule()
    network, x0, t, noise, probe = batch("attention", schedule)
    model = hosm.ScoreModel(network, schedule)
    direction = torch.randn(sum(p.numel() for p in network.parameters()))
    loss = hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=probe, third="laplacian")
    gradient = gradient_along(loss, network, direction)
    _, held = dense(model, x0, t, noise, probe)
    held = [(ell.detach(), jacobian.detach()) for ell, jacobian in held]

    def total():
        terms, _ = dense(model, x0, t, noise, probe, frozen=held, third=LAPLACIAN)
        return sum(term.mean() for term in terms)

    assert gradient == pytest.approx(difference(total, network, direction), rel=1e-6)


def difference(function, network, direction, h=1e-5):
    """Central difference of a scalar along a direction of all parameters."""
    start = parameters_to_vector(network.parameters()).detach()
    values = []
    for sign in (1, -1):
        vector_to_parameters(start + sign * h * direction, network.parameters())
        values.append(float(function().detach()))
    vector_to_parameters(start, network.parameters())
    return (values[0] - values[1]) / (2 * h)


def gradient_along(loss, network, direction):
    network.zero_grad()
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return float(parameters_to_vector(grads) @ direction)


@pytest.mark.parametrize("probes", [1, 2, "exact"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_parameter_gradients_are_differences_with_the_detached_parts_held(
    name, order, engine, probes
):
    schedule = hosm.VPSchedule()
    exact = probes == "exact"
    network, x0, t, noise, probe = batch(name, schedule, count=1 if exact else probes)
    model = hosm.ScoreModel(network, schedule)
    weights = (0.7, 1.3, 0.9, 1.7)
    inputs = {"t": t, "noise": noise, "weights": weights, "derivative": engine}
    inputs |= {"probes": "exact"} if exact else {"probe": probe}
    function = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}[order]
    direction = torch.randn(sum(p.numel() for p in network.parameters()))
    gradient = gradient_along(function(model, x0, **inputs), network, direction)
    _, held = dense(model, x0, t, noise, probe, exact=exact)
    held = [(ell.detach(), jacobian.detach()) for ell, jacobian in held]

    def total(frozen):
        terms, _ = dense(model, x0, t, noise, probe, exact=exact, frozen=frozen)
        pairs = zip(weights[: order + 1], terms, strict=False)
        return sum(weight * term.mean() for weight, term in pairs)

    assert gradient == pytest.approx(difference(lambda: total(held), network, direction), rel=1e-6)
    # The value of the loss itself moves otherwise: that is the detach at work.
    plain = difference(lambda: total(None), network, direction)
    assert abs(gradient - plain) > 1e-3 * abs(plain)


PREDICTIONS_OF_ORACLE = {
    "epsilon": lambda noise, x, alpha, sigma, rates: noise,
    "score": lambda noise, x, alpha, sigma, rates: -noise / sigma,
    "sample": lambda noise, x, alpha, sigma, rates: (x - sigma * noise) / alpha,
    "v_prediction": lambda noise, x, alpha, sigma, rates: (
        alpha * noise - sigma * (x - sigma * noise) / alpha
    ),
    "flow_prediction": lambda noise, x, alpha, sigma, rates: (
        rates[0] * (x - sigma * noise) / alpha + rates[1] * noise
    ),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_prediction_of_one_field_gives_one_loss(schedule, prediction):
    schedule = SCHEDULES[schedule]
    network, x0, t, noise, probe = batch("mlp", schedule, size=4)
    say = PREDICTIONS_OF_ORACLE[prediction]

    def same(x, t):
        alpha, sigma = (part[:, None] for part in schedule(t))
        rates = [part[:, None] for part in schedule.rates(t)]
        return say(network(x, t), x, alpha, sigma, rates)

    losses = [
        hosm.third_order_dsm(model, x0, t=t, noise=noise, probe=probe)
        for model in (
            hosm.ScoreModel(network, schedule),
            hosm.ScoreModel(same, schedule, prediction),
        )
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_seen_in_its_ve_coordinates_gives_the_same_loss(schedule):
    schedule = SCHEDULES[schedule]
    network, x0, t, noise, probe = batch("mlp", schedule, size=4)

    class Exploding(hosm.Schedule):
        t_min, t_max = schedule.t_min, schedule.t_max

        def alpha(self, t):
            return torch.ones_like(t)

        def sigma(self, t):
            return schedule.sigma(t) / schedule.alpha(t)

    def stretched(y, t):
        return network(schedule.alpha(t)[:, None] * y, t)

    inputs = {"t": t, "noise": noise, "probe": probe}
    expected = hosm.dsm_terms(hosm.ScoreModel(network, schedule), x0, **inputs)
    got = hosm.dsm_terms(hosm.ScoreModel(stretched, Exploding()), x0, **inputs)
    for term, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(term, reference, rtol=1e-10, atol=0)


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    place=st.floats(0.1, 1.0),
    count=st.sampled_from([1, 2, "exact"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_dtype_batch_schedule_and_time(shape, dtype, schedule, place, count, seed):
    """All engines agree, and a batch equals its rows."""
    schedule = SCHEDULES[schedule]
    torch.manual_seed(seed)
    elements = int(torch.tensor(shape[1:]).prod()) if shape[1:] else 1
    network = MLP(elements).to(dtype)
    model = hosm.ScoreModel(network, schedule)
    x0, noise = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    t = torch.full((shape[0],), schedule.t_min + place * (schedule.t_max - schedule.t_min))
    t = t.to(dtype).clamp(max=schedule.t_max)
    probes = {"probes": "exact"}
    if count != "exact":
        probes = {"probe": torch.randn(count, *shape, dtype=dtype)}
    default, *others = (
        hosm.dsm_terms(model, x0, t=t, noise=noise, derivative=engine, **probes)
        for engine in ENGINES
    )
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-3, "atol": 1e-4}
    for one, *same in zip(default, *others, strict=True):
        assert one.shape == (shape[0],)
        assert one.dtype == dtype
        for other in same:
            torch.testing.assert_close(one, other, **tolerance)
    row = {"t": t[-1:], "noise": noise[-1:]}
    if "probe" in probes:
        row["probe"] = probes["probe"][:, -1:]
    else:
        row["probes"] = "exact"
    alone = hosm.dsm_terms(model, x0[-1:], **row)
    for one, other in zip(alone, others[0], strict=True):
        torch.testing.assert_close(one[0], other[-1], **tolerance)
