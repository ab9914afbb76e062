"""Runs on data sets with images, from records to exported models, against transformers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from image_runs import build, make_model, records, their_logps
from safetensors.torch import load_file
from small_runs import lines, timeless
from vision import FAMILIES

from megatron_prefix.__main__ import main
from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.images import ImageProcessor
from megatron_prefix.errors import InputError
from megatron_prefix.train.run import train


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By family: the model, the records, and the data set of them."""
    root = tmp_path_factory.mktemp("images")
    path = records(root / "records")
    made = {}
    for family in FAMILIES:
        model = make_model(root / family, family)
        made[family] = (model, path, build(model, path, root / f"{family}-data"))
    return made


def configure(source, output: Path, **sections) -> Config:
    """Three steps of all six pairs."""
    model, _, data = source
    default = {
        "data": {"train": data, "global_batch_size": 6, "row_capacity": 600},
        "model": {"hf": str(model)},
        "optimizer": {"lr": 2e-3, "lr_decay_style": "constant"},
        "train": {"steps": 3},
        "logging": {"output": str(output)},
    }
    names = {**default, **sections}
    return parse_config({x: {**default.get(x, {}), **sections.get(x, {})} for x in names})


def run(source, output: Path, **sections) -> list[dict]:
    """The steps' lines of a run."""
    train(configure(source, output, **sections))
    return [row for row in timeless(lines(output)) if "loss" in row]


def values(rows: list[dict]) -> np.ndarray:
    return np.array([[row["loss"], row["grad_norm"], row["rewards/margins"]] for row in rows])


