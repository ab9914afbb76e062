"""`--merge-prompts`: all records with one prompt become one group, its prompt stored once.

A build leaves a group a record first; then groups whose prompts have the same digest are merged
into a new data set, in the order in which prompts first appear. A record's responses stay
comparison sets of their own, and the group counts its records, so batches and the weighting of
the loss go on counting records. Responses that begin alike share tokens over all its records.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_prefix.data.build.duplicates import DigestTable
from megatron_prefix.data.build.report import BuildReport
from megatron_prefix.data.files.work_folder import building_folder, checked_prefix
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tree import Pair, PrefixTree, ResponsePath, build_tree
from megatron_prefix.errors import InputError


@contextmanager
def place_before_merging(output: str | Path) -> Iterator[Path]:
    """A prefix beside `output` for the data set that is merged; nothing of it stays.

    Errors that name it come out naming `output`.
    """
    prefix = checked_prefix(output)
    made = [folder for folder in prefix.parents if not folder.exists()]
    place = building_folder(prefix, "merging")
    try:
        try:
            place.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"output {prefix} cannot be written: {error}") from error
        yield place / prefix.name
    except InputError as error:
        raise InputError(str(error).replace(str(place / prefix.name), str(prefix))) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for folder in made:
            if not folder.exists() or any(folder.iterdir()):
                break
            folder.rmdir()


def merge_prompts(
    source: PreferenceDataset, digests: DigestTable, report: BuildReport, output: str | Path
) -> None:
    """Write `source`, its groups merged by the digests of their prompts, to `output`.

    The report hears what was saved, and gets the new manifest.
    """
    options = {**source.manifest["options"], "merge_prompts": True}
    with DatasetWriter(output, source.manifest["tokenizer"], options) as writer:
        for groups in digests.by_prompt():
            records = int(source.group_records[groups[0]])
            if len(groups) == 1:
                writer.add(source[groups[0]], records)
            else:
                tree = merge_trees([source[group] for group in groups])
                writer.add(tree, records, len(groups))
        counts = writer.statistics.counts
        report.merged = {
            "records": len(source),
            "groups": counts["groups"],
            "tokens_before": source.manifest["counts"]["tokens"],
            "tokens": counts["tokens"],
        }
        report.manifest = writer.finish(report.as_dict())


def merge_trees(trees: Sequence[PrefixTree]) -> PrefixTree:
    """One tree with the responses, sets and pairs of all, in their order."""
    paths: list[ResponsePath] = []
    pairs: list[Pair] = []
    num_sets = 0
    for tree in trees:
        first = len(paths)
        for response in range(tree.num_responses):
            tokens, loss_start = tree.response_tokens(response)
            paths.append(
                ResponsePath(
                    tokens=tokens,
                    loss_start=loss_start,
                    set_id=num_sets + int(tree.response_sets[response]),
                    rank=int(tree.ranks[response]),
                    score=float(tree.scores[response]),
                )
            )
        labels = zip(tree.pairs.tolist(), tree.pair_weights, tree.pair_margins, strict=True)
        found = [
            Pair(chosen=c, rejected=r, weight=float(w), margin=float(m)) for (c, r), w, m in labels
        ]
        pairs += [replace(p, chosen=first + p.chosen, rejected=first + p.rejected) for p in found]
        num_sets += int(tree.response_sets.max()) + 1
    return build_tree(paths, pairs)
