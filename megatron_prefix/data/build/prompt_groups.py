"""`--merge-prompts`: all records with the same prompt become one group, with the prompt once.

First the build makes one group per record. Then groups whose prompts have the same digest are
merged into a new data set, in the order in which the prompts first appear:

    records 0: "Hi" -> "Yes" | "No",  1: "Why?" -> "So" | "As",  2: "Hi" -> "Yes" | "Never"
    groups  0: "Hi" -> sets [Yes, No], [Yes, Never]; 2 records    1: "Why?"; 1 record

Each record keeps its comparison set, and a group knows its number of records: batches and the
weights of the loss still count records. Responses share tokens across the records of a group.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_prefix.data.build.duplicates import DigestTable
from megatron_prefix.data.build.report import BuildReport
from megatron_prefix.data.files import building_folder, checked_prefix
from megatron_prefix.data.rebuilding import rebuilt, tree_paths
from megatron_prefix.data.store import DatasetWriter, PreferenceDataset
from megatron_prefix.data.tree import Pair, PrefixTree, ResponsePath
from megatron_prefix.errors import InputError


@contextmanager
def place_before_merging(output: str | Path, kind: str = "merging") -> Iterator[Path]:
    """A temporary prefix beside `output` for the data set before merging, or before another stage
    of this `kind`; removed at the end.

    Error messages name `output` instead of it.
    """
    prefix = checked_prefix(output)
    new_folders = [folder for folder in prefix.parents if not folder.exists()]
    place = building_folder(prefix, kind)
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
        for folder in new_folders:
            if not folder.exists() or any(folder.iterdir()):
                break
            folder.rmdir()


def merge_prompts(
    sources: Sequence[PreferenceDataset],
    tables: Sequence[DigestTable],
    report: BuildReport,
    outputs: Sequence[Path],
) -> None:
    """Write each source to its output, with groups merged by the digests of their prompts.

    `report` gets the tokens saved, over all sources, and the new manifests.
    """
    with ExitStack() as stack:
        writers = []
        for source, table, output in zip(sources, tables, outputs, strict=True):
            options = {**source.manifest["options"], "merge_prompts": True}
            writer = stack.enter_context(
                DatasetWriter(output, source.manifest["tokenizer"], options, source.images)
            )
            _write_merged(source, table, writer)
            writers.append(writer)
        counts = [writer.statistics.counts for writer in writers]
        report.merged = {
            "records": sum(map(len, sources)),
            "groups": sum(count["groups"] for count in counts),
            "tokens_before": sum(source.manifest["counts"]["tokens"] for source in sources),
            "tokens": sum(count["tokens"] for count in counts),
        }
        report.publish(writers)


def _write_merged(source: PreferenceDataset, digests: DigestTable, writer: DatasetWriter) -> None:
    for groups in digests.by_prompt():
        first_record = int(source.group_records[groups[0]])
        if len(groups) == 1:
            writer.add(source[groups[0]], first_record)
        else:
            tree = merge_trees([source[group] for group in groups])
            writer.add(tree, first_record, len(groups))


def merge_trees(trees: Sequence[PrefixTree]) -> PrefixTree:
    """One tree with the responses, comparison sets and pairs of all trees, in their order."""
    paths: list[ResponsePath] = []
    pairs: list[Pair] = []
    num_sets = 0
    for tree in trees:
        # Trees of 2 and 3 responses: the second tree's pair (0, 2) becomes (2, 4), its set 0 set 1.
        first = len(paths)  # responses of this tree are numbered from here on
        own_paths, own_pairs = tree_paths(tree)
        paths += [replace(path, set_id=num_sets + path.set_id) for path in own_paths]
        pairs += [
            replace(pair, chosen=first + pair.chosen, rejected=first + pair.rejected)
            for pair in own_pairs
        ]
        num_sets += int(tree.response_sets.max()) + 1
    return rebuilt(paths, pairs, trees)
