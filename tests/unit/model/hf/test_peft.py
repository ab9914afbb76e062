"""Adapters in PEFT's form: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.peft import PeftAdapter, peft_name

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "target_modules": ["v_proj", "q_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_dora": False,
    "rank_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
}
A = "decoder.layers.0.self_attention.linear_qkv.adapters.q_proj.lora_A"


def write(directory: Path, tensors: dict | None = None, **settings) -> PeftAdapter:
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **settings}))
    if tensors is not None:
        save_file(tensors, directory / "adapter_model.safetensors")
    return PeftAdapter.read(directory)


def test_settings_are_those_of_the_file(tmp_path):
    adapter = write(tmp_path, use_rslora=True, layers_to_transform=1)
    lora = adapter.lora
    assert (lora.r, lora.lora_alpha, lora.use_rslora) == (4, 8.0, True)
    assert set(lora.target_modules) == {"q_proj", "v_proj"} and lora.layers_to_transform == (1,)
    assert lora.modules_to_save is None and adapter.dropout == 0.05
    saved = write(tmp_path, modules_to_save=["lm_head", "score"]).lora.modules_to_save
    assert saved == ("lm_head",)


def test_names_of_single_modules_are_targets_and_layers(tmp_path):
    names = [f"model.layers.{i}.{x}" for i in (0, 2) for x in ("self_attn.q_proj", "mlp.up_proj")]
    lora = write(tmp_path, target_modules=names).lora
    assert set(lora.target_modules) == {"q_proj", "up_proj"}
    assert lora.layers_to_transform == (0, 2)
    assert lora.resolved(False, 3).layers_to_transform == (0, 2)
    both = write(tmp_path, target_modules=["model.layers.1.mlp.up_proj", names[1]])
    assert both.lora.resolved(False, 2).layers_to_transform is None
    with pytest.raises(InputError, match="all layers with adapters must have the same ones"):
        write(tmp_path, target_modules=names[:3])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("bias", "all"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [1]),
        ("layers_pattern", ["h"]),
        ("a_key_of_the_future", 1),
        ("target_modules", ".*_proj"),
        ("target_modules", ["c_attn"]),
        ("modules_to_save", ["norm"]),
        ("modules_to_save", 5),
        ("modules_to_save", "lm_head"),
        ("lora_dropout", [0.1]),
        ("lora_dropout", "0.1"),
        ("lora_dropout", 1.0),
        ("lora_dropout", float("nan")),
        ("task_type", "SEQ_2_SEQ_LM"),
        ("task_type", ["CAUSAL_LM"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(key, value, tmp_path):
    with pytest.raises(InputError, match=key):
        write(tmp_path, **{key: value})


def test_names_are_those_of_peft():
    prefix = "base_model.model."
    names = {
        A: "model.layers.0.self_attn.q_proj.lora_A.weight",
        "decoder.layers.3.mlp.linear_fc2.adapters.down_proj.lora_B": (
            "model.layers.3.mlp.down_proj.lora_B.weight"
        ),
        "saved_modules.embed_tokens.word_embeddings.weight": "model.embed_tokens.weight",
        "saved_modules.lm_head.weight": "lm_head.weight",
        "score.weight": "score.weight",
    }
    assert {name: peft_name(name) for name in names} == {k: prefix + x for k, x in names.items()}
    with pytest.raises(InputError, match="adapter of an expert"):
        peft_name("decoder.layers.0.mlp.experts.1.linear_fc2.adapters.down_proj.lora_B")


def test_tensors_must_be_those_of_the_model(tmp_path):
    adapter = write(tmp_path, {peft_name(A): torch.arange(32.0).view(4, 8)})
    adapter.check({A: (4, 8), "score.weight": (1, 8)})  # a reward head may be missing
    with pytest.raises(InputError, match=r"has shape \[4, 8\], the model asks for \[4, 16\]"):
        adapter.check({A: (4, 16)})
    with pytest.raises(InputError, match="lora_B.weight is missing"):
        adapter.check({A: (4, 8), A.replace("lora_A", "lora_B"): (8, 4)})
    with pytest.raises(InputError, match="q_proj.lora_A.weight has no place"):
        adapter.check({})


def test_a_rank_reads_its_part(tmp_path):
    whole = torch.arange(30.0).view(5, 6)
    adapter = write(tmp_path, {peft_name(A): whole})
    assert torch.equal(adapter.part(A, None, 1, 2, 0), whole)
    assert torch.equal(adapter.part(A, 1, 1, 2, 3), whole[:, 3:])
    # a vocabulary of 5 tokens over two ranks of 4: the second has one
    assert torch.equal(adapter.part(A, 0, 1, 2, 4), whole[4:])
    assert adapter.part("score.weight", None, 0, 1, 0) is None


def test_pickles_are_not_read(tmp_path):
    adapter = write(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="there is no adapter_model.safetensors"):
        adapter.check({})
