"""Numbers with their nouns in messages."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_prefix.text import counted


@pytest.mark.parametrize(
    ("count", "name", "text"),
    [
        (0, "pair", "0 pairs"),
        (1, "pair", "1 pair"),
        (1200, "data set", "1,200 data sets"),
        (np.int64(1), "token", "1 token"),
        (np.int32(4096), "token", "4,096 tokens"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (2, "batch", "2 batches"),
        (2, "epoch", "2 epochs"),
        (1.0, "minute", "1 minute"),
        (0.15, "minute", "0.15 minutes"),
    ],
)
def test_one_is_singular(count, name, text):
    assert counted(count, name) == text
