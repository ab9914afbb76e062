"""TRL's `DPOTrainer` on the same pictures as judge: losses, gradient norms and weights of LLaVA."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
from image_runs import build, make_model, records
from safetensors.torch import load_file
from small_runs import lines

from megatron_prefix.__main__ import main
from megatron_prefix.config import parse_config
from megatron_prefix.train.run import train

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from trl_common import has_trl  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not has_trl(), reason="TRL 1.16 is not installed: pip install trl"),
    pytest.mark.filterwarnings("ignore"),
]
LR, STEPS = 1e-3, 3


def trl_run(model_folder: Path, path: Path, output: Path):
    """(losses, gradient norms, weights) of full-batch steps with a frozen tower."""
    import transformers
    from datasets import Dataset
    from PIL import Image
    from trl import DPOConfig, DPOTrainer

    def load():
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            model_folder, dtype=torch.float32
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision_tower" not in name)
        return model

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["images"] = [Image.open(path.parent / x).convert("RGB") for x in row["images"]]
    arguments = DPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=len(rows),
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        disable_dropout=True,
    )
    trainer = DPOTrainer(
        model=load(),
        ref_model=load(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoProcessor.from_pretrained(model_folder),
    )
    with contextlib.redirect_stdout(None):
        trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    trainer.model.save_pretrained(output / "weights")
    return (
        [row["loss"] for row in logged],
        [row["grad_norm"] for row in logged],
        load_file(output / "weights/model.safetensors"),
    )


def test_steps_are_those_of_trl(tmp_path):
    model = make_model(tmp_path / "model", "llava")
    path = records(tmp_path / "records", 6)
    with_images = [x for x in path.read_text().splitlines(True) if '"images"' in x]
    path.write_text("".join(with_images))
    config = parse_config(
        {
            "data": {
                "train": build(model, path, tmp_path / "data"),
                "global_batch_size": len(with_images),
                "row_capacity": 600,
            },
            "model": {"hf": str(model)},
            "optimizer": {
                "lr": LR,
                "lr_decay_style": "constant",
                "weight_decay": 0.0,
                "adam_beta2": 0.999,
            },
            "train": {"steps": STEPS, "save": str(tmp_path / "saved")},
            "logging": {"output": str(tmp_path / "run")},
        }
    )
    train(config)
    ours = [row for row in lines(tmp_path / "run") if "loss" in row]
    hf = tmp_path / "hf"
    assert main(["convert", "export", "--load", str(tmp_path / "saved"), "--hf", str(hf)]) == 0
    losses, norms, weights = trl_run(model, path, tmp_path / "trl")
    assert [row["loss"] for row in ours] == pytest.approx(losses, rel=1e-3, abs=1e-4)
    assert [row["grad_norm"] for row in ours] == pytest.approx(norms, rel=1e-4)
    exported = load_file(hf / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, tensor in weights.items():
        assert float((exported[name] - tensor).abs().max()) < 1e-4, name
