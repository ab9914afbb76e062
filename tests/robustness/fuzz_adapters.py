"""One more kind of the fuzz: adapters in PEFT's form, damaged or with odd settings."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from damage import damaged, odd_values
from fuzz_forged import ForgedFuzz
from fuzz_kinds import refusal
from safetensors.torch import save_file

from megatron_prefix.checkpoint.starting_model import resolve_starting_model
from megatron_prefix.config import load_config
from megatron_prefix.engine.optimizer import build_model
from megatron_prefix.model import unwrap
from megatron_prefix.model.hf.peft import ADAPTER, ADAPTER_WEIGHTS, peft_config, peft_name
from megatron_prefix.model.parameters import trained_parts

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}


class AllFuzz(ForgedFuzz):
    """All kinds."""

    def _with_adapters(self, lora: dict) -> dict[str, torch.Tensor]:
        """Trained parameters, by PEFT's names, of a model that starts with a `lora` section."""
        settings = {**json.loads(self.settings), "lora": lora}
        path = self.folder / "lora.json"
        path.write_text(json.dumps(settings))
        config = load_config(path)
        start = resolve_starting_model(config.model, [self.data], config.lora)
        chunks = build_model(start.transformer_config(config.train.seed), self.world)
        start.load(chunks)
        parts = [part for chunk in chunks for part in trained_parts(unwrap(chunk))]
        return {peft_name(part.canonical): part.parameter.detach().clone() for part in parts}

    def _copied_adapter(self) -> Path:
        sound = self.folder / "sound_adapter"
        if not sound.exists():
            tensors = self._with_adapters(LORA)
            sound.mkdir()
            config = load_config(self.folder / "lora.json")
            assert config.lora is not None
            settings = peft_config(config.lora.resolved(False, 2), False, None)
            (sound / ADAPTER).write_text(json.dumps(settings))
            save_file(tensors, sound / ADAPTER_WEIGHTS)
        copy = self.folder / "adapter"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound, copy)
        return copy

    def adapter(self, rng: random.Random, case: object) -> object | None:
        """Read as `lora.adapter`."""
        folder = self._copied_adapter()
        path = folder / rng.choice([ADAPTER, ADAPTER, ADAPTER_WEIGHTS])
        if path.name == ADAPTER and rng.random() < 0.6:
            settings = json.loads(path.read_text())
            odd_values(rng, settings)
            path.write_text(json.dumps(settings))
            damage = path.read_text()
        else:
            others = [folder / name for name in (ADAPTER, ADAPTER_WEIGHTS) if name != path.name]
            damage = damaged(rng, path, others)
        return refusal(lambda: self._with_adapters({"adapter": str(folder)}), "", (case, damage))
