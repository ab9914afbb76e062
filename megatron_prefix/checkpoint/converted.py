"""What conversions have in common: their result, and the `config.json` of what they write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_prefix.model.hf import HFModel


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: number of tensors, their bytes and precisions, and other files."""

    num_tensors: int
    num_bytes: int
    dtypes: tuple[str, ...]
    companions: tuple[str, ...]
    note: str | None = None
    """What the user should know about the result."""

    @classmethod
    def of(
        cls,
        dtypes: Mapping[str, torch.dtype],
        shapes: Mapping[str, tuple[int, ...]],
        companions: Sequence[str],
        note: str | None = None,
    ) -> Converted:
        """The result for tensors of these precisions and shapes, by name."""
        num_bytes = sum(torch.Size(shapes[name]).numel() * x.itemsize for name, x in dtypes.items())
        kinds = sorted({str(x).removeprefix("torch.") for x in dtypes.values()})
        return cls(len(dtypes), num_bytes, tuple(kinds), tuple(companions), note)


def note_on_padding(kind: str, model: HFModel) -> str | None:
    """What the user should know about the padding token of an exported model of this kind."""
    if kind != "reward" or model.config.get("pad_token_id") is not None:
        return None
    return (
        "pad_token_id is null, because the tokenizer has no padding token other than its end "
        "of text: transformers then scores single texts only; to score batches, add a padding "
        "token to the tokenizer and config.json"
    )


def write_config(config: dict, dtypes: set[torch.dtype], path: Path) -> None:
    """Write config.json with the precision of the tensors, unless the copy already has it."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if len(dtypes) == 1 and config.get(key) != (name := str(*dtypes).removeprefix("torch.")):
        text = json.dumps(config | {key: name}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
