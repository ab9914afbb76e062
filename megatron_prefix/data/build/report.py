"""What a build did with every record: kept, dropped, cut, skipped, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_prefix.data.tokenize.rendering import WARNINGS
from megatron_prefix.text import align, format_counts

MAX_LISTED = 1000
"""Records listed a reason; all are counted."""


@dataclass
class Losses:
    """What one reason cost: whole groups, and responses and pairs of groups that stayed.

    `records` lists "file:line" of the first MAX_LISTED records it touched, `num_records` counts
    all of them.
    """

    groups: int = 0
    responses: int = 0
    pairs: int = 0
    num_records: int = 0
    records: list[str] = field(default_factory=list)

    def add(self, where: str, *, groups: int = 0, responses: int = 0, pairs: int = 0) -> None:
        self.groups += groups
        self.responses += responses
        self.pairs += pairs
        self.num_records += 1
        if len(self.records) < MAX_LISTED:
            self.records.append(where)


@dataclass
class BuildReport:
    """Counts of one build. `wrong` are unreadable records that `--on-error skip` passed over.

    `duplicates` counts records that repeat an earlier one and lists the first of them with it;
    `merged` is what `--merge-prompts` saved.
    """

    format: str = "auto"
    num_records: int = 0
    seconds: float = 0.0
    num_tokens_made: int = 0
    dropped: dict[str, Losses] = field(default_factory=dict)
    wrong: Losses = field(default_factory=Losses)
    wrong_reasons: list[str] = field(default_factory=list)
    num_cut_groups: int = 0
    num_cut_responses: int = 0
    num_cut_tokens: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, Any] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    def drop(self, reason: str, where: str, **lost: int) -> None:
        self.dropped.setdefault(reason, Losses()).add(where, **lost)

    def skip_wrong(self, where: str, message: str) -> None:
        self.wrong.add(where, groups=1)
        if len(self.wrong_reasons) < MAX_LISTED:
            self.wrong_reasons.append(f"{where}: {message}")

    def note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: everything but times, so that equal builds give equal bytes."""
        return {
            "format": self.format,
            "num_records": self.num_records,
            "dropped": {reason: vars(losses) for reason, losses in self.dropped.items()},
            "wrong": {"num_records": self.wrong.num_records, "records": self.wrong_reasons},
            "truncated": {
                "groups": self.num_cut_groups,
                "responses": self.num_cut_responses,
                "tokens": self.num_cut_tokens,
            },
            "notes": self.notes,
            "duplicates": self.duplicates,
            "merged": self.merged,
        }

    def summary(self) -> str:
        """What `build` prints at its end."""
        manifest = self.manifest
        lines = align([["records read", f"{self.num_records:,}"], ["format", self.format]])
        lines += format_counts(manifest["counts"], manifest["tokens"], manifest["lengths"])
        lines += self._lost_lines() + self._repeated_lines()
        rate = self.num_tokens_made / max(self.seconds, 1e-9)
        lines += [
            "",
            f"{self.num_tokens_made:,} tokens made in {self.seconds:.1f} s: {rate:,.0f} tokens/s",
        ]
        return "\n".join(lines)

    def _lost_lines(self) -> list[str]:
        lines = ["", "dropped" if self.dropped or self.wrong.num_records else "dropped  nothing"]
        table = [
            [f"  {reason}", *_counted(vars(lost))] for reason, lost in sorted(self.dropped.items())
        ]
        if self.wrong.num_records:
            table.append(["  wrong records skipped", f"{self.wrong.num_records:,} records", "", ""])
        lines += align(table)
        if self.num_cut_responses:
            lines += [
                f"truncated  {self.num_cut_tokens:,} prompt tokens of {self.num_cut_responses:,} "
                f"responses in {self.num_cut_groups:,} groups"
            ]
        lines += [
            f"{'warning' if text in WARNINGS else 'note'}  {count:,} {text}"
            for text, count in sorted(self.notes.items())
        ]
        lines += [f"wrong  {reason}" for reason in self.wrong_reasons[:10]]
        if self.wrong.num_records > 10:
            lines.append(f"wrong  and {self.wrong.num_records - 10:,} more, see the manifest")
        return lines

    def _repeated_lines(self) -> list[str]:
        lines = []
        if self.duplicates["num_records"]:
            count, (later, first) = self.duplicates["num_records"], self.duplicates["records"][0]
            lines.append(
                f"duplicates  {count:,} records repeat the texts and labels of an earlier one "
                f"(kept; record {later} is as record {first})"
            )
        if self.merged:
            before, after = self.merged["tokens_before"], self.merged["tokens"]
            lines.append(
                f"merged  {self.merged['records']:,} records into {self.merged['groups']:,} groups "
                f"by their prompts: {before:,} tokens as trees became {after:,} "
                f"({before / after:.2f} x)"
            )
        return lines


def _counted(lost: Mapping[str, Any]) -> list[str]:
    return [f"{lost[name]:,} {name}" for name in ("groups", "responses", "pairs")]
