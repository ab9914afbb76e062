"""Adapters out of and into checkpoints: PEFT directories, and models with their adapters merged.

A checkpoint of adapters knows its base, so nothing else is needed to export it. The adapters
themselves are copied bit by bit in both directions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_prefix.checkpoint.adapter_base import (
    DirectoryBase,
    as_files,
    dtype_of_runs,
    fingerprints,
    open_base,
)
from megatron_prefix.checkpoint.adapter_state import KEY, SavedAdapter
from megatron_prefix.checkpoint.agreement import MODEL
from megatron_prefix.checkpoint.by_tensor import (
    CheckpointTensors,
    new_directory,
    write_checkpoint,
)
from megatron_prefix.checkpoint.converted import Converted, note_on_padding, write_config
from megatron_prefix.checkpoint.model_weights import sizes_of
from megatron_prefix.checkpoint.starting_model import HF_FOLDER, check_targets
from megatron_prefix.config import ModelConfig
from megatron_prefix.config.lora import LoraConfig, lora_size_faults
from megatron_prefix.errors import InputError
from megatron_prefix.model import REWARD_HEAD, transformer_config
from megatron_prefix.model.hf import (
    HFModel,
    WeightMap,
    copy_companions,
    refuse_adapter,
    write_hf_folder,
    write_safetensors,
)
from megatron_prefix.model.hf.peft import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    AdapterMap,
    PeftAdapter,
    peft_config,
)

_NOT_OF_ADAPTERS = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""Files of the base that a PEFT directory does not repeat."""


