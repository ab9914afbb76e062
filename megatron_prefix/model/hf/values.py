"""Single values of a model's configuration, checked. Each raises InputError, naming the key."""

from __future__ import annotations

from typing import Any

from megatron_prefix.errors import InputError


def count(settings: Any, key: str, source: str) -> int:
    """A number of things that the configuration has."""
    return natural(getattr(settings, key, None), key, source)


def natural(value: Any, key: str, source: str) -> int:
    """A whole number, at least 1."""
    if type(value) is not int or not 1 <= value < 2**31:
        raise InputError(f"{source}: {key} is {value!r}, expected a number from 1 to 2^31 - 1")
    return value


def number(value: Any, key: str, source: str) -> float:
    """A positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise InputError(f"{source}: {key} is {value!r}, expected a positive number")
    return float(value)


def switch(settings: Any, key: str, source: str) -> bool:
    """True or false."""
    value = getattr(settings, key, None)
    if type(value) is not bool:
        raise InputError(f"{source}: {key} is {value!r}, expected true or false")
    return value
