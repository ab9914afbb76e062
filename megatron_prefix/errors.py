"""The exceptions a user is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the file or setting, the values and the remedy. Commands print it
    without a traceback and exit with 2.
    """

    speaks: bool | None = None
    """Whether this process prints it; where it is not said, rank 0 does."""


class RunError(RuntimeError):
    """A run found itself to be wrong and stopped.

    The message says what was expected, what was seen and what to look at. Commands print it
    without a traceback and exit with 1.
    """

    speaks: bool | None = None
    """As of InputError."""


class Stopped(Exception):
    """A run that a signal ended early, with its state saved where `train.save` is set.

    Commands print the message and exit with 143, as a program that SIGTERM ended does.
    """

    speaks: bool | None = None
    """As of InputError."""
