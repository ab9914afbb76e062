"""Which responses and pairs of an Example remain: those that fit --max-length and can be compared.

max_length 6, prompt [1 2 3 4], responses [5] and [6 7 8]      paths of 5 and 7 tokens
overflow "error"             TooLong
overflow "drop"              the second response is dropped, so the first has no pair left
overflow "truncate-prompt"   prompt [1 3 4] for both (1 is begin-of-text): 4 and 6 tokens; in a
                             conversation the oldest turns lose text, see shortening.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_prefix.data.read.formats import Example, Reason
from megatron_prefix.data.tokenize.paths import PathEncoder
from megatron_prefix.data.tokenize.shortening import PromptTurns, has_turns
from megatron_prefix.data.tree import Pair, ResponsePath
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

OVERFLOW_MODES = ("error", "truncate-prompt", "drop")


class TooLong(InputError):
    """A path is longer than --max-length, and --overflow is error."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What remains of an Example, and why the rest was dropped.

    `dropped` maps a Reason to the numbers of (responses, pairs) it took. Truncation removed
    `cut_tokens` prompt tokens in all, from `num_cut` responses.
    """

    paths: list[ResponsePath]
    pairs: list[Pair]
    dropped: dict[str, tuple[int, int]]
    num_cut: int = 0
    cut_tokens: int = 0
    kept: tuple[int, ...] = ()
    """The responses of the Example that the paths are of."""


def select(
    example: Example,
    paths: Sequence[ResponsePath],
    *,
    encoder: PathEncoder,
    max_length: int | None = None,
    overflow: str = "error",
) -> Selection:
    """Drop what cannot be compared or does not fit; docs/data_format.md describes `--max-length`.

    Responses that lose their last pair are dropped too, and the sets are renumbered. Raises
    TooLong if a path is longer than `max_length` tokens and `overflow` is "error".
    """
    lost: dict[int, str] = {}
    for i, path in enumerate(paths):
        if path.loss_start == 0:
            lost[i] = Reason.NO_PROMPT_TOKEN
        elif path.loss_start == len(path.tokens):
            lost[i] = Reason.NO_RESPONSE_TOKEN
    fitted, num_cut, cut_tokens = list(paths), 0, 0
    if max_length is not None:
        if overflow == "truncate-prompt" and not example.images:
            fitted, num_cut, cut_tokens = _truncate(example, fitted, lost, encoder, max_length)
        _lose_too_long(fitted, lost, max_length, overflow, bool(example.images))
    dropped: dict[str, tuple[int, int]] = {}
    for reason in lost.values():
        _count(dropped, reason, num_responses=1)
    pairs = []
    for pair in example.pairs:
        pair_reason = lost.get(pair.chosen) or lost.get(pair.rejected)
        a, b = fitted[pair.chosen].tokens, fitted[pair.rejected].tokens
        if not pair_reason and len(a) == len(b) and (a == b).all():
            pair_reason = Reason.EQUAL
        if pair_reason:
            _count(dropped, pair_reason, num_pairs=1)
        else:
            pairs.append(pair)
    if example.pairs:
        remaining, pairs, kept = _renumber(fitted, pairs)
    else:  # responses that are judged alone
        kept = [i for i in range(len(fitted)) if i not in lost]
        remaining = [fitted[i] for i in kept]
    if num_unpaired := len(paths) - len(lost) - len(remaining):
        dropped[Reason.UNPAIRED] = (num_unpaired, 0)
    return Selection(
        paths=remaining,
        pairs=pairs,
        dropped=dropped,
        num_cut=num_cut,
        cut_tokens=cut_tokens,
        kept=tuple(kept),
    )


def _lose_too_long(
    paths: Sequence[ResponsePath],
    lost: dict[int, str],
    max_length: int,
    overflow: str,
    has_images: bool,
) -> None:
    reason = Reason.TOO_LONG_CUT if overflow == "truncate-prompt" else Reason.TOO_LONG
    reason = Reason.TOO_LONG_IMAGES if has_images else reason
    remedy = "" if has_images else " or --overflow truncate-prompt"
    for i, path in enumerate(paths):
        if len(path.tokens) <= max_length or i in lost:
            continue
        if overflow == "error":
            raise TooLong(
                f"response {i} takes {counted(len(path.tokens), 'token')} with its prompt, and "
                f"--max-length is {max_length}: raise it, or give --overflow drop{remedy}"
            )
        lost[i] = reason


def _count(
    dropped: dict[str, tuple[int, int]], reason: str, num_responses: int = 0, num_pairs: int = 0
) -> None:
    responses, pairs = dropped.get(reason, (0, 0))
    dropped[reason] = responses + num_responses, pairs + num_pairs


def _renumber(
    paths: Sequence[ResponsePath], pairs: Sequence[Pair]
) -> tuple[list[ResponsePath], list[Pair], list[int]]:
    """The responses that have a pair, with new numbers for them and for their sets, and which they
    are.

    Four responses in sets [0, 0, 2, 2] with the pair (3, 2) -> two in sets [0, 0], pair (1, 0).
    """
    paired = sorted({side for pair in pairs for side in (pair.chosen, pair.rejected)})
    if paired == list(range(len(paths))) and not any(path.set_id for path in paths):
        return list(paths), list(pairs), paired
    new = {old: i for i, old in enumerate(paired)}
    sets: dict[int, int] = {}
    for old in paired:
        sets.setdefault(paths[old].set_id, len(sets))
    return (
        [replace(paths[old], set_id=sets[paths[old].set_id]) for old in paired],
        [replace(p, chosen=new[p.chosen], rejected=new[p.rejected]) for p in pairs],
        paired,
    )


def _truncate(
    example: Example,
    paths: Sequence[ResponsePath],
    lost: dict[int, str],
    encoder: PathEncoder,
    max_length: int,
) -> tuple[list[ResponsePath], int, int]:
    """Cut the prompts of comparison sets that are too long, the same for every response of a set.

    A response that is too long even with the shortest prompt has no influence on the cut. Returns
    the paths, and the numbers of responses and of tokens that were cut.
    """
    fitted, num_cut, cut_tokens = list(paths), 0, 0
    for set_id in dict.fromkeys(path.set_id for path in paths):
        members = [i for i, p in enumerate(paths) if p.set_id == set_id and i not in lost]
        if not members or max(len(paths[i].tokens) for i in members) <= max_length:
            continue
        if has_turns(example.responses[members[0]].prompt):
            cut = _cut_turns(example, paths, members, encoder, max_length)
        else:
            cut = _cut_tokens(example, paths, members, encoder, max_length)
        for i, path in cut.items():
            num_cut, cut_tokens = num_cut + 1, cut_tokens + len(paths[i].tokens) - len(path.tokens)
            fitted[i] = path
    return fitted, num_cut, cut_tokens


def _cut_tokens(
    example: Example,
    paths: Sequence[ResponsePath],
    members: list[int],
    encoder: PathEncoder,
    max_length: int,
) -> dict[int, ResponsePath]:
    """Cut the oldest prompt tokens of plain texts, the same number for all `members`.

    Begin-of-text and one more prompt token stay, so the longest possible cut is `room`.
    """
    # Paths of 7 and 12 tokens, max_length 6, begin-of-text, loss from token 4: room = 2. The second
    # does not fit even with that cut (10 tokens); the first decides: cut = 1.
    protected = encoder.protected_tokens(example.responses[members[0]].prompt)
    room = max(min(paths[i].loss_start for i in members) - protected - 1, 0)
    members = [i for i in members if len(paths[i].tokens) - room <= max_length]
    cut = max((len(paths[i].tokens) - max_length for i in members), default=0)
    if cut <= 0:
        return {}
    return {
        i: replace(
            paths[i],
            tokens=np.concatenate(
                [paths[i].tokens[:protected], paths[i].tokens[protected + cut :]]
            ),
            loss_start=paths[i].loss_start - cut,
        )
        for i in members
    }


def _cut_turns(
    example: Example,
    paths: Sequence[ResponsePath],
    members: list[int],
    encoder: PathEncoder,
    max_length: int,
) -> dict[int, ResponsePath]:
    """Cut the oldest characters of conversations, the same number for all `members`, and encode
    them again. The fewest characters are found by bisection."""
    turns = [PromptTurns(example.responses[i].prompt) for i in members]
    room = min(prompt.room for prompt in turns)
    if not room:
        return {}

    def encoded(count: int) -> dict[int, ResponsePath]:
        responses = tuple(
            replace(example.responses[i], prompt=prompt.shortened(count))
            for i, prompt in zip(members, turns, strict=True)
        )
        return dict(zip(members, encoder.trial(replace(example, responses=responses)), strict=True))

    shortest = encoded(room)
    fitting = [i for i in members if len(shortest[i].tokens) <= max_length]
    if all(len(paths[i].tokens) <= max_length for i in fitting):
        return {}  # those that do not fit anyway are too long, all others fit as they are
    # Invariant: what fits at all fits with `high` characters removed, and not with `low`.
    low, high, best = 0, room, shortest
    while high - low > 1:
        middle = (low + high) // 2
        tried = encoded(middle)
        if all(len(tried[i].tokens) <= max_length for i in fitting):
            high, best = middle, tried
        else:
            low = middle
    return {i: best[i] for i in fitting}
