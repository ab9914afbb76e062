"""Text -> token ids, from one of three sources: bytes, a SentencePiece model, Hugging Face.

    load_tokenizer("bytes")                 the UTF-8 bytes 0..255, 256 begins, 257 ends a text
    load_tokenizer("path/to/some.model")    a file: a SentencePiece model
    load_tokenizer("path/to/dir" or an id)  anything else: Hugging Face's AutoTokenizer

`encode` never adds special tokens: where a text begins and ends is decided in paths.py. Messages
become text by the tokenizer's chat template; a tokenizer without one writes them as HH-RLHF
does, see `plain_layout`. Hugging Face tokenizers stand in hf_tokenizer.py.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.read.fields import Message
from megatron_prefix.data.tokenize.word_cache import WordCache
from megatron_prefix.errors import InputError

PLAIN_MARKERS = {
    "system": "\n\nSystem:",
    "user": "\n\nHuman:",
    "assistant": "\n\nAssistant:",
}


def plain_layout(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Messages as HH-RLHF writes them, for tokenizers without a chat template.

    A user's "Hi" and the prompt for an answer are "\\n\\nHuman: Hi\\n\\nAssistant:", the answer
    "Yes" is " Yes" behind it. Raises InputError for a role other than system, user, assistant.
    """
    parts = []
    for message in messages:
        if message.role not in PLAIN_MARKERS:
            raise InputError(
                f"role {message.role!r} is not one of {', '.join(PLAIN_MARKERS)}, and the "
                "tokenizer has no chat template that could know it"
            )
        if message.extra:
            raise InputError(
                "a message calls a tool or answers one, and the tokenizer has no chat template "
                "that could write it"
            )
        parts.append(f"{PLAIN_MARKERS[message.role]} {message.content}")
    if add_generation_prompt:
        parts.append(PLAIN_MARKERS["assistant"])
    return "".join(parts)


@dataclass(frozen=True)
class Rendered:
    """Messages as one text.

    `literal` are the half-open spans of it, in characters, where a message itself spells a
    special token that is to stay text.
    """

    text: str
    literal: tuple[tuple[int, int], ...] = ()

    def head(self, length: int) -> Rendered:
        """The first `length` characters."""
        return Rendered(self.text[:length], tuple(s for s in self.literal if s[1] <= length))


class Tokenizer(ABC):
    """What the build needs of a tokenizer.

    `bos_id` and `eos_id` are None where the tokenizer defines none. `fingerprint` is the SHA-256
    of the content that decides which ids a text gets, not of where that content lies.
    """

    kind: str
    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    has_chat_template = False

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T], without special tokens added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Readable text, special tokens shown where the tokenizer can show them."""

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: str = ""
    ) -> Rendered:
        """Messages as one text; `add_generation_prompt` opens the assistant's next turn.

        `tools` is the JSON text of a list of functions, or "".
        """
        if tools:
            raise InputError(
                f"column 'tools' needs a chat template, and tokenizer {self.name} has none: "
                "remove the column, or give another tokenizer"
            )
        return Rendered(plain_layout(messages, add_generation_prompt))

    def encode_rendered(self, rendered: Rendered) -> np.ndarray:
        """Token ids of rendered messages, int64 [T]; the template's special tokens are such."""
        return self.encode(rendered.text)

    def spells_special(self, text: str) -> bool:
        """Whether `text` spells a special token that `encode` takes as text."""
        return False

    def describe(self) -> dict[str, Any]:
        """What a data set's manifest says about the tokenizer."""
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "fingerprint": self.fingerprint,
        }


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of the text in UTF-8; 256 begins and 257 ends a text."""

    kind = name = "bytes"
    vocab_size, bos_id, eos_id = 258, 256, 257
    fingerprint = hashlib.sha256(b"utf-8 bytes, bos 256, eos 257").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        text, run = [], bytearray()
        for token in ids:
            if token < 256:
                run.append(token)
                continue
            text += [run.decode("utf-8", errors="replace"), "<bos>" if token == 256 else "<eos>"]
            run.clear()
        return "".join([*text, run.decode("utf-8", errors="replace")])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. Its control symbols in a text are plain text."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise InputError(
                f"{path} needs the package sentencepiece: pip install sentencepiece"
            ) from error
        content = path.read_bytes()
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

    @staticmethod
    def _defined(token: int) -> int | None:
        return token if token >= 0 else None

    def encode(self, text: str) -> np.ndarray:
        return self._words.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        text, run = [], []
        for token in map(int, ids):
            if self._model.is_control(token):
                text += [self._model.decode(run), self._model.id_to_piece(token)]
                run = []
            else:
                run.append(token)
        return "".join([*text, self._model.decode(run)])


def load_tokenizer(spec: str | Path, parse_special: bool = False) -> Tokenizer:
    """The tokenizer named by `spec`, see this module's head. Raises InputError.

    With `parse_special` a text that spells a special token becomes that token.
    """
    path = Path(spec)
    if str(spec) == "bytes" or path.is_file():
        if parse_special:
            raise InputError(
                f"--parse-special: tokenizer {spec} finds no special tokens in texts, only a "
                "Hugging Face tokenizer does: leave the flag out"
            )
        return ByteTokenizer() if str(spec) == "bytes" else SentencePieceTokenizer(path)
    if not path.exists() and str(spec).endswith(".model"):
        raise InputError(f"tokenizer {spec}: no such file")
    from megatron_prefix.data.tokenize.hf_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(str(spec), parse_special)
