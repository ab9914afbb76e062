"""Hugging Face -> checkpoint -> Hugging Face gives the same tensors, or writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prefix.checkpoint import export_hf, import_hf, resolve_checkpoint
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import HFModel, WeightMap

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
ALL_BYTES = 10**9


def write_model(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A model of random weights; files beside it that an export keeps, and one that it does not."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("")
    model = HFModel.read(folder)
    shapes = WeightMap(model.sizes, model.vocab_size, model.kind).hf_shapes()
    generator = torch.Generator().manual_seed(0)
    tensors = {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [False, True])
def test_there_and_back(tmp_path, dtype, is_tied):
    source = write_model(tmp_path / "hf", dtype, tie_word_embeddings=is_tied)
    imported = import_hf(str(source), tmp_path / "saved")
    assert resolve_checkpoint(tmp_path / "saved") == tmp_path / "saved", "it is complete"
    exported = export_hf(tmp_path / "saved", tmp_path / "back", ALL_BYTES)
    before, after = (load_file(x / "model.safetensors") for x in (source, tmp_path / "back"))
    assert before.keys() == after.keys() and ("lm_head.weight" in after) != is_tied
    for name, tensor in before.items():
        assert after[name].dtype == dtype and torch.equal(after[name], tensor), name
    num_bytes = sum(x.numel() * x.itemsize for x in before.values())
    for converted in (imported, exported):
        assert (converted.num_tensors, converted.num_bytes) == (len(before), num_bytes)
        assert converted.dtypes == (str(dtype).removeprefix("torch."),)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == CONFIG | {"tie_word_embeddings": is_tied, "dtype": exported.dtypes[0]}
    names = sorted(path.name for path in (tmp_path / "back").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]


def test_shards_of_a_bounded_size(tmp_path):
    import_hf(str(write_model(tmp_path / "hf")), tmp_path / "saved")
    export_hf(tmp_path / "saved", tmp_path / "back", 4000)
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and set(index["weight_map"].values()) == {x.name for x in shards}


def nothing_new(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_an_output_that_exists_is_refused(tmp_path):
    source = write_model(tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InputError, match="--output .*full exists already"):
        import_hf(str(source), tmp_path / "full")
    (tmp_path / "empty").mkdir()
    import_hf(str(source), tmp_path / "empty")
    with pytest.raises(InputError, match="--hf .*full exists already"):
        export_hf(tmp_path / "empty", tmp_path / "full", ALL_BYTES)
    assert nothing_new(tmp_path, "hf", "full", "empty")


def test_tensors_that_are_joined_have_one_precision(tmp_path):
    source = write_model(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match="are joined with it in .* save the model in one precis"):
        import_hf(str(source), tmp_path / "saved")
    assert nothing_new(tmp_path, "hf")


def test_a_missing_tensor_or_config_is_refused(tmp_path):
    source = write_model(tmp_path / "hf")
    import_hf(str(source), tmp_path / "saved")
    (tmp_path / "saved" / "checksums.json").unlink()
    config = tmp_path / "saved" / "hf" / "config.json"
    for changes in ({"num_hidden_layers": 3}, {"intermediate_size": 25}):
        config.write_text(json.dumps(CONFIG | changes))
        with pytest.raises(InputError, match="has shape .* put the config.json|there is no tensor"):
            export_hf(tmp_path / "saved", tmp_path / "back", ALL_BYTES)
    config.unlink()
    with pytest.raises(InputError, match="config.json is missing, so the model's architecture"):
        export_hf(tmp_path / "saved", tmp_path / "back", ALL_BYTES)
    assert nothing_new(tmp_path, "hf", "saved")
