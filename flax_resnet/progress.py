"""What is said on standard error while work goes on: bars on a terminal, lines elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
from absl import logging as absl_logging
from tqdm import tqdm

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 60.0
# On a narrower terminal loss and accuracy would be cut off.
_COLUMNS_OF_A_BAR = 90

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


def hush_libraries(level: int) -> None:
    """Has TFDS and Orbax, which tell all they do, log from that level of absl's on.

    Warnings of JAX and of this library stay: that there is a GPU and no JAX for it, say.
    """
    absl_logging.set_verbosity(level)
    for name in ("flax_resnet", "jax"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:  # else $JAX_LOGGING_LEVEL says what to tell
            logger.setLevel(logging.WARNING)


def warn(line: str) -> None:
    """Writes a line, above the bar if there is one; on the first host.

    Where standard error is closed, full or read by nobody any more, work goes on without it.
    """
    if _is_first_host() and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # the latter of a file that is closed
            tqdm.write(line, file=sys.stderr)


def _is_first_host() -> bool:
    # To ask JAX for the process alone would start its devices.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(line: str) -> None:
    """Writes a line of progress, as `warn` does."""
    if not _quiet:
        warn(line)


def shows_bars() -> bool:
    """Whether bars are drawn: by the first host, on a terminal."""
    if sys.stderr is None or sys.stderr.closed or not sys.stderr.isatty():
        return False
    return not _quiet and _is_first_host()


def bar(items: Iterable[T], total: int, what: str, unit: str = "it") -> Iterable[T]:
    """The items, with a bar that goes away at their end, or one line where there are no bars."""
    if shows_bars():
        return tqdm(items, what, total, unit=unit, leave=False, dynamic_ncols=True)
    say(f"{what} ...")
    return items


def slow_bar(items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """The items, if they take long with a bar that goes away, or a line a minute elsewhere."""
    if shows_bars():
        options: dict[str, Any] = {"leave": False, "delay": 2, "dynamic_ncols": True}
        yield from tqdm(items, what, total, unit=f" {unit}", **options)
        return
    spoke = time.monotonic()
    for done, item in enumerate(items, 1):
        if time.monotonic() - spoke > _SECONDS_BETWEEN_LINES:
            say(f"{what}: {done} of {total} {unit}")
            spoke = time.monotonic()
        yield item


def duration(seconds: float) -> str:
    """A time with its unit: 43 s, 2 min 5 s or 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {of_hour} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Progress:
    """A bar over all images of a run on a terminal; elsewhere plain lines, one a minute.

    The time that is left goes by the speed of this start so far, but for its first steps and its
    first evaluation, which hold what is done once.

    Args:
      num_epochs: epochs of the run.
      total_images: training images of all epochs together.
      done_images: those that an earlier start of the run went through.
    """

    def __init__(self, num_epochs: int, total_images: int, done_images: int):
        self._num_epochs = num_epochs
        self._total, self._done = total_images, done_images
        # When and with how many images the clock began, which is after the first steps.
        self._started, self._first = None, done_images
        self._evaluating, self._has_evaluated = 0.0, False
        self._spoke = time.monotonic()
        self._bar = tqdm(
            total=total_images,
            initial=done_images,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not shows_bars(),
        )

    def step(self, epoch: int, images: int, loss: float, accuracy: float) -> None:
        """Counts the images of a few steps, and shows the means over the epoch so far."""
        self._done += images
        if self._started is None:
            self._started, self._first = time.monotonic(), self._done
        now = f"{self._of(epoch)}, loss {loss:.4f}, accuracy {accuracy:.2%}"
        if not self._bar.disable:
            self._describe(now)
            self._bar.update(images)
        elif time.monotonic() - self._spoke > _SECONDS_BETWEEN_LINES:
            say(f"{now}, {self._rate():.0f} images/s, {self.time_left()} left")
            self._spoke = time.monotonic()

    def evaluating(self, epoch: int) -> None:
        """The test split is at work."""
        self._evaluating = time.monotonic()
        self._describe(f"{self._of(epoch)}, evaluating")
        self._bar.refresh()

    def evaluated(self) -> None:
        """It is done."""
        if not self._has_evaluated and self._started is not None:
            self._started += time.monotonic() - self._evaluating
        self._has_evaluated = True

    def time_left(self) -> str:
        """What the rest of the run takes, like 01:23; ? before there is a speed."""
        rate = self._rate()
        return tqdm.format_interval((self._total - self._done) / rate) if rate else "?"

    def _of(self, epoch: int) -> str:
        return f"epoch {epoch}/{self._num_epochs}"

    def _describe(self, what: str) -> None:
        left = f"{self.time_left()} left"
        columns = self._bar.format_dict["ncols"]
        is_narrow = columns is not None and columns < _COLUMNS_OF_A_BAR
        self._bar.bar_format = f"{{desc}}, {left}"
        if not is_narrow:
            more = f"[{{elapsed}}, {left}, {{rate_fmt}}]"
            self._bar.bar_format = f"{{desc}} {{percentage:3.0f}}%|{{bar}}| {more}"
        self._bar.set_description_str(what, refresh=False)

    def _rate(self) -> float:
        """Images a second; 0 where it is not known."""
        if self._started is None or self._done == self._first:
            return 0.0
        return (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
