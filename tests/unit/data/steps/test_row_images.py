"""Where the images of a row are, and how often each is encoded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import vision

from megatron_prefix.data import PreferenceDataset
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.steps import Sampler, group_rows
from megatron_prefix.data.steps.alone import AloneSteps
from megatron_prefix.data.steps.collate import RowItem, collate_packed
from megatron_prefix.data.steps.compositions import GroupBatches
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.store import join_datasets
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree
from megatron_prefix.data.tree_images import Placed, TreeImages, place

PLACEHOLDER = 99


def tree_of(tokens, responses, images):
    """A group with a prompt of bare tokens; its first response is paired with each other one."""
    paths = [
        ResponsePath(tokens=np.array([*tokens, *response]), loss_start=len(tokens))
        for response in responses
    ]
    pairs = [Pair(chosen=0, rejected=i) for i in range(1, len(paths))]
    tree = build_tree(paths, pairs)
    stored, placed = place(tree.tokens, PLACEHOLDER, images)
    return tree.__class__(**{**vars(tree), "tokens": stored, "images": placed})


IMAGES = {7: Placed(7, 4, (1, 2, 2)), 9: Placed(9, 2, (1, 1, 2))}
SEVEN, NINE = [-8] * 4, [-10] * 2
FIRST = tree_of([1, *SEVEN, 2, *NINE, 3, *SEVEN], [[4], [5, 6]], IMAGES)
SECOND = tree_of([*SEVEN, 1], [[4], [5]], IMAGES)


def row(sharing, *trees):
    items = [
        RowItem(group=group, view=view(tree, sharing, 0), pair_weights=np.ones(1))
        for group, tree in enumerate(trees)
    ]
    return collate_packed(items, 8)


def test_the_example_of_the_module():
    images = row("tree", FIRST, SECOND).images
    assert images.starts.tolist() == [1, 6, 9, 16]
    assert images.lengths.tolist() == [4, 2, 4, 4]
    assert images.ids.tolist() == [7, 9, 7, 7]
    assert images.encoded.tolist() == [0, 1, 0, 2] and images.num_encoded == 3
    assert images.encoded_ids.tolist() == [7, 9, 7]
    assert images.grids.tolist() == [[1, 2, 2], [1, 1, 2], [1, 2, 2], [1, 2, 2]]


@pytest.mark.parametrize(
    ("sharing", "encoded"),
    [
        ("tree", [0, 1, 0, 2]),
        ("pair", [0, 1, 0, 2]),
        ("response", [0, 1, 0, 2, 3, 2, 4, 5]),
        ("none", [0, 1, 0, 2, 3, 2, 4, 5]),
    ],
)
def test_an_image_is_encoded_once_for_responses_that_share_it(sharing, encoded):
    images = row(sharing, FIRST, SECOND).images
    assert images.encoded.tolist() == encoded
    assert images.encoded_ids[images.encoded].tolist() == images.ids.tolist()


def test_parts_of_a_tree_keep_their_images():
    part = FIRST.restrict([1])
    assert part.images.starts.tolist() == [1, 6, 9] and len(part.tokens) == 15
    other = tree_of([1], [[2], [3]], {})
    assert isinstance(other.images, TreeImages) and len(other.images) == 0
    batch = row("none", other, FIRST)
    assert batch.images.starts.tolist() == [5, 10, 13, 19, 24, 27]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    directory = vision.make(folder / "model", "qwen2_5_vl")
    lines = []
    for i in range(24):
        names = [f"{i % 5}.png", "0.png", f"{i % 5}.png"][: (1, 0, 2, 3)[i % 4]]
        vision.picture(30 + 20 * (i % 5), 80, i % 5).save(folder / f"{i % 5}.png")
        parts = [part for _ in names for part in ({"type": "image"}, {"type": "text", "text": "a"})]
        prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": "?" * (i % 3)}]}]
        answers = [[{"role": "assistant", "content": f"{side} {i}"}] for side in "xy"]
        record = {"images": names, "prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        lines.append(json.dumps(record) + "\n")
    (folder / "in.jsonl").write_text("".join(lines))
    options = BuildOptions(merge_prompts=True)
    build_dataset([folder / "in.jsonl"], str(directory), folder / "out", options)
    return folder / "out"


def check(batch, dataset, per_sequence=False):
    """A row's images against its tokens: every placeholder is part of one, and of the right one."""
    images, token = batch.images, dataset.images.processor["image_token_id"]
    is_image = np.zeros(len(batch.tokens), bool)
    for start, length, image in zip(images.starts, images.lengths, images.ids, strict=True):
        assert length == dataset.images.num_tokens[image]
        assert not is_image[start : start + length].any()
        is_image[start : start + length] = True
    assert np.array_equal(is_image, batch.tokens == token)
    assert (np.diff(images.starts) > 0).all()
    assert np.array_equal(images.grids, dataset.images.grids[images.ids])
    assert np.array_equal(images.encoded_ids[images.encoded], images.ids)
    assert np.array_equal(np.unique(images.encoded), np.arange(images.num_encoded))
    # An encoding serves one root of the row, or with shared prompts one tree.
    roots = np.flatnonzero(batch.layout.parents < 0)
    segment = np.searchsorted(batch.layout.starts, images.starts, "right") - 1
    root = np.searchsorted(roots, segment, "right") - 1
    assert len({*zip(root.tolist(), images.ids.tolist(), strict=True)}) == images.num_encoded


@pytest.mark.parametrize("sharing", ["tree", "pair", "response", "none"])
@pytest.mark.parametrize(
    "layout",
    [{"row_capacity": 200}, {"micro_batch_size": 4}, {"row_capacity": 110, "oversized": "split"}],
)
def test_rows_of_steps(prefix, sharing, layout):
    dataset = PreferenceDataset(prefix)
    composition = GroupBatches(len(dataset), 3, dataset.fingerprint, 0)
    sampler = Sampler(
        dataset=dataset, composition=composition, sharing=sharing, num_ranks=2, **layout
    )
    seen = 0
    for step in map(sampler.step, range(3)):
        for rank in range(2):
            for batch in sampler.micro_batches(step, rank):
                check(batch, dataset)
                seen += len(batch.images.starts)
    assert seen > 10


def test_rows_of_responses_alone_and_of_groups(prefix):
    dataset = PreferenceDataset(prefix)
    composition = GroupBatches(len(dataset), 3, dataset.fingerprint, 0)
    sampler = Sampler(dataset=dataset, composition=composition, row_capacity=300, num_ranks=2)
    steps = AloneSteps(sampler=sampler)
    for rank in range(2):
        for batch in steps.micro_batches(steps.step(0), rank):
            check(batch, dataset)
    for group in range(len(dataset)):
        for batch in (*group_rows(dataset, group), *group_rows(dataset, group, "none")):
            assert batch.images is not None
            check(batch, dataset)


def test_rows_of_joined_data_sets_have_the_images_of_their_part(prefix):
    one = PreferenceDataset(prefix)
    both = join_datasets([one, one])
    for group in range(len(one)):
        (first,), (second,) = group_rows(both, group), group_rows(both, len(one) + group)
        assert np.array_equal(first.images.ids + len(one.images), second.images.ids)
        check(second, both)
        for image in second.images.ids:
            assert both.images.bytes(image) == one.images.bytes(image - len(one.images))
