"""InputError, what is made one, and what any exception says in one line."""

import contextlib
from collections.abc import Iterator

import jax


class InputError(ValueError):
    """The user's input cannot be used; the message is one line that says what to do.

    `train.py` prints it on standard error and exits with code 2.
    """


def printable(text: str) -> str:
    """The text on one line, with control characters as escapes: a terminal obeys them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: object) -> str:
    """What an exception says, or its name if it says nothing; of what is very long both ends."""
    words = " ".join(_shortened(word, 400) for word in str(error).split())
    return printable(_shortened(words, 4000)) or type(error).__name__


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def short_reason(error: object, length: int = 300) -> str:
    """The beginning of `one_line`, so many characters."""
    line = one_line(error)
    return line if len(line) <= length else f"{line[: length - 3]}..."


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Where JAX finds too little memory within, raises an InputError with this advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"the memory is not enough: {advice} ({short_reason(error)})") from error
