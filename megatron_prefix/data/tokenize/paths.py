"""Examples -> token paths: one list of token ids per response, and where its loss starts.

Prompt and response are tokenised together. The loss starts at the first token that differs from
the tokens of the prompt alone. If one token holds the end of the prompt and the start of the
response, it counts as response:

    prompt "Say: ", response "yes"     encode(prompt)            [Say] [:] [_]
                                       encode(prompt + response) [Say] [:] [_yes]
    with begin- and end-of-text        [bos] [Say] [:] | [_yes] [eos]     loss from depth 3 on

A response can also change how the prompt's characters are cut into tokens. Then the loss starts
at the first token with a character of the response, or earlier if siblings differ earlier:

    prompt "ab", responses "c", "ce"   encode(prompt)            [ab]
                                       encode(prompt + response) [a] | [bc]  and  [a] | [bc] [e]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_prefix.data.read import Message, Text, common_prefix
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.tokenize.base import Rendered, Tokenizer
from megatron_prefix.data.tokenize.rendering import (
    NOTE_SPECIAL,
    NOTE_TOOLS,
    check_written,
    extra_changes,
    template_changes,
)
from megatron_prefix.data.tree import ResponsePath, common_tokens
from megatron_prefix.errors import InputError

NOTE_TEMPLATE = "responses whose chat template writes the prompt otherwise once it is answered"
NOTE_MERGED = "responses that share a token with the prompt's end (it is the response's)"


class PathEncoder:
    """Turns one Example at a time into token paths; each of its prompts is encoded once.

    Raises InputError if end-of-text is to be appended and the tokenizer has none.
    """

    def __init__(self, tokenizer: Tokenizer, append_eos: bool = True) -> None:
        if append_eos and tokenizer.eos_id is None:
            raise InputError(
                f"tokenizer {tokenizer.name} defines no end-of-text token: give --no-append-eos, "
                "or a tokenizer that has one"
            )
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.num_tokens = 0
        """Tokens made so far; a prompt counts once per Example."""
        self._prompts: dict[Text, tuple[Rendered, np.ndarray]] = {}
        self._tools = ""
        self._template_kwargs = ""
        self._bos, self._eos = (
            np.array([] if token is None else [token], np.int64)
            for token in (tokenizer.bos_id, tokenizer.eos_id)
        )

    def encode(self, example: Example) -> tuple[list[ResponsePath], list[str]]:
        """The path of every response, in order, and notes on anything unusual."""
        self._prompts.clear()
        self._tools = example.tools
        self._template_kwargs = example.template_kwargs
        notes: list[str] = []
        encoded = [self._path(response, notes) for response in example.responses]
        paths = [path for path, _ in encoded]
        self.num_tokens += sum(len(path.tokens) for path in paths)
        if any(path.loss_start < prompt_only for path, prompt_only in encoded):
            paths = _start_later(paths, [prompt_only for _, prompt_only in encoded])
        return (_start_together(paths) if NOTE_TEMPLATE in notes else paths), notes

    def protected_tokens(self, prompt: Text) -> int:
        """Leading tokens of a prompt that truncation keeps: begin-of-text, system message."""
        text, ids = self._prompt(prompt)
        protected = 0
        if not isinstance(prompt, str) and prompt[0].role == "system":
            system = self.tokenizer.encode_rendered(self._system_text(prompt, text))
            protected = common_tokens(system, ids)
        return max(protected + self._needs_bos(ids), int(self.tokenizer.bos_id is not None))

    def _prompt(self, prompt: Text) -> tuple[Rendered, np.ndarray]:
        if prompt not in self._prompts:
            text = Rendered(prompt) if isinstance(prompt, str) else self._render(prompt, True)
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
            contains_special = self.tokenizer.spells_special(text.text)
        else:
            assert not isinstance(response.response, str), "messages follow messages"
            turns = (*response.prompt, *response.response)
            text = self._render(turns, False)
            contains_special = bool(text.literal)
            notes += self._template_notes(turns, len(response.prompt), text)
            # A template can render the prompt of an answered turn differently, for example
            # without the text that asks for an answer. Then only the common part is prompt.
            boundary = common_prefix(prompt.text, text.text)
            if boundary < len(prompt.text):
                notes.append(NOTE_TEMPLATE)
                prompt_ids = self._ids(response.prompt, prompt.head(boundary))
            if self.tokenizer.has_chat_template:
                check_written(response.response, text.text[boundary:])
        notes += [NOTE_SPECIAL] * contains_special
        # prompt [Say] [:] [_], whole text [Say] [:] [_yes]: they share 2 tokens, fewer than the
        # prompt has. The token [_yes] has a character of the response, so prompt_only is 2 too.
        ids = self._ids(response.prompt, text)
        loss_start = prompt_only = common_tokens(prompt_ids, ids)
        if loss_start < len(prompt_ids):
            notes.append(NOTE_MERGED)
            prompt_only = max(loss_start, self._tokens_within(ids, text.text[:boundary]))
        # Tokens of the path are numbered with begin-of-text: `lead` is 1 if it is added.
        parts, lead = [ids], int(self._needs_bos(ids))
        if lead:
            parts.insert(0, self._bos)
        if self.append_eos and not self._has_eos(ids, loss_start + lead, response.response):
            parts.append(self._eos)
        path = ResponsePath(
            tokens=np.concatenate(parts),
            loss_start=loss_start + lead,
            set_id=response.set_id,
            rank=response.rank,
            score=response.score,
        )
        return path, prompt_only + lead

    def _template_notes(
        self, turns: tuple[Message, ...], num_prompt: int, text: Rendered
    ) -> list[str]:
        if not self.tokenizer.has_chat_template:
            return []
        notes = template_changes(turns, text.text) + extra_changes(turns, num_prompt, text.text)
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

    def _needs_bos(self, ids: np.ndarray) -> bool:
        bos = self.tokenizer.bos_id
        return bos is not None and not (len(ids) and ids[0] == bos)

    def _has_eos(self, ids: np.ndarray, loss_start: int, response: Text) -> bool:
        """Whether a chat template already wrote end-of-text, with only white space after it."""
        if isinstance(response, str) or not self.tokenizer.has_chat_template:
            return False
        ends = np.flatnonzero(ids == self.tokenizer.eos_id)
        if not len(ends) or ends[-1] < loss_start - self._needs_bos(ids):
            return False
        return not self.tokenizer.decode(ids[ends[-1] + 1 :].tolist()).strip()

    def _system_text(self, prompt: tuple[Message, ...], text: Rendered) -> Rendered:
        """The part of a rendered prompt that belongs to the system message."""
        try:
            system = self._render(prompt[:1], False)
        except InputError:  # the template demands a user's turn: give one without text
            if len(prompt) == 1:
                raise
            system = self._render((prompt[0], replace(prompt[1], content="")), False)
        return text.head(common_prefix(system.text, text.text))


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
    """Start all losses of a set where its tokens begin to differ, if that is before the others.

    A template that rewrites an answered prompt can write it differently for each response:

        [p] [x] | [1]  and  [p] [y] | [2], loss from token 2   ->   both from token 1
    """
    aligned = list(paths)
    for set_id in {path.set_id for path in paths}:
        members = [i for i, path in enumerate(paths) if path.set_id == set_id]
        first = paths[members[0]].tokens
        starts = [paths[i].loss_start for i in members]
        shared = min(common_tokens(first, paths[i].tokens) for i in members)
        if shared < min(starts):
            for i in members:
                aligned[i] = replace(paths[i], loss_start=shared)
    return aligned
