"""What a build did with the records: how many were dropped, cut or skipped, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_prefix.data.read import ExampleReader
from megatron_prefix.data.store import DatasetWriter
from megatron_prefix.data.tokenize import WARNINGS
from megatron_prefix.text import align, counted, format_counts, image_line, own_counts

MAX_LISTED = 1000
"""Records listed per reason; all are counted."""
MAX_NAMES = 200
"""Different names of unread columns that are counted one by one."""
OTHER_NAMES = "(others)"


@dataclass
class DropCounts:
    """What was dropped for one reason: whole groups, and responses and pairs of other groups.

    `records` has "file:line" of the first MAX_LISTED records concerned, `num_records` counts all.
    """

    groups: int = 0
    responses: int = 0
    pairs: int = 0
    num_records: int = 0
    records: list[str] = field(default_factory=list)

    def add(self, place: str, *, groups: int = 0, responses: int = 0, pairs: int = 0) -> None:
        self.groups += groups
        self.responses += responses
        self.pairs += pairs
        self.num_records += 1
        if len(self.records) < MAX_LISTED:
            self.records.append(place)


@dataclass
class BuildReport:
    """Counts of one build.

    `num_rows` is above `num_records` if rows were joined to records. `wrong` are the wrong records
    that `--on-error skip` skipped. `duplicates` counts records that repeat an earlier one, and
    lists the first of them; `merged` has the tokens that `--merge-prompts` saved. `unread` has the
    columns that the format does not read, with the number of records that have them.
    """

    format: str = "auto"
    num_records: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    num_tokens_made: int = 0
    dropped: dict[str, DropCounts] = field(default_factory=dict)
    wrong: DropCounts = field(default_factory=DropCounts)
    wrong_reasons: list[str] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)
    """Responses that were encoded, and those that got begin- or end-of-text from the build."""
    num_cut_groups: int = 0
    num_cut_responses: int = 0
    num_cut_tokens: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, Any] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    mismatches: dict[str, int] = field(default_factory=dict)
    """With `--kto`: groups that have a mismatch, and groups without one."""
    manifest: dict[str, Any] = field(default_factory=dict)
    valid_manifest: dict[str, Any] = field(default_factory=dict)
    """Of the data set that `--holdout` made, if there is one."""

    def drop(self, reason: str, place: str, **counts: int) -> None:
        self.dropped.setdefault(reason, DropCounts()).add(place, **counts)

    def skip_wrong(self, place: str, message: str) -> None:
        self.wrong.add(place, groups=1)
        if len(self.wrong_reasons) < MAX_LISTED:
            self.wrong_reasons.append(f"{place}: {message}")

    def note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1

    def publish(self, writers: Sequence[DatasetWriter]) -> None:
        """Finish all data sets of a build; none is moved into place before all are complete."""
        self.manifest, *others = [writer.complete(self.as_dict()) for writer in writers]
        self.valid_manifest = others[0] if others else {}
        for writer in reversed(writers):
            writer.publish()

    def count_unread(self, name: str) -> None:
        self.unread[name] = self.unread.get(name, 0) + 1

    def limit_unread(self) -> None:
        """Count the names after the first MAX_NAMES together."""
        for name in [name for name in self.unread if name != OTHER_NAMES][MAX_NAMES:]:
            count = self.unread.pop(name)
            self.unread[OTHER_NAMES] = self.unread.get(OTHER_NAMES, 0) + count

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: everything except times, so that equal builds write equal bytes."""
        return {
            "format": self.format,
            "num_records": self.num_records,
            "num_rows": self.num_rows,
            "dropped": {reason: vars(counts) for reason, counts in self.dropped.items()},
            "wrong": {"num_records": self.wrong.num_records, "records": self.wrong_reasons},
            "truncated": {
                "groups": self.num_cut_groups,
                "responses": self.num_cut_responses,
                "tokens": self.num_cut_tokens,
            },
            "added": self.added,
            "notes": self.notes,
            "unread": self.unread,
            "duplicates": self.duplicates,
            "merged": self.merged,
            **({"mismatches": self.mismatches} if self.mismatches else {}),
        }

    def summary(self) -> str:
        """The text that `build` prints at its end."""
        manifest = self.manifest
        records = f"{self.num_records:,}"
        if self.num_rows != self.num_records:
            records += f", joined from {counted(self.num_rows, 'row')}"
        lines = align([["records read", records], ["format", self.format]])
        lines += format_counts(manifest["counts"], manifest["tokens"], manifest["lengths"])
        if "images" in manifest:
            lines += ["", image_line(manifest["images"], manifest["counts"]["tokens"])]
        lines += self._held_out_lines() + self._ends_lines()
        lines += self._dropped_lines() + self._unread_lines() + self._repeated_lines()
        rate = self.num_tokens_made / max(self.seconds, 1e-9)
        lines += [
            "",
            f"{self.num_tokens_made:,} tokens made in {self.seconds:.1f} s: {rate:,.0f} tokens/s",
        ]
        return "\n".join(lines)

    def _held_out_lines(self) -> list[str]:
        if not self.valid_manifest:
            return []
        valid = own_counts(self.valid_manifest["counts"])
        groups = valid["groups"] + self.manifest["counts"]["groups"]
        return [
            "",
            f"held out  {valid['groups']:,} of {counted(groups, 'group')} "
            f"({valid['groups'] / groups:.2%}), {counted(valid['responses'], 'response')}, "
            f"{counted(valid['pairs'], 'pair')}, {valid['tokens']:,} tokens; the counts above are "
            "those of the other groups",
        ]

    def _ends_lines(self) -> list[str]:
        """What the build itself put before and after responses."""
        tokenizer, parts = self.manifest["tokenizer"], []
        for name, flag, id in (
            ("begin_of_text", "--bos", tokenizer["bos_id"]),
            ("end_of_text", "--eos", tokenizer["eos_id"]),
        ):
            mode = tokenizer.get(name, {}).get("mode")
            if mode is not None:
                token = "the tokenizer defines none" if id is None else f"token {id}"
                title, count = name.replace("_", "-"), self.added.get(name, 0)
                also = ", dropped ones too" if self.dropped else ""
                parts.append(
                    f"{title} added to {counted(count, 'response')}{also} ({flag} {mode}; {token})"
                )
        return ["", *parts] if parts else []

    def _dropped_lines(self) -> list[str]:
        lines = ["", "dropped" if self.dropped or self.wrong.num_records else "dropped  nothing"]
        table = [
            [f"  {reason}", *_as_texts(vars(counts))]
            for reason, counts in sorted(self.dropped.items())
        ]
        if self.wrong.num_records:
            wrong = counted(self.wrong.num_records, "record")
            table.append(["  wrong records skipped", wrong, "", ""])
        lines += align(table)
        if self.num_cut_responses:
            lines += [
                f"truncated  {self.num_cut_tokens:,} prompt tokens of {self.num_cut_responses:,} "
                f"responses in {counted(self.num_cut_groups, 'group')}"
            ]
        warnings = (*WARNINGS, *ExampleReader.WARNINGS)
        lines += [
            f"{'warning' if text in warnings else 'note'}  {text}: {count:,}"
            for text, count in sorted(self.notes.items())
        ]
        lines += [f"wrong  {reason}" for reason in self.wrong_reasons[:10]]
        if self.wrong.num_records > 10:
            lines.append(f"wrong  and {self.wrong.num_records - 10:,} more, see the manifest")
        return lines

    def _unread_lines(self) -> list[str]:
        """The columns that were not read, with the number of records if it is not all."""
        if not self.unread:
            return []
        names = [
            name if count == self.num_records else f"{name} ({counted(count, 'record')})"
            for name, count in sorted(self.unread.items())
        ]
        return [f"columns and fields not read  {', '.join(names)}"]

    def _repeated_lines(self) -> list[str]:
        lines = []
        if self.duplicates["num_records"]:
            count, (later, first) = self.duplicates["num_records"], self.duplicates["records"][0]
            lines.append(
                f"duplicates  {counted(count, 'record')} with the texts and labels of an earlier "
                f"one (kept; for example, record {later} repeats record {first})"
            )
        if self.merged:
            before, after = self.merged["tokens_before"], self.merged["tokens"]
            lines.append(
                f"merged  {counted(self.merged['records'], 'record')} into "
                f"{counted(self.merged['groups'], 'group')} with different prompts: {before:,} "
                f"tree tokens became {after:,} ({before / after:.2f} x)"
            )
        if self.mismatches.get("without"):
            lines.append(
                f"mismatches  none for {counted(self.mismatches['without'], 'group')}: no response "
                "of another prompt fits"
            )
        return lines


def _as_texts(counts: Mapping[str, Any]) -> list[str]:
    return [counted(counts[f"{name}s"], name) for name in ("group", "response", "pair")]
