"""The modules: options that are held, terms beside the loss, copies, and what is refused."""

import copy
import inspect
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import FUNCTIONS, MLP, MODULES, VP


def setting():
    return hosm.ScoreModel(MLP(2), VP), torch.randn(4, 2)


def test_it_holds_the_model_and_nothing_else_can_be_copied_and_prints_its_options():
    model, x0 = setting()
    weights = (1, 0.1, 0.1, 0.01)
    module = hosm.ThirdOrderDSM(model, probes="exact", weighting="native", weights=weights)
    assert module.model is model
    assert set(module.state_dict()) == {f"model.{key}" for key in model.state_dict()}
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        t, noise = torch.full((4,), 0.5), torch.ones(4, 2)
        assert torch.equal(clone(x0, t=t, noise=noise), module(x0, t=t, noise=noise))
    assert "probes='exact'" in repr(module)
    assert "weights=(1, 0.1, 0.1, 0.01)" in repr(module)


@pytest.mark.parametrize("value", [hosm.Hutchinson(2, "dct"), hosm.Paired(4), "exact", 3])
def test_values_are_held_copied_and_printed_as_they_are_written(value):
    model, x0 = setting()
    module = hosm.ThirdOrderDSM(model, probes=value, weights="paper-toy")
    shown = hosm.Hutchinson(3) if value == 3 else value
    assert f"probes={shown!r}, targets=None, weights='paper-toy'" in repr(module)
    inputs = {"t": torch.full((4,), 0.5), "noise": torch.ones(4, 2)}
    numbers = (1, 0.5, 0, 0.1 * x0[0].numel() ** 2)
    found = []
    for each in (module, pickle.loads(pickle.dumps(module))):
        found.append(each(x0, generator=torch.Generator().manual_seed(0), **inputs))
        own = {"generator": torch.Generator().manual_seed(0), **inputs}
        found.append(hosm.third_order_dsm(model, x0, probes=value, weights=numbers, **own))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=0)


def test_numbers_of_numpy_are_numbers():
    model, _ = setting()
    taken = hosm.ThirdOrderDSM(model, probes=np.int32(2), fraction=np.float32(0.5))
    assert repr(taken) == repr(hosm.ThirdOrderDSM(model, probes=2, fraction=0.5))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda network: torch.compile(network, backend="eager"),
        lambda _: torch.jit.script(nn.LayerNorm(2)),
    ],
)
def test_a_wrapped_part_of_a_network_is_an_error_above_order_one(wrap, monkeypatch):
    model = hosm.ScoreModel(nn.Sequential(wrap(MLP(2))), VP)
    # As in a process where nothing was compiled or sharded.
    for package in ("torch._dynamo", "torch.distributed.fsdp"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    for call in (hosm.SecondOrderDSM, hosm.ThirdOrderDSM):
        with pytest.raises(TypeError):
            call(model)
    with pytest.raises(TypeError):
        hosm.second_order_dsm(model, torch.randn(3, 2), engine="reverse")
    hosm.FirstOrderDSM(model)


def test_terms_keep_their_times_where_a_wrapper_makes_the_tuple_again():
    """As DistributedDataParallel does with static_graph=True, and accelerate."""
    model = setting()[0]
    loss = hosm.ThirdOrderDSM(model, fraction=0.5)
    _, terms = loss(torch.randn(4, 2), return_terms=True)
    again = type(terms)(*terms)
    assert again.t is terms.t
    assert again.rows is terms.rows
    with pytest.raises(AttributeError):
        type(terms)(*[term.clone() for term in terms]).rows  # noqa: B018
    with pytest.raises(AttributeError):
        terms.other  # noqa: B018


def test_tensors_of_weights_are_no_parameters():
    model = setting()[0]
    loss = hosm.ThirdOrderDSM(model, weights=torch.ones(4))
    assert len(list(loss.parameters())) == len(list(model.parameters()))


def test_a_module_takes_the_options_of_its_function():
    inputs = {"model", "x0", "t", "noise", "probe", "generator", "model_kwargs"}
    for order in (1, 2, 3):
        shown = inspect.signature(FUNCTIONS[order]).parameters
        held = inspect.signature(MODULES[order]).parameters
        assert set(shown) - inputs == set(held) - {"model"}
        for name in set(held) - {"model"}:
            assert shown[name].default == held[name].default, name


def test_the_weighting_of_the_rows_of_a_fraction_is_that_of_their_times():
    model, x0 = setting()
    loss = hosm.ThirdOrderDSM(
        model, weights=(1, 0.5, 0.25, 2), weighting=lambda t: t.exp(), fraction=0.5
    )
    generator = torch.Generator().manual_seed(3)
    value, terms = loss(torch.cat([x0, x0]), generator=generator, return_terms=True)
    assert terms.rows is not None
    assert terms.rows.tolist() != list(range(4))
    factor = terms.t.exp()
    first, second, trace, third = terms
    higher = factor[terms.rows] * (0.5 * second + 0.25 * trace + 2 * third)
    by_hand = (factor * first).mean() + higher.mean()
    torch.testing.assert_close(value.detach(), by_hand)
