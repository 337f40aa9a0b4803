"""The page on compatibility says what the networks do here."""

import pytest
import torch

from tests.integration.compatibility import COLUMNS, PAGE, TITLES, cells, verdicts
from tests.integration.measure import ENGINES, ORDERS
from tests.integration.networks import NETWORKS

# That another engine runs is one of the verdicts.
pytestmark = pytest.mark.filterwarnings("ignore:derivative='auto'")


@pytest.fixture(scope="module")
def committed():
    return verdicts(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_every_network_and_column_once(committed):
    expected = {
        (TITLES[order], name, column)
        for order in ORDERS
        for name in NETWORKS
        for column in COLUMNS
    }
    assert set(committed) == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_page_agrees_with_this_run(name, order, committed, need):
    """If it does not, run `python -m tests.integration.compatibility` and read what changed."""
    need(NETWORKS[name].module)
    found = {column: verdict for column, (verdict, _) in cells(name, order).items()}
    # What PyTorch does alone is another thing in another version of it.
    same = f"- torch {torch.__version__}\n" in PAGE.read_text(encoding="utf-8")
    columns = COLUMNS if same else ENGINES
    expected = {column: committed[TITLES[order], name, column] for column in columns}
    assert {column: found[column] for column in columns} == expected


@pytest.mark.parametrize("name", list(NETWORKS))
def test_no_gradient_is_wrong(name, committed):
    for order in ORDERS:
        for column in ENGINES:
            assert committed[TITLES[order], name, column] in ("right", "falls back", "refused")
