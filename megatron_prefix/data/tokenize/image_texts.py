"""Texts with images, for tokenizers whose directory has an image processor.

A text has the mark IMAGE where an image belongs. Messages become contents in parts, as chat
templates of vision models read them, and the template writes the placeholder:

    content "\U0001fffeWhat is it?"
    parts   [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    written "user: <image>What is it?"           one placeholder for an image

A plain text gets the placeholder itself. Which placeholder belongs to which image follows from
their order, as in the processors of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_prefix.data.images import IMAGE, ImageProcessor
from megatron_prefix.data.read import Message
from megatron_prefix.data.tokenize.base import Rendered
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

PROBE = "probe"
"""A text that shows how a template reads contents."""


class ImageTexts:
    """The texts of a vision model. `apply` renders turns with the chat template.

    Raises InputError if the directory's image processor cannot be loaded, at its first use.
    """

    def __init__(self, directory: Path, apply: Callable[[Any, Any, dict[str, Any]], str]) -> None:
        self._directory, self._apply = directory, apply
        self.image_token, self.film_token = ImageProcessor.tokens(directory)

    @cached_property
    def _processor(self) -> ImageProcessor:
        return ImageProcessor.open(self._directory)

    def processor(self, tokenizer: Any) -> ImageProcessor:
        """The image processor, whose placeholder must be one of the tokenizer's tokens."""
        processor = self._processor
        number = tokenizer.convert_tokens_to_ids(processor.image_token)
        if number != processor.image_token_id:
            raise InputError(
                f"{self._directory}: the tokenizer has id {number} for {processor.image_token!r}, "
                f"and images have {processor.image_token_id}: copy the files of one model"
            )
        return processor

    def written(self, text: str, special: re.Pattern[str]) -> Rendered:
        """A marked plain text with the placeholder at its marks. Matches of `special` in the text
        itself stay text."""
        place, whole, literal = self._processor.image_text, "", []
        for i, piece in enumerate(text.split(IMAGE)):
            whole += place if i else ""
            literal += [
                (len(whole) + match.start(), len(whole) + match.end())
                for match in special.finditer(piece)
            ]
            whole += piece
        return Rendered(whole, tuple(literal))

    def with_parts(self, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The turns with contents in parts, if the template reads such contents."""
        if not self._reads_parts:
            if any(IMAGE in turn["content"] for turn in turns):
                raise InputError(
                    f"the chat template of {self._directory} does not read contents in parts, so "
                    "messages cannot have images: give a directory whose template does"
                )
            return list(turns)
        return [{**turn, "content": _parts(turn["content"])} for turn in turns]

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template writes the text of a content in parts."""
        try:
            turns = [{"role": "user", "content": _parts(PROBE)}]
            return _is_written(self._apply(turns, None, {}))
        except InputError:
            return False

    def check(self, text: str, messages: Sequence[Message]) -> None:
        """Compare the placeholders that a template wrote with the images of the messages."""
        num_images = sum(message.content.count(IMAGE) for message in messages)
        if num_images and (written := text.count(self.image_token)) != num_images:
            raise InputError(
                f"the chat template of {self._directory} writes {counted(written, 'place')} "
                f"({self.image_token}) for {counted(num_images, 'image')}: give a directory whose "
                "template writes one for each"
            )


def _is_written(text: str) -> bool:
    """Whether the probe's text was written, and not the list of parts as Python or JSON."""
    return PROBE in text and not any(f"{q}type{q}: {q}text{q}" in text for q in "'\"")


def _parts(content: str) -> list[dict[str, str]]:
    """A content in parts: "a", an image, "b" for a text with one mark; "" is one empty text."""
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(content.split(IMAGE)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts or [{"type": "text", "text": ""}]
