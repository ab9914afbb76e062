"""Images in token paths: one placeholder of a tokenizer becomes all tokens of its image.

    tokens [7, 9, 5] with placeholder 9, image 4 of 3 tokens    ->    [7, -5, -5, -5, 5]

As long as a path is no tree yet, the tokens of an image are -1 - image (tree_images.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_prefix.data.images import IMAGE
from megatron_prefix.data.read import Message, Text
from megatron_prefix.data.read.formats import Example
from megatron_prefix.data.tokenize.base import Tokenizer
from megatron_prefix.data.tree import ResponsePath
from megatron_prefix.data.tree_images import Placed
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted


def with_images(path: ResponsePath, placeholder: int, images: Sequence[Placed]) -> ResponsePath:
    """The path with all tokens of its images. Raises InputError if its prompt has not as many
    placeholders as there are images."""
    places = np.flatnonzero(path.tokens == placeholder)
    if len(places) != len(images) or (places >= path.loss_start).any():
        raise InputError(
            f"the prompt's tokens have {counted(int((places < path.loss_start).sum()), 'place')} "
            f"for {counted(len(images), 'image')}, and the response's "
            f"{int((places >= path.loss_start).sum())}: give a directory whose chat template "
            "writes one place for each image of the prompt"
        )
    tokens, counts = path.tokens.copy(), np.ones(len(path.tokens), np.int64)
    tokens[places] = [-1 - image.image for image in images]
    counts[places] = [image.num_tokens for image in images]
    added = sum(image.num_tokens - 1 for image in images)
    return replace(path, tokens=np.repeat(tokens, counts), loss_start=path.loss_start + added)


def example_texts(example: Example) -> list[Text]:
    """The prompts and responses of an example; a prompt that several responses have, once."""
    own = {id(response.prompt): response.prompt for response in example.responses}
    return [*own.values(), *(response.response for response in example.responses)]


def refuse_spelled(texts: Sequence[Text], tokenizer: Tokenizer, has_images: bool) -> None:
    """Raise InputError if a text spells the placeholder of an image or film, which the processors
    of transformers take for one, or has a mark without an image."""
    for text in texts if tokenizer.image_token else ():
        for part in [text] if isinstance(text, str) else [turn.content for turn in text]:
            for token in (tokenizer.image_token, tokenizer.film_token, "" if has_images else IMAGE):
                if token and token in part:
                    raise InputError(
                        f"a text contains {token!r}, which the model's processor takes for the "
                        "place of an image or film: give the images in a column 'images', or "
                        "remove it from the text"
                    )


def with_placeholders(text: str, tokenizer: Tokenizer) -> str:
    """A marked text as its tokens are decoded."""
    if IMAGE not in text or not tokenizer.image_token:
        return text
    return text.replace(IMAGE, tokenizer.image_processor().image_text)


def without_marks(turns: Sequence[Message]) -> Sequence[Message]:
    """The messages with a message of its own for each piece of text between images."""
    if not any(IMAGE in turn.content for turn in turns):
        return turns
    return [replace(turn, content=text) for turn in turns for text in turn.content.split(IMAGE)]
