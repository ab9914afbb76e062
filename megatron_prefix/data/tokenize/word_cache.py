"""SentencePiece's BPE a word at a time, each word once, where that is exact.

BPE merges pieces of the vocabulary only. Where none of them reaches from a character over a
space, nothing is merged between a character and a space behind it, and the tokens of a text are
those of its words, one after another. Words repeat, so most are found in a table:

    encode("Say: yes it") == encode("Say:") + encode("yes") + encode("it")

Each part gets the space in front that the model gives a text. For models that change characters,
the changed text is compared with its changed words each time, and must have no two spaces together:
"a\\n b" may become "▁a▁▁b", whose spaces are one piece. Unigram models are encoded whole:
they sum scores in float32 from the text's beginning, so that a tie may fall otherwise.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "▁"
BPE = 2  # TrainerSpec.ModelType
MOST_WORDS, MOST_CHARACTERS = 1 << 16, 1 << 20
"""Of words in the table; a fuller one is begun anew. Texts without spaces are one word each."""

_BETWEEN = re.compile(f"(?<=[^ {SPACE}]) (?=.)", re.DOTALL)
_NO_SPACE = re.compile(f"[^ {SPACE}]+")
_ASCII = re.compile("[!-~]+")


class WordCache:
    """Encodes texts with a SentencePiece model, exactly as the model does."""

    def __init__(self, model: SentencePieceProcessor) -> None:
        self._model = model
        self._is_local, self._is_identity, self._begins = _properties(model)
        self._ids: dict[str, bytes] = {}  # of int32
        self._normal: dict[str, str] = {}  # of models that change characters
        self._size = 0  # in characters
        self._last = "", np.zeros(0, np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T]."""
        if not self._is_local:
            return np.array(self._model.encode(text), np.int64)
        begun, ids = self._last
        at = len(begun)
        if at and text.startswith(begun) and _BETWEEN.match(text, at) and self._is_identity:
            return np.concatenate([ids, self._of_words(text[at + 1 :])])
        self._last = text, self._of_words(text)
        return self._last[1]

    def _of_words(self, text: str) -> np.ndarray:
        if "  " in text or SPACE in text or text[:1] == " " or text[-1:] == " ":
            words = _BETWEEN.split(text)
        else:
            words = text.split(" ")
        try:
            found = b"".join(map(self._ids.__getitem__, words))
        except KeyError:
            self._learn(set(words).difference(self._ids))
            found = b"".join(map(self._ids.__getitem__, words))
        ids = np.frombuffer(found, np.int32).astype(np.int64)
        if not self._is_identity:
            normal = "".join(map(self._normal.__getitem__, words))
            if SPACE * 2 in normal or normal != self._model.normalize(text):
                ids = np.array(self._model.encode(text), np.int64)
        if len(self._ids) > MOST_WORDS or self._size > MOST_CHARACTERS:
            self._ids.clear()
            self._normal.clear()
            self._size = 0
        return ids

    def _learn(self, words: set[str]) -> None:
        """Put words into the table, those without spaces in them by one call of the model.

        Of such a word's tokens the first one, and no other, begins with a space.
        """
        is_plain = (_NO_SPACE if self._is_identity else _ASCII).fullmatch
        plain = [word for word in words if is_plain(word)]
        ids, begins = self._model.encode(" ".join(plain)), self._begins
        starts = [at for at, token in enumerate(ids) if begins[token]]
        normal = plain
        if not self._is_identity:
            normal = self._model.normalize(" ".join(plain)).split(SPACE)[1:]
        if not len(starts) == len(normal) == len(plain):  # a character became a space
            plain, starts = [], []
        ends, tokens = [*starts[1:], len(ids)], np.array(ids, np.int32)
        for word, start, end in zip(plain, starts, ends, strict=False):
            self._ids[word] = tokens[start:end].tobytes()
        for word in words.difference(self._ids):
            self._ids[word] = np.array(self._model.encode(word), np.int32).tobytes()
        if not self._is_identity:
            self._normal.update(zip(plain, (SPACE + text for text in normal), strict=False))
            for word in words.difference(self._normal):
                self._normal[word] = self._model.normalize(word)
        self._size += sum(map(len, words))


def _properties(model: SentencePieceProcessor) -> tuple[bool, bool, list[bool]]:
    """Whether no merge crosses a space, whether only spaces are written otherwise, and which
    pieces begin with one.

    The first is so for BPE with a space in front of every text where no piece has a space behind
    another character.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.serialized_model_proto())
    pieces = [piece.piece for piece in proto.pieces]
    is_local = (
        proto.trainer_spec.model_type == BPE
        and model.normalize("a") == f"{SPACE}a"
        and model.piece_to_id(SPACE) != model.unk_id()
        and not any(s in piece.lstrip(SPACE) for piece in pieces for s in (SPACE, " "))
    )
    spec = proto.normalizer_spec
    is_identity = not (spec.precompiled_charsmap or spec.remove_extra_whitespaces)
    return is_local, is_identity, [piece[:1] == SPACE for piece in pieces]
