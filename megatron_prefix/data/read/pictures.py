"""Images of a record: where they are in its texts, and which they are.

    {"images": ["a.png"], "prompt": [{"role": "user", "content": [{"type": "image"}, …]}]}
    {"image": {"bytes": …}, "question": "What is it?", "chosen": …}    before the question
    {"images": ["a.png"], "conversations": [{"from": "human", "value": "<image>What is it?"}]}
    [{"type": "image", "image": {"path": "a.png"}}, {"type": "text", "text": …}]

Before a format reads a record, every image becomes a mark in a text: IMAGE and the number of its
picture, or IMAGE and UNNUMBERED for one of the columns `images` and `image`, which are numbered in
the order of the prompt's texts. So formats read texts only.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from megatron_prefix.data.images import IMAGE, Picture
from megatron_prefix.data.read.fields import json_type
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.read.texts import Text
from megatron_prefix.data.read.turns import IMAGE_PARTS, is_message
from megatron_prefix.data.read.unread import is_empty
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

COLUMNS = ("images", "image")
"""Columns with the images of a record."""
PLACE = "<image>"
"""The place of an image in a text, as LLaMA-Factory and RLHF-V write it."""
PART_FIELDS = ("image", "image_url", "url", "path", "bytes", "base64", "data")
"""Fields of such a part that may hold the picture."""
_NO_PIXELS = ("type", "detail", "mime_type", "media_type")
"""Fields that change neither the text nor the pixels."""
FIRST = 0xF0000
UNNUMBERED = chr(0xFFFFD)
MOST = 0xFFFD
"""Images of one record."""
LONGEST_PATH = 4096
_MARK = re.compile(f"{IMAGE}(.)", re.DOTALL)
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def lists_images(record: dict[str, Any]) -> bool:
    """Whether a record has images in a column of its own."""
    return any(not is_empty(record[name]) for name in COLUMNS if name in record)


class Marked:
    """A record whose images are marks; `record` has no column of images any more.

    `harmless` are fields of parts that may be left unread. Raises InputError if an image is not one
    of the forms above.
    """

    def __init__(self, record: dict[str, Any], harmless: Collection[str] = ()) -> None:
        self._harmless = frozenset(harmless)
        given = [(n, record[n]) for n in COLUMNS if n in record and not is_empty(record[n])]
        self._listed = [picture for name, value in given for picture in _pictures(value, name)]
        if len(given) > 1:
            raise InputError(
                "columns 'images' and 'image' both hold images: leave out one with --ignore-columns"
            )
        self._own: dict[Picture, int] = {}
        rest = {name: value for name, value in record.items() if name not in COLUMNS}
        self._num_places = 0
        self.record = {}
        for name, value in rest.items():
            self._num_places = 0
            self.record[name] = self._without_parts(value)
        if self._listed and self.record == rest:  # no parts, so texts have the places
            self.record = _map_texts(rest, lambda text: text.replace(PLACE, IMAGE + UNNUMBERED))

    def _without_parts(self, value: Any) -> Any:
        """The same value with texts in place of the parts that are images."""
        if isinstance(value, list):
            if any(map(is_message, value)):
                self._num_places = 0
            return [self._without_parts(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.get("type") in IMAGE_PARTS:
            return {"type": "text", "text": IMAGE + self._number(value)}
        return {name: self._without_parts(item) for name, item in value.items()}

    def _number(self, part: dict[str, Any]) -> str:
        """Of the picture in a part; UNNUMBERED if it has none."""
        given = {name: part[name] for name in PART_FIELDS if part.get(name) is not None}
        self._refuse_unread(part, has_picture=bool(given))
        if not given:
            self._num_places += 1
            return UNNUMBERED
        given = {name: x for name, x in given.items() if name not in self._harmless} or given
        picture = _picture_of_part(given)
        return chr(FIRST + self._own.setdefault(picture, len(self._own)))

    def _refuse_unread(self, part: dict[str, Any], has_picture: bool) -> None:
        """Raise InputError if a part has more than its picture, or an index of another one."""
        index = part.get("index")
        known = {*PART_FIELDS, *_NO_PIXELS, *self._harmless}
        known |= {"index"} if type(index) is int else set()
        for name in sorted(part.keys() - known):
            if not is_empty(part[name]):
                raise InputError(
                    f"a part of type 'image' has the field {name!r}, which is not read: remove it, "
                    f"or leave it out with --ignore-columns message.{name}"
                )
        is_checked = type(index) is int and not has_picture and "index" not in self._harmless
        if is_checked and index != self._num_places:
            raise InputError(
                f"a part of type 'image' has index {index}, and pictures are taken in their order, "
                f"so it would be number {self._num_places}: put the pictures in the order of their "
                "places, or leave it out with --ignore-columns message.index"
            )

    def attached(self, example: Example) -> Example:
        """The Example of the marked record with its images: every mark is IMAGE alone, and
        `images` are the pictures in the order of the prompt.

        Raises InputError if places and images do not agree, or if a response has an image.
        """
        pictures: list[tuple[Picture, ...]] = []
        responses = []
        for response in example.responses:
            _refuse_in_response(response)
            prompt = response.prompt
            if self._listed and not any(_marks(prompt)):
                prompt = self._before_first_turn(prompt)
            prompt, own = self._numbered(prompt)
            pictures.append(own)
            responses.append(replace(response, prompt=prompt))
        if any(own != pictures[0] for own in pictures):
            raise InputError(
                "the prompts of the record's responses have different images: give each prompt a "
                "record of its own"
            )
        return replace(example, responses=tuple(responses), images=pictures[0])

    def _before_first_turn(self, prompt: Text) -> Text:
        """A prompt with all listed images before the text of its first user's turn."""
        if isinstance(prompt, str):
            raise InputError(
                f"the record has {counted(len(self._listed), 'image')}, and its prompt is a text "
                f"without {PLACE}: write {PLACE} where each image belongs, or give messages"
            )
        first = next((i for i, turn in enumerate(prompt) if turn.role == "user"), None)
        if first is None:
            raise InputError(
                f"the record has {counted(len(self._listed), 'image')}, and its prompt has neither "
                "a place for it nor a user's turn: write a part of type 'image' where each image "
                "belongs"
            )
        places = (IMAGE + UNNUMBERED) * len(self._listed)
        turn = replace(prompt[first], content=places + prompt[first].content)
        return (*prompt[:first], turn, *prompt[first + 1 :])

    def _numbered(self, prompt: Text) -> tuple[Text, tuple[Picture, ...]]:
        """The prompt with IMAGE at each place, and the pictures in their order."""
        numbered, last = list(self._own), FIRST + len(self._own)
        marks = list(_marks(prompt))
        texts = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
        is_foreign = any(m != UNNUMBERED and not FIRST <= ord(m) < last for m in marks)
        if is_foreign or sum(text.count(IMAGE) for text in texts) != len(marks):
            raise InputError(
                f"a text has the character {IMAGE!r}, which stands for images here: remove it"
            )
        if marks.count(UNNUMBERED) != len(self._listed):
            raise InputError(
                f"the prompt has {counted(marks.count(UNNUMBERED), 'place')} for images, and the "
                f"record has {counted(len(self._listed), 'image')} in its columns: there must be "
                "as many"
            )
        listed = iter(self._listed)
        pictures = tuple(
            next(listed) if mark == UNNUMBERED else numbered[ord(mark) - FIRST] for mark in marks
        )
        if isinstance(prompt, str):
            return _MARK.sub(IMAGE, prompt), pictures
        turns = tuple(replace(turn, content=_MARK.sub(IMAGE, turn.content)) for turn in prompt)
        return turns, pictures


