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

from megatron_prefix.checkpoint import torch_dist
from megatron_prefix.checkpoint.save_load import load_weights, resolve_checkpoint
from megatron_prefix.config.rules import SIZES
from megatron_prefix.config.schema import ModelConfig, ParallelConfig
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.model.gpt import TreeTransformerConfig, unwrap
from megatron_prefix.model.hf.config import (
    hf_from_sizes,
    locate,
    read_hf_config,
    sliding_window,
)
from megatron_prefix.model.hf.files import copy_companions
from megatron_prefix.model.hf.reward_model import hf_kind, reward_config
from megatron_prefix.model.provider import load_hf_weights, transformer_config, with_sizes

HF_FOLDER = "hf"
"""Folder of a checkpoint with config.json and tokenizer, as Hugging Face keeps them."""


@dataclass(frozen=True, kw_only=True)
class InitialModel:
    """What a run starts from: `sizes` are complete, `vocab_size` is the model's, unpadded.

    `source` is the directory with config.json and tokenizer, or None for a model from sizes;
    `longest` is the longest path of the run's data in tokens. With `draws_head` the weights are a
    language model's and a reward model's head is drawn.
    """

    sizes: ModelConfig
    vocab_size: int
    source: Path | None
    longest: int
    draws_head: bool = False

    def transformer_config(
        self, seed: int, parallel: ParallelConfig | None = None
    ) -> TreeTransformerConfig:
        """Megatron-Core's configuration; `seed` draws weights where none are loaded."""
        drawn = self.sizes.hf is None and self.sizes.checkpoint is None
        return transformer_config(
            self.sizes,
            vocab_size=self.vocab_size,
            seed=seed if drawn else None,
            head_seed=seed if self.draws_head else None,
            parallel=parallel,
        )

    def load(self, chunks: list[torch.nn.Module]) -> None:
        """Fill models made from `transformer_config` with the weights to start from."""
        if self.sizes.hf is not None:
            for chunk in chunks:
                model = unwrap(chunk)
                keeps_head = self.draws_head and model.post_process
                load_hf_weights(model, self.sizes, self.source, keeps_head)
        elif self.sizes.checkpoint is not None:
            load_weights(self.sizes.checkpoint, chunks, self.draws_head)

    def note(self, seed: int) -> str | None:
        """What a user should be told of how the model begins, if anything."""
        if not self.draws_head:
            return None
        origin = f"model.hf = {self.sizes.hf}"
        if self.sizes.hf is None:
            origin = f"model.checkpoint = {self.sizes.checkpoint}"
        return f"{origin} is a language model: the reward head is drawn from train.seed = {seed}"

    def attach(self, directory: Path) -> None:
        """Put config.json and tokenizer into a checkpoint of this run, for `convert export`."""
        folder = directory / HF_FOLDER
        if self.source is not None:
            copy_companions(self.source, folder)
            if self.sizes.kind == "lm":
                return
            config = read_hf_config(self.source)
        else:
            try:
                config = hf_from_sizes(self.sizes, self.vocab_size, self.longest)
            except InputError:  # no architecture has these parts: the run goes on, export refuses
                return
        folder.mkdir(parents=True, exist_ok=True)
        if self.sizes.kind == "reward":
            config = reward_config(config, folder)
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
        return InitialModel(
            sizes=model,
            vocab_size=vocab_size,
            source=None,
            longest=longest,
            draws_head=_draws_head(model, None),
        )
    config = read_hf_config(source)
    draws_head = _draws_head(model, hf_kind(config, f"{source}/config.json"))
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
    return InitialModel(
        sizes=sizes,
        vocab_size=vocab_size,
        source=source,
        longest=longest,
        draws_head=draws_head,
    )


def _draws_head(model: ModelConfig, hf_kind: str | None) -> bool:
    """Whether a reward model starts from a language model's weights. Raises InputError where a
    language model is to start from a reward model's."""
    if model.hf is not None and (hf_kind, model.kind) == ("reward", "lm"):
        raise InputError(
            f"model.hf = {model.hf} is a reward model, without a language-model head, and "
            "model.kind is lm: set model.kind: reward, or give a language model"
        )
    if model.kind != "reward":
        return False
    if model.checkpoint is None:
        return hf_kind == "lm"
    return torch_dist.model_kind(resolve_checkpoint(model.checkpoint)) == "lm"


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
        return config_folder(model.checkpoint)
    return None


def config_folder(checkpoint: str | Path) -> Path | None:
    """The folder of a checkpoint with config.json and tokenizer; None if it has no config.json."""
    folder = resolve_checkpoint(checkpoint) / HF_FOLDER
    return folder if (folder / "config.json").is_file() else None


def _same_sizes(given: ModelConfig, known: ModelConfig, source: Path) -> None:
    """Refuse sizes that are not those of the checkpoint: scaling or an epsilon would be silent."""
    implied: dict[str, Any] = {
        "num_query_groups": given.num_attention_heads,
        "kv_channels": given.hidden_size // given.num_attention_heads,
        "moe_ffn_hidden_size": given.num_moe_experts and given.ffn_hidden_size,
    }
    of_lm = {"untie_embeddings_and_output_weights"} if given.kind == "reward" else set()
    for key in SIZES:
        if key in of_lm:
            continue
        if key == "ffn_hidden_size" and known.num_moe_experts:
            continue  # of layers without experts: there are none
        value = getattr(given, key)
        value = implied.get(key) if value is None else value
        if value != getattr(known, key):
            raise InputError(
                f"model.{key} = {value}, and {source}/config.json of model.checkpoint says "
                f"{getattr(known, key)}: leave the sizes out, the checkpoint has them"
            )
