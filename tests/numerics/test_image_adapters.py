"""Adapters of the language model of models that read images, against PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from image_models import GROUPS, RandomPictures, alone_logps, hf_model, image_row, save
from safetensors.torch import load_file, save_file

from megatron_prefix.checkpoint.convert import export_hf, import_hf
from megatron_prefix.checkpoint.starting_adapter import open_adapter
from megatron_prefix.checkpoint.starting_model import StartingModel
from megatron_prefix.config import ModelConfig
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.engine import build_model
from megatron_prefix.engine.batch import to_device
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import HFModel
from megatron_prefix.model.logps import response_logps

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
PATTERN = r".*\.language_model\..*\.(?:q_proj|v_proj|down_proj)"
LAYERS = r".*\.language_model\.layers\.(?:1)\..*\.(?:q_proj|v_proj|down_proj)"


def adapter(base, folder, targets=PATTERN, seed=3):
    """A random adapter, saved by PEFT; the model with it."""
    model = hf_model(base).float()
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("targets", [PATTERN, LAYERS])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_adapters_of_peft_go_in_and_out(world, tmp_path, family, targets):
    """The same log-probabilities, the same files after import and export, and the same model after
    a merge."""
    base = save(hf_model(family), tmp_path / "base")
    adapted = adapter(family, tmp_path / "peft", targets)
    pictures = RandomPictures.make(family, 4)
    with torch.no_grad():
        lengths = pictures.num_tokens(adapted.base_model.model)
        expected = alone_logps(adapted, GROUPS, pictures, lengths)

    source, section = HFModel.read(base), LoraConfig(adapter=str(tmp_path / "peft"))
    lora, own = StartingModel.resolve_lora(section, source.sizes, "lm", source)
    starting = StartingModel(
        config=ModelConfig(hf=str(base)),
        sizes=source.sizes,
        vocab_size=source.vocab_size,
        source=source,
        longest=64,
        lora=lora,
        adapter=own,
        reads_images=True,
    )
    chunks = build_model(starting.transformer_config(seed=1), world)
    starting.load(chunks)
    trained = [name for name, x in chunks[0].named_parameters() if x.requires_grad]
    assert trained
    assert all(".adapters." in name for name in trained)
    row = to_device(image_row(GROUPS, pictures, lengths), world.device, pictures=pictures)
    with torch.no_grad():
        values = chunks[0](row.tokens, None, None, **row.model_inputs)
    ours = response_logps(values, row.response_order, row.response_offsets)
    assert float((ours - expected).abs().max()) < 2e-4

    import_hf(str(tmp_path / "peft"), tmp_path / "checkpoint", str(base))
    export_hf(tmp_path / "checkpoint", tmp_path / "again")
    before = load_file(tmp_path / "peft/adapter_model.safetensors")
    after = load_file(tmp_path / "again/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    settings = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert settings["target_modules"] == targets
    again = peft.PeftModel.from_pretrained(hf_model(family).float(), tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(alone_logps(again.eval(), GROUPS, pictures, lengths), expected)

    export_hf(tmp_path / "checkpoint", tmp_path / "merged", merge=True)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    ours_merged = load_file(tmp_path / "merged/model.safetensors")
    for name, x in load_file(tmp_path / "theirs/model.safetensors").items():
        assert float((ours_merged.pop(name) - x).abs().max()) < 1e-6, name
    assert not ours_merged


def test_adapters_of_the_tower_are_refused(tmp_path):
    """A list of targets adapts layers of the tower that have the same names."""
    base = save(hf_model("llava"), tmp_path / "base")
    adapter("llava", tmp_path / "peft", ["q_proj", "v_proj"])
    with pytest.raises(InputError, match="vision_tower.* has no place in the adapters"):
        import_hf(str(tmp_path / "peft"), tmp_path / "checkpoint", str(base))


def test_names_of_older_versions_are_read(tmp_path):
    base = save(hf_model("llava"), tmp_path / "base")
    adapter("llava", tmp_path / "peft")
    file = tmp_path / "peft/adapter_model.safetensors"
    tensors = load_file(file)
    start, older = (
        "base_model.model.model.language_model.",
        "base_model.model.language_model.model.",
    )
    assert all(name.startswith(start) for name in tensors)
    save_file({name.replace(start, older): x for name, x in tensors.items()}, file)
    import_hf(str(tmp_path / "peft"), tmp_path / "checkpoint", str(base))
    export_hf(tmp_path / "checkpoint", tmp_path / "again")
    after = load_file(tmp_path / "again/adapter_model.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in tensors.items())
    assert open_adapter(str(tmp_path / "again")).lora.target_modules == (
        "q_proj",
        "v_proj",
        "down_proj",
    )
