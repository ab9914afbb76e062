"""Text -> token ids, from one of three sources: bytes, a SentencePiece model, Hugging Face.

    load_tokenizer("bytes")                 the UTF-8 bytes 0..255, 256 begins, 257 ends a text
    load_tokenizer("path/to/some.model")    a file: a SentencePiece model
    load_tokenizer("path/to/dir" or an id)  anything else: Hugging Face's AutoTokenizer

`encode` never adds special tokens: where a text begins and ends is decided in paths.py. Messages
become text by the tokenizer's chat template; a tokenizer without one writes them as HH-RLHF
does, see `plain_layout`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.fields import Message
from megatron_prefix.data.reuse import PromptReuse
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
        parts.append(f"{PLAIN_MARKERS[message.role]} {message.content}")
    if add_generation_prompt:
        parts.append(PLAIN_MARKERS["assistant"])
    return "".join(parts)


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

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Messages as one text; `add_generation_prompt` opens the assistant's next turn."""
        return plain_layout(messages, add_generation_prompt)

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
        self._reuse = PromptReuse(self._model)
        self.name = str(path.resolve())
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._defined(self._model.bos_id())
        self.eos_id = self._defined(self._model.eos_id())
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @staticmethod
    def _defined(token: int) -> int | None:
        return token if token >= 0 else None

    def encode(self, text: str) -> np.ndarray:
        return self._reuse.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        text, run = [], []
        for token in map(int, ids):
            if self._model.is_control(token):
                text += [self._model.decode(run), self._model.id_to_piece(token)]
                run = []
            else:
                run.append(token)
        return "".join([*text, self._model.decode(run)])


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer directory or hub id, with its chat template; code in it is never run."""

    kind = "huggingface"

    def __init__(self, spec: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise InputError(
                f"tokenizer {spec!r} needs the package transformers: pip install transformers"
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"tokenizer {spec!r} cannot be loaded ({first}): give bytes, a SentencePiece "
                "model file, a directory with a Hugging Face tokenizer, or a hub id in reach"
            ) from error
        self._tokenizer.model_max_length = 1 << 40  # the limit here is --max-length
        path = Path(spec)
        self.name = str(path.resolve()) if path.is_dir() else spec
        ids = self._tokenizer.get_vocab().values()
        self.vocab_size = max(len(self._tokenizer), max(ids, default=-1) + 1)
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id
        self.has_chat_template = bool(self._tokenizer.chat_template)
        self.fingerprint = hashlib.sha256(self._definition().encode()).hexdigest()

    def _definition(self) -> str:
        """Everything that decides ids and rendered text, as canonical JSON."""
        tokenizer = self._tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocab_file = getattr(tokenizer, "vocab_file", None)
        if backend is not None:
            core = backend.to_str()
        else:
            core = [type(tokenizer).__name__, tokenizer.get_vocab()]
            if vocab_file and Path(vocab_file).is_file():
                core.append(hashlib.sha256(Path(vocab_file).read_bytes()).hexdigest())
        parts = [core, tokenizer.chat_template, self.bos_id, self.eos_id]
        return json.dumps(parts, sort_keys=True)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if not self.has_chat_template:
            return plain_layout(messages, add_generation_prompt)
        from jinja2.exceptions import TemplateError

        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise InputError(
                f"the tokenizer's chat template refuses the messages ({error}): their roles are "
                f"{', '.join(m.role for m in messages)}"
            ) from error


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer named by `spec`, see this module's head. Raises InputError."""
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if not path.exists() and str(spec).endswith(".model"):
        raise InputError(f"tokenizer {spec}: no such file")
    return HuggingFaceTokenizer(str(spec))
