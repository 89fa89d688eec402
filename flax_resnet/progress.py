"""What is said on standard error while work goes on: bars on a terminal, lines elsewhere."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from tqdm import tqdm

T = TypeVar("T")

_quiet = False


@contextlib.contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Has nothing said of progress; what `warn` says stays."""
    global _quiet
    before, _quiet = _quiet, quiet
    try:
        yield
    finally:
        _quiet = before


def warn(line: str) -> None:
    """Writes a line, above the bar if there is one; on the first host."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


def say(line: str) -> None:
    """Writes a line of progress, as `warn` does."""
    if not _quiet:
        warn(line)


def shows_bars() -> bool:
    """Whether bars are drawn: by the first host, on a terminal."""
    return not _quiet and sys.stderr.isatty() and jax.process_index() == 0


def bar(items: Iterable[T], total: int, what: str, unit: str = "it") -> Iterable[T]:
    """The items, with a bar that goes away at their end, or one line where there are no bars."""
    if shows_bars():
        return tqdm(items, what, total, unit=unit, leave=False, dynamic_ncols=True)
    say(f"{what} ...")
    return items
