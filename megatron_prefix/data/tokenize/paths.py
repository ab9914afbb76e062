"""Examples -> token paths: where a text begins, where its prompt ends, where it stops.

Prompt and response are tokenised together, and the loss begins where the tokens of the whole
leave those of the prompt alone, so a token merged across the boundary belongs to the response:

    prompt "Say: ", response "yes"     encode(prompt)            [Say] [:] [_]
                                       encode(prompt + response) [Say] [:] [_yes]
    begin-of-text and end-of-text      [bos] [Say] [:] | [_yes] [eos]     loss from depth 3 on

Where a response changes how tokens before the boundary are cut, the loss begins at the first
token that holds some of the response, or, where siblings part earlier, where they part:

    prompt "ab", responses "c", "ce"   encode(prompt)            [ab]
                                       encode(prompt + response) [a] | [bc]  and  [a] | [bc] [e]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_prefix.data.read.fields import Message, Text
from megatron_prefix.data.read.formats.base import (
    EQUAL,
    NO_PROMPT_TOKEN,
    NO_RESPONSE_TOKEN,
    Example,
    ExampleResponse,
)
from megatron_prefix.data.read.formats.trl import common_prefix
from megatron_prefix.data.tokenize.rendering import NOTE_SPECIAL, NOTE_TOOLS, template_changes
from megatron_prefix.data.tokenize.tokenizers import Rendered, Tokenizer
from megatron_prefix.data.tree import Pair, ResponsePath, common_tokens
from megatron_prefix.errors import InputError

TOO_LONG = "over --max-length"
UNPAIRED = "left without a pair"
TOO_LONG_CUT = "over --max-length with the shortest prompt"
NOTE_TEMPLATE = "responses whose chat template writes the prompt otherwise once it is answered"
NOTE_MERGED = "responses that share a token with the prompt's end (it is the response's)"
OVERFLOW_MODES = ("error", "truncate-prompt", "drop")


class TooLong(InputError):
    """A path is longer than --max-length and --overflow is error."""


class PathEncoder:
    """Turns one Example at a time into token paths, encoding each prompt once.

    Raises InputError where end-of-text is to be appended and the tokenizer has none.
    """

    def __init__(self, tokenizer: Tokenizer, append_eos: bool = True) -> None:
        if append_eos and tokenizer.eos_id is None:
            raise InputError(
                f"tokenizer {tokenizer.name} defines no end-of-text token: give --no-append-eos "
                "or a tokenizer that has one"
            )
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.num_tokens = 0
        """Tokens made so far, prompts counted once."""
        self._prompts: dict[Text, tuple[Rendered, np.ndarray]] = {}
        self._tools = ""
        self._bos, self._eos = (
            np.array([] if token is None else [token], np.int64)
            for token in (tokenizer.bos_id, tokenizer.eos_id)
        )

    def encode(self, example: Example) -> tuple[list[ResponsePath], list[str]]:
        """The path of every response, in order, and notes on what was unusual."""
        self._prompts.clear()
        self._tools = example.tools
        notes: list[str] = []
        found = [self._path(response, notes) for response in example.responses]
        paths = [path for path, _ in found]
        self.num_tokens += sum(len(path.tokens) for path in paths)
        if any(path.loss_start < within for path, within in found):
            paths = _advance(paths, [within for _, within in found])
        return (_align(paths) if NOTE_TEMPLATE in notes else paths), notes

    def kept_tokens(self, prompt: Text) -> int:
        """Tokens of a prompt that truncation keeps: begin-of-text and the system message."""
        text, ids = self._prompt(prompt)
        kept = 0
        if not isinstance(prompt, str) and prompt[0].role == "system":
            system = self.tokenizer.encode_rendered(self._system_text(prompt, text))
            kept = common_tokens(system, ids)
        return max(kept + self._adds_bos(ids), int(self.tokenizer.bos_id is not None))

    def _prompt(self, prompt: Text) -> tuple[Rendered, np.ndarray]:
        if prompt not in self._prompts:
            text = Rendered(prompt) if isinstance(prompt, str) else self._render(prompt, True)
            ids = self._ids(prompt, text)
            self.num_tokens += len(ids)
            self._prompts[prompt] = text, ids
        return self._prompts[prompt]

    def _render(self, turns: tuple[Message, ...], add_generation_prompt: bool) -> Rendered:
        return self.tokenizer.render(turns, add_generation_prompt, self._tools)

    def _ids(self, text: Text, rendered: Rendered) -> np.ndarray:
        """Tokens of a text as it is, or of messages as they were rendered."""
        if isinstance(text, str):
            return self.tokenizer.encode(rendered.text)
        return self.tokenizer.encode_rendered(rendered)

    def _path(self, response: ExampleResponse, notes: list[str]) -> tuple[ResponsePath, int]:
        """The path, and how many of its tokens hold nothing of the response."""
        prompt, prompt_ids = self._prompt(response.prompt)
        boundary = len(prompt.text)
        if isinstance(response.prompt, str):
            if self._tools:
                raise InputError("column 'tools' needs prompt and responses that are messages")
            text = Rendered(prompt.text + response.response)
            special = self.tokenizer.spells_special(text.text)
        else:
            text = self._render((*response.prompt, *response.response), False)
            special = bool(text.literal)
            notes += self._template_notes(response, text)
            boundary = common_prefix(prompt.text, text.text)
            if boundary < len(prompt.text):
                notes.append(NOTE_TEMPLATE)
                prompt_ids = self._ids(response.prompt, prompt.head(boundary))
        notes += [NOTE_SPECIAL] * special
        ids = self._ids(response.prompt, text)
        loss_start = within = common_tokens(prompt_ids, ids)
        if loss_start < len(prompt_ids):
            notes.append(NOTE_MERGED)
            within = max(loss_start, self._tokens_within(ids, text.text[:boundary]))
        parts, lead = [ids], int(self._adds_bos(ids))
        if lead:
            parts.insert(0, self._bos)
        if self.append_eos and not self._ends(ids, loss_start + lead, response.response):
            parts.append(self._eos)
        path = ResponsePath(
            tokens=np.concatenate(parts),
            loss_start=loss_start + lead,
            set_id=response.set_id,
            rank=response.rank,
            score=response.score,
        )
        return path, within + lead

    def _template_notes(self, response: ExampleResponse, text: Rendered) -> list[str]:
        if not self.tokenizer.has_chat_template:
            return []
        turns = (*response.prompt, *response.response)
        notes = template_changes(turns, text.text)
        if self._tools and self.tokenizer.render(turns, False).text == text.text:
            notes.append(NOTE_TOOLS)
        return notes

    def _tokens_within(self, ids: np.ndarray, prompt: str) -> int:
        """The most leading tokens that spell a part of `prompt`; 0 where spelling is inexact."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.tokenizer.decode(ids[:middle].tolist())) <= len(prompt):
                low = middle
            else:
                high = middle - 1
        for whole in range(low, max(low - 4, 0), -1):  # the last may hold a part of a character
            if prompt.startswith(self.tokenizer.decode(ids[:whole].tolist())):
                return whole
        return 0

    def _adds_bos(self, ids: np.ndarray) -> bool:
        bos = self.tokenizer.bos_id
        return bos is not None and not (len(ids) and ids[0] == bos)

    def _ends(self, ids: np.ndarray, loss_start: int, response: Text) -> bool:
        """Whether a chat template already put end-of-text, at most white space behind it."""
        if isinstance(response, str) or not self.tokenizer.has_chat_template:
            return False
        ends = np.flatnonzero(ids == self.tokenizer.eos_id)
        if not len(ends) or ends[-1] < loss_start - self._adds_bos(ids):
            return False
        return not self.tokenizer.decode(ids[ends[-1] + 1 :].tolist()).strip()

    def _system_text(self, prompt: tuple[Message, ...], text: Rendered) -> Rendered:
        """The part of a rendered prompt that the system message takes."""
        empty = replace(prompt[1], content="") if len(prompt) > 1 else None
        try:
            system = self._render(prompt[:1], False)
        except InputError:  # templates that want a user's turn: all up to that turn's text
            if empty is None:
                raise
            system = self._render((prompt[0], empty), False)
        return text.head(common_prefix(system.text, text.text))


