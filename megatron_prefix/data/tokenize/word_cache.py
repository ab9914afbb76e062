"""SentencePiece BPE word by word with a table of known words, if the result is exactly the same.

BPE only makes pieces that are in the vocabulary. If no piece has a space after another character,
then no merge crosses from a word to the space after it. So the tokens of a text are those of its
words, and most words are already in the table:

    encode("Say: yes it") == encode("Say:") + encode("yes") + encode("it")
    ▁Say : ▁yes ▁it          ▁Say :           ▁yes            ▁it

The model puts a space ("▁") before every text, which is the space before each word. Some models
normalise: they change characters first. Then the normalised text must equal the normalised words,
without two spaces in a row ("a\\n b" may become "▁a▁▁b", where "▁▁" is one piece); else the text
is encoded as a whole. So are all texts of Unigram models: these sum scores in float32 from the
start of the text, so a tie can have another winner.
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
"""Limits of the table: number of words, and their characters in all. A table over a limit is
emptied. (A text without spaces is one word, which can be long.)"""

_BETWEEN = re.compile(f"(?<=[^ {SPACE}]) (?=.)", re.DOTALL)
_NO_SPACE = re.compile(f"[^ {SPACE}]+")
_ASCII = re.compile("[!-~]+")


class WordCache:
    """Encodes texts with a SentencePiece model; the ids are those of the model."""

    def __init__(self, model: SentencePieceProcessor) -> None:
        self._model = model
        self._is_exact, self._is_identity, self._begins = _properties(model)
        self._ids: dict[str, bytes] = {}  # word -> its ids as int32
        self._normal: dict[str, str] = {}  # word -> the normalised word
        self._size = 0  # characters of all words in the table
        self._last = "", np.zeros(0, np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T]."""
        if not self._is_exact:
            return np.array(self._model.encode(text), np.int64)
        # The prompt comes first, then the prompt with each response: encode only the response.
        prompt, ids = self._last
        end = len(prompt)
        if end and text.startswith(prompt) and _BETWEEN.match(text, end) and self._is_identity:
            return np.concatenate([ids, self._of_words(text[end + 1 :])])
        self._last = text, self._of_words(text)
        return self._last[1]

    def _of_words(self, text: str) -> np.ndarray:
        # A plain split at every space is faster. It is right if there is no "▁" and no space beside
        # another space or at an end of the text.
        if "  " in text or SPACE in text or text[:1] == " " or text[-1:] == " ":
            words = _BETWEEN.split(text)
        else:
            words = text.split(" ")
        try:
            joined = b"".join(map(self._ids.__getitem__, words))
        except KeyError:
            self._learn(set(words).difference(self._ids))
            joined = b"".join(map(self._ids.__getitem__, words))
        ids = np.frombuffer(joined, np.int32).astype(np.int64)
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
        """Put words into the table; those without spaces in them need one call of the model.

        The first token of such a word begins with a space and the others do not:

            words "Say:", "yes"    tokens ▁Say : ▁yes    starts [0, 2], ends [2, 3]
        """
        is_plain = (_NO_SPACE if self._is_identity else _ASCII).fullmatch
        plain = [word for word in words if is_plain(word)]
        # The words are encoded together and the ids are cut where a piece begins with a space.
        ids, begins = self._model.encode(" ".join(plain)), self._begins
        starts = [i for i, token in enumerate(ids) if begins[token]]
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
    """Whether no merge crosses a space; whether the model changes no character but the space;
    for each piece, whether it begins with a space.

    No merge crosses a space if the model is BPE, puts a space before every text, and has no piece
    with a space after another character.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.serialized_model_proto())
    pieces = [piece.piece for piece in proto.pieces]
    is_exact = (
        proto.trainer_spec.model_type == BPE
        and model.normalize("a") == f"{SPACE}a"
        and model.piece_to_id(SPACE) != model.unk_id()
        and not any(s in piece.lstrip(SPACE) for piece in pieces for s in (SPACE, " "))
    )
    spec = proto.normalizer_spec
    is_identity = not (spec.precompiled_charsmap or spec.remove_extra_whitespaces)
    return is_exact, is_identity, [piece[:1] == SPACE for piece in pieces]
