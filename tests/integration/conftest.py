"""Packages that are needed, and the warnings of theirs that are let through."""

import importlib
import os

import pytest

# Warnings are errors; these come from the packages, and nothing here can prevent them.
FOREIGN_WARNINGS: tuple[str, ...] = ()


def pytest_collection_modifyitems(items):
    for item in items:
        for warning in FOREIGN_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session")
def need():
    """Import a package of the extra `integration`; skip without it, except in CI."""
    return importlib.import_module if os.environ.get("CI") else pytest.importorskip
