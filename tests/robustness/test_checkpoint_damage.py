"""A checkpoint that is not whole, or is another model's, is refused by every command.

Each refusal is one message that names the checkpoint, with exit code 2.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SIZES, lines, refused, write_config

from megatron_prefix.__main__ import main
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.writer import DatasetWriter

STEP = "iter_0000002"
TRACKER = "latest_checkpointed_iteration.txt"
UNSAVED = {"save": None, "load": None, "save_interval": None, "steps": 3}


def ways(folder: Path, dataset: str, saved: Path, **model) -> dict[str, list[str]]:
    """The commands that load a checkpoint, for a run with these sizes."""
    config = write_config(folder / "c.yaml", dataset, folder / "run", model=model, train=UNSAVED)
    from_there = ["train", "--config", config, f"model.checkpoint={saved}"]
    return {
        "train.load": ["train", "--config", config, f"train.load={saved}"],
        "model.checkpoint": from_there,
        "evaluate": ["evaluate", "--config", config, f"data.valid={dataset}", "--load", str(saved)],
        "export": ["convert", "export", "--load", str(saved), "--hf", str(folder / "out")],
    }


def flipped(name: str, place: float = 0.5) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = max((root / STEP).glob(name), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 4
        path.write_bytes(data)

    return damage


def cut(name: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = max((root / STEP).glob(name), key=lambda p: p.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)

    return damage


def without(name: str) -> Callable[[Path], None]:
    return lambda root: next((root / STEP).glob(name)).unlink()


def tracked(text: bytes) -> Callable[[Path], None]:
    return lambda root: (root / TRACKER).write_bytes(text) and None


DAMAGES = {
    **{f"half of {n}": cut(n) for n in ("*.distcp", "common.pt", ".metadata", "checksums.json")},
    **{f"bit in {n}": flipped(n) for n in ("*.distcp", "common.pt", ".metadata", "checksums.json")},
    "last bit of tensors": flipped("*.distcp", 1.0),
    "bit in config": flipped("hf/config.json"),
    **{f"no {n}": without(n) for n in ("*.distcp", "common.pt", ".metadata", "metadata.json")},
    "no config": without("hf/config.json"),
    "tracker of words": tracked(b"newest"),
    "tracker of bytes": tracked(b"\xff\xfe\x00"),
    "tracker of nothing": tracked(b""),
    "tracker of a negative": tracked(b"-2"),
    "tracker of another step": tracked(b"5"),
    "tracker of a huge step": tracked(b"9" * 5000),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused(finished, dataset, tmp_path, capsys, damage):
    saved = tmp_path / "saved"
    shutil.copytree(finished / "saved", saved)
    damage(saved)
    for argv in ways(tmp_path, dataset, saved, **SIZES).values():
        refused(argv, capsys, saved)
    assert not (tmp_path / "out").exists()


FALLBACKS = {
    **{name: damage for name, damage in DAMAGES.items() if "onfig" not in name},
    "no tracker": lambda root: (root / TRACKER).unlink(),
    "no directory": lambda root: shutil.rmtree(root / STEP),
    "an empty tracker after a power cut": tracked(b"\0" * 7),
}


@pytest.mark.parametrize("damage", FALLBACKS.values(), ids=FALLBACKS.keys())
def test_an_older_checkpoint_is_named_and_taken_on_request(
    finished, dataset, tmp_path, capsys, damage
):
    """It is resumed exactly: the metrics are those of the undamaged run, and of one step more."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damage(run / "saved")
    config = write_config(tmp_path / "c.yaml", dataset, run, train={"steps": 3})
    argv = ["train", "--config", config]
    message = refused(argv, capsys, run / "saved", "add train.load_fallback=true to the command")
    assert "The newest whole checkpoint is" in message
    assert main([*argv, "train.load_fallback=true"]) == 0
    printed = capsys.readouterr().out
    assert "(train.load_fallback)" in printed and "resumed from" in printed
    assert lines(run)[:2] == lines(finished)[:2] and [x["step"] for x in lines(run)] == [1, 2, 3]
    assert (run / "saved" / TRACKER).read_text() == "3"
    assert not list((run / "saved").glob(".iter*"))
    assert main([*argv, "train.steps=4"]) == 0, "every checkpoint is whole again"


def test_without_a_whole_checkpoint_the_damage_alone_is_named(finished, dataset, tmp_path, capsys):
    saved = tmp_path / "saved"
    shutil.copytree(finished / "saved", saved)
    for step in ("iter_0000001", STEP):
        (saved / step / "common.pt").unlink()
    argv = ways(tmp_path, dataset, saved, **SIZES)["train.load"]
    for more in ([], ["train.load_fallback=true"]):
        assert "whole checkpoint" not in refused([*argv, *more], capsys, saved / STEP)


OTHER_MODELS = {
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_query_groups": 4,
    "kv_channels": 16,
    "qk_layernorm": True,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": False,
    "rotary_base": 500.0,
    "norm_epsilon": 1e-6,
}


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_another_model_is_refused(finished, dataset, tmp_path, capsys, key):
    saved = finished / "saved"
    changed = ways(tmp_path, dataset, saved, **{key: OTHER_MODELS[key]})
    for way in ("train.load", "model.checkpoint", "evaluate"):
        refused(changed[way], capsys, saved / STEP)


def test_another_vocabulary_is_refused(finished, dataset, tmp_path, capsys):
    """The same tokens in a data set whose tokenizer has 100 entries more."""
    told = dict(PreferenceDataset(dataset).manifest["tokenizer"])
    told |= {"vocab_size": told["vocab_size"] + 100, "name": "larger", "fingerprint": "cd" * 32}
    source = PreferenceDataset(dataset)
    with DatasetWriter(tmp_path / "larger", told) as writer:
        for group in range(len(source)):
            writer.add(source[group], group)
        writer.finish()
    commands = ways(tmp_path, str(tmp_path / "larger"), finished / "saved")
    refused(commands["train.load"], capsys, finished / "saved" / STEP)
    refused(commands["evaluate"], capsys, finished / "saved" / STEP)


def test_a_step_of_another_run_is_refused(finished, other, tmp_path, capsys):
    commands = ways(tmp_path, other, finished / "saved")
    message = refused(commands["train.load"], capsys, finished / "saved" / STEP)
    assert "data.train fingerprint" in message


def test_an_import_is_checked_as_well(tmp_path, capsys, dataset):
    """One bit of a weight, which torch itself does not notice."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "hf")
    saved = tmp_path / "imported"
    assert main(["convert", "import", "--hf", str(tmp_path / "hf"), "--output", str(saved)]) == 0
    path = max(saved.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    argv = ["convert", "export", "--load", str(saved), "--hf", str(tmp_path / "out")]
    refused(argv, capsys, saved, path.name)
    assert json.loads((saved / "checksums.json").read_text()).keys() >= {path.name}
