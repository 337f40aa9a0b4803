"""What every benchmark shares: how much to measure, one thread, and a file of what was found.

Nothing here is a test of the library: `python -m pytest` at the root does not come here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.environment import environment

SIZES = ("smoke", "default", "full")
REPORT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hosm-losses")
    group.addoption("--size", choices=SIZES, default="default", help="how much to measure")
    group.addoption("--results", type=Path, metavar="FILE", help="where to write what is found")


def pytest_configure(config: pytest.Config) -> None:
    size = config.getoption("--size")
    config.stash[REPORT] = {"environment": environment(), "size": size, "found": {}}


def pytest_sessionfinish(session: pytest.Session) -> None:
    file, report = session.config.getoption("--results"), session.config.stash[REPORT]
    if file and report["found"]:
        file.write_text(json.dumps(report))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """A function that keeps what a test found, by its parameter where it has one."""
    every, case = request.config.stash[REPORT]["found"], getattr(request.node, "callspec", None)
    return lambda found: every.update({case.id: found} if case else found)


@pytest.fixture(scope="session")
def choose(pytestconfig: pytest.Config) -> Callable[[Any, Any, Any], Any]:
    """A function of three values, for the sizes smoke, default and full."""
    return lambda *values: values[SIZES.index(pytestconfig.getoption("--size"))]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
