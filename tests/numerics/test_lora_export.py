"""Adapters in PEFT directories and merged models, compared with PEFT itself."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

import transformers  # noqa: E402
from peft_runs import make_adapter, make_model  # noqa: E402
from small_runs import configure, saved_state, trained  # noqa: E402

from megatron_prefix.__main__ import main  # noqa: E402
from megatron_prefix.checkpoint import export_hf, import_hf  # noqa: E402
from megatron_prefix.errors import InputError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [1]}
CASES = {  # name: model, its precision, adapter
    "all": ("llama", torch.float32, {}),
    "few, tied": ("qwen2", torch.float32, {**FEW, "use_rslora": True}),
    "whole copies": ("llama", torch.float32, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "bfloat16": ("qwen3", torch.bfloat16, {}),
}
WITHOUT_SIZES = dict.fromkeys(
    ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
)
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
EXPERTS = ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = ("r", "lora_alpha", "use_rslora", "layers_to_transform", "modules_to_save", "bias")


def save_model(folder: Path, kind: str, dtype: torch.dtype, **sizes: object) -> Path:
    """A random model in a precision."""
    model = make_model(folder, kind, **sizes)
    if dtype != torch.float32:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        loaded.save_pretrained(model)
    return model


def run_of(folder: Path, dataset: str, base: Path, lora: dict, **sections: dict):
    """A run of two steps with a high learning rate, so that adapters move far."""
    own = {"hf": str(base), **WITHOUT_SIZES, "allow_other_tokenizer": True}
    own |= sections.pop("model", {})
    train = {"steps": 2, "save": str(folder / "saved"), **sections.pop("train", {})}
    optimizer = {"lr": 0.02, **sections.pop("optimizer", {})}
    more = {"model": own, "train": train, "optimizer": optimizer, **sections}
    return configure(folder, dataset, lora=lora, **more)


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens).logits


def base_of(model: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*model*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit by bit."""
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and torch.equal(ours[name], x), name


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    """PEFT -> checkpoint -> PEFT, and merged, against PEFT's own."""
    kind, dtype, settings = CASES[case]
    model = save_model(tmp_path / "model", kind, dtype)
    adapter = make_adapter(model, tmp_path / "adapter", **settings)
    import_hf(str(adapter), tmp_path / "saved", str(model))
    export_hf(tmp_path / "saved", tmp_path / "back")
    assert_same(weights(tmp_path / "back"), weights(adapter))
    ours, theirs = (
        json.loads((x / "adapter_config.json").read_text()) for x in (tmp_path / "back", adapter)
    )
    assert {k: ours[k] for k in SETTINGS} == {k: theirs[k] for k in SETTINGS}
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])
    assert ours["base_model_name_or_path"] == str(model) and ours["task_type"] == "CAUSAL_LM"
    assert ours.keys() <= theirs.keys(), "PEFT knows every key"
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"tokenizer.json", "adapter_model.safetensors"} <= names
    assert not {"config.json", "model.safetensors"} & names
    loaded = peft.PeftModel.from_pretrained(base_of(model, dtype), tmp_path / "back")
    expected = peft.PeftModel.from_pretrained(base_of(model, dtype), adapter)
    assert torch.equal(logits(loaded), logits(expected))

    done = export_hf(tmp_path / "saved", tmp_path / "merged", 20_000, merge=True)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    merged = expected.merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    own = weights(tmp_path / "merged")
    assert_same(own, {k: x.to(own[k].dtype) for k, x in weights(tmp_path / "theirs").items()})
    assert done.dtypes == (str(dtype).removeprefix("torch."),)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert not torch.equal(logits(again), logits(base_of(model, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_run_has_trained_is_exported(dtype, random_set, tmp_path, capsys):
    model = save_model(tmp_path / "model", "llama", getattr(torch, dtype))
    lora = {"r": 4, "lora_alpha": 8}
    rows = trained(run_of(tmp_path, random_set, model, lora, model={"dtype": dtype}))
    assert len(rows) == 2
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: megatron-prefix ")
    assert main(command.split()) == 0
    assert "peft.PeftModel.from_pretrained puts it on" in capsys.readouterr().out
    exported = tmp_path / "adapter"
    tensors, _ = saved_state(tmp_path / "saved", 2)
    own = {k: x for k, x in tensors.items() if not k.startswith("optimizer.")}
    assert len(own) == len(weights(exported)) == 2 * 7 * 2
    assert all(str(x.dtype) == f"torch.{dtype}" for x in weights(exported).values())
    adapted = peft.PeftModel.from_pretrained(base_of(model), exported)
    import_hf(str(exported), tmp_path / "again", str(model))
    _, common = saved_state(tmp_path / "saved", 2)
    from megatron_prefix.checkpoint.torch_dist import load_common

    assert load_common(tmp_path / "again")["lora"] == common["lora"], "the same fingerprint"
    export_hf(tmp_path / "saved", tmp_path / "merged", merge=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    distance = (logits(whole) - logits(adapted)).abs().max()
    assert distance < (1e-5 if dtype == "float32" else 0.2)


def test_an_imported_adapter_is_one_to_start_from_and_to_evaluate(random_set, tmp_path):
    model = save_model(tmp_path / "model", "llama", torch.float32)
    adapter = make_adapter(model, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    import_hf(str(adapter), tmp_path / "imported", str(model))
    losses = [
        trained(
            run_of(tmp_path / f"of {name}", random_set, model, {"adapter": str(tmp_path / name)})
        )
        for name in ("adapter", "imported")
    ]
    assert [row["loss"] for row in losses[0]] == [row["loss"] for row in losses[1]]


def test_a_reward_model(random_set, tmp_path, capsys):
    """Its head is one of PEFT's whole copies; from a language model, and merged."""
    model = save_model(tmp_path / "model", "llama", torch.float32)
    own = {"kind": "reward", "init_method_std": 0.05}
    loss = {"loss_type": "bradley_terry"}
    trained(run_of(tmp_path, random_set, model, {"r": 4}, model=own, loss=loss))
    saved, exported = tmp_path / "saved", tmp_path / "peft"
    note = export_hf(saved, exported).note
    assert "AutoModelForSequenceClassification (num_labels 1, pad_token_id 256)" in note
    config = peft.LoraConfig.from_pretrained(exported)
    assert config.task_type == "SEQ_CLS" and config.modules_to_save == ["classifier", "score"]

    def classifier(directory: Path) -> torch.nn.Module:
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            directory, num_labels=1, pad_token_id=256, dtype=torch.float32
        )

    loaded = peft.PeftModel.from_pretrained(classifier(model), exported)
    export_hf(saved, tmp_path / "merged", merge=True)
    assert (logits(loaded) - logits(classifier(tmp_path / "merged"))).abs().max() < 1e-5
    theirs = loaded.merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(weights(tmp_path / "merged"), weights(tmp_path / "theirs"))
    loaded = peft.PeftModel.from_pretrained(classifier(model), exported)
    loaded.save_pretrained(tmp_path / "again")
    import_hf(str(tmp_path / "again"), tmp_path / "imported", str(model))
    export_hf(tmp_path / "imported", tmp_path / "back")
    assert_same(weights(tmp_path / "back"), weights(exported))


def test_adapters_of_experts_are_merged_only(random_set, tmp_path, capsys):
    model = save_model(tmp_path / "model", "mixtral", torch.float32, **MIXTURE)
    lora = {"r": 4, "target_modules": EXPERTS}
    trained(run_of(tmp_path, random_set, model, lora, optimizer={"lr": 0.05}))
    assert capsys.readouterr().out.rstrip().endswith(f"--hf {tmp_path}/hf --merge")
    with pytest.raises(
        InputError, match="adapter of an expert.*export the merged model with --mer"
    ):
        export_hf(tmp_path / "saved", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    export_hf(tmp_path / "saved", tmp_path / "merged", merge=True)
    before, after = weights(model), weights(tmp_path / "merged")
    tensors, _ = saved_state(tmp_path / "saved", 2)
    prefix = "decoder.layers.1.mlp.experts.2.linear_fc1.adapters.up_proj."
    own = tensors[f"{prefix}lora_B"] @ tensors[f"{prefix}lora_A"] * (8 / 4)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert before.keys() == after.keys() and own.abs().max() > 0
    assert torch.equal(after[name], before[name] + own)
    moved = [name for name, x in after.items() if not torch.equal(x, before[name])]
    assert len(moved) == 2 * (2 + 4 * 3)


def test_the_base_is_found_and_checked(random_set, tmp_path):
    model = save_model(tmp_path / "model", "llama", torch.float32)
    import_hf(str(model), tmp_path / "as checkpoint")
    own = {"hf": None, "checkpoint": str(tmp_path / "as checkpoint")}
    trained(run_of(tmp_path, random_set, model, {"r": 4}, model=own))
    saved = tmp_path / "saved"
    note = export_hf(saved, tmp_path / "peft").note
    assert "base_model_name_or_path is null" in note
    export_hf(saved, tmp_path / "a", merge=True)
    export_hf(saved, tmp_path / "b", merge=True, base=str(model))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    export_hf(saved, tmp_path / "c", base=str(model))
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    shutil.move(tmp_path / "as checkpoint", tmp_path / "moved")
    with pytest.raises(InputError, match="is no longer there: give its new place with --base"):
        export_hf(saved, tmp_path / "d", merge=True)
    export_hf(saved, tmp_path / "d", merge=True, base=str(tmp_path / "moved"))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "d"))
    other = base_of(model)
    other.model.norm.weight.data[0] += 1e-3
    shutil.copytree(model, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    for merge in (False, True):
        with pytest.raises(InputError, match="it is not the base of the adapters in .*fingerprint"):
            export_hf(saved, tmp_path / "e", merge=merge, base=str(tmp_path / "other"))
    assert not (tmp_path / "e").exists()


def test_a_base_that_was_drawn_cannot_be_merged(random_set, tmp_path):
    trained(
        configure(
            tmp_path, random_set, lora={"r": 4}, train={"steps": 1, "save": str(tmp_path / "s")}
        )
    )
    export_hf(tmp_path / "s", tmp_path / "peft")
    assert len(weights(tmp_path / "peft")) == 2 * 7 * 2
    with pytest.raises(InputError, match="weights that the run drew from train.seed"):
        export_hf(tmp_path / "s", tmp_path / "merged", merge=True)


def test_adapters_of_experts_on_a_drawn_base_have_no_form(random_set, tmp_path, capsys):
    mixture = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
    train = {"steps": 1, "save": str(tmp_path / "s")}
    lora = {"r": 4, "target_modules": ["down_proj"]}
    trained(configure(tmp_path, random_set, lora=lora, train=train, model=mixture))
    assert capsys.readouterr().out.rstrip().endswith("have no other form: no export")
    for merge in (False, True):
        with pytest.raises(
            InputError, match="adapters of experts cannot be exported if the run dr"
        ):
            export_hf(tmp_path / "s", tmp_path / "x", merge=merge)
    assert not (tmp_path / "x").exists()


def test_flags_without_effect_are_refused(tmp_path):
    model = save_model(tmp_path / "model", "llama", torch.float32)
    adapter = make_adapter(model, tmp_path / "adapter")
    import_hf(str(model), tmp_path / "full")
    import_hf(str(adapter), tmp_path / "saved", str(model))
    for flags in ({"merge": True}, {"base": str(model)}):
        with pytest.raises(InputError, match="is for checkpoints of adapters"):
            export_hf(tmp_path / "full", tmp_path / "x", **flags)
    with pytest.raises(InputError, match="--max-shard-size has no effect on an adapter"):
        export_hf(tmp_path / "saved", tmp_path / "x", 1000)
    with pytest.raises(InputError, match="has no adapter_config.json: leave out --base"):
        import_hf(str(model), tmp_path / "x", str(model))
    with pytest.raises(InputError, match="add --base HF_DIR"):
        import_hf(str(adapter), tmp_path / "x")


def test_what_is_not_supported_is_refused_by_name(tmp_path):
    model = save_model(tmp_path / "model", "llama", torch.float32)
    adapter = make_adapter(model, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    changes = {
        "use_dora": True,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"q_proj": 8},
        "bias": "all",
        "layer_replication": [[0, 1]],
        "lora_bias": True,
    }
    for key, value in changes.items():
        (adapter / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match=f"{key} = .* is not supported"):
            import_hf(str(adapter), tmp_path / "x", str(model))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(InputError, match=r"has shape \[4, 48\], the model asks for \[8, 48\]"):
        import_hf(str(adapter), tmp_path / "x", str(model))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for file in model.glob("model*.safetensors"):
        shutil.copy(file, adapter)
    for base in (None, str(model)):
        with pytest.raises(InputError, match="adapter_config.json beside the weights model.safet"):
            import_hf(str(adapter), tmp_path / "x", base)
    assert not (tmp_path / "x").exists()
