"""Examples -> token paths: one list of token ids per response, and where its loss starts.

Prompt and response are tokenised together. The loss starts at the first token that differs from
the tokens of the prompt alone. If one token holds the end of the prompt and the start of the
response, it counts as response:

    prompt "Say: ", response "yes"     encode(prompt)            [Say] [:] [_]
                                       encode(prompt + response) [Say] [:] [_yes]
    with begin- and end-of-text        [bos] [Say] [:] | [_yes] [eos]     loss from depth 3 on,
                                       see ends.py

A response can also change how the prompt's characters are cut into tokens. Then the loss starts
at the first token with a character of the response, or earlier if siblings differ earlier:

    prompt "ab", responses "c", "ce"   encode(prompt)            [ab]
                                       encode(prompt + response) [a] | [bc]  and  [a] | [bc] [e]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_prefix.data.images import IMAGE
from megatron_prefix.data.read import Message, Text, common_prefix
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.tokenize.base import Rendered, Tokenizer
from megatron_prefix.data.tokenize.ends import TextEnds
from megatron_prefix.data.tokenize.image_paths import (
    example_texts,
    refuse_spelled,
    with_images,
    with_placeholders,
    without_marks,
)
from megatron_prefix.data.tokenize.rendering import (
    NOTE_SPECIAL,
    NOTE_TOOLS,
    check_written,
    extra_changes,
    template_changes,
)
from megatron_prefix.data.tree import ResponsePath, common_tokens
from megatron_prefix.data.tree_images import Placed
from megatron_prefix.errors import InputError

NOTE_TEMPLATE = "responses whose chat template writes the prompt otherwise once it is answered"
NOTE_NO_END = (
    "responses that do not end with end-of-text (their chat template writes none; --eos always "
    "adds it)"
)
NOTE_MERGED = "responses that share a token with the prompt's end (it is the response's)"


@dataclass
class AddedEnds:
    """How many responses got tokens that neither their text nor a chat template wrote."""

    num_responses: int = 0
    begin_of_text: int = 0
    end_of_text: int = 0

    def count(self, lead: np.ndarray, tail: np.ndarray) -> None:
        self.num_responses += 1
        self.begin_of_text += len(lead) > 0
        self.end_of_text += len(tail) > 0


class PathEncoder:
    """Turns one Example at a time into token paths; each of its prompts is encoded once.

    `bos` and `eos` are modes of ends.py. Raises InputError if they ask for a token that the
    tokenizer does not define.
    """

    def __init__(self, tokenizer: Tokenizer, bos: str = "auto", eos: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.ends = TextEnds(tokenizer, bos, eos)
        self.reset_counts()
        self._prompts: dict[Text, tuple[Rendered, np.ndarray]] = {}
        self._tools = ""
        self._template_kwargs = ""

    def encode(
        self, example: Example, images: Sequence[Placed] = ()
    ) -> tuple[list[ResponsePath], list[str]]:
        """The path of every response, in order, and notes on anything unusual.

        `images` are those of the prompt, in order. Their tokens in a path are -1 - image.
        """
        self._prompts.clear()
        refuse_spelled(example_texts(example), self.tokenizer, bool(images))
        self._tools = example.tools
        self._template_kwargs = example.template_kwargs
        notes: list[str] = []
        encoded = [self._path(response, notes) for response in example.responses]
        paths = [path for path, _ in encoded]
        self.num_tokens += sum(len(path.tokens) for path in paths)
        if any(path.loss_start < prompt_only for path, prompt_only in encoded):
            paths = _start_later(paths, [prompt_only for _, prompt_only in encoded])
        if NOTE_TEMPLATE in notes:
            paths = _start_together(paths)
        if images:
            token = self.tokenizer.image_processor().image_token_id
            paths = [with_images(path, token, images) for path in paths]
        return paths, notes

    def reset_counts(self) -> None:
        """Count tokens and added ends from 0 again."""
        self.num_tokens = 0
        """Tokens made so far; a prompt counts once per Example."""
        self.added = AddedEnds()

    def describe(self) -> dict[str, Any]:
        """The tokenizer's entry in a manifest, with the rule for begin- and end-of-text."""
        return {**self.tokenizer.describe(), **self.ends.describe()}

    def trial(self, example: Example, images: Sequence[Placed] = ()) -> list[ResponsePath]:
        """The paths of an Example that may be discarded: nothing is counted."""
        before = self.num_tokens, replace(self.added)
        paths, _ = self.encode(example, images)
        self.num_tokens, self.added = before
        return paths

    def prompt_tokens(self, prompt: Text) -> np.ndarray:
        """A prompt without images alone, int64 [T], as it begins the path of a response. Raises
        InputError."""
        self._prompts.clear()
        refuse_spelled([prompt], self.tokenizer, has_images=False)
        self._tools = self._template_kwargs = ""
        _, ids = self._prompt(prompt)
        return np.concatenate([self._lead(prompt, ids), ids]).astype(np.int64)

    def protected_tokens(self, prompt: Text) -> int:
        """Leading tokens of a plain text that truncation keeps: those that begin a text."""
        _, ids = self._prompt(prompt)
        lead = self._lead(prompt, ids)
        begins = len(ids) > 0 and ids[0] == self.tokenizer.bos_id
        return len(lead) + int(begins)

    def _prompt(self, prompt: Text) -> tuple[Rendered, np.ndarray]:
        if prompt not in self._prompts:
            if isinstance(prompt, str):
                text = Rendered(self.ends.split_begin(prompt))
            else:
                text = self._render(prompt, True)
            ids = self._ids(prompt, text)
            self.num_tokens += len(ids)
            self._prompts[prompt] = text, ids
        return self._prompts[prompt]

    def _render(self, turns: tuple[Message, ...], add_generation_prompt: bool) -> Rendered:
        return self.tokenizer.render(
            turns, add_generation_prompt, self._tools, self._template_kwargs
        )

    def _ids(self, text: Text, rendered: Rendered) -> np.ndarray:
        """Tokens of a plain text, or of messages that were rendered."""
        if self.tokenizer.image_token and IMAGE in rendered.text:
            return self.tokenizer.encode_marked(rendered.text)
        if isinstance(text, str):
            return self.tokenizer.encode(rendered.text)
        return self.tokenizer.encode_rendered(rendered)

    def _path(self, response: ExampleResponse, notes: list[str]) -> tuple[ResponsePath, int]:
        """The path, and how many leading tokens have no character of the response.

        The loss usually starts there. It starts earlier only if the response changes tokens
        before it: with "ab" and "c" of the example above at token 0, and `prompt_only` is 1.
        """
        prompt, prompt_ids = self._prompt(response.prompt)
        boundary = len(prompt.text)
        if isinstance(response.prompt, str):
            assert isinstance(response.response, str), "a text follows a text"
            if self._tools or self._template_kwargs:
                name = "tools" if self._tools else "chat_template_kwargs"
                raise InputError(
                    f"column {name!r} needs prompt and responses that are messages: remove the "
                    "column, or give messages"
                )
            text = Rendered(prompt.text + response.response)
        else:
            assert not isinstance(response.response, str), "messages follow messages"
            turns = (*response.prompt, *response.response)
            text = self._render(turns, False)
            notes += self._template_notes(turns, len(response.prompt), text)
            # A template can render the prompt of an answered turn differently, for example
            # without the text that asks for an answer. Then only the common part is prompt.
            boundary = common_prefix(prompt.text, text.text)
            if boundary < len(prompt.text):
                notes.append(NOTE_TEMPLATE)
                prompt_ids = self._ids(response.prompt, prompt.head(boundary))
            if self.tokenizer.has_chat_template:
                check_written(response.response, text.text[boundary:])
        is_rendered = self._is_rendered(response.prompt)
        ending = None
        if is_rendered:
            contains_special = bool(text.literal)
        else:
            body, ending = self.ends.split_end(text.text, boundary)
            text = Rendered(body)
            contains_special = self.tokenizer.spells_special(body)
        notes += [NOTE_SPECIAL] * contains_special
        # prompt [Say] [:] [_], whole text [Say] [:] [_yes]: they share 2 tokens, fewer than the
        # prompt has. The token [_yes] has a character of the response, so prompt_only is 2 too.
        ids = self._ids(response.prompt, text)
        loss_start = prompt_only = common_tokens(prompt_ids, ids)
        if loss_start < len(prompt_ids):
            notes.append(NOTE_MERGED)
            written = with_placeholders(text.text[:boundary], self.tokenizer)
            prompt_only = max(loss_start, self._tokens_within(ids, written))
        lead = self._lead(response.prompt, ids)
        tail = self._tail(ids, loss_start, ending, is_rendered)
        if is_rendered and self.ends.eos == "auto" and not self.ends.is_ended(ids, loss_start):
            notes.append(NOTE_NO_END)
        self.added.count(lead, tail)
        # Tokens of the path are numbered with what was put before them.
        path = ResponsePath(
            tokens=np.concatenate([lead, ids, tail]) if len(lead) or len(tail) else ids,
            loss_start=loss_start + len(lead),
            set_id=response.set_id,
            rank=response.rank,
            score=response.score,
            attributes=response.attributes,
        )
        return path, prompt_only + len(lead)

    def _is_rendered(self, text: Text) -> bool:
        """Whether a chat template writes the text."""
        return not isinstance(text, str) and self.tokenizer.has_chat_template

    def _lead(self, prompt: Text, ids: np.ndarray) -> np.ndarray:
        """What is put before a path that has the tokens `ids`."""
        is_rendered = self._is_rendered(prompt)
        text = prompt if isinstance(prompt, str) else ""
        return np.array(self.ends.before(text, ids, is_rendered), np.int64)

    def _tail(
        self, ids: np.ndarray, loss_start: int, ending: str | None, is_rendered: bool
    ) -> np.ndarray:
        """What is put after a path; `ending` is the white space after an end-of-text that the
        text spells itself."""
        if ending is None:
            return np.array(self.ends.after(ids, loss_start, is_rendered), np.int64)
        return np.append([self.tokenizer.eos_id], self.tokenizer.encode(ending)).astype(np.int64)

    def _template_notes(
        self, turns: tuple[Message, ...], num_prompt: int, text: Rendered
    ) -> list[str]:
        if not self.tokenizer.has_chat_template:
            return []
        notes = template_changes(without_marks(turns), text.text)
        notes += extra_changes(turns, num_prompt, text.text)
        without = self._tools and self.tokenizer.render(turns, False, "", self._template_kwargs)
        if without and without.text == text.text:
            notes.append(NOTE_TOOLS)
        return notes

    def _tokens_within(self, ids: np.ndarray, prompt: str) -> int:
        """How many leading tokens decode to a part of `prompt`; 0 if decoding is not exact."""
        # Invariant: `low` tokens decode to at most as many characters as the prompt has, and
        # more than `high` tokens to more.
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.tokenizer.decode(ids[:middle].tolist())) <= len(prompt):
                low = middle
            else:
                high = middle - 1
        # The last tokens may be the first bytes of a character, which has at most 4 bytes.
        for whole in range(low, max(low - 4, 0), -1):
            if prompt.startswith(self.tokenizer.decode(ids[:whole].tolist())):
                return whole
        return 0


