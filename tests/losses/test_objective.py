"""Gradients against central differences of dense terms, and any shape, dtype and time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hosm_losses as hosm
from tests.cases import ENGINES, FUNCTIONS, MLP, SCHEDULES, VP, assert_same, gradients, networks
from tests.oracles import LAPLACIAN, dense_derivatives, dense_terms


def dense(model, x0, t, noise, probe, frozen=None, **options):
    """Terms of every sample by dense formulas, and what their detach holds fixed."""
    network = model.network
    network.by_hand = True
    terms, held = [], []
    for row in range(len(x0)):
        alpha, sigma = model.schedule(t[row])

        def field(point, row=row):
            return -network(point[None], t[row : row + 1])[0]

        f, jacobian, second = dense_derivatives(field, alpha * x0[row] + sigma * noise[row])
        held.append(((f + noise[row].reshape(-1)).detach(), jacobian.detach()))
        fixed = None if frozen is None else frozen[row]
        given = (f, jacobian, second, sigma, noise[row], probe[:, row])
        terms.append(dense_terms(*given, frozen=fixed, **options))
    network.by_hand = False
    return [torch.stack(column) for column in zip(*terms, strict=True)], held


def difference(function, network, direction, h=1e-5):
    """Central difference of a scalar along a direction of all parameters."""
    start = parameters_to_vector(network.parameters()).detach()
    values = []
    for sign in (1, -1):
        vector_to_parameters(start + sign * h * direction, network.parameters())
        values.append(float(function().detach()))
    vector_to_parameters(start, network.parameters())
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize(
    ("name", "order", "options"),
    [
        *(("attention", 3, {"engine": name}) for name in ENGINES[1:]),
        ("conv", 3, {}),
        ("conv", 2, {"probes": "exact"}),
        ("mlp", 3, {"probes": "exact"}),
        ("attention", 3, {"third": "laplacian"}),
    ],
)
def test_parameter_gradients_are_differences_with_the_detached_parts_held(name, order, options):
    network, shape = networks()[name]
    model, t = hosm.ScoreModel(network, VP), torch.tensor([0.3, 0.8])
    x0, noise, *probe = torch.randn(4, 2, *shape)
    forms = {"exact": "probes" in options}
    forms |= {"third": LAPLACIAN} if "third" in options else {}
    given = (model, x0, t, noise, probe := torch.stack(probe))
    weights = (0.7, 1.3, 0.9, 1.7)[: order + 1]
    inputs = {"t": t, "noise": noise, "weights": weights, **options}
    inputs |= {} if "probes" in options else {"probe": probe}
    direction = torch.randn(sum(p.numel() for p in network.parameters()))
    found = gradients(FUNCTIONS[order](model, x0, **inputs), network)
    found = float(parameters_to_vector(found) @ direction)
    _, held = dense(*given, **forms)

    def total(frozen):
        terms, _ = dense(*given, frozen=frozen, **forms)
        return sum(weight * term.mean() for weight, term in zip(weights, terms, strict=False))

    assert found == pytest.approx(difference(lambda: total(held), network, direction), rel=1e-6)
    # The value of the loss itself moves otherwise: that is the detach at work.
    plain = difference(lambda: total(None), network, direction)
    assert abs(found - plain) > 1e-3 * abs(plain)


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
    network = MLP(int(torch.tensor([1, *shape[1:]]).prod())).to(dtype)
    model = hosm.ScoreModel(network, schedule)
    x0, noise = torch.randn(2, *shape, dtype=dtype).unbind()
    t = torch.full((shape[0],), schedule.t_min + place * (schedule.t_max - schedule.t_min))
    given = {"t": t.to(dtype).clamp(max=schedule.t_max), "noise": noise}
    probes = {"probes": "exact"}
    if count != "exact":
        probes = {"probe": torch.randn(count, *shape, dtype=dtype)}
    default, *others = (
        hosm.dsm_terms(model, x0, **given, engine=engine, **probes) for engine in ENGINES
    )
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    assert all((term.shape, term.dtype) == (x0.shape[:1], dtype) for term in default)
    for other in others:
        assert_same(other, default, tolerance, least=0.1)
    row = {name: value[-1:] for name, value in given.items()}
    row |= {name: value if count == "exact" else value[:, -1:] for name, value in probes.items()}
    alone = hosm.dsm_terms(model, x0[-1:], **row)
    assert_same(alone, [term[-1:] for term in default], tolerance, least=0.1)
