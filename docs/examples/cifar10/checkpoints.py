"""Checkpoints that a killed process cannot corrupt, and the logs that belong to them."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: `path` is the old file or the new file, never half a file."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint on the CPU. Only tensors and plain values are loaded.

    Raises:
        ValueError: if `save` did not write the file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # its type depends on the contents of the file
        # PyTorch's message advises weights_only=False, with which a file can run code.
        reason = f"a file that torch.load refuses ({type(error).__name__})"
        raise ValueError(f"{path}: expected a checkpoint of train.py; got {reason}.") from None
    if not (isinstance(state, dict) and {"step", "options", "ema"} <= state.keys()):
        raise ValueError(f"{path}: expected a checkpoint of train.py; got other contents.")
    return state


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return a short text that differs if the weights differ."""
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
            f"expected the options of the checkpoint; got {', '.join(differing)}. Pass the "
            "options of the checkpoint, or start another run with another --out."
        )


def truncate_log(path: Path, step: int) -> None:
    """Remove from a log of JSON lines the entries after a step and any incomplete line."""
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
