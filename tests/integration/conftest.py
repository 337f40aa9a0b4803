"""The networks of the table by name, those whose package is installed."""

import importlib
import os

import pytest

from tests.integration.networks import NETWORKS


@pytest.fixture(params=NETWORKS)
def name(request):
    """A network's name; skipped without its package, but in CI only if that may be missing."""
    network = NETWORKS[request.param]
    if os.environ.get("CI") and not network.optional:
        importlib.import_module(network.module)
    else:
        pytest.importorskip(network.module)
    return request.param
