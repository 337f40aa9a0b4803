"""What every test here needs: the packages of the extra `integration`, and some that may be there."""

import importlib
import os
from types import ModuleType

import pytest

from tests.integration.networks import NETWORKS

OPTIONAL = {network.module for network in NETWORKS.values() if network.optional}


@pytest.fixture(scope="session")
def need():
    """Import a package; without it skip, but not in CI, where no other than these may be missing."""

    def imported(module: str) -> ModuleType:
        if os.environ.get("CI") and module not in OPTIONAL:
            return importlib.import_module(module)
        return pytest.importorskip(module)

    return imported
