"""Pairs whose scores do not agree with their label: `--on-contradiction`.

    chosen has score 7, rejected has 9     against the label: swap makes the second the chosen one
    chosen has score 7, rejected has 7     equal: neither label nor scores can be checked

`keep` counts both; `drop` drops such pairs; `swap` swaps the first kind and counts the second;
`error` stops.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_prefix.data.read.formats import DegenerateRecord, Example, Reason
from megatron_prefix.errors import InputError

CONTRADICTION_MODES = ("keep", "drop", "swap", "error")
NOTE_EQUAL = "pairs whose scores are equal (kept)"
NOTE_AGAINST = "pairs whose scores contradict their label (kept; see --on-contradiction)"
NOTE_SWAPPED = "pairs whose scores contradicted their label (swapped)"
NOTE_DROPPED = "pairs whose scores are equal or contradict their label (dropped)"


def settle_contradictions(example: Example, mode: str) -> Example:
    """The Example as `mode` asks, with a note for each pair that its scores do not support.

    Raises InputError with mode "error", and DegenerateRecord if no pair is left.
    """
    pairs, notes = [], []
    for pair in example.pairs:
        chosen, rejected = (example.responses[i].score for i in (pair.chosen, pair.rejected))
        if not chosen <= rejected:  # better, or a NaN
            pairs.append(pair)
            continue
        if mode == "error":
            raise InputError(
                f"the chosen response has the score {chosen:g} and the rejected one {rejected:g}: "
                "correct the record, or decide with --on-contradiction keep, drop or swap"
            )
        if mode == "drop":
            notes.append(NOTE_DROPPED)
        elif chosen < rejected and mode == "swap":
            notes.append(NOTE_SWAPPED)
            pairs.append(replace(pair, chosen=pair.rejected, rejected=pair.chosen))
        else:
            notes.append(NOTE_EQUAL if chosen == rejected else NOTE_AGAINST)
            pairs.append(pair)
    if not notes:
        return example
    if not pairs:
        raise DegenerateRecord(Reason.CONTRADICTION)
    if len(example.responses) == 2 and NOTE_SWAPPED in notes:
        return _reversed(example, (*example.notes, *notes))
    return replace(example, pairs=tuple(pairs), notes=(*example.notes, *notes))


def _reversed(example: Example, notes: tuple[str, ...]) -> Example:
    """A pair with its two responses exchanged, so that the chosen one comes first."""
    first, second = example.responses
    responses = replace(second, rank=first.rank), replace(first, rank=second.rank)
    return replace(example, responses=responses, notes=notes)
