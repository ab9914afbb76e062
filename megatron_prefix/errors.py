"""Exceptions whose messages are written for the user."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the file or setting, its value, why it cannot be used, and what to do.
    Commands print it without a traceback and exit with 2.
    """

    printed_by_this_process: bool | None = None
    """Whether this process prints the message. None: rank 0 does."""


class RunError(RuntimeError):
    """A run detected an error in its own work and stopped.

    The message says what was expected, what was seen and what to look at. Commands print it
    without a traceback and exit with 1.
    """

    printed_by_this_process: bool | None = None
    """As in InputError."""


class Stopped(Exception):
    """A run that a signal ended early. Its state is saved if `train.save` is set.

    Commands print the message and exit with 143, like a program that SIGTERM ended.
    """

    printed_by_this_process: bool | None = None
    """As in InputError."""
