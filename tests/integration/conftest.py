"""What every test here needs: the packages of the extra `integration`."""

import importlib
import os

import pytest


@pytest.fixture(scope="session")
def need():
    """Import a package; without it skip, but not in CI, where nothing may go unseen."""
    return importlib.import_module if os.environ.get("CI") else pytest.importorskip
