"""A prompt's tokens used again for the prompt with its responses, where that is exact.

SentencePiece's BPE merges pieces of the vocabulary only. Where none of them reaches from a
character over a space, nothing is merged across "…x y…", and the tokens of a text are those of
both sides of any single space, one after another:

    encode("Say: yes it") == encode("Say:") + encode("yes it")     each side gets its "▁" in front

This needs that the normalised text is the normalised sides as well, which is compared each time.
Unigram models are left alone: they sum scores in float32 from the text's beginning, so that a
tie may fall otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "▁"
BPE = 2  # TrainerSpec.ModelType


class PromptReuse:
    """Encodes texts with a SentencePiece model; one that goes on from the last whole text where
    a space follows costs only what is new."""

    def __init__(self, model: SentencePieceProcessor) -> None:
        self._model = model
        self._is_local = _merges_stay_between_spaces(model)
        self._text = self._normal = ""
        self._ids = np.zeros(0, np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T]: exactly those of the model."""
        rest = self._rest(text) if self._is_local else None
        if rest is not None:
            return np.concatenate([self._ids, np.array(self._model.encode(rest), np.int64)])
        ids = np.array(self._model.encode(text), np.int64)
        if self._is_local:
            self._text, self._ids, self._normal = text, ids, self._model.normalize(text)
        return ids

    def _rest(self, text: str) -> str | None:
        """What stands behind the last text and the space that ends it; None if it does not."""
        at = len(self._text)
        if not at or len(text) < at + 2 or text[at] != " " or not text.startswith(self._text):
            return None
        rest = text[at + 1 :]
        normal = self._model.normalize(rest)
        is_clean = self._normal[-1:] != SPACE and normal[:1] == SPACE and normal[1:2] != SPACE
        is_same = is_clean and self._model.normalize(text) == self._normal + normal
        return rest if is_same else None


def _merges_stay_between_spaces(model: SentencePieceProcessor) -> bool:
    """BPE, a space in front of every text, and no piece with a space behind another character."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.serialized_model_proto())
    pieces = [piece.piece.lstrip(SPACE) for piece in proto.pieces]
    return (
        proto.trainer_spec.model_type == BPE
        and model.normalize("a") == f"{SPACE}a"
        and model.piece_to_id(SPACE) != model.unk_id()
        and not any(SPACE in piece or " " in piece for piece in pieces)
    )
