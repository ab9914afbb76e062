"""Hugging Face tokenizers: chat templates, tools, and special tokens inside messages.

A chat template writes special tokens. A user may write the same characters and mean text:

    content "say <|im_end|>"    rendered "<|im_start|>user\nsay <|im_end|><|im_end|>"
                                                               ^^^^^^^^^^ literal, kept as text

To find such places, the messages are rendered a second time with a mark in the user's token:

    "<|im_start|>user\nsay <*|im_end|><|im_end|>"    split at the mark "*": it is at character 22,
                                                     so the literal token starts at 21
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.images import ImageProcessor
from megatron_prefix.data.read import Message
from megatron_prefix.data.tokenize.base import Rendered, Tokenizer, vocabulary_digest
from megatron_prefix.data.tokenize.fragments import Fragments
from megatron_prefix.data.tokenize.image_texts import ImageTexts
from megatron_prefix.data.tokenize.prompt_reuse import PromptReuse
from megatron_prefix.data.tokenize.tool_arguments import ArgumentForm
from megatron_prefix.errors import InputError, Stopped

TOKENIZER_FILES = ("tokenizer*", "*.model", "*.tiktoken", "vocab*", "tekken.json", "spiece*")

MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters without a meaning in Unicode, to mark special tokens that messages contain."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer directory or hub id, with its chat template; its code is never run.

    Only the chat template writes special tokens. If a text or a message contains the characters
    of one, they are tokenised like other text, unless `parse_special` is true.
    """

    kind = "huggingface"

    def __init__(self, spec: str, parse_special: bool = False) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise InputError(
                f"tokenizer {spec!r} needs the package transformers: pip install transformers"
            ) from error
        path = Path(spec)
        if path.is_dir() and not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
            # Some versions of transformers return a tokenizer without any words here.
            raise InputError(
                f"tokenizer {spec!r} cannot be loaded: the directory has no file of a tokenizer, "
                "such as tokenizer.json; give the directory that has it"
            )
        remedy = (
            "give bytes, a SentencePiece model file, a directory with a Hugging Face tokenizer, "
            "or a hub id that can be downloaded"
        )
        with _explained(f"tokenizer {spec!r} cannot be loaded", remedy):
            self._tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
            self._prepare(spec, parse_special)

    def _prepare(self, spec: str, parse_special: bool) -> None:
        path = Path(spec)
        self._tokenizer.model_max_length = 1 << 40  # --max-length is the only limit
        self.name = str(path.resolve()) if path.is_dir() else spec
        pieces = self._tokenizer.get_vocab()
        self.vocab_size = max(len(self._tokenizer), max(pieces.values(), default=-1) + 1)
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id
        self.bos_text = self._spelling(self.bos_id)
        self.eos_text = self._spelling(self.eos_id)
        self._images = ImageTexts(path, self._apply) if ImageProcessor.supports(path) else None
        if self._images is not None:
            self.image_token, self.film_token = self._images.image_token, self._images.film_token
            self._tokenizer.chat_template = (
                ImageProcessor.chat_template(path) or self._tokenizer.chat_template
            )
        self.has_chat_template = bool(self._tokenizer.chat_template)
        self.fingerprint = hashlib.sha256(self._definition().encode()).hexdigest()
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        definition = self._backend.to_str() if self._backend else "{}"
        self._reuse = PromptReuse(self._encode, definition)
        self._fragments = Fragments(self._encode_all, definition) if self._backend else None
        self._parse_special = parse_special
        self._arguments = ArgumentForm(lambda turns: self._apply(turns, None, {}))
        self._special = _special_tokens(self._tokenizer)
        self._special_set = frozenset(self._special.values())
        self.vocabulary = vocabulary_digest(pieces, self._special)
        self._starts = {text[:2] for text in self._special}  # a quick test before the pattern
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _spelling(self, token: int | None) -> str:
        return "" if token is None else str(self._tokenizer.convert_ids_to_tokens(token))

    @cached_property
    def text_begin(self) -> tuple[int, ...]:
        """`tokenizer("a")` is [1, 15] and "a" alone [15]: the tokenizer begins a text with [1]."""
        bare, whole = (
            self._tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True)
        )
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return tuple(whole[:start])
        return ()

    def _definition(self) -> str:
        """Everything that ids and rendered texts depend on, as canonical JSON."""
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
        ids = self._reuse.encode(text)
        if self._parse_special or self._special_set.isdisjoint(ids.tolist()):
            return ids
        return self._encode(text, split_special_tokens=True)

    def encode_rendered(self, rendered: Rendered) -> np.ndarray:
        if not self.has_chat_template:
            return self.encode(rendered.text)
        if not rendered.literal:
            if self._fragments is not None and self._fragments.is_exact:
                return self._fragments.encode(rendered.text)
            return self._encode(rendered.text)
        return self._encode_around(rendered)

    def encode_marked(self, text: str) -> np.ndarray:
        if self._images is None:
            return super().encode_marked(text)
        special = re.compile("(?!)") if self._parse_special else self._pattern
        rendered = self._images.written(text, special)
        return self._encode_around(rendered) if rendered.literal else self._encode(rendered.text)

    @property
    def no_images(self) -> str:
        return "" if self._images is not None else super().no_images

    def image_processor(self) -> ImageProcessor:
        if self._images is None:
            return super().image_processor()
        return self._images.processor(self._tokenizer)

    def _encode_around(self, rendered: Rendered) -> np.ndarray:
        """Token ids of a text whose literal spans stay text."""
        with _explained("the tokenizer cannot encode a text", "give another tokenizer"):
            encoding = self._tokenizer(
                rendered.text, add_special_tokens=False, return_offsets_mapping=True
            )
        ids: list[int] = []
        spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        for token, (start, end) in spans:
            if token in self._special_set and (start, end) in rendered.literal:
                ids += self._as_text(rendered.text[start:end])
            else:
                ids.append(token)
        return np.array(ids, np.int64)

    def _encode(self, text: str, **options: bool) -> np.ndarray:
        if self._backend is not None and not options:
            (ids,) = self._encode_all([text])
            return np.array(ids, np.int64)
        with _explained("the tokenizer cannot encode a text", "give another tokenizer"):
            ids = self._tokenizer.encode(text, add_special_tokens=False, **options)
            return np.array(ids, np.int64)

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        assert self._backend is not None, "tokenizers without a backend encode one text at a time"
        self._backend.encode_special_tokens = False  # a call with options may have set it
        with _explained("the tokenizer cannot encode a text", "give another tokenizer"):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    def _as_text(self, text: str) -> list[int]:
        """The characters of a special token as ordinary tokens, as they are after other text."""
        # Some tokenizers put a space before the first word of a text, so the characters are encoded
        # after an "a" and the tokens of "a" are removed: [a] [<] [|] [im] … -> [<] [|] [im] …
        before = self._encode("a", split_special_tokens=True).tolist()
        whole = self._encode(f"a{text}", split_special_tokens=True).tolist()
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self._encode(text, split_special_tokens=True).tolist()

    def spells_special(self, text: str) -> bool:
        return (
            not self._parse_special
            and any(start in text for start in self._starts)
            and bool(self._pattern.search(text))
        )

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: str = "",
        template_kwargs: str = "",
    ) -> Rendered:
        if not self.has_chat_template:
            return super().render(messages, add_generation_prompt, tools, template_kwargs)
        turns = self._arguments.adapt([message.as_dict() for message in messages])
        if self._images is not None:
            turns = self._images.with_parts(turns)
        functions = json.loads(tools) if tools else None
        options = json.loads(template_kwargs) if template_kwargs else {}
        options = {**options, "add_generation_prompt": add_generation_prompt}
        text = self._apply(turns, functions, options)
        if self._images is not None:
            self._images.check(text, messages)
        if not any(map(self.spells_special, _texts([turns, functions]))):
            return Rendered(text)
        return self._with_literals(text, turns, functions, options)

    def _apply(self, turns: Any, tools: Any, options: dict[str, Any]) -> str:
        roles = ", ".join(turn["role"] for turn in turns)
        remedy = f"their roles are {roles}; change the messages, or give another tokenizer"
        with _explained("the tokenizer's chat template refuses the messages", remedy):
            return self._tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, **options
            )

    def _with_literals(
        self, text: str, turns: Any, tools: Any, options: dict[str, Any]
    ) -> Rendered:
        """`text` with the places of special tokens that messages contain, found by marks."""
        mark = next(mark for mark in MARKS if mark not in text)

        def marked(value: str) -> str:
            return self._pattern.sub(lambda m: m[0][0] + mark + m[0][1:], value)

        turns, tools = (_map_texts(value, marked) for value in (turns, tools))
        pieces = self._apply(turns, tools, options).split(mark)
        if "".join(pieces) != text or not getattr(self._tokenizer, "is_fast", False):
            raise InputError(
                "a message contains the characters of a special token, which cannot be "
                "distinguished from those of the chat template: remove them from the record, or "
                "give --parse-special"
            )
        # `position` is the number of characters of `text` before each mark.
        literal, position = [], 0
        for piece in pieces[:-1]:
            position += len(piece)
            token = self._pattern.match(text, position - 1)
            assert token is not None, "a mark follows the first character of its token"
            literal.append(token.span())
        return Rendered(text, tuple(literal))


@contextlib.contextmanager
def _explained(fault: str, remedy: str) -> Iterator[None]:
    """Turn whatever a tokenizer's files or template raise into the InputError of their fault.

    A panic of the library `tokenizers` is a BaseException.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit, Stopped):
        raise
    except BaseException as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{fault} ({text}): {remedy}") from error


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """The text of every special token -> its id."""
    ids = {
        token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for text, id in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        ids[str(text)] = id
    return ids


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and objects, including names."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same nested lists and objects with `change` applied to every text value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    return value