def _start_later(paths: list[ResponsePath], prompt_only: Sequence[int]) -> list[ResponsePath]:
    """Move each loss start to the first token with a character of the response.

    But not past the first token that differs from a sibling's: both sides need it in their loss.

        prompt "ab": [a] [bc] and [a] [bc] [e]; the loss started at 0, prompt_only is [1, 1],
        the siblings share 2 tokens: both losses start at 1
    """
    moved = list(paths)
    for i, path in enumerate(paths):
        siblings = [p.tokens for p in paths if p.set_id == path.set_id]
        shared = min(common_tokens(path.tokens, tokens) for tokens in siblings)
        moved[i] = replace(path, loss_start=max(path.loss_start, min(prompt_only[i], shared)))
    return moved


def _start_together(paths: list[ResponsePath]) -> list[ResponsePath]:
    """Start all losses of a set together: at the earliest one, or earlier if tokens differ before.

    A template that rewrites an answered prompt can write it differently for each response:

        [p] [x] | [1]  and  [p] [y] | [2], loss from token 2   ->   both from token 1
        [p] | [1]      and  [p] [x] | [2], prompt [p] [x]      ->   both from token 1
    """
    aligned = list(paths)
    for set_id in {path.set_id for path in paths}:
        members = [i for i, path in enumerate(paths) if path.set_id == set_id]
        first = paths[members[0]].tokens
        starts = [paths[i].loss_start for i in members]
        shared = min(common_tokens(first, paths[i].tokens) for i in members)
        start = min(shared, *starts)
        for i in members:
            aligned[i] = replace(paths[i], loss_start=start)
    return aligned
