"""What every benchmark shares: how much to measure, one thread, and what the results say of it.

Nothing here is a test of the library: `python -m pytest` at the root does not come here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.environment import environment

OF_A_RUN = ("load_before", "commit", "date")
SIZES = ("smoke", "default", "full")
Choose = Callable[[Any, Any, Any], Any]
BEFORE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hosm-losses")
    group.addoption("--full", action="store_true", help="measure more, in an hour and a quarter")
    group.addoption("--compiled", action="store_true", help="compiled losses too, in 20 minutes")
    group.addoption("--smoke", action="store_true", help="try everything, measure nothing")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--full") and config.getoption("--smoke"):
        raise pytest.UsageError("expected --full or --smoke; got both.")
    config.stash[BEFORE] = environment()


@pytest.fixture(scope="session")
def choose(pytestconfig: pytest.Config) -> Choose:
    """A function of three values, for --smoke, for neither, and for --full."""
    full, smoke = pytestconfig.getoption("--full"), pytestconfig.getoption("--smoke")
    return lambda *values: values[0 if smoke else 2 if full else 1]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """In place of the plugin's, which names the host: what two runs should have in common."""
    return {key: each for key, each in config.stash[BEFORE].items() if key not in OF_A_RUN}


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """The plugin's, without the names of the folder and the branch."""
    for name in ("project", "branch"):
        commit_info.pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Say where, and how much was measured."""
    output_json["environment"] = config.stash[BEFORE]
    size = [name for name in SIZES if name != "default" and config.getoption(f"--{name}")]
    output_json["size"] = size[0] if size else "default"