@dataclass(frozen=True)
class StoredAdapters:
    """The adapters of a checkpoint."""

    path: Path
    saved: SavedAdapter
    model: HFModel
    weights: WeightMap
    """Of the base model, with a reward model's head."""
    parameters: AdapterMap
    tensors: CheckpointTensors

    @classmethod
    def open(cls, path: Path, saved: SavedAdapter, model: HFModel, weights: WeightMap):
        """`model` is the configuration in the checkpoint. Raises InputError."""
        has_experts = weights.sizes.num_moe_experts > 0
        lora = saved.lora().resolved(has_experts, weights.sizes.num_layers)
        parameters = AdapterMap(lora, weights)
        tensors = CheckpointTensors(path, parameters)
        tensors.check()
        return cls(path, saved, model, weights, parameters, tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the adapters."""
        return self.tensors.dtype(self.parameters.names()[0])

    def _refuse_without_form(self, base: str | None) -> None:
        """Refuse adapters that neither a PEFT directory nor a merged model can hold."""
        if base is None and not self.saved.base and self.parameters.has_experts:
            raise InputError(
                f"{self.path}: adapters of experts cannot be exported if the run drew its model "
                "from train.seed: a PEFT directory has no place for them, and the weights to merge "
                "them into are in no file. Start the run from model.hf or model.checkpoint"
            )

    def write_peft(self, hf: Path, base: str | None) -> Converted:
        """Write the PEFT directory `hf`; `base` is `--base`, which is checked."""
        self._refuse_without_form(base)
        parameters, lora = self.parameters, self.parameters.lora
        names = {parameters.file_name(name): name for name in parameters.names()}
        place = self.saved.base.get("hf")
        if base is not None:
            open_base(self.path, self.saved, base, self.weights, self.dtype)
            is_model = (Path(base) / "config.json").is_file()
            place = str(Path(base).resolve()) if is_model else None
            place = place if Path(base).exists() else base  # an id on the Hub
        is_classifier = self.weights.kind == "reward"
        dtypes = {own: self.tensors.dtype(name) for own, name in names.items()}
        shapes = {own: parameters.shape(name) for own, name in names.items()}
        with new_directory(hf, "--hf") as partial:
            source = self.path / HF_FOLDER
            companions = copy_companions(source, partial, _NOT_OF_ADAPTERS)
            write_safetensors(
                partial,
                {own: (dtypes[own], shapes[own]) for own in sorted(names)},
                ((own, self.tensors.read(names[own])) for own in sorted(names)),
                sys.maxsize,
                ADAPTER_WEIGHTS,
            )
            settings = peft_config(lora, is_classifier, place, self.model.images is not None)
            text = json.dumps(settings, indent=2)
            (partial / ADAPTER).write_text(text + "\n", encoding="utf-8")
        return Converted.of(dtypes, shapes, companions, self._peft_note(place))

    def _peft_note(self, place: str | None) -> str:
        """How the directory is loaded."""
        known = "the base model that you give" if place is None else place
        kind = "AutoModelForCausalLM"
        if self.model.images is not None:
            kind = "AutoModelForImageTextToText"
        if self.weights.kind == "reward":
            pad = self.model.config.get("pad_token_id")
            kind = f"AutoModelForSequenceClassification (num_labels {self.weights.num_labels}, "
            kind += f"pad_token_id {pad})"
        note = f"a PEFT adapter: peft.PeftModel.from_pretrained puts it on {known}, a {kind}"
        if place is not None:
            return note
        return f"{note}; base_model_name_or_path is null: the base is no Hugging Face directory"

    def write_merged(self, hf: Path, base: str | None, max_shard_bytes: int) -> Converted:
        """Write the Hugging Face model `hf`, in the precision of the base."""
        self._refuse_without_form(base)
        weights = self.weights
        stored = open_base(self.path, self.saved, base, weights, self.dtype)
        dtypes, shapes = stored.hf_dtypes(), weights.hf_shapes()
        if weights.kind == "reward":
            dtypes[REWARD_HEAD] = next(iter(dtypes.values()))  # that of the embedding

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in stored.hf_tensors():
                yield name, self.parameters.merged(name, tensor, self.tensors.read)
            if weights.kind == "reward":
                yield REWARD_HEAD, self.tensors.read(REWARD_HEAD).to(dtypes[REWARD_HEAD])

        with new_directory(hf, "--hf") as partial:
            companions = copy_companions(self.path / HF_FOLDER, partial)
            entries = {weights.file_name(name): (x, shapes[name]) for name, x in dtypes.items()}
            write_safetensors(partial, entries, as_files(weights, tensors()), max_shard_bytes)
            write_config(self.model.config, set(dtypes.values()), partial / "config.json")
        note = note_on_padding(weights.kind, self.model)
        return Converted.of(dtypes, shapes, companions, note)


def import_adapter(hf: str, base: str, output: Path) -> Converted:
    """Write the checkpoint `output` from the PEFT directory `hf`, whose base model is `base`.

    Raises InputError if the adapter is not supported, if the two do not fit, or if `output` exists;
    nothing is written then.
    """
    directory = Path(hf)
    if has_weights(directory):
        refuse_adapter(directory)
    adapter, model = PeftAdapter.read(directory), HFModel.open(base)
    if adapter.is_classifier and not adapter.num_labels:
        raise InputError(
            f"{hf}: an adapter of a sequence classifier without the classifier's score.weight: "
            "save it again with its head, or train from it with lora.adapter, which draws one"
        )
    labels = adapter.num_labels or 1
    kind: Literal["lm", "reward"] = "reward" if adapter.num_labels else "lm"
    weights = WeightMap.of(model, kind=kind, num_labels=labels)
    lora = _checked(adapter.lora, model, kind)
    parameters = AdapterMap(lora, weights)
    adapter.check(parameters.shapes)
    stored = DirectoryBase(model.directory, weights)
    dtype = dtype_of_runs(stored)
    section = ModelConfig(
        hf=base,
        kind=kind,
        num_labels=labels,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
    )
    place = {"hf": str(Path(base).resolve()) if Path(base).exists() else base}
    saved = SavedAdapter.of(lora, fingerprints(stored, {dtype})[dtype], place)
    config = transformer_config(
        section, sizes=model.sizes, vocab_size=model.vocab_size, seed=None, source=model
    )

    def attach(folder: Path) -> list[str]:
        write_hf_folder(
            folder,
            model,
            sizes=model.sizes,
            vocab_size=model.vocab_size,
            max_positions=0,
            model=section,
        )
        return sorted(path.name for path in folder.iterdir())

    common = {KEY: saved.as_dict(), MODEL: sizes_of(config)}
    companions = write_checkpoint(output, parameters, adapter.tensors, common, attach)
    note = f"its base is {base}; a run that takes it has model.dtype: {section.dtype}"
    if adapter.dropout:
        note += f"; lora_dropout = {adapter.dropout} is not kept, runs here train without"
    shapes = adapter.tensors.shapes
    return Converted.of(adapter.tensors.dtypes, shapes, companions, note)


def has_weights(directory: Path) -> bool:
    """Whether a directory has the weights of a model."""
    return next(iter(directory.glob("model*.safetensors")), None) is not None


def _checked(lora: LoraConfig, model: HFModel, kind: str) -> LoraConfig:
    """The settings, resolved. Raises InputError for what the model does not have."""
    if faults := list(lora_size_faults(lora, model.sizes, kind)):
        raise InputError("; ".join(faults))
    lora = lora.resolved(model.sizes.num_moe_experts > 0, model.sizes.num_layers)
    check_targets(lora, model)
    return lora