def _advance(paths: list[ResponsePath], withins: Sequence[int]) -> list[ResponsePath]:
    """Let losses begin at the first token that holds some of the response.

    Where a set's paths part before that, the loss begins where they part at the latest.
    """
    advanced = list(paths)
    for i, path in enumerate(paths):
        siblings = [p.tokens for p in paths if p.set_id == path.set_id]
        shared = min(common_tokens(path.tokens, tokens) for tokens in siblings)
        advanced[i] = replace(path, loss_start=max(path.loss_start, min(withins[i], shared)))
    return advanced


def _align(paths: list[ResponsePath]) -> list[ResponsePath]:
    """Let the loss of every set's responses begin where all their tokens are still the same."""
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


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of an Example remains, and why the rest does not.

    `dropped` maps a reason to (responses, pairs) lost to it; `cut_tokens` counts the prompt
    tokens that truncation took from `num_cut` responses.
    """

    paths: list[ResponsePath]
    pairs: list[Pair]
    dropped: dict[str, tuple[int, int]]
    num_cut: int = 0
    cut_tokens: int = 0


def select(
    example: Example,
    paths: Sequence[ResponsePath],
    *,
    encoder: PathEncoder,
    max_length: int | None = None,
    overflow: str = "error",
) -> Selection:
    """Drop what cannot be compared or does not fit; see interface words on `--max-length`.

    Responses that lose their last pair go too, and sets are numbered anew. Raises InputError
    where a path is longer than `max_length` tokens and `overflow` is "error".
    """
    lost: dict[int, str] = {}
    for i, path in enumerate(paths):
        if path.loss_start == 0:
            lost[i] = NO_PROMPT_TOKEN
        elif path.loss_start == len(path.tokens):
            lost[i] = NO_RESPONSE_TOKEN
    fitted, num_cut, cut_tokens = list(paths), 0, 0
    if max_length is not None:
        if overflow == "truncate-prompt":
            fitted, num_cut, cut_tokens = _truncate(example, fitted, lost, encoder, max_length)
        reason = TOO_LONG_CUT if overflow == "truncate-prompt" else TOO_LONG
        for i, path in enumerate(fitted):
            if len(path.tokens) <= max_length or i in lost:
                continue
            if overflow == "error":
                raise TooLong(
                    f"response {i} takes {len(path.tokens)} tokens with its prompt, and "
                    f"--max-length is {max_length}: raise it, or give --overflow drop or "
                    "--overflow truncate-prompt"
                )
            lost[i] = reason
    dropped: dict[str, tuple[int, int]] = {}
    for reason in lost.values():
        dropped[reason] = _plus(dropped.get(reason), (1, 0))
    pairs = []
    for pair in example.pairs:
        reason = lost.get(pair.chosen) or lost.get(pair.rejected)
        a, b = fitted[pair.chosen].tokens, fitted[pair.rejected].tokens
        if not reason and len(a) == len(b) and (a == b).all():
            reason = EQUAL
        if reason:
            dropped[reason] = _plus(dropped.get(reason), (0, 1))
        else:
            pairs.append(pair)
    if example.pairs:
        kept_paths, kept_pairs = _renumber(fitted, pairs)
    else:  # responses that are judged alone
        kept_paths, kept_pairs = [p for i, p in enumerate(fitted) if i not in lost], []
    if left := len(paths) - len(lost) - len(kept_paths):
        dropped[UNPAIRED] = (left, 0)
    return Selection(
        paths=kept_paths,
        pairs=kept_pairs,
        dropped=dropped,
        num_cut=num_cut,
        cut_tokens=cut_tokens,
    )


def _plus(a: tuple[int, int] | None, b: tuple[int, int]) -> tuple[int, int]:
    return (a[0] + b[0], a[1] + b[1]) if a else b


def _renumber(
    paths: Sequence[ResponsePath], pairs: Sequence[Pair]
) -> tuple[list[ResponsePath], list[Pair]]:
    kept = sorted({side for pair in pairs for side in (pair.chosen, pair.rejected)})
    if kept == list(range(len(paths))) and not any(path.set_id for path in paths):
        return list(paths), list(pairs)
    new = {old: i for i, old in enumerate(kept)}
    sets: dict[int, int] = {}
    for old in kept:
        sets.setdefault(paths[old].set_id, len(sets))
    return (
        [replace(paths[old], set_id=sets[paths[old].set_id]) for old in kept],
        [replace(p, chosen=new[p.chosen], rejected=new[p.rejected]) for p in pairs],
    )


def _truncate(
    example: Example,
    paths: Sequence[ResponsePath],
    lost: dict[int, str],
    encoder: PathEncoder,
    max_length: int,
) -> tuple[list[ResponsePath], int, int]:
    """Cut the oldest prompt tokens, as many for every response of a comparison set.

    A response that fits under no cut does not take part in the choice of the cut.
    """
    fitted, num_cut, cut_tokens = list(paths), 0, 0
    for set_id in dict.fromkeys(path.set_id for path in paths):
        members = [i for i, p in enumerate(paths) if p.set_id == set_id and i not in lost]
        if not members or max(len(paths[i].tokens) for i in members) <= max_length:
            continue
        keep = encoder.kept_tokens(example.responses[members[0]].prompt)
        room = max(min(paths[i].loss_start for i in members) - keep - 1, 0)
        members = [i for i in members if len(paths[i].tokens) - room <= max_length]
        cut = max((len(paths[i].tokens) - max_length for i in members), default=0)
        if cut <= 0:
            continue
        for i in members:
            path = paths[i]
            tokens = np.concatenate([path.tokens[:keep], path.tokens[keep + cut :]])
            fitted[i] = replace(path, tokens=tokens, loss_start=path.loss_start - cut)
            num_cut, cut_tokens = num_cut + 1, cut_tokens + cut
    return fitted, num_cut, cut_tokens
