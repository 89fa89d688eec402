"""The one exception that means: the user's input cannot be used; and what others say, short."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do.

    `train.py` prints it on standard error and exits with code 2.
    """


def short_reason(error: object) -> str:
    """The beginning of what an exception says, in one line."""
    return " ".join(str(error).split())[:200]
