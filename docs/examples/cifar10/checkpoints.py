"""Checkpoints that a kill cannot spoil, and logs that go with them."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint in one move: `path` is the old one or the new one, never half of one."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint, on the CPU. Nothing but tensors and plain values is loaded.

    Raises:
        ValueError: for a file that `save` did not write.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of as many types as there are ways to be another file
        # PyTorch's text advises weights_only=False, by which a file can run code.
        reason = f"one that torch.load refuses ({type(error).__name__})"
        raise ValueError(f"{path}: expected a checkpoint of train.py; got {reason}.") from None
    if not (isinstance(state, dict) and {"step", "options", "ema"} <= state.keys()):
        raise ValueError(f"{path}: expected a checkpoint of train.py; got other contents.")
    return state


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A short text that differs where weights do."""
    summed = hashlib.sha256()
    for name, tensor in tensors.items():
        summed.update(name.encode())
        summed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return summed.hexdigest()[:16]


def check_same(saved: dict[str, Any], args: dict[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError unless the options of a checkpoint and of this command agree."""
    differing = [
        f"--{name.replace('_', '-')} {args[name]} where it has {saved.get(name)}"
        for name in names
        if saved.get(name) != args[name]
    ]
    if differing:
        raise ValueError(
            f"expected the options of the checkpoint; got {', '.join(differing)}. Give those of "
            "the checkpoint, or another --out for another run."
        )


def truncate_log(path: Path, step: int) -> None:
    """Drop from a log of JSON lines what came after a step, and a line that a kill cut off."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] <= step:
            lines.append(line + "\n")
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)
