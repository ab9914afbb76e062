"""The model that a run starts from: its sizes fit, or the setting to change is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, tiny_config, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_prefix.checkpoint import hf_folder, resolve_starting_model
from megatron_prefix.config import ModelConfig
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.testing import write_random_set

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PreferenceDataset:
    return PreferenceDataset(write_random_set(tmp_path_factory.mktemp("start") / "set", 0, 5))


def hf_directory(folder: Path, **changes) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(folder)


def checkpoint(folder: Path, **changes) -> str:
    """A checkpoint as far as its description goes."""
    folder.mkdir()
    (folder / "metadata.json").write_text("{}")
    hf_directory(folder / "hf", **changes)
    return str(folder)


def test_a_model_from_sizes_has_the_data_sets_vocabulary(dataset):
    initial = resolve_starting_model(ModelConfig(**SIZES), [dataset])
    assert (initial.source, initial.draws_head, initial.note(1)) == (None, False, None)
    assert initial.vocab_size == dataset.vocab_size
    assert initial.longest == dataset.response_lengths.max()
    assert initial.transformer_config(7).init_seed == 7


def test_a_hugging_face_directory_gives_sizes_and_vocabulary(dataset, tmp_path):
    hf = hf_directory(tmp_path / "hf")
    initial = resolve_starting_model(ModelConfig(hf=hf), [dataset])
    assert (initial.sizes.num_layers, initial.vocab_size) == (2, 300)
    assert initial.transformer_config(7).init_seed is None, "nothing is drawn"


def test_a_token_that_the_model_does_not_have_is_refused(dataset, tmp_path):
    highest = int(dataset.tokens.max())
    enough = hf_directory(tmp_path / "enough", vocab_size=highest + 1)
    assert resolve_starting_model(ModelConfig(hf=enough), [dataset]).vocab_size == highest + 1
    few = hf_directory(tmp_path / "few", vocab_size=highest)
    with pytest.raises(InputError, match=f"uses token {highest}; the model in .*{few} has a voc"):
        resolve_starting_model(ModelConfig(hf=few), [dataset])


def test_a_reward_model_has_no_head_for_a_language_model(dataset, tmp_path):
    architecture = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    hf = hf_directory(tmp_path / "hf", **architecture, pad_token_id=0)
    with pytest.raises(InputError, match=r"model\.hf = .* set model\.kind: reward, or give a"):
        resolve_starting_model(ModelConfig(hf=hf), [dataset])
    initial = resolve_starting_model(ModelConfig(hf=hf, kind="reward"), [dataset])
    assert not initial.draws_head


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_paths_whose_rotation_depends_on_their_length_are_refused(kind, dataset, tmp_path):
    longest = int(dataset.response_lengths.max())
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 500.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 2.0, 2.0, 3.0], "long_factor": [4.0] * 4}
    for limit in (longest - 1, longest):
        lengths = {"max_position_embeddings": limit}
        if kind == "longrope":
            lengths = {"original_max_position_embeddings": limit}
        directory = hf_directory(tmp_path / str(limit), rope_parameters=rope, **lengths)
        model = ModelConfig(hf=directory, allow_other_tokenizer=True)
        if limit == longest:
            assert resolve_starting_model(model, [dataset]).sizes.rope_scaling.type == kind
        else:
            with pytest.raises(InputError, match=f"has {longest}: build the data.* {limit}$"):
                resolve_starting_model(model, [dataset])


@pytest.mark.parametrize(
    "kind, target", [("phi3", "q_proj"), ("glm4", "up_proj"), ("starcoder2", "down_proj")]
)
def test_adapters_of_joined_layers_are_refused(kind, target, dataset, tmp_path):
    more = {"rms_norm_eps": None} if kind == "starcoder2" else {"head_dim": 8}
    changes = {"model_type": kind, "pad_token_id": 2, **more}
    model = ModelConfig(hf=hf_directory(tmp_path / "hf", **changes), allow_other_tokenizer=True)
    with pytest.raises(InputError, match=f"has {target}, and linear layers of model_type {kind}"):
        resolve_starting_model(model, [dataset], LoraConfig(target_modules=(target,)))
    taken = resolve_starting_model(model, [dataset], LoraConfig(target_modules=("o_proj",)))
    assert taken.lora is not None


def test_a_reward_model_needs_a_classifier_in_transformers(dataset, tmp_path):
    model = ModelConfig(hf=hf_directory(tmp_path / "hf", model_type="granite"), kind="reward")
    with pytest.raises(InputError, match="no sequence classifier of model_type granite"):
        resolve_starting_model(model, [dataset])


def test_data_of_another_vocabulary_is_refused_unless_allowed(tmp_path):
    known = PreferenceDataset(write_random_set(tmp_path / "set", 0, 5))
    known.manifest["tokenizer"]["vocabulary"] = "0" * 64  # as data sets from version 3 on have it
    hf = hf_directory(tmp_path / "hf")
    vocabulary = {"a": 0, "[UNK]": 1}
    Tokenizer(WordLevel(vocabulary, "[UNK]")).save(f"{hf}/tokenizer.json")
    with pytest.raises(InputError, match="tokenizer"):
        resolve_starting_model(ModelConfig(hf=hf), [known])
    allowed = resolve_starting_model(ModelConfig(hf=hf, allow_other_tokenizer=True), [known])
    assert allowed.note(1) is None
    del known.manifest["tokenizer"]["vocabulary"]
    assert "version 2" in resolve_starting_model(ModelConfig(hf=hf), [known]).note(1)


def test_the_head_of_a_reward_model_is_drawn_for_a_language_models_weights(dataset, tmp_path):
    hf = hf_directory(tmp_path / "hf")
    initial = resolve_starting_model(ModelConfig(hf=hf, kind="reward"), [dataset])
    assert initial.draws_head
    first, second = initial.note(7).splitlines()
    assert first.startswith(f"the model in {hf} has no tokenizer")
    assert second == (
        f"model.hf = {hf} is a language model: the reward head is drawn from train.seed = 7"
    )


def test_a_checkpoint_without_sizes_asks_for_them(dataset, tmp_path):
    path = tmp_path / "saved"
    path.mkdir()
    (path / "metadata.json").write_text("{}")
    assert hf_folder(str(path)) is None
    with pytest.raises(InputError, match="has no hf/config.json .* give them"):
        resolve_starting_model(ModelConfig(checkpoint=str(path)), [dataset])


def test_sizes_beside_a_checkpoint_have_to_agree(dataset, tmp_path):
    path = checkpoint(tmp_path / "saved")
    given = {**SIZES, "num_layers": 2, "num_query_groups": 2}
    resolve_starting_model(ModelConfig(checkpoint=path, **given), [dataset])
    with pytest.raises(InputError, match="model.norm_epsilon = 1e-06, but .* has 1e-05"):
        resolve_starting_model(ModelConfig(checkpoint=path, **given, norm_epsilon=1e-6), [dataset])


def test_what_is_attached_describes_the_model(world, dataset, tmp_path):
    config = tiny_config(str(dataset.prefix), tmp_path)
    initial = resolve_starting_model(config.model, [dataset])
    initial.attach(tmp_path)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["hidden_size"] == 16 and written["vocab_size"] == dataset.vocab_size
    model = tiny_model(world)
    before = [parameter.clone() for parameter in model.parameters()]
    initial.load([model])  # nothing to load: the weights are drawn
    assert all(map(torch.equal, before, model.parameters()))
