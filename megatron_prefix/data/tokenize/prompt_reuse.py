"""A prompt's tokens used again for the prompt with its responses, where that is exact.

Byte-level tokenizers first cut a text into words by a regular expression and then merge bytes
within words. In the expressions listed here a space stands at the beginning of a word or among
other white space, never behind another character; so no word reaches over the boundary in "…x y…",
and whether a word ends there does not depend on what follows:

    encode("Say: yes it") == encode("Say:") + encode(" yes it")

A normaliser, or an added token that has a space in it or takes some beside it, may change that;
tokenizers with either encode every text whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
EXPRESSIONS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",  # Llama 3
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",  # Qwen 2 and 3
}


class PromptReuse:
    """Encodes texts by `encode`, of a tokenizer whose definition is `definition` (JSON)."""

    def __init__(self, encode: Callable[[str], np.ndarray], definition: str) -> None:
        self._encode = encode
        self._is_local = words_stay_between_spaces(json.loads(definition))
        self._last = "", np.zeros(0, np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T]: what encoding the whole text gives."""
        begun, ids = self._last
        at = len(begun)
        if (
            self._is_local
            and 0 < at < len(text) - 1
            and text[at] == " "
            and not (begun[-1].isspace() or text[at + 1].isspace())
            and text.startswith(begun)
        ):
            return np.concatenate([ids, self._encode(text[at:])])
        self._last = text, self._encode(text)
        return self._last[1]


def words_stay_between_spaces(definition: dict) -> bool:
    """Whether no word of the tokenizer goes on over a space behind another character."""
    added = definition.get("added_tokens") or []
    if definition.get("normalizer") or any(
        " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in added
    ):
        return False
    steps = definition.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if len(steps) == 1:
        return bool(steps[0]["use_regex"])
    split = steps[0]
    return (
        len(steps) == 2
        and not steps[1]["use_regex"]
        and split.get("type") == "Split"
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and split["pattern"].get("Regex") in EXPRESSIONS
    )