def _marks(text: Text) -> Iterator[str]:
    """What follows each mark of a text, in order."""
    for part in [text] if isinstance(text, str) else [turn.content for turn in text]:
        yield from _MARK.findall(part)


def _refuse_in_response(response: ExampleResponse) -> None:
    texts = response.response
    own = [texts] if isinstance(texts, str) else [turn.content for turn in texts]
    if any(IMAGE in text for text in own):
        raise InputError(
            f"a response has an image (or the text {PLACE}), and only prompts may have images: "
            "move it into the prompt, or remove the record"
        )


def _pictures(value: Any, name: str) -> list[Picture]:
    """The pictures of a column: one, or a list of them."""
    items = value if isinstance(value, list) else [value]
    if len(items) > MOST:
        raise InputError(
            f"column {name!r} has {counted(len(items), 'image')}, and a record {MOST} at most"
        )
    return [_picture(item, f"column {name!r}") for item in items]


def _picture_of_part(given: dict[str, Any]) -> Picture:
    """The picture of a part with these of PART_FIELDS. Raises InputError if they are two."""
    place = "a part of type 'image'"
    nested = [name for name in ("image", "image_url") if name in given]
    beside = {name: x for name, x in given.items() if name not in nested}
    values: list[tuple[str, Any]] = [(name, given[name]) for name in nested]
    values += [(name, beside) for name in list(beside)[:1]]
    picture = _picture(values[0][1], place)
    for name, value in values[1:]:
        if not _is(value, picture):
            raise InputError(_two_pictures(place, values[0][0], name, "message."))
    return picture


