"""Begin- and end-of-text: which tokens the build adds to a text or to rendered messages.

    mode    plain text                                  messages that a chat template writes
    auto    what the tokenizer puts before a text by    exactly what the template writes
            itself; end-of-text after the response
    always  begin-of-text, end-of-text                  begin-of-text, end-of-text
    never   nothing                                     nothing

Nothing is added that is there already. A text may spell these two tokens itself, as texts do that
a chat template wrote: then the spelling at the very beginning or end is the token, once:

    prompt "<s>[INST] Hi [/INST]", response " Yes</s>"      [<s>] … | … [</s>]

Messages of a tokenizer without a chat template are plain text.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_prefix.data.tokenize.base import Tokenizer
from megatron_prefix.errors import InputError

END_MODES = ("auto", "always", "never")


class TextEnds:
    """The rule for begin- and end-of-text, for one tokenizer.

    `bos` and `eos` are in END_MODES. Raises InputError if a token is asked for that the tokenizer
    does not define.
    """

    def __init__(self, tokenizer: Tokenizer, bos: str = "auto", eos: str = "auto") -> None:
        for flag, mode in (("--bos", bos), ("--eos", eos)):
            if mode not in END_MODES:
                raise InputError(f"{flag} is {mode!r}: give one of {', '.join(END_MODES)}")
        if bos == "always" and tokenizer.bos_id is None:
            raise InputError(
                f"--bos is always and tokenizer {tokenizer.name} defines no begin-of-text token: "
                "give --bos auto, or a tokenizer that has one"
            )
        needs_eos = eos == "always" or (eos == "auto" and not tokenizer.has_chat_template)
        if needs_eos and tokenizer.eos_id is None:
            raise InputError(
                f"tokenizer {tokenizer.name} defines no end-of-text token: give --eos never, or a "
                "tokenizer that has one"
            )
        self.bos, self.eos = bos, eos
        self._tokenizer = tokenizer
        by_itself = list(tokenizer.text_begin)
        always = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        before_text = {"auto": by_itself, "always": by_itself or always, "never": []}[bos]
        before_messages = always if bos == "always" else []
        self._before = {False: before_text, True: before_messages}
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self._after = {
            False: [] if eos == "never" else end,
            True: end if eos == "always" else [],
        }
        self._tails: dict[tuple[int, ...], bool] = {}

    def describe(self) -> dict[str, Any]:
        """The rule for a manifest: the token ids that are added, unless they are there already."""
        return {
            "begin_of_text": {
                "mode": self.bos,
                "text": self._before[False],
                "messages": self._before[True],
            },
            "end_of_text": {
                "mode": self.eos,
                "text": self._after[False],
                "messages": self._after[True],
            },
        }

    def split_begin(self, text: str) -> str:
        """A plain text without the begin-of-text that it spells itself."""
        spelling = self._tokenizer.bos_text
        return text[len(spelling) :] if self._spells_begin(text) else text

    def _spells_begin(self, text: str) -> bool:
        spelling = self._tokenizer.bos_text
        return self.bos != "never" and bool(spelling) and text.startswith(spelling)

    def before(self, text: str, ids: np.ndarray, is_rendered: bool) -> list[int]:
        """Token ids to put before `ids`, which are those of `text` after `split_begin`."""
        if not is_rendered and self._spells_begin(text):
            assert self._tokenizer.bos_id is not None, "its spelling is known"
            return [self._tokenizer.bos_id]
        wanted = self._before[is_rendered]
        return [] if ids[: len(wanted)].tolist() == wanted else wanted

    def split_end(self, text: str, boundary: int) -> tuple[str, str | None]:
        """A plain text up to the end-of-text that it spells after character `boundary`, and the
        white space after that; or the whole text and None."""
        spelling = self._tokenizer.eos_text
        if self.eos == "never" or not spelling:
            return text, None
        body = text.rstrip()
        end = len(body) - len(spelling)
        if end < boundary or not body.endswith(spelling):
            return text, None
        return text[:end], text[len(body) :]

    def after(self, ids: np.ndarray, loss_start: int, is_rendered: bool) -> list[int]:
        """Token ids to put after `ids`, whose response begins at `loss_start`.

        Raises InputError if a text needs end-of-text and the tokenizer has none.
        """
        wanted = self._after[is_rendered]
        if not wanted:
            if self.eos == "auto" and not is_rendered:
                raise InputError(
                    f"tokenizer {self._tokenizer.name} defines no end-of-text token to put after "
                    "a plain text: give --eos never, or messages for its chat template"
                )
            return []
        return [] if self.is_ended(ids, loss_start) else wanted

    def is_ended(self, ids: np.ndarray, loss_start: int) -> bool:
        """Whether a response ends with end-of-text, with only white space after it."""
        if len(ids) > loss_start and ids[-1] == self._tokenizer.eos_id:
            return True
        ends = np.flatnonzero(ids[loss_start:] == self._tokenizer.eos_id)
        if not len(ends):
            return False
        tail = tuple(ids[loss_start + int(ends[-1]) + 1 :].tolist())
        if tail not in self._tails:
            if len(self._tails) > 1024:
                self._tails.clear()
            self._tails[tail] = not self._tokenizer.decode(tail).strip()
        return self._tails[tail]
