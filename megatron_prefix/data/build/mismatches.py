"""`--kto`: every group gets a response of another prompt, its mismatch.

    groups      0 "Hi" -> "Yes"     1 "Why?" -> "So"     2 "Hi" -> "No"
    in order    2, 0, 1             (a permutation by seed and number of groups)
    mismatches  group 2: of 0? the same prompt, so of 1: "Hi" -> "So"
                group 0: of 1: "Hi" -> "So"
                group 1: of 2: "Why?" -> "No"

A group takes a response of the next group in the permutation that has another prompt; of several
responses, that of its place in the permutation. The response is taken as text: it is rendered and
encoded after this group's prompt. If it does not fit `--max-length`, or cannot follow this prompt,
the next group is tried. The order of groups decides everything, so the number of workers does not
matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_prefix.data.build.duplicates import DigestTable
from megatron_prefix.data.build.group_texts import GroupText, GroupTexts
from megatron_prefix.data.build.options import BuildOptions
from megatron_prefix.data.build.report import BuildReport
from megatron_prefix.data.build.workers import ordered
from megatron_prefix.data.read import Text
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.rebuilding import bare, prompt_images, rebuilt, tree_paths
from megatron_prefix.data.store import Block, DatasetWriter, PreferenceDataset
from megatron_prefix.data.tokenize import PathEncoder
from megatron_prefix.data.tree import PrefixTree, ResponsePath
from megatron_prefix.errors import InputError

GROUPS = 256
"""Groups whose mismatches are made together."""
TRIES = 64
"""Groups that are tried before a group stays without a mismatch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set without mismatches, and what its groups were made of.

    `members[g]` are the groups before merging that group g consists of, as `texts` numbers them;
    `prompts[g]` is the digest of its prompt.
    """

    dataset: PreferenceDataset
    members: Sequence[Sequence[int]]
    prompts: np.ndarray
    texts: GroupTexts


def source_of(
    dataset: PreferenceDataset, table: DigestTable, texts: GroupTexts, is_merged: bool
) -> Source:
    """A built data set, whose groups were merged by their prompts or not."""
    prompts = table.prompts()
    members: Sequence[Sequence[int]] = [[group] for group in range(len(dataset))]
    if is_merged:
        members = list(table.by_prompt())
        prompts = prompts[[own[0] for own in members]]
    return Source(dataset=dataset, members=members, prompts=prompts, texts=texts)


def add_mismatches(
    sources: Sequence[Source],
    outputs: Sequence[Path],
    encoder: PathEncoder,
    options: BuildOptions,
    report: BuildReport,
) -> None:
    """Write each source with a mismatch in its groups to its output.

    `report` gets the numbers of groups with and without one, and the new manifests. Raises
    InputError if a data set would have none.
    """
    with ExitStack() as stack:
        writers = []
        for source, output in zip(sources, outputs, strict=True):
            settings = {"kto": True, "kto_seed": options.kto_seed}
            writer = stack.enter_context(
                DatasetWriter(
                    output,
                    source.dataset.manifest["tokenizer"],
                    {**source.dataset.manifest["options"], **settings},
                    source.dataset.images,
                )
            )
            with_mismatch = _write(source, writer, encoder, options)
            if not with_mismatch:
                raise InputError(
                    f"--kto: no group of {output} can have the response of another prompt: give "
                    "records with different prompts, or a larger --max-length or --holdout"
                )
            counts = report.mismatches
            counts["groups"] = counts.get("groups", 0) + with_mismatch
            counts["without"] = counts.get("without", 0) + len(source.dataset) - with_mismatch
            writers.append(writer)
        report.publish(writers)


def _write(
    source: Source, writer: DatasetWriter, encoder: PathEncoder, options: BuildOptions
) -> int:
    """Write all groups; returns how many have a mismatch."""
    count, with_mismatch = len(source.dataset), 0
    spans = [(start, min(start + GROUPS, count)) for start in range(0, count, GROUPS)]
    make = MismatchMaker(source, encoder, options)
    with closing(ordered(make, spans, options.workers)) as results:
        for _, block in results:
            writer.add_block(block)
            with_mismatch += int(block.columns["response_roles"].sum())
    return with_mismatch


class MismatchMaker:
    """Groups from `start` to `stop` -> a block of them with mismatches."""

    def __init__(self, source: Source, encoder: PathEncoder, options: BuildOptions) -> None:
        self._source, self._encoder, self._options = source, encoder, options
        count = len(source.dataset)
        seed = options.kto_seed
        self._order = np.random.default_rng([seed, count]).permutation(count)
        self._place = np.empty(count, np.int64)
        self._place[self._order] = np.arange(count)

    def __call__(self, span: tuple[int, int]) -> Block:
        data = self._source.dataset
        trees, roles, records = [], [], []
        for group in range(*span):
            tree = data[group]
            path = self._mismatch(group, tree)
            if path is not None:
                paths, pairs = tree_paths(tree)
                tree = rebuilt([*paths, path], pairs, [tree])
            trees.append(tree)
            roles += [0] * (tree.num_responses - (path is not None)) + [1] * (path is not None)
            records.append((int(data.group_records[group]), int(data.group_num_records[group])))
        block = Block.of_trees(trees, records, data.images)
        columns = {**block.columns, "response_roles": np.array(roles, np.int32)}
        return replace(block, columns=columns)

    def _mismatch(self, group: int, tree: PrefixTree) -> ResponsePath | None:
        """The mismatch of a group as a path, in a set of its own; None if no group has one."""
        own = self._source.texts[self._source.members[group][0]]
        for place, donor in self._donors(group):
            texts = [
                text
                for member in self._source.members[donor]
                for text in self._source.texts[member].responses
            ]
            path = self._path(own, tree, texts[place % len(texts)])
            most = self._options.max_length
            if path is not None and (most is None or len(path.tokens) <= most):
                return path
        return None

    def _donors(self, group: int) -> Iterator[tuple[int, int]]:
        """Groups with another prompt after this one in the order, with their places in it."""
        prompts, count = self._source.prompts, len(self._order)
        first, tried = int(self._place[group]), 0
        for step in range(1, count):
            place = (first + step) % count
            donor = int(self._order[place])
            if prompts[donor] != prompts[group]:
                yield place, donor
                tried += 1
            if tried == TRIES:
                return

    def _path(self, own: GroupText, tree: PrefixTree, response: Text) -> ResponsePath | None:
        """`response` after a group's prompt; None if it cannot follow it.

        The group's own first response is encoded too: if the build has cut its prompt, its tokens
        are no longer those of the tree, and the mismatch follows the tree's prompt.
        """
        if isinstance(response, str) != isinstance(own.prompt, str):
            return None
        example = Example(
            responses=tuple(
                ExampleResponse(prompt=own.prompt, response=text, set_id=i)
                for i, text in enumerate((own.responses[0], response))
            ),
            pairs=(),
            tools=own.tools,
            template_kwargs=own.template_kwargs,
        )
        try:
            first, path = self._encoder.trial(example, prompt_images(tree))
        except InputError:
            return None  # a call of a tool, for example, that only the other prompt has
        if not 0 < path.loss_start < len(path.tokens):
            return None
        tokens, loss_start = bare(tree).response_tokens(0)
        if not np.array_equal(tokens, first.tokens):
            path = replace(
                path,
                tokens=np.concatenate([tokens[:loss_start], path.tokens[path.loss_start :]]),
                loss_start=loss_start,
            )
        return replace(path, set_id=int(tree.response_sets.max()) + 1)
