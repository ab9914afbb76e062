"""Hugging Face's reward models: `…ForSequenceClassification` with one label.

Such a model scores a text at its rightmost token that is not `pad_token_id`. So that this is the
last token of the text, as in training here, padding must be a token that no text ends in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.config import ARCHITECTURES

LM, REWARD = "ForCausalLM", "ForSequenceClassification"


def hf_kind(config: dict[str, Any], source: str) -> str:
    """`reward` for a `config.json` of a sequence classifier, else `lm`.

    Raises InputError, naming `source`, for a classifier with other than one label.
    """
    names = config.get("architectures") or []
    if not any(isinstance(name, str) and name.endswith(REWARD) for name in names):
        return "lm"
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if count != 1:
        raise InputError(
            f"{source}: a sequence classifier with {count} labels; a reward model has num_labels 1"
        )
    return "reward"


def reward_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config.json` of the reward model that was made of the model with `config`.

    `pad_token_id` is the configuration's, else that of the tokenizer in `folder`; null where
    neither has one, or where it is an end-of-text token, which texts end in: transformers then
    scores single texts rightly and refuses batches, instead of scoring another token.
    """
    classifier = ARCHITECTURES[config["model_type"]].replace(LM, REWARD)
    pad = config.get("pad_token_id")
    pad = _tokenizer_pad(folder) if pad is None else pad
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    labels = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    if classifier in (config.get("architectures") or []):
        labels = {}  # it has its own
    padding = {"pad_token_id": None if pad in ends else pad}
    return config | {"architectures": [classifier]} | labels | padding


def _tokenizer_pad(folder: Path) -> int | None:
    """Id of the padding token that the tokenizer's files name, if they do."""
    pad = _read(folder / "tokenizer_config.json").get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad is None:
        return None
    tokenizer = _read(folder / "tokenizer.json")
    for entry in tokenizer.get("added_tokens") or []:
        if isinstance(entry, dict) and entry.get("content") == pad:
            return entry.get("id")
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    return vocabulary.get(pad) if isinstance(vocabulary, dict) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
