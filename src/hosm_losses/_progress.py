"""A progress bar for long work, on request."""

__all__ = ["progress_bar"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager

FORMAT = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"


@contextmanager
def progress_bar(shown: bool, total: float, unit: str) -> Iterator[Callable[[float], object]]:
    """Show how much of `total` is done; fractions are welcome.

    Args:
        shown: False shows nothing and needs no tqdm.
        total: the amount of work.
        unit: what it is counted in.

    Yields:
        A function to call with the amount that was just done.

    Raises:
        ImportError: where a bar is asked for and tqdm is not installed.

    Example:
        >>> with progress_bar(False, 2, "sample") as advance:
        ...     _ = advance(0.5)
    """
    if not shown:
        yield lambda _: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: expected tqdm to be installed; got none. Install it with "
            "pip install 'hosm-losses[progress]', or leave progress=False."
        ) from error
    with tqdm(total=total, unit=unit, bar_format=FORMAT) as bar:
        yield bar.update
