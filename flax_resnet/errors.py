"""The one exception that means: the user's input cannot be used."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do.

    `train.py` prints it on standard error and exits with code 2.
    """
