"""What a checkpoint says about its adapters: read back as written, and refused where forged."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prefix.checkpoint.adapter_state import SavedAdapter
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.errors import InputError

SAVED = SavedAdapter.of(
    LoraConfig(r=4, target_modules=("q_proj",)).resolved(False, 2), "ab" * 32, {"hf": "/base"}
)


def test_it_is_read_as_it_was_written():
    assert SavedAdapter.read({"lora": SAVED.as_dict()}, Path("iter")) == SAVED
    assert SavedAdapter.read({}, Path("iter")) is None


@pytest.mark.parametrize(
    "forged",
    [
        5,
        [],
        {},
        {**SAVED.as_dict(), "more": 1},
        {**SAVED.as_dict(), "settings": 5},
        {**SAVED.as_dict(), "settings": {"r": 0}},
        {**SAVED.as_dict(), "settings": {"rank": 8}},
        {**SAVED.as_dict(), "settings": {**SAVED.settings, "target_modules": ["c_attn"]}},
        {**SAVED.as_dict(), "base": ["/base"]},
        {**SAVED.as_dict(), "base": {"hf": 5}},
        {**SAVED.as_dict(), "base_fingerprint": 5},
    ],
)
def test_a_forged_description_is_refused(forged):
    with pytest.raises(InputError, match="iter: its description of adapters is damaged"):
        SavedAdapter.read({"lora": forged}, Path("iter"))
