"""Reuse of a prompt's tokens for the prompt with a response, if the result is exactly the same.

Byte-level tokenizers first cut a text into words with a regular expression, and then merge bytes
within each word. In the expressions listed here, a space is only at the start of a word or among
other white space. So a word always ends between a character and a space with a character after it:

    "Say: yes it"    words "Say" ":" " yes" " it"    no word contains the boundary "…:| y…"
    encode("Say: yes it") == encode("Say:") + encode(" yes it")

This can fail with a normaliser, or with an added token that contains a space or takes spaces
beside it. Tokenizers with either encode every text as a whole.
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
    """Encodes texts with `encode`; `definition` is the JSON text of the tokenizer.

    The last text that was encoded as a whole is remembered: the prompt, after its first use.
    """

    def __init__(self, encode: Callable[[str], np.ndarray], definition: str) -> None:
        self._encode = encode
        self._is_exact = words_end_before_spaces(json.loads(definition))
        self._last = "", np.zeros(0, np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T]: the same as for the text encoded as a whole."""
        prompt, ids = self._last
        end = len(prompt)
        if (
            self._is_exact
            and 0 < end < len(text) - 1
            and text[end] == " "
            and not (prompt[-1].isspace() or text[end + 1].isspace())
            and text.startswith(prompt)
        ):
            return np.concatenate([ids, self._encode(text[end:])])
        self._last = text, self._encode(text)
        return self._last[1]


def words_end_before_spaces(definition: dict) -> bool:
    """Whether every word of the tokenizer ends before a space that follows a character."""
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
