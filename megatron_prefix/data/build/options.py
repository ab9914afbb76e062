"""The settings of a build."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_prefix.data.tokenize import OVERFLOW_MODES
from megatron_prefix.errors import InputError


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How records become trees; the flags of `megatron-prefix build` have the same names."""

    format: str = "auto"
    """A name in FORMATS, or "auto": detected from the first record."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column -> the path of its value in a record."""
    ignored: tuple[str, ...] = ()
    """Columns that are left out, and fields of messages (message.FIELD) that stay unread."""
    attributes: tuple[str, ...] = ()
    """Fields of responses with a score each; they become `response_attributes`."""
    split: str | None = None
    """The part of a Hugging Face data set that is read."""
    parse_special: bool = False
    """The characters of a special token in a text become that token."""
    merge_prompts: bool = False
    """All records with the same prompt become one group."""
    max_length: int | None = None
    """Longest path from the root, in tokens, end-of-text included; None for no limit."""
    overflow: str = "error"
    """What happens to longer paths: "error", "truncate-prompt" or "drop"."""
    bos: str = "auto"
    """Which texts get begin-of-text: "auto", "always" or "never", see data/tokenize/ends.py."""
    eos: str = "auto"
    """Which responses get end-of-text: the same modes."""
    holdout: float | None = None
    """Share of the prompts that go to a second data set, PREFIX_valid; None for no second one."""
    holdout_seed: int = 1234
    """Decides which prompts these are."""
    kto: bool = False
    """Each group also gets a response of another prompt, see mismatches.py."""
    kto_seed: int = 1234
    """Decides which responses these are."""
    on_contradiction: str = "keep"
    """What happens to pairs whose scores contradict their label: keep, drop, swap or error."""
    on_error: str = "stop"
    """What happens to wrong records: "stop" or "skip"."""
    strict: bool = False
    """Degenerate records (with nothing to compare) are an error."""
    overwrite: bool = False
    """Replace a data set that is there already; without it that is an error."""
    workers: int = 1
    """Processes that share the work; the files do not depend on it."""

    @property
    def num_outputs(self) -> int:
        """Data sets that the build writes."""
        return 1 if self.holdout is None else 2

    def __post_init__(self) -> None:
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise InputError(
                f"--holdout is {self.holdout}: give a share of the prompts above 0 and below 1"
            )
        if self.holdout_seed < 0:
            raise InputError(f"--holdout-seed is {self.holdout_seed}: give at least 0")
        if len(set(self.attributes)) < len(self.attributes):
            raise InputError(f"--attributes {' '.join(self.attributes)}: a name is given twice")
        if self.attributes and self.merge_prompts:
            raise InputError(
                f"--attributes {' '.join(self.attributes)} with --merge-prompts: merged groups "
                "keep no attributes: leave one of them out"
            )
        if self.attributes and self.kto:
            raise InputError(
                f"--attributes {' '.join(self.attributes)} with --kto: reward models learn "
                "attributes, and KTO trains policies: leave one of them out"
            )
        if self.kto_seed < 0:
            raise InputError(f"--kto-seed is {self.kto_seed}: give at least 0")
        if self.workers < 1:
            raise InputError(f"--workers is {self.workers}: give at least 1")
        if self.overflow not in OVERFLOW_MODES:
            raise InputError(
                f"overflow {self.overflow!r} is not one of {', '.join(OVERFLOW_MODES)}"
            )
        if self.on_error not in ("stop", "skip"):
            raise InputError(f"on_error {self.on_error!r} is not one of stop, skip")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(
                f"--max-length is {self.max_length}: a path has at least 2 tokens, one of the "
                "prompt and one of the response"
            )
        if self.max_length is None and self.overflow != "error":
            raise InputError(
                f"--overflow {self.overflow} has no effect without --max-length: give both"
            )
