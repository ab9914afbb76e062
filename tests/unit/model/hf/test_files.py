"""One set of weights, under the names and with the head that transformers would find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_hf_weights import random_tensors, weight_map

from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.files import HFTensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def weights():
    return weight_map()


@pytest.fixture
def tensors(weights):
    return random_tensors(weights)


def shard(folder: Path, tensors: dict, names: list[str] | None = None) -> None:
    """Two shards and their index."""
    names = names or ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    keys = sorted(tensors)
    placed = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        save_file({k: tensors[k] for k in keys if placed[k] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))


def refusal(folder: Path, weights, is_tied: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        HFTensors(folder).match(weights.hf_shapes(), is_tied)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_shards_are_read(tmp_path, weights, tensors):
    shard(tmp_path, tensors)
    stored_tensors = HFTensors(tmp_path)
    stored_tensors.match(weights.hf_shapes())
    assert all(torch.equal(stored_tensors.read(name), tensor) for name, tensor in tensors.items())


def test_one_file_beside_an_index_is_refused(tmp_path, weights, tensors):
    """transformers reads the one file, whichever is newer."""
    shard(tmp_path, tensors)
    save_file({k: x + 1 for k, x in tensors.items()}, tmp_path / SINGLE)
    message = refusal(tmp_path, weights)
    assert "two sets of weights" in message and INDEX in message and f"{SINGLE}:" in message


@pytest.mark.parametrize("other", ["model.fp16.safetensors", "model-00001-of-00003.safetensors"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_files_of_another_set_are_refused(tmp_path, weights, tensors, other, is_sharded):
    if is_sharded:
        shard(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / SINGLE)
    save_file({"x": torch.ones(1)}, tmp_path / other)
    message = refusal(tmp_path, weights)
    assert other in message and (INDEX if is_sharded else SINGLE) in message


def test_mistrals_own_format_is_ignored(tmp_path, weights, tensors):
    save_file(tensors, tmp_path / SINGLE)
    save_file({"x": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    HFTensors(tmp_path).match(weights.hf_shapes())


def test_an_index_that_is_older_than_its_files_is_refused(tmp_path, weights, tensors):
    shard(tmp_path, tensors)
    index = json.loads((tmp_path / INDEX).read_text())
    name = sorted(tensors)[0]
    del index["weight_map"][name]
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = refusal(tmp_path, weights)
    assert f"tensor {name} is there" in message and INDEX in message


def test_a_tensor_in_two_files_is_refused(tmp_path, weights, tensors):
    shard(tmp_path, tensors)
    first, second = sorted(tensors)[:2]
    more = {first: tensors[first], **{k: tensors[k] for k in sorted(tensors)[1::2]}}
    save_file(more, tmp_path / "model-00002-of-00002.safetensors")
    assert f"tensor {first} is there" in refusal(tmp_path, weights) and second in more


def test_an_adapter_beside_weights_is_refused(tmp_path, weights, tensors):
    save_file(tensors, tmp_path / SINGLE)
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    message = refusal(tmp_path, weights)
    assert f"adapter_model.safetensors beside the weights {SINGLE}" in message


@pytest.mark.parametrize("parts", [{}, {"num_moe_experts": 2, "moe_ffn_hidden_size": 10}])
def test_names_may_lack_the_prefix(tmp_path, parts):
    weights = weight_map(**parts)
    tensors = random_tensors(weights)
    save_file({k.removeprefix("model."): x for k, x in tensors.items()}, tmp_path / SINGLE)
    stored_tensors = HFTensors(tmp_path)
    stored_tensors.match(weights.hf_shapes())
    assert stored_tensors.shapes.keys() == stored_tensors.dtypes.keys() == tensors.keys()
    assert all(torch.equal(stored_tensors.read(name), tensor) for name, tensor in tensors.items())


def test_a_name_with_and_without_the_prefix_is_refused(tmp_path, weights, tensors):
    more = {"norm.weight": tensors["model.norm.weight"] + 1}
    save_file({**tensors, **more}, tmp_path / SINGLE)
    assert "tensor norm.weight has no place" in refusal(tmp_path, weights)


def test_tied_embeddings_may_be_stored_as_the_head(tmp_path):
    weights = weight_map(untie_embeddings_and_output_weights=False)
    tensors = random_tensors(weights)
    stored = {HEAD if k == EMBEDDING else k: x for k, x in tensors.items()}
    save_file(stored, tmp_path / SINGLE)
    stored_tensors = HFTensors(tmp_path)
    stored_tensors.match(weights.hf_shapes(), is_tied=True)
    assert torch.equal(stored_tensors.read(EMBEDDING, slice(2, 5)), tensors[EMBEDDING][2:5])
    assert "embed_tokens.weight is missing" in refusal(tmp_path, weights, is_tied=False)


def test_a_tied_head_must_equal_the_embedding(tmp_path):
    weights = weight_map(untie_embeddings_and_output_weights=False)
    tensors = random_tensors(weights)
    head = tensors[EMBEDDING].clone()
    save_file({**tensors, HEAD: head}, tmp_path / SINGLE)
    HFTensors(tmp_path).match(weights.hf_shapes(), is_tied=True)
    head[-1, -1] += 1e-3
    for other in (head, head[:-1].clone()):
        save_file({**tensors, HEAD: other}, tmp_path / SINGLE)
        message = refusal(tmp_path, weights, is_tied=True)
        assert HEAD in message and EMBEDDING in message and "tie_word_embeddings" in message


def test_many_rows_are_compared_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prefix.model.hf.files._ROWS_COMPARED", 3)
    test_a_tied_head_must_equal_the_embedding(tmp_path)


def test_a_classifier_without_architectures_is_told_to_name_them(tmp_path, weights, tensors):
    save_file({**tensors, "score.weight": torch.ones(1, 8)}, tmp_path / SINGLE)
    message = refusal(tmp_path, weights)
    assert "score.weight" in message and '"architectures"' in message
