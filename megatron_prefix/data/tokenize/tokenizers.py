"""Loading a tokenizer: bytes, a SentencePiece model, or Hugging Face (hf_tokenizer.py).

load_tokenizer("bytes")                 UTF-8 bytes 0..255; 256 begins a text, 257 ends it
load_tokenizer("path/to/some.model")    a file: a SentencePiece model
load_tokenizer("path/to/dir" or an id)  anything else: Hugging Face's AutoTokenizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_prefix.data.tokenize.base import Tokenizer, vocabulary_digest
from megatron_prefix.data.tokenize.hf_tokenizer import HuggingFaceTokenizer
from megatron_prefix.data.tokenize.word_cache import WordCache
from megatron_prefix.errors import InputError


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the UTF-8 bytes of the text; 256 begins a text and 257 ends it."""

    kind = name = "bytes"
    vocab_size, bos_id, eos_id = 258, 256, 257
    fingerprint = hashlib.sha256(b"utf-8 bytes, bos 256, eos 257").hexdigest()
    vocabulary = vocabulary_digest(
        {**{f"<0x{byte:02X}>": byte for byte in range(256)}, "<bos>": 256, "<eos>": 257},
        ("<bos>", "<eos>"),
    )

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        parts, pending = [], bytearray()
        for token in ids:
            if token < 256:
                pending.append(token)
                continue
            parts.append(pending.decode("utf-8", errors="replace"))
            parts.append("<bos>" if token == 256 else "<eos>")
            pending.clear()
        return "".join([*parts, pending.decode("utf-8", errors="replace")])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. A text that contains its control symbols stays plain text."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise InputError(
                f"tokenizer {path} needs the package sentencepiece: pip install sentencepiece"
            ) from error
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"tokenizer {path}: {error.strerror}") from None
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise InputError(
                f"{path} is not a SentencePiece model: give a model file, the directory of a "
                "Hugging Face tokenizer, or bytes"
            ) from error
        self._words = WordCache(self._model)
        self.name = str(path.resolve())
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._defined(self._model.bos_id())
        self.eos_id = self._defined(self._model.eos_id())
        self.fingerprint = hashlib.sha256(content).hexdigest()
        pieces = {self._model.id_to_piece(id): id for id in range(self.vocab_size)}
        special = [p for p, id in pieces.items() if self._is_special(id)]
        self.vocabulary = vocabulary_digest(pieces, special)

    def _is_special(self, token: int) -> bool:
        return self._model.is_control(token) or self._model.is_unknown(token)

    @staticmethod
    def _defined(token: int) -> int | None:
        return token if token >= 0 else None

    def encode(self, text: str) -> np.ndarray:
        return self._words.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        pending: list[int] = []
        for token in map(int, ids):
            if self._model.is_control(token):
                parts += [self._model.decode(pending), self._model.id_to_piece(token)]
                pending = []
            else:
                pending.append(token)
        return "".join([*parts, self._model.decode(pending)])


def load_tokenizer(spec: str | Path, parse_special: bool = False) -> Tokenizer:
    """The tokenizer that `spec` names, see the top of this file. Raises InputError.

    With `parse_special`, the characters of a special token in a text become that token.
    """
    path = Path(spec)
    if str(spec) == "bytes" or path.is_file():
        if parse_special:
            raise InputError(
                f"--parse-special has no effect with tokenizer {spec}: only Hugging Face "
                "tokenizers find special tokens in texts; remove the flag"
            )
        return ByteTokenizer() if str(spec) == "bytes" else SentencePieceTokenizer(path)
    if not path.exists() and str(spec).endswith(".model"):
        raise InputError(f"tokenizer {spec}: no such file")
    return HuggingFaceTokenizer(str(spec), parse_special)