def evaluated(config: Config, folder: Path, key: str = "logp") -> list[float]:
    """Log-probability or reward of each response of the data set, by the command."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    output = folder / "responses.jsonl"
    argv = ["evaluate", "--config", str(folder / "config.yaml"), "--per-response", str(output)]
    assert main(argv) == 0
    return [json.loads(line)[key] for line in output.read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_of_records_are_those_of_transformers(sources, tmp_path, family):
    """Through processor, tokens, pixels and trees; pictures alone in their prompt and several."""
    model, path, data = sources[family]
    config = configure(sources[family], tmp_path / "run", data={"valid": data})
    ours, theirs = evaluated(config, tmp_path), their_logps(model, path)
    assert len(ours) == len(theirs) == 12
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    "family", [pytest.param("llava", marks=pytest.mark.slow), "llava_onevision", "qwen2_5_vl"]
)
def test_sharing_recomputation_and_rows_change_nothing(sources, tmp_path, family):
    source = sources[family]
    vision = {"vision": {"freeze_tower": False}}
    expected = run(source, tmp_path / "tree", model=vision)
    assert expected[-1]["loss"] < expected[0]["loss"]
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    others = {
        "none": {"data": {"sharing": "none"}},
        "pair": {"data": {"sharing": "pair"}},
        "padded": {"data": {"packing": False, "micro_batch_size": 2, "row_capacity": None}},
        "recomputed": {"model": {**full, "recompute_num_layers": 1}},
    }
    for name, sections in others.items():
        model = {"model": {**vision, **sections.get("model", {})}}
        rows = run(source, tmp_path / name, **{**sections, **model})
        assert values(rows) == pytest.approx(values(expected), rel=2e-4, abs=1e-6), name


def test_a_run_goes_on_from_its_checkpoint_and_is_exported(sources, tmp_path):
    """Two and two steps are four; transformers computes the same with the exported model."""
    source = sources["llava_onevision"]
    model, path, data = source
    saved = {"save": str(tmp_path / "saved"), "load": str(tmp_path / "saved"), "steps": 2}
    vision = {"vision": {"freeze_tower": False}}
    whole = run(source, tmp_path / "whole", train={"steps": 4}, model=vision)
    first = run(source, tmp_path / "parts", train=saved, model=vision)
    second = run(source, tmp_path / "parts", train={**saved, "steps": 4}, model=vision)
    assert values(first) == pytest.approx(values(whole[:2]), rel=1e-6)
    assert values(second)[-2:] == pytest.approx(values(whole[2:]), rel=1e-5)
    hf = tmp_path / "exported"
    assert main(["convert", "export", "--load", str(tmp_path / "saved"), "--hf", str(hf)]) == 0
    before, after = (load_file(x / "model.safetensors") for x in (model, hf))
    assert before.keys() == after.keys()
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    for part in ("vision_tower.encoder", "multi_modal_projector", "image_newline", "layers.0"):
        assert any(part in name for name in changed), part
    config = configure(source, tmp_path / "run", data={"valid": data})
    section = replace(config.model, hf=None, checkpoint=str(tmp_path / "saved"))
    ours = evaluated(replace(config, model=section), tmp_path / "evaluated")
    assert ours == pytest.approx(their_logps(model, path, hf), rel=1e-5)


def test_a_frozen_vision_part_stays_as_it_is(sources, tmp_path):
    source = sources["qwen2_5_vl"]
    saved = {"save": str(tmp_path / "saved")}
    run(source, tmp_path / "run", train=saved, optimizer={"weight_decay": 0.1})
    hf = tmp_path / "exported"
    assert main(["convert", "export", "--load", str(tmp_path / "saved"), "--hf", str(hf)]) == 0
    before, after = (load_file(x / "model.safetensors") for x in (source[0], hf))
    for name, tensor in before.items():
        is_frozen = name.startswith("visual.") and "merger" not in name
        assert torch.equal(tensor, after[name]) == is_frozen, name


def test_a_scored_reference_is_the_frozen_model(sources, tmp_path):
    source = sources["qwen2_5_vl"]
    expected = run(source, tmp_path / "model")
    config = configure(source, tmp_path / "score")
    (tmp_path / "score.yaml").write_text(config.to_yaml())
    output = str(tmp_path / "ref")
    assert main(["score", "--config", str(tmp_path / "score.yaml"), "--output", output]) == 0
    loss = {"reference": "precomputed", "ref_logps": output}
    rows = run(source, tmp_path / "precomputed", loss=loss)
    assert values(rows) == pytest.approx(values(expected), rel=1e-5)
    other = make_model(tmp_path / "other", "qwen2_5_vl")
    file = other / "model.safetensors"
    tensors = load_file(file)
    tensors["visual.merger.mlp.0.bias"] += 1e-3
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="of another model|fingerprint"):
        run((other, *source[1:]), tmp_path / "refused", loss=loss)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shadow_run_passes(sources, tmp_path, dtype):
    model = {"dtype": dtype, "vision": {"freeze_tower": False}}
    rows = run(sources["llava"], tmp_path, model=model, train={"shadow_steps": 2})
    assert len(rows) == 3


def test_adapters_leave_the_vision_part_frozen(sources, tmp_path):
    source = sources["llava"]
    saved = {"save": str(tmp_path / "saved"), "load": str(tmp_path / "saved"), "steps": 2}
    lora = {"r": 4, "lora_alpha": 8}
    whole = run(source, tmp_path / "whole", lora=lora, train={"steps": 4})
    run(source, tmp_path / "parts", lora=lora, train=saved)
    rows = run(source, tmp_path / "parts", lora=lora, train={**saved, "steps": 4})
    assert values(rows)[-2:] == pytest.approx(values(whole[2:]), rel=1e-5)
    assert whole[-1]["loss"] < whole[0]["loss"]
    hf, base = tmp_path / "merged", load_file(source[0] / "model.safetensors")
    argv = ["convert", "export", "--load", str(tmp_path / "saved"), "--hf", str(hf), "--merge"]
    assert main(argv) == 0
    merged = load_file(hf / "model.safetensors")
    assert base.keys() == merged.keys()
    assert all(torch.equal(merged[x], base[x]) for x in base if not x.startswith("language_model"))
    config = configure(source, tmp_path / "run", data={"valid": source[2]}, lora=lora)
    with_adapters = replace(
        config, lora=replace(config.lora, adapter=str(tmp_path / "saved"), r=None, lora_alpha=None)
    )
    ours = evaluated(with_adapters, tmp_path / "evaluated")
    assert ours == pytest.approx(their_logps(source[0], source[1], hf), rel=1e-5)


def test_reward_models_are_trained_saved_and_evaluated(sources, tmp_path, capsys):
    """transformers has no classifier of these families, so there is nothing to export them to."""
    model, _, data = sources["qwen2_5_vl"]
    saved = {"save": str(tmp_path / "saved"), "load": str(tmp_path / "saved"), "steps": 2}
    reward = {"kind": "reward", "vision": {"freeze_tower": False}}

    def section(output, **sections):
        config = configure((model, None, data), output, model=reward, loss={}, **sections)
        return config

    train(section(tmp_path / "whole", train={"steps": 4}))
    train(section(tmp_path / "run", train=saved))
    train(section(tmp_path / "run", train={**saved, "steps": 4}))
    whole = [row for row in lines(tmp_path / "whole") if "loss" in row]
    rows = [row for row in lines(tmp_path / "run") if "loss" in row]
    losses = [[row["loss"] for row in own] for own in (rows, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    argv = ["convert", "export", "--load", str(tmp_path / "saved"), "--hf", str(tmp_path / "hf")]
    capsys.readouterr()
    assert main(argv) == 2
    assert "transformers has no sequence classifier" in capsys.readouterr().err
    config = section(tmp_path / "scored", data={"valid": data})
    config = replace(config, model=replace(config.model, hf=None, checkpoint=saved["save"]))
    scores = evaluated(config, tmp_path / "evaluated", "reward")
    assert len(set(scores)) == 12


def refusal(source, tmp_path, capsys, **sections) -> str:
    config = configure(source, tmp_path / "run", **sections)
    (tmp_path / "refused.yaml").write_text(config.to_yaml())
    assert main(["train", "--config", str(tmp_path / "refused.yaml")]) == 2
    return capsys.readouterr().err


def test_models_and_data_that_do_not_fit_are_refused(sources, tmp_path, capsys):
    model, path, data = sources["llava"]
    sizes = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2}
    text = refusal(sources["llava"], tmp_path, capsys, model={"hf": None, **sizes})
    assert "has images, and the model without config.json reads none" in text
    other = make_model(tmp_path / "other", "llava", image_mean=[0.4, 0.4, 0.4])
    text = refusal((other, path, data), tmp_path, capsys)
    assert "built with another image processor" in text
    assert "image_mean" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_answers_to_texts(sources, tmp_path, capsys, family):
    """Those of transformers; a prompt of these has no pictures, however it is spelled."""
    model, prompts = sources[family][0], tmp_path / "prompts.jsonl"
    generate = {"prompts": str(prompts), "every": 2, "max_new_tokens": 4}
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    placeholder = ImageProcessor.open(model).image_token
    for prompt, message in (
        ([{"role": "user", "content": parts}], "line 2: prompt must be a text"),
        (
            f"What is {placeholder}?",
            "train.generate: prompt 2: a text contains .* remove it from the text",
        ),
    ):
        lines = [json.dumps({"prompt": x}) + "\n" for x in ("What?", prompt)]
        prompts.write_text("".join(lines))
        text = refusal(sources[family], tmp_path, capsys, train={"generate": generate})
        assert re.search(message, text), text
    prompts.write_text('{"prompt": "What?"}\n')
    run(sources[family], tmp_path / "answers", train={"generate": generate, "steps": 1})
    first = json.loads((tmp_path / "answers/samples.jsonl").read_text().splitlines()[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(model)
    tokens = tokenizer("What?", return_tensors="pt").input_ids
    answer = theirs.generate(tokens, max_new_tokens=4, do_sample=False)[0, tokens.shape[1] :]
    assert first["step"] == 0 and first["answer"] == tokenizer.decode(answer)


def test_a_resumed_run_trains_the_same_parts(sources, tmp_path, capsys):
    saved = {"save": str(tmp_path / "saved"), "load": str(tmp_path / "saved")}
    run(sources["llava"], tmp_path / "run", train={**saved, "steps": 1})
    vision = {"vision": {"freeze_tower": False}}
    text = refusal(sources["llava"], tmp_path, capsys, train={**saved, "steps": 2}, model=vision)
    assert "model.vision.freeze_tower" in text


def test_data_without_images_trains_the_language_model(sources, tmp_path, capsys):
    """And a line says so; the vision part stays as it is, decay included."""
    model = sources["llava"][0]
    plain = tmp_path / "plain.jsonl"
    pairs = [{"prompt": f"{i} ?", "chosen": f"{i} a", "rejected": f"{i} b"} for i in range(6)]
    plain.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = (model, plain, build(model, plain, tmp_path / "data"))
    rows = run(
        source,
        tmp_path / "run",
        model={"vision": {"freeze_tower": False}},
        optimizer={"weight_decay": 0.1},
        train={"save": str(tmp_path / "saved")},
    )
    assert rows[-1]["loss"] < rows[0]["loss"]
    note = capsys.readouterr().out
    assert "it is trained as a text model" in note and "model.vision has no effect" in note
    hf, before = tmp_path / "exported", load_file(model / "model.safetensors")
    assert main(["convert", "export", "--load", str(tmp_path / "saved"), "--hf", str(hf)]) == 0
    after = load_file(hf / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith("language_model."), name
