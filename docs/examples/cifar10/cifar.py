"""CIFAR-10 in its binary version, the order of its training images, and a stand-in for it.

A file consists of records of 3073 bytes: a label from 0 to 9 and 3 x 32 x 32 pixels, red first,
row by row. Five files are for training and one is for testing, each with 10 000 records. The
Python version of CIFAR-10 consists of pickles, which can run code when they are loaded, so it is
not read.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = ("test_batch.bin",)


def load(folder: str | Path, *, train: bool) -> torch.Tensor:
    """Return the images of the training or of the test set, uint8 (N, 3, 32, 32).

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is cut off or has another format.
    """
    folder = Path(folder)
    sizes = {name: _size(folder, name) for name in (*TRAIN, *TEST)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size // RECORD}" for name, size in sizes.items())
        raise ValueError(
            f"{folder}: expected equally many records in every file, 10000 in CIFAR-10; got "
            f"{listed}. Unpack the short files again."
        )
    parts = [_records(folder / name) for name in (TRAIN if train else TEST)]
    return torch.from_numpy(np.concatenate(parts)[:, 1:].reshape(-1, *SHAPE))


def _size(folder: Path, name: str) -> int:
    path = folder / name
    if not path.is_file():
        advice = "Unpack CIFAR-10's binary version there, or make a stand-in: --make-stand-in."
        if (folder / path.stem).exists():
            advice = f"{path.stem} is a pickle of the Python version, which is not read. {advice}"
        raise FileNotFoundError(f"expected {path}, with 10000 records; got no such file. {advice}")
    size = path.stat().st_size
    whole, over = divmod(size, RECORD)
    if over or not whole:
        raise ValueError(
            f"{path}: expected whole records of {RECORD} bytes, in CIFAR-10 10000 records and "
            f"{10_000 * RECORD} bytes; got {size} bytes, {whole} records and {over} bytes. The "
            "file is cut off or has another format: unpack it again."
        )
    return size


def _records(path: Path) -> np.ndarray:
    records = np.fromfile(path, np.uint8).reshape(-1, RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(
            f"{path}: expected a label from 0 to 9 in the first byte of each record; got "
            f"{records[:, 0].max()}. Is it CIFAR-100, or another file of that name?"
        )
    return records


def batch_rows(
    count: int, *, seed: int, step: int, batch: int, rank: int = 0, ranks: int = 1
) -> np.ndarray:
    """Return the rows of the `count` images that the process `rank` trains on in a step.

    The rows depend on the arguments alone, so that a resumed run continues where the killed run
    stopped. Every epoch has its own order; images that do not fill a whole batch at the end of an
    epoch are skipped.
    """
    epoch, place = divmod(step, count // batch)
    return _order(count, seed, epoch)[place * batch : (place + 1) * batch][rank::ranks]


@lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def prepared(images: torch.Tensor, *, flip: bool, dequantize: bool) -> torch.Tensor:
    """Return uint8 images as float32 in [-1, 1], optionally dequantized and randomly flipped.

    Dequantization adds uniform noise. Without it, level 0 is -1 and level 255 is 1, as in
    `TruncatedNormal`.
    """
    x = -1 + 2 * images.float() / 255
    if dequantize:
        x = -1 + 2 * (images.float() + torch.rand(images.shape, device=images.device)) / 256
    if not flip:
        return x
    coin = torch.rand((len(x), 1, 1, 1), device=x.device) < 0.5
    return torch.where(coin, x.flip(3), x)


def write_stand_in(folder: str | Path, *, records: int = 400, seed: int = 0) -> None:
    """Write generated pictures to the six files of the format, `records` to each file.

    Each picture is a colour gradient with a few soft discs and a little noise.
    """
    folder, random = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*TRAIN, *TEST):
        pixels = _pictures(records, random).reshape(records, -1)
        labels = random.integers(0, 10, (records, 1), np.uint8)
        np.concatenate([labels, pixels], 1).tofile(folder / name)


def _pictures(count: int, random: np.random.Generator) -> np.ndarray:
    row, column = np.mgrid[0:1:32j, 0:1:32j]
    corners = random.uniform(40, 215, (count, 3, 2, 1, 1))
    slope = random.uniform(0, 1, (count, 1, 1, 1))
    mixed = slope * row + (1 - slope) * column
    picture = corners[:, :, 0] * (1 - mixed) + corners[:, :, 1] * mixed
    for _ in range(4):
        colour = random.uniform(0, 255, (count, 3, 1, 1))
        y, x = random.uniform(0, 1, (2, count, 1, 1, 1))
        radius = random.uniform(0.08, 0.3, (count, 1, 1, 1))
        distance = np.hypot(row - y, column - x)
        cover = 1 / (1 + np.exp((distance - radius) / 0.03))
        picture = picture * (1 - cover) + colour * cover
    return (picture + random.normal(0, 3, picture.shape)).round().clip(0, 255).astype(np.uint8)
