"""Networks of other packages: terms and parameter gradients of both orders, in every engine."""

import pytest
import torch

import hosm_losses as hosm
from tests.cases import ENGINES, default_dtype
from tests.integration.compatibility import COLUMNS, PAGE, TITLES, cells, verdicts
from tests.integration.measure import (
    ORDERS,
    TOLERANCE,
    arguments,
    measured,
    outcome,
    reference_of,
)
from tests.integration.networks import FLOW, NETWORKS
from tests.integration.reference import relative_error
from tests.versions import layer_norm_is_wrong

# That another engine runs is one of the verdicts.
pytestmark = pytest.mark.filterwarnings("ignore:engine='auto'")
TEXT = PAGE.read_text(encoding="utf-8")
SAID = verdicts(TEXT)


def takes(name, engine):
    return SAID[TITLES[3], name][engine] != "refused"


def test_the_page_has_every_network_and_column_and_nothing_wrong():
    assert list(SAID) == [(TITLES[order], name) for order in ORDERS for name in NETWORKS]
    for row in SAID.values():
        assert tuple(row) == COLUMNS
        assert {row[engine] for engine in ENGINES} <= {"right", "falls back", "refused"}


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_right_or_refused_as_the_page_says(name, order):
    """If they are not, run `python -m tests.integration.compatibility` and read what changed."""
    said = SAID[TITLES[order], name]
    # "auto" is "taylor" where that is not refused. What PyTorch does alone depends on its version.
    known = order == 3 and f"- torch {torch.__version__}\n" in TEXT
    columns = COLUMNS if known else ENGINES
    columns = columns if said["taylor"] == "refused" else columns[1:]
    row = cells(name, order, columns)
    assert {column: row[column][0] for column in columns} == {each: said[each] for each in columns}
    for found in (row[column][1] for column in columns if column in ENGINES):
        assert found.of_terms < TOLERANCE[found.dtype]
        assert found.raised is None or isinstance(found.raised, hosm.DerivativeError)


def test_float32_is_near(name):
    """As it is used: with the default engine, and with the casts of the package."""
    found = outcome(name, "auto", 3, dtype=torch.float32)
    assert found.verdict == ("right" if takes(name, "auto") else "refused"), found


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_several_probes_are_the_mean_of_single_ones(name, engine):
    """With conditions that follow their samples."""
    if not takes(name, engine):
        return
    model, weights = NETWORKS[name].score_model(), reference_of(name).weights
    given = arguments(name, torch.float64, probes=2)
    both, *singly = (
        measured(model, {**given, "probe": probe}, 3, engine, weights)[1]
        for probe in (given["probe"], *given["probe"])
    )
    assert relative_error(both, sum(singly) / 2) < 1e-9


def check(name, engine="auto", **options):
    """As a user does before the training, near where parameters start."""
    with default_dtype(torch.float32):
        model = NETWORKS[name].score_model(torch.float32, **options)
        given = arguments(name, torch.float32)
        given = {key: given[key] for key in ("x0", "t", "model_kwargs")}
        hosm.check_derivatives(model, engine=engine, **given)


CHECKED = ["azula ViT, checkpointing", "azula UNet, group norm"]


@pytest.mark.parametrize("name", CHECKED, indirect=True)
def test_check_derivatives_passes_what_is_right_and_objects_to_the_rest(name):
    if takes(name, "auto"):
        check(name)
    else:
        with pytest.raises(hosm.DerivativeError, match="checkpoint"):
            check(name)


@layer_norm_is_wrong
@pytest.mark.parametrize("name", ["diffusers DiTTransformer2DModel"], indirect=True)
def test_check_derivatives_objects_to_layer_norm_without_its_primitive(name):
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with kernel, pytest.raises(hosm.DerivativeError, match="primitives=True"):
        check(name, "reverse", primitives=False)


@pytest.mark.parametrize("name", ["torchcfm UNetModel, use_checkpoint"], indirect=True)
def test_check_derivatives_objects_to_a_checkpoint_that_a_flow_would_hide(name):
    """The straight part of the flow has a graph where the network's own part has lost it.

    The package's backward frees what a second pass needs, so the error may be its own.
    """
    with pytest.raises((hosm.DerivativeError, AttributeError)):
        check(name, **FLOW)
