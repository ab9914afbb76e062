"""Names and slices of the weight mapping, and safetensors directories, good and bad."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prefix.config import ModelConfig
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import names
from megatron_prefix.model.hf.files import HFTensors, copy_companions, write_safetensors
from megatron_prefix.model.hf.weights import WeightMap
from megatron_prefix.model.names import canonical_name, is_expert

VOCAB = 13
MIXTURES = [
    {"num_moe_experts": 3, "moe_ffn_hidden_size": 10, "qk_layernorm": x} for x in (False, True)
]
FUSED = "self_attention.linear_qkv.layer_norm_weight"


def weight_map(**parts) -> WeightMap:
    sizes = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 4}
    model = ModelConfig(**sizes, num_query_groups=2, kv_channels=6, **parts)
    return WeightMap(model.sizes(), VOCAB, model.kind)


def random_tensors(weights: WeightMap, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = weights.hf_shapes().items()
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes}


def reader(tensors: dict[str, torch.Tensor], seen: list | None = None):
    def read(name, rows, columns):
        part = tensors[name][rows] if tensors[name].dim() == 1 else tensors[name][rows, columns]
        if seen is not None:
            seen.append(part.numel())
        return part

    return read


def test_both_layer_namings_become_one():
    local = canonical_name("decoder.layers.0.input_layernorm.weight", 2)
    engine = canonical_name(f"decoder.layers.0.{FUSED}", 2)
    assert local == engine == "decoder.layers.2.input_layernorm.weight"
    assert canonical_name("decoder.layers.1.mlp.linear_fc1.layer_norm_weight") == (
        "decoder.layers.1.pre_mlp_layernorm.weight"
    )
    for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight"):
        assert canonical_name(name, 5) == name
    unchanged = "decoder.layers.3.self_attention.linear_qkv.bias"
    assert canonical_name(unchanged) == unchanged
    weights = weight_map()
    assert weights.checkpoint_key(engine) == (f"decoder.layers.{FUSED}", (2,), (2,))
    assert weights.checkpoint_key("output_layer.weight") == ("output_layer.weight", (), ())


def test_experts_have_their_numbers_among_all_ranks():
    local = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"
    grouped = "decoder.layers.0.mlp.experts.linear_fc2.weight1"
    name = "decoder.layers.1.mlp.experts.5.linear_fc2.weight"
    assert canonical_name(local, 1, 4) == canonical_name(grouped, 1, 4) == name
    assert is_expert(name) and not is_expert("decoder.layers.1.mlp.router.weight")
    weights = weight_map(num_moe_experts=6, moe_ffn_hidden_size=10)
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    assert weights.checkpoint_key(name) == (key, (1, 5), (2, 6))
    norm = "decoder.layers.0.pre_mlp_layernorm.weight"  # which no linear layer fuses, with experts
    assert weights.checkpoint_key(norm)[0] == "decoder.layers.pre_mlp_layernorm.weight"
    assert weights.shape(name) == (8, 10) and len(weights.names()) == 2 * (5 + 2 * 6) + 3


def test_the_two_mixtures_name_their_experts_differently():
    mixtral = weight_map(num_moe_experts=2, moe_ffn_hidden_size=10)
    mixtral = replace(mixtral, tensor_names=names.MIXTRAL)
    qwen = weight_map(num_moe_experts=2, moe_ffn_hidden_size=10, qk_layernorm=True)
    router = "decoder.layers.1.mlp.router.weight"
    fused = "decoder.layers.1.mlp.experts.0.linear_fc1.weight"
    prefix = "model.layers.1.block_sparse_moe"
    assert mixtral.hf_names(router) == (f"{prefix}.gate.weight",)
    assert mixtral.hf_names(fused) == tuple(f"{prefix}.experts.0.{w}.weight" for w in ("w1", "w3"))
    assert qwen.hf_names(router) == ("model.layers.1.mlp.gate.weight",)
    expert = "model.layers.1.mlp.experts.0"
    assert qwen.hf_names(fused) == (f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight")
    assert qwen.hf_shapes()[f"{expert}.down_proj.weight"] == (8, 10)
    assert mixtral.hf_shapes()[f"{prefix}.gate.weight"] == (2, 8)


def test_names_of_hugging_face():
    attention = "model.layers.1.self_attn"
    plain, full = weight_map(), weight_map(add_qkv_bias=True, qk_layernorm=True)
    assert full.hf_names("decoder.layers.1.self_attention.linear_qkv.bias") == (
        f"{attention}.q_proj.bias",
        f"{attention}.k_proj.bias",
        f"{attention}.v_proj.bias",
    )
    assert plain.hf_names("decoder.layers.1.pre_mlp_layernorm.weight") == (
        "model.layers.1.post_attention_layernorm.weight",
    )
    tied = weight_map(untie_embeddings_and_output_weights=False)
    assert len(plain.names()) == 2 * 6 + 3 and len(full.names()) == 2 * 9 + 3
    assert plain.names()[:-1] == tied.names()
    assert full.hf_shapes()[f"{attention}.k_proj.bias"] == (12,)
    assert full.hf_shapes()[f"{attention}.q_norm.weight"] == (6,)
    assert full.hf_shapes()[f"{attention}.o_proj.weight"] == (8, 24)


def test_heads_are_laid_group_after_group():
    weights = weight_map()
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    heads = {"q": ["q0", "q1", "q2", "q3"], "k": ["k0", "k1"], "v": ["v0", "v1"]}
    order = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    code = {head: i for i, head in enumerate(order)}
    tensors = {
        f"model.layers.0.self_attn.{x}_proj.weight": torch.tensor(
            [[float(code[head])] * 8 for head in names for _ in range(6)]
        )
        for x, names in heads.items()
    }
    fused = weights.read(name, reader(tensors))
    assert fused[:, 0].tolist() == [float(i) for i in range(8) for _ in range(6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [{}, {"add_qkv_bias": True, "qk_layernorm": True}, *MIXTURES])
def test_split_undoes_read(parts, dtype):
    weights = weight_map(**parts)
    tensors = random_tensors(weights, dtype)
    split = {}
    for name in weights.names():
        whole = weights.read(name, reader(tensors), padded_vocab_size=16)
        padded = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        assert tuple(whole.shape) == ((16, 8) if padded else weights.shape(name))
        split |= weights.split(name, whole)
    assert split.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert split[name].dtype == dtype and torch.equal(split[name], tensor), name


@pytest.mark.parametrize("parts", [{"add_qkv_bias": True}, *MIXTURES])
def test_two_ranks_own_the_whole_and_read_no_more(parts):
    weights = weight_map(**parts)
    tensors = random_tensors(weights)
    for name in weights.names():
        seen: list[int] = []
        whole = weights.read(name, reader(tensors), padded_vocab_size=16)
        a, b = (weights.read(name, reader(tensors, seen), rank, 2, 16) for rank in (0, 1))
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            assert torch.equal(torch.cat([a, b], 1), whole)
        elif name.endswith("linear_fc1.weight"):
            halves = [torch.cat(x) for x in zip(a.chunk(2), b.chunk(2), strict=True)]
            assert torch.equal(torch.cat(halves), whole)
        elif a.shape == whole.shape:
            assert (
                ("norm" in name or "router" in name) and torch.equal(a, b) and torch.equal(a, whole)
            )
            continue
        else:
            assert torch.equal(torch.cat([a, b]), whole)
        assert sum(seen) == sum(tensors[part].numel() for part in weights.hf_names(name)), name


def test_padding_is_zero_on_the_rank_that_has_it():
    weights = weight_map()
    tensors = random_tensors(weights)
    name = "output_layer.weight"
    parts = [weights.read(name, reader(tensors), rank, 4, 32) for rank in range(4)]
    assert [len(part) for part in parts] == [8] * 4
    assert torch.equal(torch.cat(parts)[:VOCAB], tensors["lm_head.weight"])
    assert not torch.cat(parts)[VOCAB:].any()


@pytest.fixture
def saved(tmp_path) -> tuple[Path, WeightMap, dict[str, torch.Tensor]]:
    weights = weight_map()
    tensors = random_tensors(weights)
    entries = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    write_safetensors(tmp_path, entries, tensors.items(), 1500)
    return tmp_path, weights, tensors


def test_what_is_written_is_read_by_safetensors(saved):
    directory, weights, tensors = saved
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    theirs = {k: v for f in files for k, v in load_file(f).items()}
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], x) for name, x in tensors.items())
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for file in files:
        assert sum(x.nbytes for x in load_file(file).values()) <= 1500
        assert set(load_file(file)) == {k for k, f in index["weight_map"].items() if f == file.name}
    ours = HFTensors(directory)
    ours.match(weights.hf_shapes())
    for name, x in tensors.items():
        assert torch.equal(ours.read(name), x)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(ours.read(name, slice(2, 5), slice(1, 4)), tensors[name][2:5, 1:4])


def test_one_file_needs_no_index(tmp_path):
    tensors = {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.ones(3)}
    entries = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    assert write_safetensors(tmp_path, entries, tensors.items(), 10**9) == ["model.safetensors"]
    written = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(written[k], x) and written[k].dtype == x.dtype for k, x in tensors.items()
    )


def refusal(directory: Path, weights: WeightMap) -> str:
    with pytest.raises(InputError) as caught:
        HFTensors(directory).match(weights.hf_shapes())
    return str(caught.value)


def one_file(tmp_path: Path, tensors: dict) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_wrong_tensors_are_named(tmp_path):
    weights = weight_map()
    tensors = random_tensors(weights)
    name = "model.layers.1.mlp.down_proj.weight"
    less = {k: x for k, x in tensors.items() if k != name}
    message = refusal(one_file(tmp_path, less), weights)
    assert name in message and "missing" in message
    message = refusal(one_file(tmp_path, {**tensors, name: tensors[name].T.contiguous()}), weights)
    assert name in message and "[12, 8]" in message and "[8, 12]" in message
    assert "model.safetensors" in message
    message = refusal(one_file(tmp_path, {**tensors, "score.weight": torch.ones(2)}), weights)
    assert "score.weight" in message and "no place" in message
    message = refusal(one_file(tmp_path, {**tensors, name: tensors[name].to(torch.int8)}), weights)
    assert name in message and "I8" in message


def test_what_nothing_needs_may_be_there(tmp_path):
    weights = weight_map(untie_embeddings_and_output_weights=False)
    tensors = random_tensors(weights)
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    HFTensors(one_file(tmp_path, {**tensors, **more})).match(weights.hf_shapes(), is_tied=True)


def test_damaged_files_are_named(saved):
    directory, weights, _ = saved
    file = sorted(directory.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    for damaged in (
        b"",
        whole[:5],
        whole[:-1],
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"]" * len(whole[8:]),
        whole.replace(b"[0,", b"[9,", 1),
    ):
        file.write_bytes(damaged)
        assert file.name in refusal(directory, weights)
    file.unlink()
    assert file.name in refusal(directory, weights)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_damaged_indices_are_named(saved, text):
    directory, weights, _ = saved
    (directory / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(directory, weights)


def test_an_index_reads_no_file_elsewhere(saved):
    directory, weights, _ = saved
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    content["weight_map"][name] = f"../{directory.name}/{file}"
    index.write_text(json.dumps(content))
    assert name in refusal(directory, weights)
    content["weight_map"][name] = file
    content["weight_map"]["not.there"] = file
    index.write_text(json.dumps(content))
    message = refusal(directory, weights)
    assert "not.there" in message and file in message


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    message = refusal(tmp_path, weight_map())
    assert "pytorch_model.bin" in message and "save_pretrained" in message


def test_neither_code_nor_weights_are_copied(tmp_path):
    source, target = tmp_path / "from", tmp_path / "to"
    (source / "additional_chat_templates").mkdir(parents=True)
    kept = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat.jinja"]
    left = ["modeling.py", "model.safetensors", "x.bin", "model.safetensors.index.json", "o.pt"]
    for name in (*kept, *left, "additional_chat_templates/tool.jinja"):
        (source / name).write_text(name)
    copied = copy_companions(source, target)
    assert sorted(copied) == sorted([*kept, "additional_chat_templates/tool.jinja"])
    files = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert files == set(copied)
