"""Types of settings: a number with the bounds outside of which it is certainly a mistake.

Upper bounds are generous. They keep a slip of the keyboard from becoming an overflow in a library
below: token positions are 32-bit integers, weights are float32, a checkpoint's folder has room
for a step of nine digits, a network timeout is counted in milliseconds of 31 bits.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

KNOWN_KEYS = ConfigDict(extra="forbid")
"""A section refuses keys that it does not have."""

LARGEST_FLOAT = 3e38
"""Just below the largest float32."""
LEAST_FLOAT = 1.2e-38
"""Just above the least float32 of full precision: a smaller number may become 0."""

Switch = Annotated[bool, Field(strict=True)]
Labels = Annotated[int, Field(strict=True, ge=1, le=64)]
"""Scores of a reward model."""
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
"""Tokens."""
WindowSize = tuple[Annotated[int, Field(strict=True, ge=0, lt=2**31 - 1)], Literal[0]]
"""Tokens that attention sees before a token and after it."""
PerStep = Annotated[int, Field(strict=True, ge=1, le=2**20)]
"""Groups, rows or sequences of one step."""
Steps = Annotated[int, Field(strict=True, ge=1, lt=10**9)]
WarmupSteps = Annotated[int, Field(strict=True, ge=0, lt=10**9)]
NoneOrSteps = Annotated[int, Field(strict=True, ge=0, lt=10**9)]
ProfiledSteps = tuple[Steps, Steps]
"""The first and the last of some steps."""
MOST_PROFILED = 100
NewTokens = Annotated[int, Field(strict=True, ge=1, le=2**16)]
Temperature = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]
Epochs = Annotated[int, Field(strict=True, ge=1, le=10**6)]
SetEpochs = Annotated[float, Field(strict=True, gt=0, le=10**6, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=1e-6, le=1e9, allow_inf_nan=False)]
"""A part of something, in proportion to other parts."""
Layers = Annotated[int, Field(strict=True, ge=1, le=10**4)]
NoneOrLayers = Annotated[int, Field(strict=True, ge=0, le=10**4)]
MOST_CHANNELS = 2**16
"""Channels of a head."""
Heads = Annotated[int, Field(strict=True, ge=1, le=MOST_CHANNELS)]
"""Heads, their channels, or experts."""
NoneOrHeads = Annotated[int, Field(strict=True, ge=0, le=2**16)]
Width = Annotated[int, Field(strict=True, ge=1, le=2**24)]
"""Channels of a layer."""
NoneOrWidth = Annotated[int, Field(strict=True, ge=0, le=2**24)]
Processes = Annotated[int, Field(strict=True, ge=1, le=2**20)]
Minutes = Annotated[float, Field(strict=True, ge=0.001, le=35_000, allow_inf_nan=False)]

Positive = Annotated[float, Field(strict=True, gt=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(strict=True, ge=LEAST_FLOAT, le=1, allow_inf_nan=False)]
"""What is added to a divisor so that it is not 0."""
Factor = Annotated[float, Field(strict=True, ge=1e-6, le=1e6, allow_inf_nan=False)]
"""A ratio of two quantities of the same kind."""
RotaryBase = Annotated[float, Field(strict=True, ge=1, le=1e15, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]


def _check_path(path: str) -> str:
    if not path or "\0" in path or len(path) > LONGEST_PATH or not _is_unicode(path):
        raise ValueError(
            f"expected a path of 1 to {LONGEST_PATH} characters without zero characters; leave "
            "the setting out, or set null, for none"
        )
    return path


def _is_unicode(text: str) -> bool:
    """Whether `text` has no half of a surrogate pair, which no file name can have."""
    return not any(0xD800 <= ord(character) < 0xDC00 for character in text)


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
"""Name of a data set or a reference, in metrics."""
LONGEST_PATH = 4095
"""Linux's limit, in bytes there."""
PathText = Annotated[str, AfterValidator(_check_path)]
"""A path or a name of a model; the empty text is none."""
