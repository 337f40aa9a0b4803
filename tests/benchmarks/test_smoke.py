"""Experiments run from end to end, and start from changed files only where they keep nothing."""

import shlex
import sys
from importlib import import_module

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("torchdiffeq")
pytest.importorskip("zuko")

from benchmarks import results

COMMANDS = [
    "calibration",
    "coverage",
    "densities --cells DW4",
    "finite --cells 'board.* 1,000' --rows '^one$|pairs'",
    "molecule --problems DW4",
    "ode_accuracy",
    "operators",
    "patches --row times",
    "patches --second-stage",
    "posteriors --rows 'd = 2'",
    "quiet mlp",
    "recipe --cells 'd = 4, (base|equal)' --rows averaged$",
    "seconds --cells 'flow, densities, 64|^MLP, curve'",
    "weights",
    "worth --cells 'well, d = 2$' --rows '^two, averaged'",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*expected enough samples")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_smoke_run(command, tmp_path, monkeypatch):
    def measured(*_):
        raise AssertionError("expected that nothing is measured")

    name, *options = shlex.split(command)
    main = import_module(f"benchmarks.{name}").main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "git", lambda *_: "?? new.py")
    monkeypatch.setattr(sys, "argv", [name, *options])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", measured)
        with pytest.raises(SystemExit, match=r"got \?\? new\.py\. Commit first, or pass --dirty"):
            main()
    before = {file: file.stat().st_mtime_ns for file in results.DIRECTORY.rglob("*")}
    monkeypatch.setattr(sys, "argv", [name, *options, "--smoke"])
    main()
    assert {file: file.stat().st_mtime_ns for file in results.DIRECTORY.rglob("*")} == before