def _is(value: Any, picture: Picture) -> bool:
    try:
        return _picture(value, "") == picture
    except InputError:
        return False


def _two_pictures(place: str, first: str, second: str, prefix: str = "") -> str:
    ignored = f", or leave it out with --ignore-columns {prefix}{second}" if prefix else ""
    return (
        f"{place} has {first!r} and {second!r}, which are not the same picture: remove "
        f"{second!r}{ignored}"
    )


def _only(given: dict[str, Any], place: str) -> Any:
    """The value of all these fields, which must be equal; None without any."""
    first = next(iter(given), "")
    for name, value in given.items():
        if value != given[first]:
            raise InputError(_two_pictures(place, first, name))
    return given.get(first)


def _picture(value: Any, place: str) -> Picture:
    """One picture: encoded bytes, a path, or an object with one of these. Beside bytes a path or
    an address is their name. Raises InputError if an object has two pictures."""
    if isinstance(value, dict):
        coded = {n: value[n] for n in ("bytes", "base64", "data") if value.get(n)}
        contents = {
            name: _decoded(DATA_URL.sub("", x, 1), place) if isinstance(x, str) else x
            for name, x in coded.items()
        }
        content = _only(contents, place)
        if content is None:
            value = _only({n: value[n] for n in ("path", "url", "image") if value.get(n)}, place)
            if not isinstance(value, str):
                raise InputError(
                    f"{place} is an object with neither bytes nor path: give one of them, or "
                    "remove the record"
                )
        else:
            value = content
    if isinstance(value, bytes | bytearray):
        return Picture(content=bytes(value))
    if not isinstance(value, str):
        raise InputError(
            f"{place} is {json_type(value)}, it must be the path of a picture, or an object with "
            "its bytes"
        )
    if data := DATA_URL.match(value):
        return Picture(content=_decoded(value[data.end() :], place))
    if URL.match(value):
        raise InputError(
            f"{place} is the address {value[:80]!r}, and pictures are not downloaded: give a local "
            "file or the picture's bytes"
        )
    if len(value) > LONGEST_PATH:
        raise InputError(
            f"{place} is a text of {counted(len(value), 'character')}, which is no path: put "
            "base64 into an "
            'object {"bytes": …}'
        )
    if not value.strip() or "\0" in value:
        raise InputError(f"{place} is {value[:40]!r}, which is no path of a picture: correct it")
    return Picture(path=value)


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"{place} holds text that is not base64 ({error}): write the picture's bytes as base64"
        ) from error


def _map_texts(value: Any, change: Any) -> Any:
    """The same lists and objects with `change` applied to every text."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {name: _map_texts(item, change) for name, item in value.items()}
    return value
