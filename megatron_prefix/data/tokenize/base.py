"""The interface of all tokenizers, and the plain layout of messages without a chat template.

`encode` never adds special tokens: ends.py decides where begin-of-text and end-of-text go.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_prefix.data.images import ImageProcessor
from megatron_prefix.data.read import Message
from megatron_prefix.errors import InputError

PLAIN_MARKERS = {
    "system": "\n\nSystem:",
    "user": "\n\nHuman:",
    "assistant": "\n\nAssistant:",
}


def plain_layout(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Messages in the layout of HH-RLHF, for tokenizers without a chat template.

    A user's "Hi" with the generation prompt is "\\n\\nHuman: Hi\\n\\nAssistant:", and the answer
    "Yes" adds " Yes". Raises InputError for a role other than system, user and assistant.
    """
    parts = []
    for message in messages:
        if message.role not in PLAIN_MARKERS:
            raise InputError(
                f"role {message.role!r} is not one of {', '.join(PLAIN_MARKERS)}: give a "
                "tokenizer whose chat template knows it, or change the role"
            )
        if message.extra:
            raise InputError(
                "a message calls a tool or answers one, and the tokenizer has no chat template "
                "that could write it: give a tokenizer with one, or remove the record"
            )
        parts.append(f"{PLAIN_MARKERS[message.role]} {message.content}")
    if add_generation_prompt:
        parts.append(PLAIN_MARKERS["assistant"])
    return "".join(parts)


@dataclass(frozen=True)
class Rendered:
    """Messages as one text.

    `literal` are half-open character spans of `text`: there a message itself contains the
    characters of a special token, and they must stay text.
    """

    text: str
    literal: tuple[tuple[int, int], ...] = ()

    def head(self, length: int) -> Rendered:
        """The first `length` characters."""
        return Rendered(self.text[:length], tuple(s for s in self.literal if s[1] <= length))


class Tokenizer(ABC):
    """What the build needs of a tokenizer.

    `bos_id` and `eos_id` are None if the tokenizer defines none; `bos_text` and `eos_text` are how
    texts spell them, "" if texts cannot. `text_begin` are the ids that the tokenizer puts before a
    text by itself. `fingerprint` is the SHA-256 of the content that decides which ids a text gets;
    it does not depend on where the files are. `vocabulary` is the SHA-256 of the pieces with their
    ids and of the special tokens alone, see `vocabulary_digest`.
    """

    kind: str
    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    vocabulary: str
    has_chat_template = False
    bos_text = eos_text = ""
    image_token = film_token = ""
    """Texts that mean an image or a film where a tokenizer has an image processor."""

    @property
    def text_begin(self) -> tuple[int, ...]:
        return () if self.bos_id is None else (self.bos_id,)

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T], without added special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Readable text, with special tokens if the tokenizer can write them."""

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: str = "",
        template_kwargs: str = "",
    ) -> Rendered:
        """Messages as one text; `add_generation_prompt` opens the assistant's next turn.

        `tools` is "" or the JSON text of a list of functions, `template_kwargs` "" or the JSON text
        of an object with other values that the chat template reads.
        """
        if tools or template_kwargs:
            name = "tools" if tools else "chat_template_kwargs"
            raise InputError(
                f"column {name!r} needs a chat template, and tokenizer {self.name} has none: "
                "remove the column, or give another tokenizer"
            )
        return Rendered(plain_layout(messages, add_generation_prompt))

    def encode_rendered(self, rendered: Rendered) -> np.ndarray:
        """Token ids of rendered messages, int64 [T]; a special token of the template is one id."""
        return self.encode(rendered.text)

    @property
    def no_images(self) -> str:
        """Why texts cannot have images, with the remedy; "" if they can."""
        return (
            f"tokenizer {self.name} has no image processor: give --tokenizer the directory of a "
            "vision model, or leave out the images with --ignore-columns"
        )

    def image_processor(self) -> ImageProcessor:
        """The image processor beside the tokenizer. Raises InputError if there is none."""
        raise InputError(f"images cannot be read: {self.no_images}")

    def encode_marked(self, text: str) -> np.ndarray:
        """Token ids of a plain text with the mark IMAGE in place of each image, int64 [T]: an image
        is one placeholder."""
        raise InputError(f"images cannot be read: {self.no_images}")

    def spells_special(self, text: str) -> bool:
        """Whether `text` contains the characters of a special token that `encode` keeps as text."""
        return False

    def describe(self) -> dict[str, Any]:
        """The tokenizer's entry in the manifest of a data set."""
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "fingerprint": self.fingerprint,
            "vocabulary": self.vocabulary,
        }


def vocabulary_digest(pieces: Mapping[str, int], special: Iterable[str]) -> str:
    """SHA-256 of the pieces with their ids, and of which of them are special tokens.

    Two tokenizers with the same digest mean the same by an id, also if their chat templates or
    their rules for cutting texts differ.
    """
    digest = hashlib.sha256()
    lines = [f"{id} {len(piece)} {piece}\n" for piece, id in pieces.items()]
    digest.update("".join(sorted(lines)).encode("utf-8", "surrogatepass"))
    lines = [f"special {len(piece)} {piece}\n" for piece in special]
    digest.update("".join(sorted(lines)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
