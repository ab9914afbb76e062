"""Trees with images, stored and rebuilt: other images are other tokens, the same one is shared."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from data_sets import TOKENIZER

from megatron_prefix.data.images import PictureTable, StoredPicture
from megatron_prefix.data.rebuilding import bare, prompt_images, rebuilt, tree_paths
from megatron_prefix.data.store import Block, DatasetWriter, PreferenceDataset
from megatron_prefix.data.store.verify import verify_dataset
from megatron_prefix.data.tree import Pair, ResponsePath, merge_paths
from megatron_prefix.errors import InputError

PLACEHOLDER = 9
PICTURES = [
    StoredPicture(
        sha256=hashlib.sha256(content).digest(),
        width=3,
        height=2,
        num_tokens=count,
        grid=(0, 0, 0),
        among_several=False,
        source=content,
    )
    for content, count in ((b"first", 3), (b"second", 2))
]
TABLE = PictureTable(
    PLACEHOLDER,
    PICTURES,
    {
        "family": "llava",
        "kind": "K",
        "image_token_id": PLACEHOLDER,
        "settings": {},
        "fingerprint": "f" * 64,
    },
)
A, B = [-1] * 3, [-2] * 2


def written(prefix, *prompts):
    """A data set of one group: for each prompt two responses that are compared."""
    paths = [
        ResponsePath(tokens=np.array([*prompt, *own]), loss_start=len(prompt), set_id=i)
        for i, prompt in enumerate(prompts)
        for own in ([1, 2], [1, 3, 4])
    ]
    pairs = [Pair(chosen=2 * i, rejected=2 * i + 1) for i in range(len(prompts))]
    with DatasetWriter(prefix, TOKENIZER) as writer:
        writer.add_block(Block.of_paths([merge_paths(paths, pairs)], [0], TABLE))
        writer.finish()
    data = PreferenceDataset(prefix)
    verify_dataset(data)
    return data


def test_prompts_that_begin_with_other_images_are_two_roots(tmp_path):
    data = written(tmp_path / "set", [*A, 5], [*B, 5])
    tree = data[0]
    assert tree.parents.tolist() == [-1, 0, 1, 1, -1, 4, 5, 5]
    assert tree.images.ids.tolist() == [0, 1] and tree.images.lengths.tolist() == [3, 2]
    assert tree.node_tokens(0).tolist() == [9, 9, 9, 5]
    assert tree.node_tokens(4).tolist() == [9, 9, 5]


def test_a_prompt_that_goes_on_with_another_image_shares_what_is_before(tmp_path):
    data = written(tmp_path / "set", [*A, *A, 5], [*A, *B, 5])
    tree = data[0]
    assert tree.node_tokens(0).tolist() == [9, 9, 9]
    assert tree.images.ids.tolist() == [0, 0, 1] and tree.images.starts[:2].tolist() == [0, 3]
    assert [p.image for p in prompt_images(tree)] == [0, 0]
    assert data.images.described["tokens"] == 8 and data.images.described["bytes"] == 11


def test_paths_rebuild_the_same_tree(tmp_path):
    tree = written(tmp_path / "set", [*A, 5, *B], [*A, 5, *B, 6])[0]
    again = rebuilt(*tree_paths(tree), [tree])
    for name in ("tokens", "node_offsets", "parents", "response_first", "response_last"):
        assert np.array_equal(getattr(again, name), getattr(tree, name)), name
    for name in ("starts", "lengths", "ids", "grids"):
        assert np.array_equal(getattr(again.images, name), getattr(tree.images, name)), name
    assert bare(tree).tokens.min() == -2 and bare(bare(tree)).images is None


def test_two_processors_do_not_mix(tmp_path):
    other = TABLE._replace(processor={**TABLE.processor, "fingerprint": "0" * 64})
    path = ResponsePath(tokens=np.array([*A, 1, 2]), loss_start=4)
    with (
        pytest.raises(InputError, match="two image processors"),
        DatasetWriter(tmp_path / "set", TOKENIZER) as writer,
    ):
        for number, table in enumerate((TABLE, other)):
            writer.add_block(Block.of_paths([merge_paths([path], [])], [number], table))
    assert not [*tmp_path.iterdir()]
