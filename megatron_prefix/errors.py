"""The exceptions a user is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the file or setting, the values and the remedy. Commands print it
    without a traceback and exit with 2.
    """


class RunError(RuntimeError):
    """A run found itself to be wrong and stopped.

    The message says what was expected, what was seen and what to look at. Commands print it
    without a traceback and exit with 1.
    """
