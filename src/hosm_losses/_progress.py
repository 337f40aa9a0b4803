"""A progress bar for long work, on request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

FORMAT = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"


@contextmanager
def progress_bar(shown: bool, total: float, unit: str) -> Iterator[Callable[[float], object]]:
    """Yield a function to call with the amount, in `unit` and of `total`, that was just done.

    Where `shown` is False it shows nothing and needs no tqdm; else a missing tqdm is an
    ImportError.
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
