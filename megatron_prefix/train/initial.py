"""The model that policy and reference start from: where it comes from, and what goes along.

`model.hf` is a Hugging Face directory, `model.checkpoint` a distributed checkpoint, which has
config.json and tokenizer in `hf/` where it came from Hugging Face; otherwise sizes are given and
weights are drawn. Checkpoints of the run get the same `hf/`, so that they can be exported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.config_rules import SIZES
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.model.gpt import TreeTransformerConfig, unwrap
from megatron_prefix.model.hf_config import (
    hf_from_sizes,
    locate,
    read_hf_config,
    sliding_window,
)
from megatron_prefix.model.hf_files import copy_companions
from megatron_prefix.model.provider import load_hf_weights, transformer_config, with_sizes
from megatron_prefix.train import checkpoint

HF_FOLDER = "hf"
"""Folder of a checkpoint with config.json and tokenizer, as Hugging Face keeps them."""


@dataclass(frozen=True, kw_only=True)
class InitialModel:
    """What a run starts from: `sizes` are complete, `vocab_size` is the model's, unpadded.

    `source` is the directory with config.json and tokenizer, or None for a model from sizes;
    `longest` is the longest path of the run's data in tokens.
    """

    sizes: ModelConfig
    vocab_size: int
    source: Path | None
    longest: int

    def transformer_config(
        self, seed: int, parallel: ParallelConfig | None = None
    ) -> TreeTransformerConfig:
        """Megatron-Core's configuration; `seed` draws weights where none are loaded."""
        drawn = self.sizes.hf is None and self.sizes.checkpoint is None
        return transformer_config(
            self.sizes,
            vocab_size=self.vocab_size,
            seed=seed if drawn else None,
            parallel=parallel,
        )

    def load(self, chunks: list[torch.nn.Module]) -> None:
        """Fill models made from `transformer_config` with the weights to start from."""
        if self.sizes.hf is not None:
            for chunk in chunks:
                load_hf_weights(unwrap(chunk), self.sizes, self.source)
        elif self.sizes.checkpoint is not None:
            checkpoint.load_weights(self.sizes.checkpoint, chunks)

    def attach(self, directory: Path) -> None:
        """Put config.json and tokenizer into a checkpoint of this run, for `convert export`."""
        folder = directory / HF_FOLDER
        if self.source is not None:
            copy_companions(self.source, folder)
            return
        try:
            config = hf_from_sizes(self.sizes, self.vocab_size, self.longest)
        except InputError:  # no architecture has these parts: the run goes on, export refuses
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def initial_model(model: ModelConfig, datasets: Sequence[PreferenceDataset]) -> InitialModel:
    """What `model` describes, checked against the data it will see. Raises InputError.

    The vocabulary is the model's where it comes from Hugging Face, else the data sets'.
    """
    longest = max(int(dataset.response_lengths.max()) for dataset in datasets)
    source = _source(model)
    if source is None:
        if model.num_layers is None:
            raise InputError(
                f"model.checkpoint = {model.checkpoint} has no {HF_FOLDER}/config.json that gives "
                "the model's sizes: give them (model.num_layers, …)"
            )
        vocab_size = datasets[0].vocab_size
        return InitialModel(sizes=model, vocab_size=vocab_size, source=None, longest=longest)
    config = read_hf_config(source)
    sizes, vocab_size = with_sizes(model, config, f"{source}/config.json")
    if model.num_layers is not None:
        _same_sizes(model, sizes, source)
    for dataset in datasets:
        _check_vocabulary(dataset, vocab_size, source)
    window = sliding_window(config)
    if window is not None and longest > window:
        raise InputError(
            f"the model in {source} attends to the last {window} tokens (sliding_window) and the "
            f"data's longest path has {longest}: build the data set with --max-length {window}"
        )
    return InitialModel(sizes=sizes, vocab_size=vocab_size, source=source, longest=longest)


def _check_vocabulary(dataset: PreferenceDataset, vocab_size: int, source: Path) -> None:
    """Refuse tokens that the model does not have.

    A tokenizer may know more than its model: added tokens that were never trained. Such a data
    set is refused only where they occur.
    """
    if dataset.vocab_size <= vocab_size:
        return
    highest = int(dataset.tokens.max())
    if highest >= vocab_size:
        raise InputError(
            f"data set {dataset.prefix} has a vocabulary of {dataset.vocab_size} and uses token "
            f"{highest}; the model in {source} has a vocabulary of {vocab_size}: build the data "
            "set with the model's tokenizer"
        )


def _source(model: ModelConfig) -> Path | None:
    if model.hf is not None:
        return locate(model.hf)
    if model.checkpoint is not None:
        folder = checkpoint.resolve_checkpoint(model.checkpoint) / HF_FOLDER
        return folder if (folder / "config.json").is_file() else None
    return None


def _same_sizes(given: ModelConfig, known: ModelConfig, source: Path) -> None:
    """Refuse sizes that are not those of the checkpoint: scaling or an epsilon would be silent."""
    implied: dict[str, Any] = {
        "num_query_groups": given.num_attention_heads,
        "kv_channels": given.hidden_size // given.num_attention_heads,
        "moe_ffn_hidden_size": given.num_moe_experts and given.ffn_hidden_size,
    }
    for key in SIZES:
        if key == "ffn_hidden_size" and known.num_moe_experts:
            continue  # of layers without experts: there are none
        value = getattr(given, key)
        value = implied.get(key) if value is None else value
        if value != getattr(known, key):
            raise InputError(
                f"model.{key} = {value}, and {source}/config.json of model.checkpoint says "
                f"{getattr(known, key)}: leave the sizes out, the checkpoint has them"
            )
