"""A progress bar for long work, on request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

FORMAT = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"


@contextmanager
def progress_bar(shown: bool, total: float, unit: str) -> Iterator[Callable[[float], object]]:
    """Yield a function to call with the amount, in `unit` and of `total`, that was just done.

    It shows nothing, and needs no tqdm, unless `shown`. The extra `progress` installs tqdm.
    """
    if not shown:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=unit, bar_format=FORMAT) as bar:
        yield bar.update
