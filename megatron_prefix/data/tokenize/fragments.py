"""Rendered messages, encoded piece by piece between special tokens: no turn is encoded twice.

Hugging Face tokenizers first cut a text at the tokens that were added to their vocabulary, and then
normalise and encode each piece between them on its own:

    "<s>user\\nHi<e>\\n<s>assistant\\nYes<e>"
    <s> | user\\nHi | <e> | \\n | <s> | assistant\\nYes | <e>

So the pieces of a prompt are the same in the prompt with any response, and their ids are kept in a
table. This fails with a pre-tokenizer that treats the beginning of a text differently, and with
added tokens that take the white space beside them or need a word's end. Such tokenizers encode
every text as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ON_THEIR_OWN = (
    "ByteLevel",
    "Digits",
    "Metaspace",
    "Punctuation",
    "Split",
    "Whitespace",
    "WhitespaceSplit",
)
"""Pre-tokenizers that cut a piece without regard to what is before it; Metaspace does so unless it
treats the first piece of a text differently."""
MOST_CHARACTERS = 1 << 20
"""Limit of the table. A table over it is emptied."""

EncodeAll = Callable[[Sequence[str]], list[list[int]]]


class Fragments:
    """Encodes texts with added tokens in them; `encode_all` gives the ids of several pieces.

    `definition` is the JSON text of the tokenizer. `is_exact` tells whether the ids are those of
    the text encoded as a whole; if not, do not use it.
    """

    def __init__(self, encode_all: EncodeAll, definition: str) -> None:
        self._encode_all = encode_all
        described = json.loads(definition)
        added = described.get("added_tokens") or []
        self.is_exact = pieces_stand_alone(described)
        # Tokens with "normalized" are looked for later, within the pieces; the encoder does that.
        self._added = {
            token["content"]: np.array([token["id"]], np.int64)
            for token in added
            if token["content"] and not token["normalized"]
        }
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._ids: dict[str, np.ndarray] = {}
        self._forget()

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T]."""
        parts = self._pattern.split(text)  # pieces, and between them what the group matched
        try:
            return np.concatenate([self._ids[part] for part in parts])
        except KeyError:
            self._learn(set(parts))
            return np.concatenate([self._ids[part] for part in parts])

    def _forget(self) -> None:
        """Keep only the added tokens and the empty piece between two of them."""
        self._ids = {"": np.zeros(0, np.int64), **self._added}
        self._size = 0

    def _learn(self, parts: set[str]) -> None:
        """Encode the pieces that are not in the table."""
        if self._size + sum(map(len, parts)) > MOST_CHARACTERS:
            self._forget()
        missing = [part for part in parts if part not in self._ids]
        self._size += sum(map(len, missing))
        for piece, ids in zip(missing, self._encode_all(missing), strict=True):
            self._ids[piece] = np.array(ids, np.int64)


def pieces_stand_alone(definition: dict[str, Any]) -> bool:
    """Whether the pieces between added tokens are encoded without regard to each other."""
    added = definition.get("added_tokens") or []
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return False
    steps = definition.get("pre_tokenizer") or {"pretokenizers": []}
    return all(
        step.get("type") in ON_THEIR_OWN and step.get("prepend_scheme") != "first"
        for step in steps.get("pretokenizers", [steps])
    )
