"""Directories of models that read images: their keys, and the names of their tensors."""

from __future__ import annotations

import json

import pytest
import torch
from image_models import FAMILIES, hf_model, save
from safetensors.torch import load_file, save_file

from megatron_prefix.checkpoint.convert import export_hf, import_hf
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import HFModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save(hf_model(family), root / family.replace(" ", "-")) for family in FAMILIES}


def changed(folder, target, **keys):
    """A copy of a directory with other keys of config.json; None removes one."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for key, value in keys.items():
        *outer, last = key.split("__")
        section = config[outer[0]] if outer else config
        section[last] = value
        if value is None:
            del section[last]
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_models_have_the_files_of_save_pretrained(folders, tmp_path, family):
    import_hf(str(folders[family]), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    before = load_file(folders[family] / "model.safetensors")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    assert (tmp_path / "hf/config.json").read_text() == (
        folders[family] / "config.json"
    ).read_text()


NEWER = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
    "visual.": "model.visual.",
}


@pytest.mark.parametrize("naming", ["newer", "inner tower"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_other_versions_are_read(folders, tmp_path, family, naming):
    folder = changed(folders[family], tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")

    def other(name):
        if naming == "inner tower":
            return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if family == "qwen2_5_vl" and name.startswith("model."):
            return name.replace("model.", "model.language_model.", 1)
        for start, new in NEWER.items():
            if name.startswith(start):
                return name.replace(start, new, 1)
        return name

    save_file({other(name): x for name, x in tensors.items()}, folder / "model.safetensors")
    import_hf(str(folder), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors.items())


def test_a_tensor_under_two_names_is_refused(folders, tmp_path):
    folder = changed(folders["llava"], tmp_path / "two")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.vision_tower.pre_layrnorm.bias"] = tensors["vision_tower.pre_layrnorm.bias"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="the same one under names of two versions"):
        import_hf(str(folder), tmp_path / "checkpoint")


def test_flat_files_of_qwen_are_read(folders, tmp_path):
    """As the Hub has them: keys of the text model beside `vision_config`, rope type mrope."""
    config = json.loads((folders["qwen2_5_vl"] / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {
        **text,
        **config,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    folder = changed(folders["qwen2_5_vl"], tmp_path / "flat")
    (folder / "config.json").write_text(json.dumps(flat))
    assert HFModel.read(folder).sizes == HFModel.read(folders["qwen2_5_vl"]).sizes
    assert HFModel.read(folder).sizes.architecture.rotary_sections == (1, 1, 2)


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llava", {"text_config__model_type": "phi3"}, "text_config.model_type = 'phi3'"),
        ("llava", {"vision_config__model_type": "dinov2"}, "vision_config.model_type = 'dinov2'"),
        ("llava", {"hidden_size": 99}, "hidden_size = 99 is a key of model_type llava"),
        ("llava", {"text_config__odd": 1}, "odd = 1 is a key of model_type llama"),
        ("llava", {"text_config": [1]}, "text_config is"),
        ("llava_onevision", {"use_image_newline_parameter": False}, "use_image_newline_parameter"),
        (
            "qwen2_5_vl",
            {"text_config__rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1, 1]}},
            "mrope_section = \\[1, 1, 1\\] has 3 pairs",
        ),
        (
            "qwen2_5_vl",
            {"text_config__rope_parameters": {"rope_theta": 1e4, "mrope_section": 4}},
            "mrope_section is 4",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(folders, tmp_path, family, keys, message):
    folder = changed(folders[family], tmp_path / "other", **keys)
    with pytest.raises(InputError, match=message):
        _ = HFModel.read(folder).sizes


def test_keys_of_the_text_model_may_be_repeated(folders, tmp_path):
    sizes = HFModel.read(folders["llava"]).sizes
    folder = changed(folders["llava"], tmp_path / "other", hidden_size=sizes.hidden_size)
    assert HFModel.read(folder).sizes == sizes


def test_a_text_part_alone_is_no_model(folders, tmp_path):
    config = json.loads((folders["qwen2_5_vl"] / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="model_type 'qwen2_5_vl_text' is not supported"):
        _ = HFModel.read(tmp_path).family
